"""The row movers as torch.library ops: kernels on host and device memory, fakes, autograd.

    pack_embeddings   packed[r] = embedding[source[r]], or vision[v] where source[r] = ~v
    merge_vision      the same with a table that has one row for each packed row, and a source
                      made from vision_rows
    unpack_vision     vision[v] = packed[vision_rows[v]]

Packing and unpacking get both halves of the row map, ``source`` int32 [total] and ``vision_rows``
int32 [vision]: one drives the forward pass, the other the backward pass, and they are all that is
saved. A gradient is a row mover again, or sums of rows:

    op                of embedding / inputs_embeds / packed            of vision
    pack_embeddings   table_gradient (text rows, summed by token id;   unpack_vision; table_gradient
                      sparse_table_gradient: those of the ids in use)  where not shown_once
    merge_vision      keep_text      (vision rows become zero)         unpack_vision
    unpack_vision     spread_vision  (text rows become zero)

Each gradient is linear in turn, and a mover or a table gradient is its own gradient. So there are
derivatives of any order; of the sparse table gradient there are first ones only. Under
``torch.vmap`` a mover runs once for the whole batch, on wider rows: it depends on row numbers
alone, so the rows of all examples stand side by side in one row.

The public functions check arguments and name the wrong one. An op that is called on its own checks
dtypes, widths and strides alone, so that it reads no memory but its tensors'; row numbers are
checked on the CPU.

The extension links no torch: it takes addresses, byte strides and sizes, and reads ordinary host
tensors through DLPack. Rows may have any stride;
the elements of a row are next to each other. It copies bytes; only sums of rows depend on a dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from tokenflex_kernels.backend import compiled_extension
from tokenflex_kernels.layout import neighbours
from tokenflex_kernels.library import (
    Op,
    batch,
    define,
    differentiate_linear,
    refuse_derivatives,
    side_by_side,
)

# ---- kernels


def _pack(
    embedding: torch.Tensor,
    vision: torch.Tensor,
    source: torch.Tensor,
    vision_rows: torch.Tensor,
    sparse_ids: int | None = None,
    shown_once: bool = True,
) -> torch.Tensor:
    packed = on_host(embedding, vision, source)
    return _pack_rows(embedding, vision, source) if packed is None else packed


def _unpack(packed: torch.Tensor, source: torch.Tensor, vision_rows: torch.Tensor) -> torch.Tensor:
    vision = on_host(packed, packed, vision_rows, True)
    if vision is not None:
        return vision
    packed = neighbours(packed)
    # No row number is negative, so the second table is not read; an empty slice would cost 2 us.
    return _pack_rows(packed, packed, vision_rows, "vision_rows")


def _keep_text(rows: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    kept = on_host(rows, None, source)
    return _pack_rows(rows, _zero_rows(rows), source) if kept is None else kept


def _spread_vision(vision: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    spread = on_host(None, vision, source)
    return _pack_rows(_zero_rows(vision), vision, source) if spread is None else spread


def _table_gradient(
    grad: torch.Tensor, source: torch.Tensor, num_vision: int, num_rows: int
) -> torch.Tensor:
    if not grad.is_cuda:
        gradient: torch.Tensor | None = compiled_extension().table_gradient(
            grad, source, num_vision, num_rows, torch.get_num_threads()
        )
        if gradient is not None:
            return gradient
    _check_gradient(grad, source)
    ids, rows = _text_by_id(source, num_vision)
    sums = grad.new_zeros(num_rows, grad.shape[1])
    _sum_rows(grad, ids, rows, sums)
    return sums


def _sparse_table_gradient(
    grad: torch.Tensor, source: torch.Tensor, num_vision: int, num_ids: int
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_gradient(grad, source)
    ids, rows = _text_by_id(source, num_vision)
    slots = torch.cumsum(torch.diff(ids, prepend=ids[:1]) != 0, 0, dtype=torch.int32)
    if not source.is_cuda:
        different = int(slots[-1]) + 1 if slots.shape[0] else 0
        if different != num_ids:
            raise ValueError(
                f"source must have the plan's {num_ids} different token ids, but has {different}"
            )
    first = torch.searchsorted(slots, torch.arange(num_ids, dtype=torch.int32, device=slots.device))
    sums = grad.new_empty(num_ids, grad.shape[1])
    _sum_rows(grad, slots, rows, sums)
    return ids[first].to(torch.int64), sums


def _merge(
    inputs_embeds: torch.Tensor, vision: torch.Tensor, vision_rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    if vision_rows.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"vision_rows must be int32 or int64, got {vision_rows.dtype}")
    table = _as_rows(inputs_embeds)
    source = _merge_source(vision_rows, table.size(0))
    return _pack_rows(table, vision, source, shape=inputs_embeds.shape), source


def _merge_source(vision_rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    vision_rows = vision_rows.contiguous()
    source = vision_rows.new_empty(num_rows, dtype=torch.int32)
    job = (
        vision_rows.data_ptr(),
        vision_rows.dtype == torch.int64,
        vision_rows.size(0),
        source.data_ptr(),
        num_rows,
    )
    if source.is_cuda:
        compiled_extension().merge_source_cuda(*job, *_place(source))
    else:
        compiled_extension().merge_source(*job)
    return source


# ---- the shapes of their results, for torch.compile


def _like_merge(
    inputs_embeds: torch.Tensor, vision: torch.Tensor, vision_rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = math.prod(inputs_embeds.shape[:-1])
    return (
        inputs_embeds.new_empty(inputs_embeds.shape),
        vision_rows.new_empty(rows, dtype=torch.int32),
    )


def _like_source(rows: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    return rows.new_empty(source.shape[0], rows.shape[1])


def _like_vision_rows(
    packed: torch.Tensor, source: torch.Tensor, vision_rows: torch.Tensor
) -> torch.Tensor:
    return packed.new_empty(vision_rows.shape[0], packed.shape[1])


# ---- the ops


pack_embeddings = define(
    "pack_embeddings",
    lambda embedding, vision, source, *_: _like_source(embedding, source),
    _pack,
)
# The second result is the `source` of a packing whose table is inputs_embeds: each row is written
# once, where a copy and a scatter would write the vision rows twice. On the CPU the op refuses rows
# out of range and rows that come twice, in compiled functions too.
merge_vision = define("merge_vision", _like_merge, _merge)
unpack_vision = define(
    "unpack_vision",
    _like_vision_rows,
    _unpack,
    at_once=lambda packed, source, vision_rows: on_host(packed, packed, vision_rows, True),
)
keep_text = define(
    "keep_text",
    _like_source,
    _keep_text,
    at_once=lambda rows, source: on_host(rows, None, source),
)
spread_vision = define(
    "spread_vision",
    _like_source,
    _spread_vision,
    at_once=lambda vision, source: on_host(None, vision, source),
)
# The text rows of `grad`, added up by token id in an order that `source` alone decides. Their
# number follows from `num_vision`, without waiting for the device.
table_gradient = define(
    "table_gradient",
    lambda grad, source, num_vision, num_rows: grad.new_empty(num_rows, grad.shape[1]),
    _table_gradient,
)
# The ids in use, ascending, and their sums alone. The plan has counted them: to count them on a
# device would mean waiting for it.
sparse_table_gradient = define(
    "sparse_table_gradient",
    lambda grad, source, num_vision, num_ids: (
        source.new_empty(num_ids, dtype=torch.int64),
        grad.new_empty(num_ids, grad.shape[1]),
    ),
    _sparse_table_gradient,
)


# ---- autograd: each function returns the gradients of an op's float tensors

Gradients = tuple[torch.Tensor | None, ...]


def _of_packing(
    ctx: Any,
    grad: torch.Tensor,
    source: torch.Tensor,
    vision_rows: torch.Tensor,
    sparse_ids: int | None = None,
    shown_once: bool = True,
) -> Gradients:
    needs_embedding, needs_vision, *_ = ctx.needs_input_grad
    num_rows, num_vision = ctx.sizes
    grad_embedding = grad_vision = None
    if needs_embedding and sparse_ids is None:
        grad_embedding = table_gradient(grad, source, vision_rows.shape[0], num_rows)
    elif needs_embedding:
        ids, sums = sparse_table_gradient(grad, source, vision_rows.shape[0], sparse_ids)
        # torch.sparse_coo_tensor warns of checks that are off, up to 2.11 even if told so.
        grad_embedding = torch.ops.aten._sparse_coo_tensor_with_dims_and_tensors(
            *(1, 1, (num_rows, grad.shape[1]), ids[None], sums),
            dtype=sums.dtype,
            layout=torch.sparse_coo,
            device=sums.device,
            is_coalesced=True,
        )
    if needs_vision and shown_once:
        grad_vision = pack_eagerly(grad, grad, vision_rows, (True, -1, 0))
        if grad_vision is None:
            grad_vision = unpack_vision(grad, source, vision_rows)
    elif needs_vision:  # in ~source the vision tokens are the ids, and text rows are of no table
        text_rows = source.shape[0] - vision_rows.shape[0]
        grad_vision = table_gradient(grad, ~source, text_rows, num_vision)
    return grad_embedding, grad_vision


def _of_merging(
    ctx: Any, grad: torch.Tensor, vision_rows: torch.Tensor, source: torch.Tensor | None = None
) -> Gradients:
    needs_inputs, needs_vision, *_ = ctx.needs_input_grad
    if not grad.is_cuda:
        gradients: Gradients | None = compiled_extension().merge_gradients(
            grad, vision_rows, needs_inputs, needs_vision, torch.get_num_threads()
        )
        if gradients is not None:
            return gradients
    rows = _as_rows(grad)
    numbers = vision_rows
    if source is None:  # a merge that was computed at once
        order = torch.arange(-1, ~numbers.shape[0], -1, dtype=torch.int32)
        source = torch.arange(rows.shape[0], dtype=torch.int32).index_copy(0, numbers.long(), order)
    if needs_vision and numbers.dtype is not torch.int32:
        numbers = numbers.to(torch.int32)
    return (
        keep_text(rows, source).view(grad.shape) if needs_inputs else None,
        unpack_vision(rows, source, numbers.contiguous()) if needs_vision else None,
    )


def _of_unpacking(
    ctx: Any, grad: torch.Tensor, source: torch.Tensor, vision_rows: torch.Tensor
) -> Gradients:
    spread = pack_eagerly(None, grad, source, (False, -1, 0))
    return (spread_vision(grad, source) if spread is None else spread,)


# Those of the gradients: a torch.func transform around another one differentiates them.


def _of_keeping_text(ctx: Any, grad: torch.Tensor, source: torch.Tensor) -> Gradients:
    return (keep_text(grad, source),)  # a merge leaves each text row where it is


def _of_spreading_vision(ctx: Any, grad: torch.Tensor, source: torch.Tensor) -> Gradients:
    return (unpack_vision(grad, source, _vision_rows(source, ctx.sizes[0])),)


def _of_table_gradient(
    ctx: Any, grad: torch.Tensor, source: torch.Tensor, num_vision: int, num_rows: int
) -> Gradients:
    # One row of zeros is shown wherever a row counted for nothing.
    nothing = grad.new_zeros(1, grad.shape[1])
    rows = _vision_rows(source, num_vision)
    return (pack_embeddings(grad, nothing, source.clamp(min=-1), rows, None, False),)


def _vision_rows(source: torch.Tensor, num_vision: int) -> torch.Tensor:
    """Return the row of each vision token, int32. Sorted, ``source`` begins with the last one."""
    return torch.argsort(source)[:num_vision].flip(0).to(torch.int32)


def _differentiate(
    name: str, op: Op, gradient: Callable[..., Gradients], *, floats: int, maps: int
) -> None:
    """Give an op its gradient; it is linear in its first ``floats`` arguments, then has ``maps``.

    ``gradient`` gets the gradient of the result and the op's other arguments; a row map that the op
    returns comes after its row maps. Of the float tensors only the numbers of rows are kept.
    """

    class RowMove(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            others, result = arguments[floats:], op.below(*arguments)
            made = result[1:] if isinstance(result, tuple) else ()
            ctx.save_for_backward(*others[:maps], *made)
            ctx.numbers = others[maps:]
            ctx.sizes = [value.shape[0] for value in arguments[:floats]]
            return result

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            gradients = gradient(ctx, grads[0], *ctx.saved_tensors, *ctx.numbers)
            return *gradients, *[None] * (maps + len(ctx.numbers))

    class RowsMoved(torch.autograd.Function):
        """The same of a result that is there; ``save_for_backward`` would take 3 us more."""

        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            result, ctx.others, ctx.sizes = arguments[-1]
            # Versions only grow: a sum tells whether one has.
            ctx.versions = ctx.others[0]._version + ctx.others[maps - 1]._version
            return result

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> Any:
            others = ctx.others
            if ctx.versions != others[0]._version + others[maps - 1]._version:
                raise RuntimeError(
                    f"a row map of {name} was modified by an inplace operation after the call, "
                    "but its gradient needs the map as it was"
                )
            return *gradient(ctx, grad, *others), None

    differentiate_linear(name, op, RowMove, floats)
    op.set_result_function(RowsMoved, floats)


_differentiate("pack_embeddings", pack_embeddings, _of_packing, floats=2, maps=2)
_differentiate("merge_vision", merge_vision, _of_merging, floats=2, maps=1)
_differentiate("unpack_vision", unpack_vision, _of_unpacking, floats=1, maps=2)
_differentiate("keep_text", keep_text, _of_keeping_text, floats=1, maps=1)
_differentiate("spread_vision", spread_vision, _of_spreading_vision, floats=1, maps=1)
_differentiate("table_gradient", table_gradient, _of_table_gradient, floats=1, maps=1)
refuse_derivatives("sparse_table_gradient", sparse_table_gradient)


# ---- torch.vmap


def _batch_packing(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
    if in_dims[0] is None and not any(dim is not None for dim in in_dims[2:]):
        # A table is too large to stand there once for each example; its text rows are not.
        arguments = _text_first(*arguments)
        in_dims = (*in_dims[:4], None, None)
    return side_by_side(pack_embeddings, floats=2)(info, in_dims, *arguments)


def _text_first(
    embedding: torch.Tensor,
    vision: torch.Tensor,
    source: torch.Tensor,
    vision_rows: torch.Tensor,
    sparse_ids: int | None = None,
    shown_once: bool = True,
) -> tuple[Any, ...]:
    """Return the arguments of the same packing from a table with a row for each packed row."""
    nothing = embedding.new_zeros(1, embedding.shape[1])
    text = pack_embeddings(embedding, nothing, source.clamp(min=-1), vision_rows, sparse_ids, False)
    numbers = torch.arange(source.shape[0], dtype=source.dtype, device=source.device)
    return text, vision, torch.where(source >= 0, numbers, source), vision_rows, None, shown_once


batch("pack_embeddings", _batch_packing)
batch("merge_vision", side_by_side(merge_vision, floats=2))
batch("unpack_vision", side_by_side(unpack_vision, floats=1))
batch("keep_text", side_by_side(keep_text, floats=1))
batch("spread_vision", side_by_side(spread_vision, floats=1))
batch("table_gradient", side_by_side(table_gradient, floats=1))


# ---- calls into the extension


def on_host(
    table: torch.Tensor | None,
    vision: torch.Tensor | None,
    source: torch.Tensor,
    unpacks: bool = False,
    num_vision: int = -1,
    least_table: int = 0,
) -> torch.Tensor | None:
    """Return ``_pack_rows`` of ordinary host tensors, from one call that checks and allocates too.

    None where a tensor is on a device, not of contiguous rows or in any other way not ordinary, or
    where vision has other than ``num_vision`` rows (any for -1), the table less than
    ``least_table``. A table or vision of None is rows of zeros.
    """
    if source.is_cuda:
        return None
    moved: torch.Tensor | None = compiled_extension().pack_tensors(
        table, vision, source, unpacks, num_vision, least_table, torch.get_num_threads()
    )
    return moved


def pack_eagerly(
    table: torch.Tensor | None,
    vision: torch.Tensor | None,
    source: torch.Tensor,
    bounds: tuple[bool, int, int],
    record: Callable[..., Any] | None = None,
    others: tuple[Any, ...] = (),
) -> torch.Tensor | None:
    """Return ``on_host`` as a call of an op with ``others`` after its float tensors, recorded.

    ``bounds`` are the last three arguments of ``on_host``. None outside of plain eager mode too,
    and where a gradient without ``record`` would have to be recorded.
    """
    if source.is_cuda:
        return None
    packed: torch.Tensor | None = compiled_extension().pack_eagerly(
        table, vision, source, *bounds, torch.get_num_threads(), record, others
    )
    return packed


def merge_eagerly(
    inputs_embeds: torch.Tensor, vision: torch.Tensor, vision_rows: torch.Tensor
) -> torch.Tensor | None:
    """Return the merged rows, recorded as a call of ``merge_vision``; None as ``pack_eagerly``."""
    merged: torch.Tensor | None = compiled_extension().merge_eagerly(
        inputs_embeds, vision, vision_rows, torch.get_num_threads(), merge_vision.record_result
    )
    return merged


def _pack_rows(
    table: torch.Tensor,
    vision: torch.Tensor,
    source: torch.Tensor,
    name: str = "source",
    shape: torch.Size | None = None,
) -> torch.Tensor:
    """packed[r] = table[source[r]] if source[r] >= 0 else vision[~source[r]]; one launch.

    ``shape`` is that of the result where it is not [rows, D]: a view would cost 2 us more.
    """
    _check_map(name, source)
    rows, width = source.size(0), table.size(1)
    if vision.dtype is not table.dtype or vision.size(1) != width:
        raise TypeError(
            f"vision must have the dtype and width of the table, {table.dtype} and {width}, "
            f"got {vision.dtype} and {vision.size(1)}"
        )
    table, vision = neighbours(table), neighbours(vision)
    row_bytes = width * table.element_size()
    packed = table.new_empty((rows, width) if shape is None else shape)
    job = (
        *_rows(table),
        *_rows(vision),
        packed.data_ptr(),
        row_bytes,
        source.data_ptr(),
        rows,
        row_bytes,
    )
    if packed.is_cuda:
        compiled_extension().pack_rows_cuda(*job, *_place(packed))
    else:  # which can check its map; a device would have to be waited for
        bounds = table.size(0), vision.size(0), name == "vision_rows"
        compiled_extension().pack_rows(*job, *bounds, *_place(packed))
    return packed


def write_text(
    packed: torch.Tensor, embedding: torch.Tensor, source: torch.Tensor, num_vision: int
) -> None:
    """Write the text rows of ``packed``, [rows, D] and contiguous, from the embedding table.

    The rows of the ``num_vision`` vision tokens, each shown once, are left as they are.
    """
    _check_map("source", source)
    embedding = neighbours(embedding)
    rows, width = packed.shape
    row_bytes = width * packed.element_size()
    no_vision = 0, 0
    job = (
        *(*_rows(embedding), *no_vision, packed.data_ptr(), row_bytes),
        *(source.data_ptr(), rows, row_bytes),
    )
    if packed.is_cuda:
        compiled_extension().pack_rows_cuda(*job, *_place(packed))
    else:
        bounds = embedding.size(0), num_vision, False
        compiled_extension().pack_rows(*job, *bounds, *_place(packed))


def _check_map(name: str, rows: torch.Tensor) -> None:
    if rows.dtype is not torch.int32 or not rows.is_contiguous():
        raise TypeError(
            f"{name} must be contiguous int32, got {rows.dtype} of strides {rows.stride()}"
        )


def _check_gradient(grad: torch.Tensor, source: torch.Tensor) -> None:
    _check_map("source", source)
    if grad.shape[0] != source.shape[0]:
        raise ValueError(
            f"grad must have one row per entry of source, {source.shape[0]}, but has "
            f"{grad.shape[0]}"
        )


def _text_by_id(source: torch.Tensor, num_vision: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the token ids of the text rows, int32 ascending, and their rows, int64.

    The rows of an id ascend. Vision entries are negative: sorted, they come first.
    """
    if not source.is_cuda:
        vision = int(torch.count_nonzero(source < 0))
        if vision != num_vision:
            raise ValueError(
                f"source must have one vision row per entry of vision_rows, {num_vision}, "
                f"but has {vision}"
            )
    ids, rows = torch.sort(source, stable=True)
    return ids[num_vision:], rows[num_vision:]


def _sum_rows(
    grad: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor, sums: torch.Tensor
) -> None:
    """sums[s] = the sum of grad[rows[i]] over all i of slots[i] = s; ``slots`` must ascend.

    Made in float32 (float64 for float64) and rounded once. Other rows of ``sums`` are left alone.
    """
    compiled = compiled_extension()
    grad = neighbours(grad)
    precision = torch.promote_types(grad.dtype, torch.float32)
    tiles = -(-rows.shape[0] // compiled.sum_tile)
    partials = grad.new_empty(tiles, grad.shape[1], dtype=precision)
    job = (
        *_rows(grad),
        *_rows(sums),
        *_rows(partials),
        slots.data_ptr(),
        rows.data_ptr(),
        rows.shape[0],
        grad.shape[1],
        str(grad.dtype).removeprefix("torch."),
    )
    if grad.is_cuda:
        compiled.sum_rows_cuda(*job, *_place(grad))
    else:
        compiled.sum_rows(*job, sums.shape[0], *_place(grad))


def _zero_rows(like: torch.Tensor) -> torch.Tensor:
    """Return a [2^31, D] view of a single row of zeros, with a row stride of 0."""
    return like.new_zeros(like.shape[1]).expand(2**31, -1)


def _as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Return [.., D] as [rows, D]; ``flatten`` and ``reshape`` cost time even on 2-D tensors."""
    if tensor.ndim == 2:
        return tensor
    return tensor.flatten(0, -2) if tensor.ndim > 2 else tensor[None]


def _rows(rows: torch.Tensor) -> tuple[int, int]:
    return rows.data_ptr(), rows.stride(0) * rows.element_size()


def _place(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return the number of host threads, or the device and its current stream."""
    if tensor.is_cuda:
        return tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream
    return (torch.get_num_threads(),)
