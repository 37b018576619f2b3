"""Attention over packed sequences, under the name ``tokenflex_varlen`` in transformers.

A packed row holds many samples; each must attend to itself only. transformers recognises packed
rows from ``position_ids``, but not when a cache or a mask is present; then samples see each other,
and nothing warns of it. This implementation takes the boundaries themselves (``cu_seq_lens_q``,
``max_length_q``, the names of transformers' flash attention), needs no mask of T x T entries, and
does for an ordinary padded batch exactly what "sdpa" does.

A sequence may also go on from another, its prefix (:mod:`tokenflex.models.prefixes`): its queries
are its own rows, its keys and values those of its prefix before its own. Where it has q queries and
k keys, query i sees the first k - q + i + 1 keys: the causal mask is aligned at the last row.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from tokenflex.models.prefixes import SharedPrefixes

PACKED_ATTENTION = "tokenflex_varlen"


def packed_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    sequence_lengths: torch.Tensor | None = None,
    shared_prefixes: SharedPrefixes | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend causally within each sequence of a packed row, as transformers' attention function.

    Args:
        query: [1, heads, T, head width]; key and value likewise with the key-value heads.
        attention_mask: used only for calls that are not packed.
        dropout: probability; packed calls support 0 only.
        scaling: of the scores; 1/sqrt(head width) if None.
        cu_seq_lens_q: int32 [sequences + 1] on the device, the rows where sequences start; None
            where the call is not packed.
        max_length_q: the longest sequence, a host int.
        sequence_lengths: int64 [sequences] on the host, the rows of each sequence. A tensor: for a
            tuple a compiler would make a graph a length.
        shared_prefixes: which sequences go on from another; None where none does.

    Returns:
        ([1, T, heads, head width], None).

    Raises:
        ValueError: packed with a batch of more than one row, dropout, or a sliding window.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if sequence_lengths is None or max_length_q is None:
        raise ValueError(
            "packed attention needs sequence_lengths and max_length_q beside cu_seq_lens_q, got "
            f"sequence_lengths={sequence_lengths} and max_length_q={max_length_q}"
        )
    if query.shape[0] != 1 or key.shape[2] != query.shape[2]:
        raise ValueError(
            "packed attention takes one packed row and no cache, got a batch of "
            f"{query.shape[0]} rows, {query.shape[2]} queries and {key.shape[2]} keys"
        )
    if dropout:
        raise ValueError(f"packed attention supports no dropout, got dropout={dropout}")
    window = kwargs.get("sliding_window")
    if window is not None:
        longest = max_length_q if shared_prefixes is None else shared_prefixes.max_length
        if longest > window:
            raise ValueError(
                f"packed attention supports no sliding window, got sliding_window={window} for "
                f"sequences of up to {longest} rows"
            )
    output = _attend(
        query, key, value, cu_seq_lens_q, max_length_q, sequence_lengths, shared_prefixes, scaling
    )
    return output, None


@torch.compiler.disable  # it reads the lengths
def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    max_length: int,
    lengths: torch.Tensor,
    shared_prefixes: SharedPrefixes | None,
    scaling: float | None,
) -> torch.Tensor:
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and _has_varlen_attention():
        return _flash(query, key, value, cu_seq_lens, max_length, shared_prefixes, scaling)
    rows = lengths.tolist()
    if shared_prefixes is None:
        return _by_length(query, key, value, rows, rows, None, scaling)
    seen = shared_prefixes.lengths
    return _by_length(query, key, value, rows, seen, shared_prefixes.key_rows, scaling)


def _by_length(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: Sequence[int],
    key_lengths: Sequence[int],
    key_rows: torch.Tensor | None,
    scaling: float | None,
) -> torch.Tensor:
    """Call causal attention once per distinct (rows, keys), over all sequences of that shape."""
    alike: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    starts = zip(accumulate(lengths, initial=0), accumulate(key_lengths, initial=0), strict=True)
    for start, shape in zip(starts, zip(lengths, key_lengths, strict=True), strict=False):
        if shape[0]:
            alike[shape].append(start)

    order, outputs = [], []
    for (length, key_length), firsts in alike.items():
        first = torch.tensor(firsts)
        rows = (first[:, :1] + torch.arange(length)).to(query.device, non_blocking=True)
        seen = (first[:, 1:] + torch.arange(key_length)).to(query.device, non_blocking=True)
        order.append(rows.flatten())
        attended = F.scaled_dot_product_attention(
            _sequences(query, rows),
            _sequences(key, seen if key_rows is None else key_rows[seen]),
            _sequences(value, seen if key_rows is None else key_rows[seen]),
            attn_mask=_aligned_at_the_end(length, key_length, query.device),
            is_causal=length == key_length,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        outputs.append(attended.transpose(1, 2).flatten(0, 1))
    if not outputs:
        return query.transpose(1, 2)
    row_order = torch.empty_like(all_rows := torch.cat(order))
    row_order[all_rows] = torch.arange(len(all_rows), device=all_rows.device)
    return torch.cat(outputs).index_select(0, row_order).unsqueeze(0)


def _sequences(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """[1, heads, T, width] at ``rows`` [sequences, length] -> [sequences, heads, length, width]."""
    return x[0].index_select(1, rows.flatten()).unflatten(1, rows.shape).transpose(0, 1)


def _aligned_at_the_end(length: int, key_length: int, device: torch.device) -> torch.Tensor | None:
    """Return the mask of the keys; None where PyTorch's causal mask, or no mask, is the same."""
    if length in (1, key_length):
        return None
    every = torch.ones(length, key_length, dtype=torch.bool, device=device)
    return every.tril(key_length - length)


def _flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    max_length: int,
    shared_prefixes: SharedPrefixes | None,
    scaling: float | None,
) -> torch.Tensor:
    """Call PyTorch's variable-length flash attention.

    It aligns the causal mask at the last row, as flash attention does since its version 2.1.
    """
    from torch.nn.attention.varlen import varlen_attn

    # The function grew: 2.9 has is_causal; later releases a window, a scale and grouped queries.
    parameters = _varlen_parameters()
    options: dict[str, Any] = {}
    if "window_size" in parameters:
        options["window_size"] = (-1, 0)
    else:
        options["is_causal"] = True
    if scaling is not None:
        if "scale" in parameters:
            options["scale"] = scaling
        else:
            query = query * (scaling * query.shape[-1] ** 0.5)
    if query.shape[1] != key.shape[1]:
        if "enable_gqa" in parameters:
            options["enable_gqa"] = True
        else:
            groups = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    cu_seq_lens_k, max_length_k = cu_seq_lens, max_length
    if shared_prefixes is not None:
        k, v = (_rows_seen(x, shared_prefixes.key_rows) for x in (k, v))
        cu_seq_lens_k, max_length_k = shared_prefixes.cu_seqlens, shared_prefixes.max_length
    output = varlen_attn(q, k, v, cu_seq_lens, cu_seq_lens_k, max_length, max_length_k, **options)
    assert isinstance(output, torch.Tensor)  # a tuple only where auxiliary outputs are asked for
    return output.unsqueeze(0)


def _rows_seen(x: torch.Tensor, key_rows: torch.Tensor) -> torch.Tensor:
    """[T, heads, width] -> [keys, heads, width]: the rows ``key_rows``, most of them several times.

    An embedding's gradient adds up a row's uses in a fixed order on a device too; that of
    ``index_select`` adds them in any order there, unless deterministic algorithms are asked for.
    """
    return F.embedding(key_rows, x.flatten(1)).unflatten(1, x.shape[1:])


@cache
def _varlen_parameters() -> frozenset[str]:
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


@cache
def _has_varlen_attention() -> bool:
    try:
        from torch.nn.attention import varlen  # noqa: F401
    except ImportError:
        return False
    return True


AttentionInterface.register(PACKED_ATTENTION, packed_attention_forward)
AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)
