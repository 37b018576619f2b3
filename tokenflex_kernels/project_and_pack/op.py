"""`project_and_pack`: the projector's tokens in the packed buffer, without a buffer of their own.

    tokens = project_tokens(x, ..)                                    [T, D]
    packed = pack_embeddings(embedding, tokens, plan)                 [total, D]

It equals these two calls. The last product of the projector writes each token to its packed row,
which saves a write and a read of T D numbers and the memory for them; see the stage `packed_down`
for where it does. Backward reads the vision rows of the gradient where they are if they follow one
another, and gathers them once otherwise: the gradient of the down projection's weight is a product
of the library, which takes a matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tokenflex_kernels.backend import select_backend
from tokenflex_kernels.call_records import (
    SEEN,
    are_same,
    call_key,
    find_record,
    keep_record,
    needs_grad,
)
from tokenflex_kernels.checks import Grid, autocast_enabled, check_eps, check_like
from tokenflex_kernels.library import (
    UnpackedContext,
    choose_backend,
    define_fused,
    differentiable_once,
    is_eager,
    is_ordinary,
    may_be_recorded,
    record_apply,
)
from tokenflex_kernels.packing import ops
from tokenflex_kernels.packing.embeddings import check_table, pack_embeddings
from tokenflex_kernels.packing.plan import PackPlan
from tokenflex_kernels.pool_norm.axis_weights import check_mode
from tokenflex_kernels.pool_norm.op import (
    beyond_triton,
    check_plan,
    device_plan,
    dtypes_of,
    host_plan,
)
from tokenflex_kernels.pool_norm.plan import PoolPlan, grids_of
from tokenflex_kernels.pool_norm.stages import launch_pool_norm_forward
from tokenflex_kernels.project_and_pack import native
from tokenflex_kernels.project_and_pack.stages import launch_packed_down, packed_down
from tokenflex_kernels.project_tokens import native as native_tokens
from tokenflex_kernels.project_tokens import recorded
from tokenflex_kernels.project_tokens.op import (
    SAVE_CHOICES,
    Gradients,
    check_save,
    check_weights,
    gradients_of_tokens,
    in_product_dtype,
    keep_for_tokens,
    project_tokens,
)
from tokenflex_kernels.project_tokens.weights import ProjectorWeights
from tokenflex_kernels.swiglu.stages import launch_gate_up

TENSORS = 10  # x, the weights and the table, which may require gradients


def project_and_pack(
    x: torch.Tensor,
    in_grids: Sequence[Grid] | PoolPlan,
    out_grids: Sequence[Grid] | None = None,
    *,
    embedding: torch.Tensor,
    plan: PackPlan,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor | None,
    gate_weight: torch.Tensor,
    gate_bias: torch.Tensor | None,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    mode: str = "adaptive",
    eps: float = 1e-5,
    save: str = "preactivation",
) -> torch.Tensor:
    """Project patches into vision tokens, and write these and the text into one packed buffer.

    The same as :func:`project_tokens` followed by :func:`pack_embeddings`. Differentiable in ``x``,
    all weights and the table. The kernels have first derivatives only; the reference has all. A
    plan that shows an image several times or not at all, and a table of another dtype than
    autocast's, take the two calls.

    Args:
        x: float [sum of H*W, C], the images' patches one image after another, row-major.
        in_grids: one (H, W) per image, host ints; or the batch's :func:`plan_pooling`.
        out_grids: one (h, w) per image, host ints: image i becomes h*w tokens; nothing beside a
            plan of the pooling.
        embedding: float [V, D], the embedding table, in the dtype of ``x`` (any under autocast).
        plan: the batch's :func:`plan_packing`, on the same device, with a vision token for each
            cell of the output grids.
        norm_weight: float [C].
        norm_bias: float [C] or None.
        gate_weight: float [H, C].
        gate_bias: float [H] or None.
        up_weight: float [H, C].
        up_bias: float [H] or None.
        down_weight: float [D, H].
        down_bias: float [D] or None.
        mode: "adaptive" or "resize", see :func:`pool_norm`.
        eps: of the LayerNorm.
        save: what training keeps for backward, see :func:`project_tokens`.

    Returns:
        [total, D] in the dtype of ``embedding``.

    Raises:
        TypeError: an argument is not a tensor or a plan, or of a dtype that does not go with ``x``.
        ValueError: shapes, devices, grids, plans, ``mode`` or ``save`` do not fit together, or the
            table has fewer rows than the plan's text needs.
    """
    weights = ProjectorWeights(
        *(norm_weight, norm_bias, gate_weight, gate_bias),
        *(up_weight, up_bias, down_weight, down_bias),
    )
    if is_ordinary(x):
        packed = _on_host(x, in_grids, out_grids, embedding, plan, weights, mode, eps, save)
        if packed is not None:
            return packed
    if may_be_recorded("project_and_pack", x):
        packed = _on_device(x, in_grids, out_grids, embedding, plan, weights, mode, eps, save)
        if packed is not None:
            return packed
    pooling = check_plan(x, in_grids, out_grids)
    mode, eps, save = check_mode(mode), check_eps(eps), check_save(save)
    weights = check_weights(x, weights)
    check_table(embedding, plan)
    _check_packing(x, embedding, plan, pooling, weights)
    if plan.shown_once and _is_fused(x):
        parameters = in_product_dtype(x, weights)
        if parameters.down_weight.dtype == embedding.dtype:
            maps = grids_of(pooling), plan.source, plan.vision_rows
            # A start would be a constant of a compiled graph.
            start = -1 if torch.compiler.is_compiling() else plan.vision_start
            options = pooling.num_cells, mode, eps, save, start
            return fused_project_and_pack(x, *parameters, embedding, *maps, *options)
    tokens = project_tokens(x, pooling, **weights._asdict(), mode=mode, eps=eps, save=save)
    return pack_embeddings(embedding, tokens, plan)


def _check_packing(
    x: torch.Tensor,
    embedding: torch.Tensor,
    plan: PackPlan,
    pooling: PoolPlan,
    weights: ProjectorWeights,
) -> None:
    """Refuse a table or a plan that does not go with the tokens."""
    check_like("embedding", embedding, "x", x)
    if embedding.dtype != x.dtype and not autocast_enabled(x.device):
        raise TypeError(f"embedding must have the dtype of x, {x.dtype}, got {embedding.dtype}")
    if embedding.shape[1] != weights.down_weight.shape[0]:
        raise ValueError(
            f"embedding must be as wide as the rows of down_weight, "
            f"{weights.down_weight.shape[0]}, but is {embedding.shape[1]}"
        )
    tokens = plan.vision_rows.shape[0] if plan.shown_once else plan.num_vision_tokens
    if tokens != pooling.num_cells:
        raise ValueError(
            f"plan must have a vision token for each cell of out_grids, {pooling.num_cells}, but "
            f"has {tokens}"
        )


def _is_fused(x: torch.Tensor) -> bool:
    """Return whether the kernels, and the mover of the text rows, run on these tensors."""
    backend = choose_backend("project_and_pack", x, beyond_triton=beyond_triton(x))
    return backend != "reference" and select_backend("pack_embeddings", x.device) != "reference"


# ---- The fused op: kernels and autograd.


def _fused_project_and_pack(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor | None,
    gate_weight: torch.Tensor,
    gate_bias: torch.Tensor | None,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    embedding: torch.Tensor,
    grids: torch.Tensor,
    source: torch.Tensor,
    vision_rows: torch.Tensor,
    cells: int,
    mode: str,
    eps: float,
    save: str,
    vision_start: int,
) -> torch.Tensor:
    tokens, _, _ = launch_pool_norm_forward(
        x, norm_weight, norm_bias, grids, cells, mode, eps, gate_weight.dtype, False
    )
    product, _, _ = launch_gate_up(tokens, gate_weight, up_weight, gate_bias, up_bias, True, False)
    maps = source, vision_rows, vision_start
    return launch_packed_down(product, down_weight, down_bias, embedding, *maps)


def _shape(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    embedding, _, source, *_ = arguments[TENSORS - 2 :]
    return embedding.new_empty(source.shape[0], embedding.shape[1])


class ProjectAndPack(torch.autograd.Function):
    """Keep what `project_tokens` keeps, and the row maps: 4 bytes a row and 4 a vision row."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *arguments: Any) -> torch.Tensor:
        weights, embedding = ProjectorWeights(*arguments[:8]), arguments[8]
        grids, source, vision_rows, *options, vision_start = arguments[9:]
        product, saved = keep_for_tokens(ctx, x, weights, grids, *options)
        ctx.save_for_backward(*saved, source, vision_rows)
        ctx.table_rows, ctx.vision_start = embedding.shape[0], vision_start
        down = weights.down_weight, weights.down_bias
        return packed_down.below(product, *down, embedding, source, vision_rows, vision_start)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: torch.Tensor) -> Gradients:
        *saved, source, vision_rows = ctx.saved_tensors
        gradients: Gradients = (None,) * (TENSORS - 1)
        if any(ctx.needs_input_grad[: TENSORS - 1]):
            d_tokens = _gradient_of_tokens(ctx, grad, source, vision_rows)
            gradients = gradients_of_tokens(ctx, saved, d_tokens)
        d_table = None
        if ctx.needs_input_grad[TENSORS - 1]:
            d_table = ops.table_gradient(grad, source, vision_rows.shape[0], ctx.table_rows)
        return *gradients, d_table, *(None,) * 8


def _gradient_of_tokens(
    ctx: Any, grad: torch.Tensor, source: torch.Tensor, vision_rows: torch.Tensor
) -> torch.Tensor:
    """Return the vision rows of the packed gradient, [T, D]."""
    if ctx.vision_start >= 0:
        return grad.narrow(0, ctx.vision_start, vision_rows.shape[0])
    return ops.unpack_vision(grad, source, vision_rows)


class ProjectAndPackOnHost(torch.autograd.Function):
    """Record the eager call that computed the last argument: packed, what is kept, the batch."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *arguments: Any) -> torch.Tensor:
        *weights, embedding, (packed, kept, batch, plan) = arguments
        maps = batch.plan.grids, plan.source, plan.vision_rows
        ctx.save_for_backward(*kept, *weights[:-1], *maps)
        ctx.batch, ctx.save, ctx.tables = (x.shape[0], batch.mode), batch.save, batch.tables
        ctx.table_rows, ctx.vision_start = embedding.shape[0], plan.vision_start
        result: torch.Tensor = packed
        return result

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Gradients:
        saved = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if is_eager() and not torch.is_grad_enabled():
            source, vision_rows = saved[13:]
            gradients: Any = (None,) * (TENSORS - 1)
            if any(needs[: TENSORS - 1]):
                kept = native_tokens.Kept(*saved[:5])
                weights = ProjectorWeights._make([*saved[5:12], None])
                d_tokens = _gradient_of_tokens(ctx, grad, source, vision_rows)
                gradients = native_tokens.backward(d_tokens, kept, weights, ctx.tables, needs)
            if gradients is not None:
                d_table = None
                if needs[TENSORS - 1]:
                    d_table = ops.table_gradient(grad, source, vision_rows.shape[0], ctx.table_rows)
                return *gradients, d_table, None
        context = UnpackedContext(
            saved_tensors=saved,
            needs_input_grad=needs[:TENSORS],
            batch=ctx.batch,
            save=ctx.save,
            norm_dtypes=(grad.dtype,) * 3,  # those that are taken at once are of one dtype
            table_rows=ctx.table_rows,
            vision_start=ctx.vision_start,
        )
        return *ProjectAndPack.backward(context, grad)[:TENSORS], None


_record_on_host = record_apply(ProjectAndPackOnHost)


def _on_host(
    x: torch.Tensor,
    in_grids: Sequence[Grid] | PoolPlan,
    out_grids: Sequence[Grid] | None,
    embedding: torch.Tensor,
    plan: PackPlan,
    weights: ProjectorWeights,
    mode: str,
    eps: float,
    save: str,
) -> torch.Tensor | None:
    """Return the result of an eager call; None where arguments are unusual, or wrong."""
    if (
        save not in SAVE_CHOICES
        or weights.norm_weight is None
        or not is_ordinary(embedding)
        or type(plan) is not PackPlan
        or not plan.shown_once
        or plan.bounds is None
        or select_backend("project_and_pack") != "native"
        or torch.is_autocast_enabled("cpu")
        or not native_tokens.fit(x, weights)
    ):
        return None
    pooling, tables = host_plan(in_grids, out_grids, mode, eps)
    if pooling is None or tables is None or pooling.num_cells != plan.bounds[0]:
        return None
    leaves = x, *weights, embedding
    records = torch.is_grad_enabled() and torch._C._any_requires_grad(*leaves)
    batch = native_tokens.Batch(pooling, tables, mode, eps, save)
    with torch._C._AutoDispatchBelowAutograd():
        results = native_tokens.gated_product(x, weights, batch, records)
        if results is None:
            return None
        product, kept = results
        down = weights.down_weight, weights.down_bias
        packed = native.packed_down_at_once(product, *down, embedding, plan)
    if packed is None or not records:
        return packed
    out: torch.Tensor = _record_on_host(*leaves, (packed, kept, batch, plan))
    return out


class ProjectAndPackOnDevice(torch.autograd.Function):
    """Record the call that computed the last argument: packed, what is kept, and the batch."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *arguments: Any) -> torch.Tensor:
        *weights, embedding, (packed, kept, grids, mode, save, plan) = arguments
        maps = grids, plan.source, plan.vision_rows
        ctx.save_for_backward(*kept, *weights[:-1], *maps)
        ctx.batch, ctx.save = (x.shape[0], mode), save
        ctx.norm_dtypes = dtypes_of(x, *weights[:2])
        ctx.table_rows, ctx.vision_start = embedding.shape[0], plan.vision_start
        result: torch.Tensor = packed
        return result

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Gradients:
        return *ProjectAndPack.backward(ctx, grad)[:TENSORS], None


_record_on_device = record_apply(ProjectAndPackOnDevice)


def _on_device(
    x: torch.Tensor,
    in_grids: Sequence[Grid] | PoolPlan,
    out_grids: Sequence[Grid] | None,
    embedding: torch.Tensor,
    plan: PackPlan,
    weights: ProjectorWeights,
    mode: str,
    eps: float,
    save: str,
) -> torch.Tensor | None:
    """Return the result of a call of a kind that came before; None for other calls.

    The plan of the packing is no part of a kind: its launches are made anew in every call.
    """
    pooling, bounds = device_plan(in_grids, out_grids, mode, eps), _usual_bounds(plan, x)
    if pooling is None or bounds is None or type(save) is not str:
        return None
    tensors = x, *weights
    leaves = *tensors, embedding
    key = call_key("project_and_pack", leaves, pooling, mode, eps, save)
    call = None if key is None else find_record(key)
    if key is None or call is None:
        return None
    if call is SEEN:
        check_plan(x, in_grids, out_grids)
        check_mode(mode)
        check_eps(eps)
        check_save(save)
        if not are_same(check_weights(x, weights), weights) or beyond_triton(x):
            return None
        check_table(embedding, plan)
        _check_packing(x, embedding, plan, pooling, weights)
        needs = needs_grad(leaves)
        product, kept, call = recorded.record(x, weights, pooling, mode, eps, save, needs)
        keep_record(key, call)
    elif bounds[0] != pooling.num_cells or bounds[1] > embedding.shape[0]:
        return None  # of another plan than the recorded call's
    else:
        product, kept = call.repeat(tensors)
    with torch.no_grad():
        down = weights.down_weight, weights.down_bias
        maps = plan.source, plan.vision_rows, plan.vision_start
        packed = packed_down.below(product, *down, embedding, *maps)
    if not call.is_differentiated:
        return packed
    batch = pooling.grids, mode, save, plan
    result: torch.Tensor = _record_on_device(*leaves, (packed, kept, *batch))
    return result


def _usual_bounds(plan: PackPlan, x: torch.Tensor) -> tuple[int, int, int] | None:
    """Return the bounds of a plan that recorded calls on ``x`` pack by; None for other plans."""
    if (
        type(plan) is not PackPlan
        or not plan.shown_once
        or plan.source.device != x.device
        or select_backend("pack_embeddings", x.device) == "reference"
    ):
        return None
    return plan.bounds


fused_project_and_pack = define_fused(
    "project_and_pack", _shape, _fused_project_and_pack, ProjectAndPack
)
