"""Packing: text and vision rows into one padding-free buffer, and back.

    pack_embeddings   packed[r] = embedding[input_ids[r]] or vision[v], as the plan says
    unpack_vision     vision[v] = packed[vision_rows[v]]
    merge_vision      out = inputs_embeds, with out[vision_rows[v]] = vision[v]

Each is one launch that reads and writes every row once, driven by an int32 row map, with O(rows)
extra memory and no synchronisation. Backward is again a row mover, by the inverse map, so gradients
are repeatable bit by bit; only the embedding table sums rows, in PyTorch's deterministic kernel.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from tokenflex_kernels._backend import select_backend
from tokenflex_kernels._checks import check_float, check_like, check_tensor
from tokenflex_kernels._row_movers import gather_rows, pack_rows, scatter_rows_
from tokenflex_kernels.pack_plan import PackPlan, plan_packing
from tokenflex_kernels.reference import packing as reference
from tokenflex_kernels.reference.packing import MAX_INT32

__all__ = ["PackPlan", "merge_vision", "pack_embeddings", "plan_packing", "unpack_vision"]


def pack_embeddings(embedding: torch.Tensor, vision: torch.Tensor, plan: PackPlan) -> torch.Tensor:
    """Write a batch's text and vision rows into one packed buffer, as ``plan`` lays it out.

    The result is what an embedding lookup followed by ``masked_scatter`` gives, without the
    intermediate and the mask. Differentiable once, in both tensors; the table's gradient (dense,
    [V, D]) is computed only if the table requires it.

    Args:
        embedding: float [V, D], the embedding table.
        vision: float [vision, D], one row per vision token, in the dtype of ``embedding``. Under
            autocast, where a projector's output and the table may differ, it is cast to that dtype.
        plan: the batch's plan, on the same device.

    Returns:
        [total, D] in the dtype of ``embedding``.

    Raises:
        TypeError: an argument is not a float tensor, or the dtypes differ outside autocast.
        ValueError: the rows of ``vision`` or the ids of the text do not fit the plan or the table,
            the widths differ, or the devices do.
    """
    check_tensor("embedding", embedding, ndim=2)
    check_tensor("vision", vision, ndim=2)
    check_float("embedding", embedding)
    _check_plan(plan, "embedding", embedding)
    _check_vision(vision, plan.vision_rows.shape[0], "plan.vision_rows", "embedding", embedding)
    if plan.max_token_id >= embedding.shape[0]:
        raise ValueError(
            f"embedding must have a row for every text token: the plan's largest id is "
            f"{plan.max_token_id}, but embedding has {embedding.shape[0]} rows"
        )
    vision = _like_autocast("vision", vision, "embedding", embedding)
    if select_backend("pack_embeddings", embedding.device) == "reference":
        return reference.pack_embeddings(embedding, vision, plan.source, plan.vision_rows)
    packed: torch.Tensor = _PackEmbeddings.apply(embedding, vision, plan.source, plan.vision_rows)
    return packed


def unpack_vision(packed: torch.Tensor, plan: PackPlan) -> torch.Tensor:
    """The vision rows of a packed buffer, in the order of the vision tokens. Differentiable once.

    Args:
        packed: float [total, D].
        plan: the plan the buffer was packed by, on the same device.

    Returns:
        [vision, D].

    Raises:
        TypeError: ``packed`` is not a float tensor.
        ValueError: ``packed`` has another number of rows than the plan, or is on another device.
    """
    check_tensor("packed", packed, ndim=2)
    check_float("packed", packed)
    _check_plan(plan, "packed", packed)
    if packed.shape[0] != plan.num_tokens:
        raise ValueError(
            f"packed must have the plan's {plan.num_tokens} rows, but has {packed.shape[0]}"
        )
    if select_backend("unpack_vision", packed.device) == "reference":
        return reference.unpack_vision(packed, plan.vision_rows)
    vision: torch.Tensor = _UnpackVision.apply(packed, plan.vision_rows)
    return vision


def merge_vision(
    inputs_embeds: torch.Tensor, vision: torch.Tensor, vision_rows: torch.Tensor
) -> torch.Tensor:
    """A copy of ``inputs_embeds`` with some of its rows replaced by vision tokens.

    What ``masked_scatter`` does in other models, by row number instead of by mask. Differentiable
    once, in both float tensors.

    Args:
        inputs_embeds: float [.., D]; its leading dimensions count as one, row-major.
        vision: float [n, D], in the dtype of ``inputs_embeds`` (cast to it under autocast).
        vision_rows: int32 or int64 [n], the row of each vision token, no row twice. The numbers are
            checked on the CPU; on a device that would mean waiting for it, so there a number out
            of range fails as in any PyTorch indexing, with a device-side assertion.

    Returns:
        A new tensor of the shape and dtype of ``inputs_embeds``.

    Raises:
        TypeError: an argument is not a tensor, or not of the dtypes above.
        ValueError: shapes or devices do not fit together, or (CPU) a row number is out of range.
    """
    check_tensor("inputs_embeds", inputs_embeds)
    check_tensor("vision", vision, ndim=2)
    check_tensor("vision_rows", vision_rows, ndim=1)
    check_float("inputs_embeds", inputs_embeds)
    if inputs_embeds.ndim < 1:
        raise ValueError("inputs_embeds must have at least 1 dimension, got shape ()")
    check_like("vision_rows", vision_rows, "inputs_embeds", inputs_embeds)
    _check_vision(vision, vision_rows.shape[0], "vision_rows", "inputs_embeds", inputs_embeds)
    rows = math.prod(inputs_embeds.shape[:-1])
    _check_row_numbers(vision_rows, rows)
    vision = _like_autocast("vision", vision, "inputs_embeds", inputs_embeds)

    flat = inputs_embeds.reshape(rows, inputs_embeds.shape[-1])
    if select_backend("merge_vision", flat.device) == "reference":
        merged = reference.merge_vision(flat, vision, vision_rows)
    else:
        merged = _MergeVision.apply(flat, vision, vision_rows)
    return merged.reshape(inputs_embeds.shape)


def _check_plan(plan: PackPlan, name: str, tensor: torch.Tensor) -> None:
    if not isinstance(plan, PackPlan):
        raise TypeError(f"plan must be a PackPlan, got {type(plan).__name__}")
    if plan.source.device != tensor.device:
        raise ValueError(
            f"plan must be on the device of {name}, {tensor.device}, but is on "
            f"{plan.source.device}; move it with plan.to({str(tensor.device)!r})"
        )


def _check_vision(
    vision: torch.Tensor, rows: int, rows_name: str, other_name: str, other: torch.Tensor
) -> None:
    check_float("vision", vision)
    check_like("vision", vision, other_name, other)
    if vision.shape[0] != rows:
        raise ValueError(
            f"vision must have one row per entry of {rows_name}, {rows}, but has {vision.shape[0]}"
        )
    if vision.shape[1] != other.shape[-1]:
        raise ValueError(
            f"vision must be as wide as {other_name}, {other.shape[-1]}, but is {vision.shape[1]}"
        )


def _like_autocast(
    name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor
) -> torch.Tensor:
    """``tensor`` in the dtype of ``other``: as models cast image features to their embeddings."""
    if tensor.dtype == other.dtype:
        return tensor
    if torch.is_autocast_enabled(tensor.device.type):
        return tensor.to(other.dtype)
    raise TypeError(
        f"{name} must have the dtype of {other_name}, {other.dtype}, but has {tensor.dtype}"
    )


def _check_row_numbers(vision_rows: torch.Tensor, rows: int) -> None:
    if vision_rows.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"vision_rows must be int32 or int64, got {vision_rows.dtype}")
    if rows > MAX_INT32:
        raise ValueError(f"inputs_embeds must have at most {MAX_INT32} rows, got {rows}")
    if vision_rows.device.type != "cpu" or vision_rows.numel() == 0:
        return
    for number in vision_rows.aminmax():
        if not 0 <= number < rows:
            raise ValueError(
                f"vision_rows must hold rows of inputs_embeds, in [0, {rows}), got {int(number)}"
            )


class _PackEmbeddings(torch.autograd.Function):
    """Saves the two row maps (4 bytes a row each), no activations."""

    @staticmethod
    def forward(
        ctx: Any,
        embedding: torch.Tensor,
        vision: torch.Tensor,
        source: torch.Tensor,
        vision_rows: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(source, vision_rows)
        ctx.vocabulary = embedding.shape[0]
        packed = embedding.new_empty(source.shape[0], embedding.shape[1])
        pack_rows(embedding, vision, source, packed)
        return packed

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        source, vision_rows = ctx.saved_tensors
        needs_embedding, needs_vision, *_ = ctx.needs_input_grad
        grad_embedding = _table_gradient(grad, source, ctx.vocabulary) if needs_embedding else None
        grad_vision = gather_rows(grad, vision_rows) if needs_vision else None
        return grad_embedding, grad_vision, None, None


def _table_gradient(grad: torch.Tensor, source: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Sum the text rows of ``grad`` [total, D] by token id, without a copy of those rows.

    Vision rows are given to one padding id past the vocabulary, which PyTorch's kernel skips; a
    negative id would not do, as its sort on the device looks at the low bits only.
    """
    ids = source.masked_fill(source < 0, vocabulary)
    table = torch.ops.aten.embedding_dense_backward(grad, ids, vocabulary + 1, vocabulary, False)
    return table[:vocabulary]


class _UnpackVision(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed: torch.Tensor, vision_rows: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(vision_rows)
        ctx.rows = packed.shape[0]
        return gather_rows(packed, vision_rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (vision_rows,) = ctx.saved_tensors
        grad_packed = grad.new_zeros(ctx.rows, grad.shape[1])
        scatter_rows_(grad_packed, vision_rows, grad)
        return grad_packed, None


class _MergeVision(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, inputs_embeds: torch.Tensor, vision: torch.Tensor, vision_rows: torch.Tensor
    ) -> torch.Tensor:
        source = _merge_source(inputs_embeds.shape[0], vision_rows)
        ctx.save_for_backward(source, vision_rows)
        merged = torch.empty_like(inputs_embeds, memory_format=torch.contiguous_format)
        pack_rows(inputs_embeds, vision, source, merged)
        return merged

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        source, vision_rows = ctx.saved_tensors
        grad_inputs, grad_vision = None, None
        if ctx.needs_input_grad[0]:
            zeros = grad.new_zeros(1, grad.shape[1]).expand(vision_rows.shape[0], -1)
            grad_inputs = torch.empty_like(grad, memory_format=torch.contiguous_format)
            pack_rows(grad, zeros, source, grad_inputs)
        if ctx.needs_input_grad[1]:
            grad_vision = gather_rows(grad, vision_rows.to(torch.int32))
        return grad_inputs, grad_vision, None


def _merge_source(rows: int, vision_rows: torch.Tensor) -> torch.Tensor:
    """The ``source`` map that makes merging a packing whose table is ``inputs_embeds``.

    Then each row is written once, where a copy and a scatter would write the vision rows twice.
    """
    source = torch.arange(rows, dtype=torch.int32, device=vision_rows.device)
    vision = torch.arange(vision_rows.shape[0], dtype=torch.int32, device=vision_rows.device)
    return source.index_copy_(0, vision_rows.long(), ~vision)
