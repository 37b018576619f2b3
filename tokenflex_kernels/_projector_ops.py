"""The projector's kernels as torch.library ops: kernels, the shapes of their results, autograd.

    pool_norm        x -> pool -> LayerNorm                     = pool_norm_forward
    swiglu           x -> silu(gate) * up                       = gate_up
    project_tokens   the two and the down projection            = both, and PyTorch's product

Each is one op with one ``autograd.Function``. A compiler looks through them and sees the stages,
which are ops of their own: ``pool_norm_forward``, ``pool_norm_backward``, ``scale_shift``,
``gate_up``, ``down_gradient`` and ``input_gradient``.

A stage computes what it is asked for and no more: whether an input requires grad decides what
forward keeps and which products backward runs. What is kept for a token of C features, H hidden:

    save="preactivation"   normalised (C), gate and up (2 H), one float
    save="input"           normalised (C), one float; gate and up are computed again

The ops trust their arguments; ``pooling``, ``gated_unit`` and ``projection`` check. The batch's
grids travel as a small tensor on the host (``PoolPlan.grids``), beside the one number of rows that
a compiler must know, so no length is ever read back from the device. Triton is imported by the
first call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch

from tokenflex_kernels.launch_configs import Config, architecture, launch_config
from tokenflex_kernels.library import (
    apply,
    batch,
    below_autograd,
    define,
    differentiable_once,
    differentiate,
    has_tangent,
    one_by_one,
    refuse_derivatives,
    requires_grad,
)
from tokenflex_kernels.pooling_tables import pooling_tables

Tensors = tuple[torch.Tensor, ...]
Gradients = tuple[torch.Tensor | None, ...]


@cache
def _kernels() -> SimpleNamespace:
    """The launchers. A function, because importing them imports Triton."""
    from tokenflex_kernels.triton_kernels import down_gradient, gate_up, input_gradient, pooling

    return SimpleNamespace(
        pool_norm_forward=pooling.pool_norm_forward,
        pool_norm_backward=pooling.pool_norm_backward,
        mostly_idle=pooling.mostly_idle,
        norm_gradient=pooling.norm_gradient,
        scale_shift=pooling.scale_shift,
        gate_up=gate_up.gate_up,
        down_gradient=down_gradient.down_gradient,
        input_gradient=input_gradient.input_gradient,
    )


def _config(stage: str, like: torch.Tensor, rows: int) -> Any:
    config: Config | None = launch_config(stage, rows, like.dtype, architecture(like.device))
    return config


# ---- stages


def _pool_norm_forward(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    grids: torch.Tensor,
    cells: int,
    mode: str,
    eps: float,
    dtype: torch.dtype,
    save: bool,
) -> Tensors:
    """out [cells, C]; normalised [cells, C] and inverse_std [cells] if ``save``, else no rows."""
    if len(grids) == 0:
        return _pool_norm_shapes(x, weight, bias, grids, cells, mode, eps, dtype, save)
    tables = pooling_tables(grids, mode, x.device)
    result: Tensors = _kernels().pool_norm_forward(
        x,
        weight,
        bias,
        tables,
        eps=eps,
        dtype=dtype,
        save=save,
        config=_config("pool_norm_forward", x, cells),
    )
    return result


def _pool_norm_shapes(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    grids: torch.Tensor,
    cells: int,
    mode: str,
    eps: float,
    dtype: torch.dtype,
    save: bool,
) -> Tensors:
    saved = cells if save and weight is not None else 0
    return (
        x.new_empty(cells, x.shape[1], dtype=dtype),
        x.new_empty(saved, x.shape[1], dtype=dtype),
        x.new_empty(saved, dtype=torch.float32),
    )


def _pool_norm_backward(
    grad: torch.Tensor,
    normalised: torch.Tensor,
    inverse_std: torch.Tensor,
    weight: torch.Tensor | None,
    grids: torch.Tensor,
    patches: int,
    mode: str,
    dtype: torch.dtype | None,
    grad_weight: bool,
    grad_bias: bool,
) -> Tensors:
    """The gradients of x [patches, C] in ``dtype``, weight and bias [C]; unwanted: no elements."""
    if len(grids) == 0:
        results = _pool_norm_backward_shapes(
            *(grad, normalised, inverse_std, weight, grids, patches, mode, dtype),
            *(grad_weight, grad_bias),
        )
        return tuple(result.zero_() for result in results)
    kernels = _kernels()
    wanted = {"grad_weight": grad_weight, "grad_bias": grad_bias}
    tables = pooling_tables(grids, mode, grad.device)
    gather = _config("pool_norm_backward", grad, patches)
    grads: Gradients = (None, None, None)
    if any(wanted.values()) and (dtype is None or kernels.mostly_idle(tables, gather)):
        config = _config("norm_gradient", grad, grad.shape[0])
        grads = None, *kernels.norm_gradient(grad, normalised, **wanted, config=config)
        wanted = dict.fromkeys(wanted, False)
    if dtype is not None:
        grad_x, *sums = kernels.pool_norm_backward(
            grad, normalised, inverse_std, weight, tables, dtype=dtype, **wanted, config=gather
        )
        grads = grad_x, *(sums if any(wanted.values()) else grads[1:])
    return tuple(grad.new_empty(0) if result is None else result for result in grads)


def _pool_norm_backward_shapes(
    grad: torch.Tensor,
    normalised: torch.Tensor,
    inverse_std: torch.Tensor,
    weight: torch.Tensor | None,
    grids: torch.Tensor,
    patches: int,
    mode: str,
    dtype: torch.dtype | None,
    grad_weight: bool,
    grad_bias: bool,
) -> Tensors:
    width = grad.shape[1]
    return (
        grad.new_empty(0) if dtype is None else grad.new_empty(patches, width, dtype=dtype),
        grad.new_empty(width, dtype=torch.float32) if grad_weight else grad.new_empty(0),
        grad.new_empty(width, dtype=torch.float32) if grad_bias else grad.new_empty(0),
    )


def _scale_shift(
    normalised: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    config = _config("scale_shift", normalised, normalised.shape[0])
    out: torch.Tensor = _kernels().scale_shift(normalised, weight, bias, config=config)
    return out


def _gate_up(
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    up_weight: torch.Tensor,
    gate_bias: torch.Tensor | None,
    up_bias: torch.Tensor | None,
    product: bool,
    save: bool,
) -> Tensors:
    """silu(gate) * up if ``product``, gate and up if ``save``: [T, H] each, else no rows."""
    if x.shape[0] == 0:
        return _gate_up_shapes(x, gate_weight, up_weight, gate_bias, up_bias, product, save)
    result: Tensors = _kernels().gate_up(
        x,
        gate_weight,
        up_weight,
        gate_bias,
        up_bias,
        product=product,
        save=save,
        config=_config("gate_up", x, x.shape[0]),
        pointwise=_config("pointwise", x, x.shape[0]),
    )
    return result


def _gate_up_shapes(
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    up_weight: torch.Tensor,
    gate_bias: torch.Tensor | None,
    up_bias: torch.Tensor | None,
    product: bool,
    save: bool,
) -> Tensors:
    rows, hidden = x.shape[0], gate_weight.shape[0]
    saved = rows if save else 0
    return (
        x.new_empty(rows if product else 0, hidden),
        x.new_empty(saved, hidden),
        x.new_empty(saved, hidden),
    )


def _down_gradient(
    dy: torch.Tensor,
    down_weight: torch.Tensor | None,
    gate: torch.Tensor,
    up: torch.Tensor,
    product: bool,
    bias: bool,
) -> Tensors:
    """The gradients of gate and up [T, 2H]; product [T, H] and the biases' float32 [2H] if asked.

    ``dy`` is the gradient of the down projection's result, or of its input if there is no weight.
    """
    if gate.shape[0] == 0:
        shapes = _down_gradient_shapes(dy, down_weight, gate, up, product, bias)
        return tuple(result.zero_() for result in shapes)
    result: Tensors = _kernels().down_gradient(
        dy,
        down_weight,
        gate,
        up,
        product=product,
        bias=bias,
        config=_config("down_gradient", gate, gate.shape[0]),
        pointwise=_config("pointwise", gate, gate.shape[0]),
    )
    return result


def _down_gradient_shapes(
    dy: torch.Tensor,
    down_weight: torch.Tensor | None,
    gate: torch.Tensor,
    up: torch.Tensor,
    product: bool,
    bias: bool,
) -> Tensors:
    rows, hidden = gate.shape
    return (
        gate.new_empty(rows, 2 * hidden),
        gate.new_empty(rows if product else 0, hidden),
        gate.new_empty(2 * hidden, dtype=torch.float32)
        if bias
        else gate.new_empty(0, 2 * hidden, dtype=torch.float32),
    )


def _input_gradient(
    grads: torch.Tensor, gate_weight: torch.Tensor, up_weight: torch.Tensor
) -> torch.Tensor:
    """d gate Wg + d up Wu: [T, 2H] -> [T, C]."""
    if grads.shape[0] == 0:
        return grads.new_empty(0, gate_weight.shape[1])
    config = _config("input_gradient", grads, grads.shape[0])
    out: torch.Tensor = _kernels().input_gradient(grads, gate_weight, up_weight, config=config)
    return out


_NORM = "Tensor? weight, Tensor? bias"
_POOLED = "Tensor grids, SymInt cells, str mode"
_GATED = "Tensor gate_weight, Tensor up_weight, Tensor? gate_bias, Tensor? up_bias"

pool_norm_forward = define(
    f"pool_norm_forward(Tensor x, {_NORM}, {_POOLED}, float eps, ScalarType dtype, bool save)",
    _pool_norm_shapes,
    _pool_norm_forward,
    returns="(Tensor, Tensor, Tensor)",
)
pool_norm_backward = define(
    "pool_norm_backward(Tensor grad, Tensor normalised, Tensor inverse_std, Tensor? weight, "
    "Tensor grids, SymInt patches, str mode, ScalarType? dtype, bool grad_weight, bool grad_bias)",
    _pool_norm_backward_shapes,
    _pool_norm_backward,
    returns="(Tensor, Tensor, Tensor)",
)
scale_shift = define(
    "scale_shift(Tensor normalised, Tensor weight, Tensor? bias)",
    lambda normalised, weight, bias: torch.empty_like(normalised),
    _scale_shift,
)
gate_up = define(
    f"gate_up(Tensor x, {_GATED}, bool product, bool save)",
    _gate_up_shapes,
    _gate_up,
    returns="(Tensor, Tensor, Tensor)",
)
down_gradient = define(
    "down_gradient(Tensor dy, Tensor? down_weight, Tensor gate, Tensor up, bool product, "
    "bool bias)",
    _down_gradient_shapes,
    _down_gradient,
    returns="(Tensor, Tensor, Tensor)",
)
input_gradient = define(
    "input_gradient(Tensor grads, Tensor gate_weight, Tensor up_weight)",
    lambda grads, gate_weight, up_weight: grads.new_empty(grads.shape[0], gate_weight.shape[1]),
    _input_gradient,
)


# ---- the ops


def _pool_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    grids: torch.Tensor,
    cells: int,
    mode: str,
    eps: float,
) -> torch.Tensor:
    return _pool_norm_forward(x, weight, bias, grids, cells, mode, eps, x.dtype, False)[0]


def _swiglu(
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    up_weight: torch.Tensor,
    gate_bias: torch.Tensor | None,
    up_bias: torch.Tensor | None,
) -> torch.Tensor:
    return _gate_up(x, gate_weight, up_weight, gate_bias, up_bias, True, False)[0]


def _project_tokens(
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
    tokens, _, _ = _pool_norm_forward(
        x, norm_weight, norm_bias, grids, cells, mode, eps, gate_weight.dtype, False
    )
    product, _, _ = _gate_up(tokens, gate_weight, up_weight, gate_bias, up_bias, True, False)
    return torch.nn.functional.linear(product, down_weight, down_bias)


def _pool_norm_shape(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    grids: torch.Tensor,
    cells: int,
    mode: str,
    eps: float,
) -> torch.Tensor:
    return _pool_norm_shapes(x, weight, bias, grids, cells, mode, eps, x.dtype, False)[0]


def _project_tokens_shape(x: torch.Tensor, *args: Any) -> torch.Tensor:
    _, _, gate_weight, _, _, _, down_weight, _, _, cells, *_ = args
    return x.new_empty(cells, down_weight.shape[0], dtype=gate_weight.dtype)


pool_norm = define(
    f"pool_norm(Tensor x, {_NORM}, {_POOLED}, float eps)", _pool_norm_shape, _pool_norm
)
swiglu = define(
    f"swiglu(Tensor x, {_GATED})",
    lambda x, gate_weight, *rest: x.new_empty(x.shape[0], gate_weight.shape[0]),
    _swiglu,
)
project_tokens = define(
    "project_tokens(Tensor x, Tensor norm_weight, Tensor? norm_bias, Tensor gate_weight, "
    "Tensor? gate_bias, Tensor up_weight, Tensor? up_bias, Tensor down_weight, Tensor? down_bias, "
    f"{_POOLED}, float eps, str save)",
    _project_tokens_shape,
    _project_tokens,
)


# ---- autograd


class _PoolNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        grids: torch.Tensor,
        cells: int,
        mode: str,
        eps: float,
    ) -> torch.Tensor:
        needs_x, needs_weight, *_ = ctx.needs_input_grad
        save = needs_x or needs_weight
        with below_autograd():
            out, normalised, inverse_std = pool_norm_forward(
                x, weight, bias, grids, cells, mode, eps, x.dtype, save
            )
        ctx.save_for_backward(normalised, inverse_std, weight, grids)
        ctx.patches, ctx.mode = x.shape[0], mode
        ctx.dtypes = x.dtype, _dtype(weight), _dtype(bias)
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: torch.Tensor) -> Gradients:
        normalised, inverse_std, weight, grids = ctx.saved_tensors
        grads = _pool_norm_gradients(
            grad,
            normalised,
            inverse_std,
            weight,
            (grids, ctx.patches, ctx.mode),
            ctx.needs_input_grad,
            ctx.dtypes,
        )
        return *grads, *(None,) * 4


def _pool_norm_gradients(
    grad: torch.Tensor,
    normalised: torch.Tensor,
    inverse_std: torch.Tensor,
    weight: torch.Tensor | None,
    batch: tuple[torch.Tensor, int, str],
    needs: Sequence[bool],
    dtypes: Sequence[torch.dtype | None],
) -> Gradients:
    """The gradients of x, weight and bias, each in its own dtype; None where not needed."""
    needs_x, needs_weight, needs_bias = needs[:3]
    grads = pool_norm_backward(
        grad,
        normalised,
        inverse_std,
        weight,
        *batch,
        dtypes[0] if needs_x else None,
        needs_weight,
        needs_bias,
    )
    wanted = zip(grads, needs[:3], dtypes, strict=True)
    return tuple(result.to(dtype) if needed else None for result, needed, dtype in wanted)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        gate_weight: torch.Tensor,
        up_weight: torch.Tensor,
        gate_bias: torch.Tensor | None,
        up_bias: torch.Tensor | None,
    ) -> torch.Tensor:
        needs_x, *needs_weights = ctx.needs_input_grad[:3]
        with below_autograd():
            product, gate, up = gate_up(x, gate_weight, up_weight, gate_bias, up_bias, True, True)
        ctx.save_for_backward(
            x if any(needs_weights) else None,
            gate_weight if needs_x else None,
            up_weight if needs_x else None,
            gate,
            up,
        )
        return product

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: torch.Tensor) -> Gradients:
        x, gate_weight, up_weight, gate, up = ctx.saved_tensors
        needs_x, *needs = ctx.needs_input_grad
        grads, _, bias = down_gradient(grad, None, gate, up, False, needs[2] or needs[3])
        return (
            input_gradient(grads, gate_weight, up_weight) if needs_x else None,
            *_gated_gradients(grads, bias, x, needs),
        )


def _gated_gradients(
    grads: torch.Tensor, bias: torch.Tensor, x: torch.Tensor | None, needs: Sequence[bool]
) -> Gradients:
    """The gradients of gate weight, up weight, gate bias and up bias, from those of gate and up."""
    both = [grads.shape[1] // 2] * 2
    weights: list[torch.Tensor | None] = [None, None]
    if x is not None and needs[0] and needs[1]:
        weights = list((grads.t() @ x).split(both))  # one product for both
    elif x is not None:
        halves = grads.split(both, dim=1)
        weights = [half.t() @ x if needs[i] else None for i, half in enumerate(halves)]
    biases = bias.to(grads.dtype).split(both) if needs[2] or needs[3] else (None, None)
    return (
        *weights,
        *(half if needed else None for half, needed in zip(biases, needs[2:4], strict=True)),
    )


class _ProjectTokens(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
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
        needs = ctx.needs_input_grad
        through_gate, needs_down = any(needs[:7]), needs[7]
        keep_gate_up = through_gate and save == "preactivation"
        # Where nothing before the down projection is trained, its input is all that it needs.
        keep_product = needs_down and not through_gate and save == "preactivation"
        keep_rows = through_gate or (needs_down and save == "input")
        with below_autograd():
            tokens, normalised, inverse_std = pool_norm_forward(
                *(x, norm_weight, norm_bias, grids, cells, mode, eps),
                *(gate_weight.dtype, keep_rows),
            )
            product, gate, up = gate_up(
                tokens, gate_weight, up_weight, gate_bias, up_bias, True, keep_gate_up
            )
            out = torch.nn.functional.linear(product, down_weight, down_bias)
        ctx.save_for_backward(
            *(normalised, inverse_std, gate, up, product if keep_product else None),
            *(norm_weight, norm_bias, gate_weight, gate_bias, up_weight, up_bias, down_weight),
            grids,
        )
        ctx.patches, ctx.mode, ctx.save = x.shape[0], mode, save
        ctx.norm_dtypes = x.dtype, norm_weight.dtype, _dtype(norm_bias)
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: torch.Tensor) -> Gradients:
        normalised, inverse_std, gate, up, product, *weights, grids = ctx.saved_tensors
        norm_weight, norm_bias, gate_weight, gate_bias, up_weight, up_bias, down_weight = weights
        needs = ctx.needs_input_grad
        through_gate, needs_down, needs_down_bias = any(needs[:7]), needs[7], needs[8]

        tokens = None
        if needs[3] or needs[5] or (ctx.save == "input" and (through_gate or needs_down)):
            tokens = scale_shift(normalised, norm_weight, norm_bias)
        if ctx.save == "input" and (through_gate or needs_down):
            product, gate, up = gate_up(
                *(tokens, gate_weight, up_weight, gate_bias, up_bias),
                product=not through_gate,
                save=through_gate,
            )

        inner: Gradients = (None,) * 7
        if through_gate:
            grads, product, bias = down_gradient(
                grad, down_weight, gate, up, needs_down, needs[4] or needs[6]
            )
            d_gate, d_up, d_gate_bias, d_up_bias = _gated_gradients(
                grads, bias, tokens, (needs[3], needs[5], needs[4], needs[6])
            )
            norms: Gradients = (None,) * 3
            if any(needs[:3]):
                norms = _pool_norm_gradients(
                    input_gradient(grads, gate_weight, up_weight),
                    normalised,
                    inverse_std,
                    norm_weight,
                    (grids, ctx.patches, ctx.mode),
                    needs,
                    ctx.norm_dtypes,
                )
            inner = (*norms, d_gate, d_gate_bias, d_up, d_up_bias)
        return (
            *inner,
            grad.t() @ product if needs_down else None,
            grad.sum(0) if needs_down_bias else None,
            *(None,) * 5,
        )


def _dtype(tensor: torch.Tensor | None) -> torch.dtype | None:
    return None if tensor is None else tensor.dtype


def _differentiate(name: str, op: Callable[..., torch.Tensor], function: Any) -> None:
    """Give ``op`` the derivative that ``function`` has, at no cost where none is asked for."""

    def autograd(*args: Any) -> torch.Tensor:
        # In forward mode, `function` is what refuses: it has no jvp.
        if has_tangent(args) or (torch.is_grad_enabled() and requires_grad(args)):
            result: torch.Tensor = apply(function, *args)
            return result
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    differentiate(name, autograd)


_differentiate("pool_norm", pool_norm, _PoolNorm)
_differentiate("swiglu", swiglu, _Swiglu)
_differentiate("project_tokens", project_tokens, _ProjectTokens)

# Parts of a backward pass, or of a forward pass that is differentiated as a whole.
_STAGES = {
    "pool_norm_forward": pool_norm_forward,
    "pool_norm_backward": pool_norm_backward,
    "scale_shift": scale_shift,
    "gate_up": gate_up,
    "down_gradient": down_gradient,
    "input_gradient": input_gradient,
}
_OPS = {"pool_norm": pool_norm, "swiglu": swiglu, "project_tokens": project_tokens}

for _name, _op in _STAGES.items():
    refuse_derivatives(_name, _op)
for _name, _op in (_STAGES | _OPS).items():
    batch(_name, one_by_one(_op))
