"""Pack text and vision rows into one padding-free buffer, and unpack them.

    pack_embeddings   packed[r] = embedding[input_ids[r]] or vision[v], as the plan says
    unpack_vision     vision[v] = packed[vision_rows[v]]
    merge_vision      out = inputs_embeds, with out[vision_rows[v]] = vision[v]

Each reads and writes every row once, in one launch driven by an int32 row map, with O(rows) extra
memory and no synchronisation; `merge_vision`, which is given row numbers, makes the map first, in
two small launches. The backward pass is a row mover by the inverse map. Only the gradients of the
embedding table, and of images that are shown several times, sum rows, in an order that the plan
decides: gradients repeat bit by bit.

This file checks arguments and chooses the backend; the torch ops are in `ops`. The functions may be
called in ``torch.compile(fullgraph=True, dynamic=True)`` and transformed by ``torch.func``.
Derivatives may be of any order.
"""

from __future__ import annotations

import math
from typing import NoReturn

import torch

from tokenflex_kernels.backend import select_backend
from tokenflex_kernels.checks import autocast_enabled, check_float, check_like, check_tensor
from tokenflex_kernels.packing import ops, reference
from tokenflex_kernels.packing.plan import PackPlan
from tokenflex_kernels.packing.reference import MAX_INT32


def pack_embeddings(
    embedding: torch.Tensor, vision: torch.Tensor, plan: PackPlan, *, sparse_grad: bool = False
) -> torch.Tensor:
    """Write a batch's text and vision rows into one packed buffer, as ``plan`` lays it out.

    The result is what an embedding lookup followed by ``masked_scatter`` gives, without the
    intermediate and the mask. Differentiable in both tensors; the table's gradient is computed only
    if the table requires it.

    Args:
        embedding: float [V, D], the embedding table.
        vision: float [vision tokens, D], those of one image after another, in the dtype of
            ``embedding``. Under autocast, where a projector's output and the table may differ, it
            is cast to that dtype. A token that the plan shows several times gets the sum of its
            rows' gradients, added up in a fixed order.
        plan: the batch's plan, on the same device.
        sparse_grad: False for a table gradient of the table's own shape and layout, as most
            optimizers and FSDP ask for. True for a coalesced sparse COO tensor that has a row for
            each token id of the batch and takes no memory for the others. It is what
            ``torch.nn.functional.embedding(.., sparse=True)`` gives, added up: for
            ``torch.optim.SparseAdam``, ``SGD`` or ``Adagrad``. Where the table is also the output
            layer, that layer's gradient is dense, and so is the sum. In ``torch.compile``,
            ``embedding`` must be an input of the compiled function, as a parameter is: Inductor
            cannot take a sparse gradient further.

    Returns:
        [total, D] in the dtype of ``embedding``.

    Raises:
        TypeError: an argument is not a dense float tensor, the dtypes differ outside autocast,
            ``plan`` is no plan or its row maps are not int32, or ``sparse_grad`` is not a bool.
        ValueError: the rows of ``vision`` or the ids of the text do not fit the plan or the table,
            the widths differ, the devices do, or the plan's row maps are not contiguous.
    """
    if (
        _may_run_eagerly("pack_embeddings")
        and type(plan) is PackPlan
        and type(sparse_grad) is bool
        and plan.bounds is not None
    ):
        vision_rows, table_rows, _ = plan.bounds
        sparse_ids = plan.num_token_ids if sparse_grad else None
        packed = ops.pack_eagerly(
            embedding,
            vision,
            plan.source,
            (False, vision_rows, table_rows),
            ops.pack_embeddings.record_result,
            (plan.source, plan.vision_rows, sparse_ids, plan.shown_once),
        )
        if packed is not None:
            return packed
    _check_rows("vision", vision, ndim=2)
    check_table(embedding, plan)
    if plan.shown_once:
        _check_vision(
            vision, plan.vision_rows.shape[0], "entry of plan.vision_rows", "embedding", embedding
        )
    else:
        tokens = "vision token of plan.token_counts"
        _check_vision(vision, plan.num_vision_tokens, tokens, "embedding", embedding)
    if not isinstance(sparse_grad, bool):
        raise TypeError(f"sparse_grad must be a bool, got {sparse_grad!r}")
    vision = _like_autocast("vision", vision, "embedding", embedding)
    maps = plan.source, plan.vision_rows
    if select_backend("pack_embeddings", embedding.device) == "reference":
        return reference.pack_embeddings(embedding, vision, *maps, sparse_grad)
    sparse_ids = plan.num_token_ids if sparse_grad else None
    return ops.pack_embeddings(embedding, vision, *maps, sparse_ids, plan.shown_once)


def unpack_vision(packed: torch.Tensor, plan: PackPlan) -> torch.Tensor:
    """Return the vision rows of a packed buffer, in the order of ``plan.vision_rows``.

    That is the order of the vision tokens. Differentiable.

    Args:
        packed: float [total, D].
        plan: the plan the buffer was packed by, on the same device.

    Returns:
        [vision, D].

    Raises:
        TypeError: ``packed`` is not a dense float tensor, or ``plan`` is no plan or its row maps
            are not int32.
        ValueError: ``packed`` has another number of rows than the plan, or is on another device, or
            the plan's row maps are not contiguous.
    """
    if (
        _may_run_eagerly("unpack_vision")
        and type(plan) is PackPlan
        and plan.shown_once
        and plan.bounds is not None
    ):
        maps, bounds = (plan.source, plan.vision_rows), (True, plan.bounds[2], 0)
        record = ops.unpack_vision.record_result
        vision = ops.pack_eagerly(packed, packed, plan.vision_rows, bounds, record, maps)
        if vision is not None:
            return vision
    _check_rows("packed", packed, ndim=2)
    _check_plan(plan, "packed", packed)
    if packed.shape[0] != plan.num_tokens:
        raise ValueError(
            f"packed must have the plan's {plan.num_tokens} rows, but has {packed.shape[0]}"
        )
    if not plan.shown_once or select_backend("unpack_vision", packed.device) == "reference":
        return reference.unpack_vision(packed, plan.vision_rows)
    return ops.unpack_vision(packed, plan.source, plan.vision_rows)


def merge_vision(
    inputs_embeds: torch.Tensor, vision: torch.Tensor, vision_rows: torch.Tensor
) -> torch.Tensor:
    """Return a copy of ``inputs_embeds`` with some of its rows replaced by vision tokens.

    It does what ``masked_scatter`` does in other models, by row number instead of by mask.
    Differentiable in both float tensors.

    Args:
        inputs_embeds: float [.., D]; its leading dimensions count as one, row-major.
        vision: float [n, D], in the dtype of ``inputs_embeds`` (cast to it under autocast).
        vision_rows: int32 or int64 [n], the row of each vision token, no row twice. The numbers are
            checked on the CPU; on a device that would mean waiting for it, so there a number out
            of range fails as in any PyTorch indexing, with a device-side assertion, and of a row
            that comes twice either token may win.

    Returns:
        A new tensor of the shape and dtype of ``inputs_embeds``.

    Raises:
        TypeError: an argument is not a dense tensor, or not of the dtypes above.
        ValueError: shapes or devices do not fit together, or (CPU) a row number is out of range or
            comes twice.
    """
    if _may_run_eagerly("merge_vision"):
        merged = ops.merge_eagerly(inputs_embeds, vision, vision_rows)
        if merged is not None:
            return merged
    _check_rows("inputs_embeds", inputs_embeds)
    _check_rows("vision", vision, ndim=2)
    check_tensor("vision_rows", vision_rows, ndim=1)
    if vision_rows.layout != torch.strided:
        _refuse_layout("vision_rows", vision_rows)
    if inputs_embeds.ndim < 1:
        raise ValueError("inputs_embeds must have at least 1 dimension, got shape ()")
    check_like("vision_rows", vision_rows, "inputs_embeds", inputs_embeds)
    _check_vision(
        vision, vision_rows.shape[0], "entry of vision_rows", "inputs_embeds", inputs_embeds
    )
    rows = math.prod(inputs_embeds.shape[:-1])
    if vision_rows.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"vision_rows must be int32 or int64, got {vision_rows.dtype}")
    if rows > MAX_INT32:
        raise ValueError(f"inputs_embeds must have at most {MAX_INT32} rows, got {rows}")
    vision = _like_autocast("vision", vision, "inputs_embeds", inputs_embeds)

    if select_backend("merge_vision", inputs_embeds.device) == "reference":
        flat = inputs_embeds.reshape(rows, inputs_embeds.shape[-1])
        return reference.merge_vision(flat, vision, vision_rows).reshape(inputs_embeds.shape)
    merged, _ = ops.merge_vision(inputs_embeds, vision, vision_rows)
    return merged


def _may_run_eagerly(op: str) -> bool:
    """Return whether to try ``op`` by one call into the extension, which checks the rest."""
    return not torch.compiler.is_compiling() and select_backend(op) == "native"


def check_table(embedding: torch.Tensor, plan: PackPlan) -> None:
    """Check the embedding table, [V, D], and that the plan's text rows are in it."""
    _check_rows("embedding", embedding, ndim=2)
    _check_plan(plan, "embedding", embedding)
    if plan.max_token_id >= embedding.shape[0]:
        raise ValueError(
            f"embedding must have a row for every text token: the plan's largest id is "
            f"{plan.max_token_id}, but embedding has {embedding.shape[0]} rows"
        )


def _check_plan(plan: PackPlan, name: str, tensor: torch.Tensor) -> None:
    if not isinstance(plan, PackPlan):
        raise TypeError(f"plan must be a PackPlan, got {type(plan).__name__}")
    if plan.source.device != tensor.device:
        raise ValueError(
            f"plan must be on the device of {name}, {tensor.device}, but is on "
            f"{plan.source.device}; move it with plan.to({str(tensor.device)!r})"
        )
    source, vision_rows = plan.source, plan.vision_rows
    if not (
        source.dtype == vision_rows.dtype == torch.int32
        and source.is_contiguous()
        and vision_rows.is_contiguous()
    ):
        _refuse_maps(plan)


def _refuse_maps(plan: PackPlan) -> NoReturn:
    """Refuse row maps that are not contiguous int32."""
    for name in ("source", "vision_rows"):
        rows = getattr(plan, name)
        if rows.dtype != torch.int32:
            raise TypeError(
                f"plan.{name} must be int32, as plan_packing makes it, got {rows.dtype}"
            )
        if not rows.is_contiguous():
            raise ValueError(
                f"plan.{name} must be contiguous, as plan_packing makes it, got strides "
                f"{rows.stride()}"
            )
    raise AssertionError("unreachable: one of the maps was refused")


def _check_rows(name: str, tensor: torch.Tensor, *, ndim: int | None = None) -> None:
    """Refuse what is not a dense tensor of floats."""
    check_tensor(name, tensor, ndim=ndim)
    check_float(name, tensor)
    if tensor.layout != torch.strided:
        _refuse_layout(name, tensor)


def _refuse_layout(name: str, tensor: torch.Tensor) -> NoReturn:
    raise TypeError(f"{name} must be a dense tensor, got layout {tensor.layout}")


def _check_vision(
    vision: torch.Tensor, rows: int, rows_name: str, other_name: str, other: torch.Tensor
) -> None:
    check_like("vision", vision, other_name, other)
    if vision.shape[0] != rows:
        raise ValueError(
            f"vision must have one row per {rows_name}, {rows}, but has {vision.shape[0]}"
        )
    if vision.shape[1] != other.shape[-1]:
        raise ValueError(
            f"vision must be as wide as {other_name}, {other.shape[-1]}, but is {vision.shape[1]}"
        )


def _like_autocast(
    name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor
) -> torch.Tensor:
    """Return ``tensor`` in the dtype of ``other``, to which autocast may cast it."""
    if tensor.dtype == other.dtype:
        return tensor
    if autocast_enabled(tensor.device):
        return tensor.to(other.dtype)
    raise TypeError(
        f"{name} must have the dtype of {other_name}, {other.dtype}, but has {tensor.dtype}"
    )
