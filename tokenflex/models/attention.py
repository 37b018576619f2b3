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
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from tokenflex.models.attention_blocks import AttentionBlocks
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
    blocks: AttentionBlocks | None = None,
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
        blocks: of the same sequences and ``shared_prefixes``, planned once for all layers.
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
    if blocks is None or max_length_q is None:
        raise ValueError(
            "packed attention needs blocks and max_length_q beside cu_seq_lens_q, got "
            f"blocks={blocks} and max_length_q={max_length_q}"
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
        query, key, value, cu_seq_lens_q, max_length_q, blocks, shared_prefixes, scaling
    )
    return output, None


@torch.compiler.disable  # it reads the runs
def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    max_length: int,
    blocks: AttentionBlocks,
    shared_prefixes: SharedPrefixes | None,
    scaling: float | None,
) -> torch.Tensor:
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and _has_varlen_attention():
        return _flash(query, key, value, cu_seq_lens, max_length, shared_prefixes, scaling)
    return _by_blocks(query, key, value, blocks, scaling)


def _by_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    blocks: AttentionBlocks,
    scaling: float | None,
) -> torch.Tensor:
    """Call attention once per run of ``blocks``."""
    if not blocks.sizes:
        return query.transpose(1, 2)
    queries, keys, values = (x.split(blocks.sizes, 2) for x in (query, key, value))
    outputs = []
    for run, (prefix, mask) in enumerate(zip(blocks.prefixes, blocks.masks(query), strict=True)):
        k, v = keys[run], values[run]
        if prefix is not None:
            k, v = torch.cat([keys[prefix], k], 2), torch.cat([values[prefix], v], 2)
        attended = F.scaled_dot_product_attention(
            queries[run],
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        outputs.append(attended.transpose(1, 2))
    return torch.cat(outputs, 1)


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
