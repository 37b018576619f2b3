"""`swiglu`: the gated unit, two matrix products and their gate in one op.

out = silu(x Wg^T + bg) * (x Wu^T + bu)            x: [T, C], Wg and Wu: [H, C] -> [T, H]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tokenflex_kernels.backend import compiled_extension, select_backend
from tokenflex_kernels.call_records import (
    SEEN,
    are_same,
    call_key,
    find_record,
    keep_record,
    needs_grad,
    record_stage,
)
from tokenflex_kernels.checks import check_float, check_linear, check_tensor, in_autocast_dtype
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
from tokenflex_kernels.swiglu import native, reference
from tokenflex_kernels.swiglu.stages import (
    beyond_triton,
    down_gradient,
    gate_up,
    input_gradient,
    launch_gate_up,
    transposed_product,
)

Gradients = tuple[torch.Tensor | None, ...]


def swiglu(
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    up_weight: torch.Tensor,
    gate_bias: torch.Tensor | None = None,
    up_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """silu(x Wg^T + bg) * (x Wu^T + bu); the weights are those of two plain Linears.

    The kernels have first derivatives only; the reference has all.

    Args:
        x: float [T, C].
        gate_weight: float [H, C], the branch that SiLU is applied to.
        up_weight: float [H, C].
        gate_bias: float [H] or None.
        up_bias: float [H] or None.

    Returns:
        [T, H] in the dtype that two Linears would give: that of ``x``, or autocast's.

    Raises:
        TypeError: an argument is not a tensor or of a dtype that does not go with ``x``.
        ValueError: shapes or devices do not fit together.
    """
    if is_ordinary(x):
        out = _on_host(x, gate_weight, up_weight, gate_bias, up_bias)
        if out is not None:
            return out
    if may_be_recorded("swiglu", x):
        out = _on_device(x, gate_weight, up_weight, gate_bias, up_bias)
        if out is not None:
            return out
    weights = _checked(x, gate_weight, up_weight, gate_bias, up_bias)
    if choose_backend("swiglu", x, beyond_triton=beyond_triton(x)) != "reference":
        return fused_swiglu(*in_autocast_dtype(x.device, x, *weights))
    return reference.swiglu(x, *weights)


def _checked(
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    up_weight: torch.Tensor,
    gate_bias: torch.Tensor | None,
    up_bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Check the tensors; return the weights and biases in the dtype for products with x."""
    check_tensor("x", x, ndim=2)
    check_float("x", x)
    width = x.shape[1]
    gate_weight, gate_bias = check_linear("gate", gate_weight, gate_bias, x, width, "H, C")
    rows = gate_weight.shape[0]
    up_weight, up_bias = check_linear("up", up_weight, up_bias, x, width, "H, C", rows)
    return gate_weight, up_weight, gate_bias, up_bias


# ---- The fused op: kernels and autograd.


def _fused_swiglu(
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    up_weight: torch.Tensor,
    gate_bias: torch.Tensor | None,
    up_bias: torch.Tensor | None,
) -> torch.Tensor:
    return launch_gate_up(x, gate_weight, up_weight, gate_bias, up_bias, True, False)[0]


class Swiglu(torch.autograd.Function):
    """Keep gate and up, 2 H a row, and the inputs that the wanted gradients need."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *weights: torch.Tensor | None) -> torch.Tensor:
        product, gate, up = gate_up.below(x, *weights, True, True)
        _save_for_backward(ctx, x, weights, gate, up)
        return product

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: torch.Tensor) -> Gradients:
        x, gate_weight, up_weight, gate, up = ctx.saved_tensors
        needs_x, *needs = ctx.needs_input_grad
        grads, _, bias = down_gradient(grad, None, gate, up, False, needs[2] or needs[3])
        return (
            input_gradient(grads, gate_weight, up_weight) if needs_x else None,
            *weight_gradients(grads, bias, x, needs),
        )


def _save_for_backward(
    ctx: Any,
    x: torch.Tensor,
    weights: Sequence[torch.Tensor | None],
    gate: torch.Tensor,
    up: torch.Tensor,
) -> None:
    """Save what the gradients that are needed are computed from; None in the place of the rest."""
    needs_x, *needs_weights = ctx.needs_input_grad[:3]
    kept_x = x if any(needs_weights) else None
    ctx.save_for_backward(kept_x, *(weights[:2] if needs_x else (None, None)), gate, up)


class SwigluOnHost(torch.autograd.Function):
    """Record the eager call that computed the last argument: product, gate and up."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> torch.Tensor:
        x, *weights, (product, gate, up) = arguments
        _save_for_backward(ctx, x, weights, gate, up)
        result: torch.Tensor = product
        return result

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Gradients:
        saved = ctx.saved_tensors
        if is_eager() and not torch.is_grad_enabled():
            x, gate_weight, up_weight, gate, up = saved
            needs_x, *needs = ctx.needs_input_grad[:5]
            results = native.gate_gradients_at_once(
                grad, gate, up, product=False, sums=needs[2] or needs[3]
            )
            if results is not None:
                grads, _, sums = results
                d_x = native.input_gradient(grads, gate_weight, up_weight) if needs_x else None
                return d_x, *native.weight_gradients_at_once(grads, sums, x, needs), None
        context = UnpackedContext(saved_tensors=saved, needs_input_grad=ctx.needs_input_grad[:5])
        return *Swiglu.backward(context, grad), None


_record_on_host = record_apply(SwigluOnHost)


def _on_host(
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    up_weight: torch.Tensor,
    gate_bias: torch.Tensor | None,
    up_bias: torch.Tensor | None,
) -> torch.Tensor | None:
    """Return the result of an eager call; None where arguments are unusual, or wrong."""
    weights = gate_weight, up_weight, gate_bias, up_bias
    if (
        select_backend("swiglu") != "native"
        or torch.is_autocast_enabled("cpu")
        or not compiled_extension().fit_tensors(x, gate_weight, gate_bias, up_weight, up_bias)
    ):
        return None
    records = torch.is_grad_enabled() and torch._C._any_requires_grad(x, *weights)
    with torch._C._AutoDispatchBelowAutograd():
        results = native.gate_up_at_once(x, *weights, save=records)
    out: torch.Tensor = _record_on_host(x, *weights, results) if records else results[0]
    return out


class SwigluOnDevice(torch.autograd.Function):
    """Record the call that computed the last argument: product, gate and up."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> torch.Tensor:
        x, *weights, (product, gate, up) = arguments
        _save_for_backward(ctx, x, weights, gate, up)
        result: torch.Tensor = product
        return result

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Gradients:
        return *Swiglu.backward(ctx, grad), None


_record_on_device = record_apply(SwigluOnDevice)


def _on_device(
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    up_weight: torch.Tensor,
    gate_bias: torch.Tensor | None,
    up_bias: torch.Tensor | None,
) -> torch.Tensor | None:
    """Return the result of a call of a kind that came before; None for other calls."""
    tensors = x, gate_weight, up_weight, gate_bias, up_bias
    key = call_key("swiglu", tensors)
    call = None if key is None else find_record(key)
    if key is None or call is None:
        return None
    if call is SEEN:
        weights = _checked(*tensors)
        if not are_same(weights, tensors[1:]) or beyond_triton(x):
            return None
        is_differentiated = bool(needs_grad(tensors))
        results, stage = record_stage(launch_gate_up, tensors, (True, is_differentiated))
        keep_record(key, (stage, is_differentiated))
    else:
        stage, is_differentiated = call
        results = stage.repeat(tensors)
    if not is_differentiated:
        out: torch.Tensor = results[0]
        return out
    recorded: torch.Tensor = _record_on_device(*tensors, results)
    return recorded


def weight_gradients(
    grads: torch.Tensor, bias: torch.Tensor, x: torch.Tensor | None, needs: Sequence[bool]
) -> Gradients:
    """Return the gradients of gate weight, up weight, gate bias and up bias; None if not needed.

    Args:
        grads: of gate and up, [T, 2H].
        bias: the sums of ``grads`` over rows, [2H].
        x: [T, C]; may be None where no weight needs a gradient.
        needs: whether each of the four needs a gradient.
    """
    halves = [grads.shape[1] // 2] * 2
    weights: Sequence[torch.Tensor | None] = (None, None)
    if x is not None and needs[0] and needs[1]:
        weights = transposed_product(grads, x).split(halves)  # one product for both
    elif x is not None:
        parts = grads.split(halves, dim=1)
        weights = [
            transposed_product(part, x) if needs[i] else None for i, part in enumerate(parts)
        ]
    biases = bias.to(grads.dtype).split(halves) if needs[2] or needs[3] else (None, None)
    return *weights, *(part if needs[2 + i] else None for i, part in enumerate(biases))


fused_swiglu = define_fused(
    "swiglu",
    lambda x, gate_weight, up_weight, gate_bias, up_bias: x.new_empty(
        x.shape[0], gate_weight.shape[0]
    ),
    _fused_swiglu,
    Swiglu,
)
