"""`project_tokens`: the token-adaptive projector as one differentiable op.

    tokens = LayerNorm(pool(x))                                   [sum h*w, C]
    out = (silu(tokens Wg^T + bg) * (tokens Wu^T + bu)) Wd^T + bd     [sum h*w, D]

Source: TokenFLEX, arXiv 2504.03154; the projector of the released LiAutoAD/Ristretto-3B.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from tokenflex_kernels.backend import select_backend
from tokenflex_kernels.call_records import (
    SEEN,
    are_same,
    call_key,
    find_record,
    keep_record,
    needs_grad,
)
from tokenflex_kernels.checks import (
    Grid,
    check_eps,
    check_linear,
    check_tensor,
    in_autocast_dtype,
)
from tokenflex_kernels.library import (
    UnpackedContext,
    below_autograd,
    choose_backend,
    define_fused,
    differentiable_once,
    is_eager,
    is_ordinary,
    may_be_recorded,
    record_apply,
)
from tokenflex_kernels.pool_norm.axis_weights import check_mode
from tokenflex_kernels.pool_norm.op import (
    beyond_triton,
    check_norm,
    check_plan,
    device_plan,
    dtypes_of,
    host_plan,
    pool_norm_gradients,
)
from tokenflex_kernels.pool_norm.plan import PoolPlan, grids_of
from tokenflex_kernels.pool_norm.stages import (
    launch_pool_norm_forward,
    pool_norm_forward,
    scale_shift,
)
from tokenflex_kernels.project_tokens import native, recorded, reference
from tokenflex_kernels.project_tokens.weights import ProjectorWeights
from tokenflex_kernels.swiglu.op import weight_gradients
from tokenflex_kernels.swiglu.stages import (
    down_gradient,
    gate_up,
    input_gradient,
    launch_gate_up,
    linear,
    transposed_product,
)

Gradients = tuple[torch.Tensor | None, ...]

SAVE_CHOICES = ("preactivation", "input")


def project_tokens(
    x: torch.Tensor,
    in_grids: Sequence[Grid] | PoolPlan,
    out_grids: Sequence[Grid] | None = None,
    *,
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
    """Pool, normalise and project patches into vision tokens, each image to its own grid.

    The kernels have first derivatives only; the reference has all.

    Args:
        x: float [sum of H*W, C], the images' patches one image after another, row-major.
        in_grids: one (H, W) per image, host ints; or the batch's :func:`plan_pooling`.
        out_grids: one (h, w) per image, host ints: image i becomes h*w tokens; nothing beside a
            plan.
        norm_weight: float [C].
        norm_bias: float [C] or None.
        gate_weight: float [H, C].
        gate_bias: float [H] or None.
        up_weight: float [H, C].
        up_bias: float [H] or None.
        down_weight: float [D, H].
        down_bias: float [D] or None.
        mode: "adaptive" or "resize", see :func:`tokenflex_kernels.pool_norm`.
        eps: of the LayerNorm.
        save: what training keeps for backward: "preactivation" keeps gate and up, "input" keeps
            the pooled rows and computes gate and up again (one more matrix product, less memory).

    Returns:
        [sum of h*w, D] in the dtype that the last Linear would give: that of ``x``, or autocast's.

    Raises:
        TypeError: an argument is not a tensor or of a dtype that does not go with ``x``.
        ValueError: shapes, devices, grids, ``mode`` or ``save`` do not fit together.
    """
    tensors = (x, norm_weight, norm_bias, gate_weight, gate_bias,
               up_weight, up_bias, down_weight, down_bias)  # fmt: skip
    if is_ordinary(x):
        out = _on_host(x, in_grids, out_grids, ProjectorWeights(*tensors[1:]), mode, eps, save)
        if out is not None:
            return out
    if may_be_recorded("project_tokens", x):
        out = _on_device(tensors, in_grids, out_grids, mode, eps, save)
        if out is not None:
            return out
    weights = ProjectorWeights(*tensors[1:])
    plan = check_plan(x, in_grids, out_grids)
    mode, eps, save = check_mode(mode), check_eps(eps), check_save(save)
    weights = check_weights(x, weights)
    if choose_backend("project_tokens", x, beyond_triton=beyond_triton(x)) != "reference":
        weights = in_product_dtype(x, weights)
        return fused_project_tokens(x, *weights, grids_of(plan), plan.num_cells, mode, eps, save)
    return reference.project_tokens(x, plan, weights, mode=mode, eps=eps, save=save)


def check_weights(x: torch.Tensor, weights: ProjectorWeights) -> ProjectorWeights:
    """Check the projector's weights; return those of Linears in the dtype for products with x."""
    norm_weight, norm_bias, gate_weight, gate_bias, up_weight, up_bias = weights[:6]
    check_tensor("norm_weight", norm_weight)
    check_norm(x, norm_weight, norm_bias, prefix="norm_")
    width = x.shape[1]
    gate_weight, gate_bias = check_linear("gate", gate_weight, gate_bias, x, width, "H, C")
    hidden = gate_weight.shape[0]
    up_weight, up_bias = check_linear("up", up_weight, up_bias, x, width, "H, C", hidden)
    down_weight, down_bias = check_linear(
        "down", weights.down_weight, weights.down_bias, x, hidden, "D, H"
    )
    linears = gate_weight, gate_bias, up_weight, up_bias, down_weight, down_bias
    return ProjectorWeights(norm_weight, norm_bias, *linears)


def in_product_dtype(x: torch.Tensor, weights: ProjectorWeights) -> ProjectorWeights:
    """Return checked weights with those of Linears in autocast's dtype, if it is on."""
    linears: Any = in_autocast_dtype(x.device, *weights[2:])
    return ProjectorWeights(*weights[:2], *linears)


def check_save(save: object) -> str:
    """Check that ``save`` is one of ``SAVE_CHOICES``, and return it."""
    if save not in SAVE_CHOICES:
        raise ValueError(f"save must be one of {', '.join(SAVE_CHOICES)}, got {save!r}")
    return str(save)


# ---- The fused op: kernels and autograd.


def _fused_project_tokens(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor | None,
    gate_weight: torch.Tensor,
    gate_bias: torch.Tensor | None,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    grids: torch.Tensor,
    cells: int,
    mode: str,
    eps: float,
    save: str,
) -> torch.Tensor:
    tokens, _, _ = launch_pool_norm_forward(
        x, norm_weight, norm_bias, grids, cells, mode, eps, gate_weight.dtype, False
    )
    product, _, _ = launch_gate_up(tokens, gate_weight, up_weight, gate_bias, up_bias, True, False)
    return linear(product, down_weight, down_bias)


def _split(arguments: tuple[Any, ...]) -> tuple[ProjectorWeights, tuple[Any, ...]]:
    """Return the weights, and grids, cells, mode, eps and save."""
    return ProjectorWeights(*arguments[:8]), arguments[8:]


def _shape(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    weights, (_, cells, *_) = _split(arguments)
    return x.new_empty(cells, weights.down_weight.shape[0], dtype=weights.gate_weight.dtype)


class ProjectTokens(torch.autograd.Function):
    """Keep for a token of C features and H hidden, where an input or weight requires grad:

    ``save="preactivation"``: normalised (C), gate and up (2 H), one float;
    ``save="input"``: normalised (C), one float; gate and up are computed again.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *arguments: Any) -> torch.Tensor:
        weights, (grids, cells, mode, eps, save) = _split(arguments)
        product, saved = keep_for_tokens(ctx, x, weights, grids, cells, mode, eps, save)
        ctx.save_for_backward(*saved)
        with below_autograd():
            return linear(product, weights.down_weight, weights.down_bias)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: torch.Tensor) -> Gradients:
        return *gradients_of_tokens(ctx, ctx.saved_tensors, grad), *(None,) * 5


def keep_for_tokens(
    ctx: Any,
    x: torch.Tensor,
    weights: ProjectorWeights,
    grids: torch.Tensor,
    cells: int,
    mode: str,
    eps: float,
    save: str,
) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...]]:
    """Return the input of the down projection, [T, H], and what to save for its gradients.

    ``ctx`` is of a Function of x and the weights, which come first, and keeps the other arguments
    of :func:`gradients_of_tokens`.
    """
    needs = ProjectorWeights(*ctx.needs_input_grad[1:9])
    through_gate = any(ctx.needs_input_grad[:7])
    keep_gate_up = through_gate and save == "preactivation"
    # Where nothing before the down projection is trained, its input is all that it needs.
    keep_product = needs.down_weight and not through_gate and save == "preactivation"
    keep_rows = through_gate or (needs.down_weight and save == "input")
    norm, dtype = weights[:2], weights.gate_weight.dtype
    tokens, normalised, inverse_std = pool_norm_forward.below(
        x, *norm, grids, cells, mode, eps, dtype, keep_rows
    )
    product, gate, up = gate_up.below(tokens, *weights.gated_unit, True, keep_gate_up)
    kept_product = product if keep_product else None
    ctx.batch, ctx.save = (x.shape[0], mode), save
    ctx.norm_dtypes = dtypes_of(x, *norm)
    return product, (normalised, inverse_std, gate, up, kept_product, *weights[:-1], grids)


def gradients_of_tokens(
    ctx: Any, saved: Sequence[torch.Tensor | None], grad: torch.Tensor
) -> Gradients:
    """Return the gradients of x and the weights from that of the tokens, [T, D]."""
    kept: Any = saved
    normalised, inverse_std, gate, up, product, *saved_weights, grids = kept
    weights = ProjectorWeights._make([*saved_weights, None])
    needs_inputs, needs = ctx.needs_input_grad[:3], ProjectorWeights(*ctx.needs_input_grad[1:9])
    through_gate = any(ctx.needs_input_grad[:7])
    recompute = ctx.save == "input" and (through_gate or needs.down_weight)

    tokens = None
    if needs.gate_weight or needs.up_weight or recompute:
        tokens = scale_shift(normalised, weights.norm_weight, weights.norm_bias)
    if recompute:
        product, gate, up = gate_up(tokens, *weights.gated_unit, not through_gate, through_gate)

    d_inputs: Gradients = (None,) * 3  # x and the norm's
    d_gate = d_gate_bias = d_up = d_up_bias = None
    if through_gate:
        grads, product, bias = down_gradient(
            *(grad, weights.down_weight, gate, up),
            *(needs.down_weight, needs.gate_bias or needs.up_bias),
        )
        d_gate, d_up, d_gate_bias, d_up_bias = weight_gradients(
            grads, bias, tokens, needs.gated_unit
        )
        if any(needs_inputs):
            d_inputs = pool_norm_gradients(
                input_gradient(grads, weights.gate_weight, weights.up_weight),
                (normalised, inverse_std, weights.norm_weight, grids, *ctx.batch),
                needs_inputs,
                ctx.norm_dtypes,
            )
    d_down = transposed_product(grad, product) if needs.down_weight else None
    d_down_bias = grad.sum(0) if needs.down_bias else None
    return *d_inputs, d_gate, d_gate_bias, d_up, d_up_bias, d_down, d_down_bias


class ProjectTokensOnHost(torch.autograd.Function):
    """Record the eager call that computed the last argument: out, what is kept, and the batch."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *arguments: Any) -> torch.Tensor:
        *weights, (out, kept, ctx.batch) = arguments
        ctx.save_for_backward(*kept, *weights[:-1])
        result: torch.Tensor = out
        return result

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Gradients:
        saved, batch = ctx.saved_tensors, ctx.batch
        if is_eager() and not torch.is_grad_enabled():
            kept, weights = native.Kept(*saved[:5]), ProjectorWeights._make([*saved[5:], None])
            grads = native.backward(grad, kept, weights, batch.tables, ctx.needs_input_grad)
            if grads is not None:
                return *grads, None
        context = UnpackedContext(
            saved_tensors=(*saved, batch.plan.grids),
            needs_input_grad=ctx.needs_input_grad[:9],
            batch=(batch.plan.num_patches, batch.mode),
            save=batch.save,
            norm_dtypes=(grad.dtype,) * 3,  # those that are taken at once are of one dtype
        )
        return *ProjectTokens.backward(context, grad)[:9], None


_record_on_host = record_apply(ProjectTokensOnHost)


def _on_host(
    x: torch.Tensor,
    in_grids: Sequence[Grid] | PoolPlan,
    out_grids: Sequence[Grid] | None,
    weights: ProjectorWeights,
    mode: str,
    eps: float,
    save: str,
) -> torch.Tensor | None:
    """Return the result of an eager call; None where arguments are unusual, or wrong."""
    if (
        save not in SAVE_CHOICES
        or weights.norm_weight is None
        or select_backend("project_tokens") != "native"
        or torch.is_autocast_enabled("cpu")
        or not native.fit(x, weights)
    ):
        return None
    plan, tables = host_plan(in_grids, out_grids, mode, eps)
    if plan is None or tables is None:
        return None
    records = torch.is_grad_enabled() and torch._C._any_requires_grad(x, *weights)
    batch = native.Batch(plan, tables, mode, eps, save)
    results = native.forward(x, weights, batch, records)
    if results is None:
        return None
    out: torch.Tensor = _record_on_host(x, *weights, (*results, batch)) if records else results[0]
    return out


class ProjectTokensOnDevice(torch.autograd.Function):
    """Record the call that computed the last argument: out, what is kept, and the batch."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *arguments: Any) -> torch.Tensor:
        *weights, (out, kept, grids, mode, save) = arguments
        ctx.save_for_backward(*kept, *weights[:-1], grids)
        ctx.batch, ctx.save = (x.shape[0], mode), save
        ctx.norm_dtypes = dtypes_of(x, *weights[:2])
        result: torch.Tensor = out
        return result

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Gradients:
        return *ProjectTokens.backward(ctx, grad)[:9], None


_record_on_device = record_apply(ProjectTokensOnDevice)


def _on_device(
    tensors: tuple[Any, ...],
    in_grids: Sequence[Grid] | PoolPlan,
    out_grids: Sequence[Grid] | None,
    mode: str,
    eps: float,
    save: str,
) -> torch.Tensor | None:
    """Return the result of a call of a kind that came before; None for other calls.

    ``tensors`` are x and the weights.
    """
    plan = device_plan(in_grids, out_grids, mode, eps)
    if plan is None or type(save) is not str:
        return None
    key = call_key("project_tokens", tensors, plan, mode, eps, save)
    call = None if key is None else find_record(key)
    if key is None or call is None:
        return None
    if call is SEEN:
        x, weights = tensors[0], ProjectorWeights(*tensors[1:])
        check_plan(x, in_grids, out_grids)
        check_mode(mode)
        check_eps(eps)
        check_save(save)
        if not are_same(check_weights(x, weights), weights) or beyond_triton(x):
            return None
        needs = needs_grad(tensors)
        product, kept, call = recorded.record(x, weights, plan, mode, eps, save, needs)
        keep_record(key, call)
    else:
        product, kept = call.repeat(tensors)
    down_weight, down_bias = tensors[7:]
    if not call.is_differentiated:
        return F.linear(product, down_weight, down_bias)
    with torch._C._AutoDispatchBelowAutograd():
        out = F.linear(product, down_weight, down_bias)
    result: torch.Tensor = _record_on_device(*tensors, (out, kept, plan.grids, mode, save))
    return result


fused_project_tokens = define_fused("project_tokens", _shape, _fused_project_tokens, ProjectTokens)
