"""`pool_norm`: pool patch grids to any other grids and normalise, a mixed batch in one call.

Maths, per image and with one small map per axis (see ``axis_weights``):

    pooled = P_h X P_w^T                  X: [H, W, C] patches -> [h, w, C] cells
    out = (pooled - mean) / sqrt(var + eps) * weight + bias          over C, if weight is given
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tokenflex_kernels.backend import select_backend
from tokenflex_kernels.call_records import (
    SEEN,
    RecordedStage,
    call_key,
    find_record,
    keep_record,
    needs_grad,
    record_stage,
)
from tokenflex_kernels.checks import (
    Grid,
    check_eps,
    check_float,
    check_like,
    check_shape,
    check_tensor,
)
from tokenflex_kernels.library import (
    UnpackedContext,
    choose_backend,
    define_fused,
    differentiable_once,
    is_eager,
    is_ordinary,
    is_transformed,
    may_be_recorded,
    record_apply,
)
from tokenflex_kernels.pool_norm import native, reference
from tokenflex_kernels.pool_norm.axis_weights import MODES, check_mode
from tokenflex_kernels.pool_norm.plan import PoolPlan, grids_of, plan_eagerly, plan_pooling
from tokenflex_kernels.pool_norm.stages import (
    beyond_triton,
    launch_pool_norm_forward,
    pool_norm_backward,
    pool_norm_forward,
)
from tokenflex_kernels.pool_norm.tables import pooling_tables

Gradients = tuple[torch.Tensor | None, ...]


def pool_norm(
    x: torch.Tensor,
    in_grids: Sequence[Grid] | PoolPlan,
    out_grids: Sequence[Grid] | None = None,
    *,
    mode: str = "adaptive",
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """Pool each image's patch grid to its own output grid, then LayerNorm if ``weight`` is given.

    Images may differ in both grids. Pooling and normalisation are computed in float32 (float64
    for float64 inputs) and rounded once, to the dtype of ``x``. The kernels have first derivatives
    only, without a norm all of plain autograd; the reference has all. A NaN or infinite patch
    spoils the cells whose window holds it.

    Args:
        x: float [sum of H*W, C], the images' patches one image after another, row-major.
        in_grids: one (H, W) per image, host ints; or the batch's :func:`plan_pooling`.
        out_grids: one (h, w) per image, host ints; nothing beside a plan.
        mode: "adaptive" is PyTorch's adaptive average pooling (the paper, arXiv 2504.03154);
            "resize" is the released model's: bilinear with aligned corners to the next multiple,
            then average.
        weight: LayerNorm scale, float [C]; None skips the normalisation.
        bias: LayerNorm shift, float [C]; needs ``weight``.
        eps: added to the variance.

    Returns:
        [sum of h*w, C] in the dtype of ``x``, one image after another, row-major.

    Raises:
        TypeError: an argument is not a tensor, not of a float dtype, or not (height, width) pairs.
        ValueError: shapes, devices, grids or ``mode`` do not fit together.
    """
    if is_ordinary(x):
        out = _on_host(x, in_grids, out_grids, mode, weight, bias, eps)
        if out is not None:
            return out
    if may_be_recorded("pool_norm", x):
        out = _on_device(x, in_grids, out_grids, mode, weight, bias, eps)
        if out is not None:
            return out
    plan = check_plan(x, in_grids, out_grids)
    mode = check_mode(mode)
    eps = check_eps(eps)
    check_norm(x, weight, bias, prefix="")
    if choose_backend("pool_norm", x, beyond_triton=beyond_triton(x)) != "reference":
        return fused_pool_norm(x, weight, bias, grids_of(plan), plan.num_cells, mode, eps)
    return reference.pool_norm(x, plan, mode=mode, weight=weight, bias=bias, eps=eps)


def check_plan(
    x: torch.Tensor, in_grids: Sequence[Grid] | PoolPlan, out_grids: Sequence[Grid] | None
) -> PoolPlan:
    """Check ``x`` and return the plan of the batch, made of both lists or given."""
    check_tensor("x", x, ndim=2)
    check_float("x", x)
    if isinstance(in_grids, PoolPlan):
        if out_grids is not None:
            raise TypeError(
                "out_grids must not be given beside a PoolPlan, which has them, got "
                f"{type(out_grids).__name__}"
            )
        plan = in_grids
    elif out_grids is None:
        raise TypeError(
            "out_grids must be a sequence of (height, width) pairs where in_grids is not a "
            "PoolPlan, got NoneType"
        )
    else:
        plan = plan_pooling(in_grids, out_grids)
    if x.shape[0] != plan.num_patches:
        raise ValueError(
            f"x must have one row per patch: in_grids of {plan.num_images} images hold "
            f"{plan.num_patches} patches, but x has {x.shape[0]} rows"
        )
    return plan


def check_norm(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, *, prefix: str
) -> None:
    """Check LayerNorm's parameters against the width of ``x``."""
    if weight is None and bias is not None:
        raise ValueError(f"{prefix}bias needs {prefix}weight: got a bias and no weight")
    for name, parameter in ((f"{prefix}weight", weight), (f"{prefix}bias", bias)):
        if parameter is not None:
            check_tensor(name, parameter)
            check_float(name, parameter)
            check_shape(name, parameter, (x.shape[1],), "C")
            check_like(name, parameter, "x", x)


# ---- The fused op: kernels and autograd.


def _fused_pool_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    grids: torch.Tensor,
    cells: int,
    mode: str,
    eps: float,
) -> torch.Tensor:
    return launch_pool_norm_forward(x, weight, bias, grids, cells, mode, eps, x.dtype, False)[0]


class PoolNorm(torch.autograd.Function):
    """Keep normalised rows and one float a row where x or the weight requires grad.

    Without a norm the op is linear: where backward is recorded, ops with derivatives run it.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *arguments: Any) -> torch.Tensor:
        weight, bias, grids, _, mode, _ = arguments
        needs_x, needs_weight, *_ = ctx.needs_input_grad
        out, normalised, inverse_std = pool_norm_forward.below(
            x, *arguments, x.dtype, needs_x or needs_weight
        )
        ctx.save_for_backward(normalised, inverse_std, weight, grids)
        ctx.batch = x.shape[0], mode
        ctx.has_norm = weight is not None
        ctx.dtypes = x.dtype, *dtypes_of(weight, bias)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Gradients:
        if not ctx.has_norm and torch.is_grad_enabled() and not is_transformed():
            *_, grids = ctx.saved_tensors  # once in a backward, or checkpointing refuses
            return reference.spread(grad, grids, *ctx.batch).to(ctx.dtypes[0]), *(None,) * 6
        return _kernel_backward(ctx, grad)


@differentiable_once
def _kernel_backward(ctx: Any, grad: torch.Tensor) -> Gradients:
    kept = *ctx.saved_tensors, *ctx.batch
    grads = pool_norm_gradients(grad, kept, ctx.needs_input_grad, ctx.dtypes)
    return *grads, *(None,) * 4


class PoolNormOnHost(torch.autograd.Function):
    """Record what an eager call has computed: ``kept`` is all but the tensors that it was given."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: Any, bias: Any, kept: tuple[Any, ...]
    ) -> torch.Tensor:
        out, normalised, inverse_std, *ctx.batch = kept
        ctx.save_for_backward(normalised, inverse_std, weight)
        result: torch.Tensor = out
        return result

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Gradients:
        normalised, inverse_std, weight = saved = ctx.saved_tensors
        plan, tables, mode = ctx.batch
        if is_eager() and not torch.is_grad_enabled():
            grads = native.gradients_at_once(
                *(grad, normalised, inverse_std, weight, tables), ctx.needs_input_grad[:3]
            )
            if grads is not None:
                return *grads, None
        if normalised is None:
            saved = grad.new_empty(0), grad.new_empty(0), weight
        context = UnpackedContext(
            saved_tensors=(*saved, plan.grids),
            needs_input_grad=ctx.needs_input_grad[:3],
            batch=(plan.num_patches, mode),
            has_norm=weight is not None,
            dtypes=(grad.dtype,) * 3,  # those that are taken at once are of one dtype
        )
        return *PoolNorm.backward(context, grad)[:3], None


_record_on_host = record_apply(PoolNormOnHost)


def _on_host(
    x: torch.Tensor,
    in_grids: Sequence[Grid] | PoolPlan,
    out_grids: Sequence[Grid] | None,
    mode: str,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> torch.Tensor | None:
    """Return the result of an eager call; None where arguments are unusual, or wrong."""
    if select_backend("pool_norm") != "native":
        return None
    plan, tables = host_plan(in_grids, out_grids, mode, eps)
    if plan is None or tables is None:
        return None
    if not (torch.is_grad_enabled() and torch._C._any_requires_grad(x, weight, bias)):
        out: torch.Tensor = native.pool_norm_at_once(
            x, weight, bias, eps, tables, plan.num_cells, False
        )
        return out
    needs_rows = x.requires_grad or (weight is not None and weight.requires_grad)
    results = native.pool_norm_at_once(x, weight, bias, eps, tables, plan.num_cells, needs_rows)
    if results is None:
        return None
    if not needs_rows:
        results = results, None, None
    result: torch.Tensor = _record_on_host(x, weight, bias, (*results, plan, tables, mode))
    return result


class PoolNormOnDevice(torch.autograd.Function):
    """Record the call that computed the last argument: its results, grids and mode."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: Any, bias: Any, kept: tuple[Any, ...]
    ) -> torch.Tensor:
        out, normalised, inverse_std, grids, mode = kept
        ctx.save_for_backward(normalised, inverse_std, weight, grids)
        ctx.batch = x.shape[0], mode
        ctx.has_norm = weight is not None
        ctx.dtypes = x.dtype, *dtypes_of(weight, bias)
        result: torch.Tensor = out
        return result

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Gradients:
        return *PoolNorm.backward(ctx, grad)[:3], None


_record_on_device = record_apply(PoolNormOnDevice)


def _on_device(
    x: torch.Tensor,
    in_grids: Sequence[Grid] | PoolPlan,
    out_grids: Sequence[Grid] | None,
    mode: str,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> torch.Tensor | None:
    """Return the result of a call of a kind that came before; None for other calls."""
    plan = device_plan(in_grids, out_grids, mode, eps)
    if plan is None:
        return None
    key = call_key("pool_norm", (x, weight, bias), plan, mode, eps)
    call = None if key is None else find_record(key)
    if key is None or call is None:
        return None
    if call is SEEN:
        check_plan(x, in_grids, out_grids)
        check_mode(mode)
        check_eps(eps)
        check_norm(x, weight, bias, prefix="")
        if beyond_triton(x):
            return None
        tensors = x, weight, bias
        needs = needs_grad(tensors)
        results, stage = record_pooling(tensors, plan, mode, eps, x.dtype, any(needs[:2]))
        is_differentiated = bool(needs)
        keep_record(key, (stage, is_differentiated))
    else:
        stage, is_differentiated = call
        results = stage.repeat((x, weight, bias))
    if not is_differentiated:
        out: torch.Tensor = results[0]
        return out
    recorded: torch.Tensor = _record_on_device(x, weight, bias, (*results, plan.grids, mode))
    return recorded


def record_pooling(
    tensors: tuple[torch.Tensor | None, ...],
    plan: PoolPlan,
    mode: str,
    eps: float,
    dtype: torch.dtype,
    save: bool,
) -> tuple[tuple[torch.Tensor, ...], RecordedStage]:
    """Run and record the forward stage on x, weight and bias."""
    x: Any = tensors[0]
    grids = grids_of(plan)
    tables = () if len(grids) == 0 else pooling_tables(grids, mode, x.device)
    tensors_of_tables = [value for value in tables if isinstance(value, torch.Tensor)]
    others = grids, plan.num_cells, mode, eps, dtype, save
    return record_stage(launch_pool_norm_forward, tensors, others, tensors_of_tables)


def device_plan(
    in_grids: Sequence[Grid] | PoolPlan, out_grids: Sequence[Grid] | None, mode: str, eps: float
) -> PoolPlan | None:
    """Return the plan of an eager call; None where an argument is unusual."""
    if type(eps) is not float or type(mode) is not str:
        return None
    if type(in_grids) is PoolPlan:
        return in_grids if out_grids is None else None
    return None if out_grids is None else plan_eagerly(in_grids, out_grids)  # type: ignore[arg-type]


def host_plan(
    in_grids: Sequence[Grid] | PoolPlan, out_grids: Sequence[Grid] | None, mode: str, eps: float
) -> tuple[PoolPlan | None, native.HostTables | None]:
    """Return the plan and the tables of an eager call; None where an argument is unusual."""
    if type(eps) is not float or not 0 < eps < float("inf") or mode not in MODES:
        return None, None
    if type(in_grids) is PoolPlan:
        plan = in_grids if out_grids is None else None
    else:
        plan = None if out_grids is None else plan_eagerly(in_grids, out_grids)  # type: ignore[arg-type]
    return plan, None if plan is None else native.host_tables(plan, mode)


def pool_norm_gradients(
    grad: torch.Tensor,
    kept: tuple[Any, ...],
    needs: Sequence[bool],
    dtypes: Sequence[torch.dtype | None],
) -> Gradients:
    """Return the gradients of x, weight and bias, each in its own dtype; None where not needed.

    ``kept`` has the arguments of the stage from ``normalised`` to ``mode``.
    """
    dtype = dtypes[0] if needs[0] else None
    grads = pool_norm_backward(grad, *kept, dtype, needs[1], needs[2])
    wanted = zip(grads, needs[:3], dtypes, strict=True)
    return tuple(result.to(dtype) if needed else None for result, needed, dtype in wanted)


def dtypes_of(*tensors: torch.Tensor | None) -> list[torch.dtype | None]:
    """Return the dtype of each tensor, None for None."""
    return [None if tensor is None else tensor.dtype for tensor in tensors]


fused_pool_norm = define_fused(
    "pool_norm",
    lambda x, weight, bias, grids, cells, mode, eps: x.new_empty(cells, x.shape[1]),
    _fused_pool_norm,
    PoolNorm,
)
