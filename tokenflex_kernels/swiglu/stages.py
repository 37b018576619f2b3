"""The stages of `swiglu`: how each runs its kernel, registered as torch.library ops.

A stage computes only the results that are wanted, and trusts its arguments. On host memory, where
the table of configs says so, or where sides and addresses do not suit the fused kernel, the matrix
products are PyTorch's, followed by a pointwise kernel: of the extension on host memory
(``native``), unless Triton interprets its kernels there.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F

from tokenflex_kernels.backend import select_backend
from tokenflex_kernels.launch import (
    can_describe,
    cdiv,
    divisible,
    is_interpreted,
    launch,
    num_programs,
    num_tiles,
    pair_source,
    pointwise_options,
    product_options,
    source,
    takes,
    tileable,
)
from tokenflex_kernels.launch_configs import TileConfig, config_for
from tokenflex_kernels.layout import neighbours
from tokenflex_kernels.library import define_stage
from tokenflex_kernels.pool_norm.native import sum_dtype
from tokenflex_kernels.swiglu import native

Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@cache
def _kernels() -> ModuleType:
    """Import the kernels with the first launch, because that imports Triton."""
    from tokenflex_kernels.swiglu import kernels

    return kernels


def beyond_triton(x: torch.Tensor) -> str | None:
    """Return the property of ``x`` that the Triton kernels are not made for, or None."""
    return "float64" if x.dtype == torch.float64 else None


def _is_native(x: torch.Tensor) -> bool:
    if x.device.type != "cpu":
        return False
    return select_backend("swiglu", "cpu", beyond_triton=beyond_triton(x)) != "triton"


def launch_gate_up(
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    up_weight: torch.Tensor,
    gate_bias: torch.Tensor | None,
    up_bias: torch.Tensor | None,
    product: bool,
    save: bool,
) -> Triple:
    """Compute gate and up, and their product.

    Args:
        x: [T, C], any strides.
        gate_weight, up_weight: [H, C] in the dtype of x.
        gate_bias, up_bias: [H] in the dtype of x, or None.
        product: whether the product is wanted.
        save: whether gate and up are.

    Returns:
        product, gate and up, each [T, H] in the dtype of x, or of no rows where not wanted.
    """
    if len(x) == 0:
        return _gate_up_results(x, gate_weight, product, save)
    if _is_native(x):
        results = _gate_up_results(x, gate_weight, product, save)
        native.gate_up(x, gate_weight, up_weight, gate_bias, up_bias, *results)
        return results
    config: TileConfig | None = config_for("gate_up", x, len(x))
    if config is None or not takes(config, x, gate_weight, up_weight):
        gate, up = F.linear(x, gate_weight, gate_bias), F.linear(x, up_weight, up_bias)
        return (
            gated_product(gate, up) if product else gate.new_empty(0, gate.shape[1]),
            gate if save else gate.new_empty(0, gate.shape[1]),
            up if save else up.new_empty(0, up.shape[1]),
        )
    results = _gate_up_results(x, gate_weight, product, save)
    x, gate_weight, up_weight = map(tileable, (x, gate_weight, up_weight))
    gate_bias, up_bias = (
        None if bias is None else neighbours(bias) for bias in (gate_bias, up_bias)
    )
    (rows, width), hidden = x.shape, len(gate_weight)
    options: dict[str, Any] = {
        "GATE_BIAS": gate_bias is not None,
        "UP_BIAS": up_bias is not None,
        "PRODUCT": product,
        "SAVE": save,
        **product_options(config, x.dtype),
    }
    tiles = num_tiles(rows, hidden, config)
    pair = None
    if config.tma and can_describe(x, *(result for result in results if len(result) > 0)):
        pair = pair_source(gate_weight, up_weight, [2, config.block_n, config.block_k])
    if pair is not None:
        weights, up_first = pair
        block = [config.block_m, config.block_n]
        kernel = _kernels().gate_up_pair_kernel
        launch(
            kernel,
            num_programs(tiles, config, x.device),
            x,
            *(source(x, [config.block_m, config.block_k], True), weights, gate_bias, up_bias),
            *(source(result, block, len(result) > 0) for result in results),
            *(rows, hidden, width),
            UP_FIRST=up_first,
            PTX=not is_interpreted(kernel),
            **options,
        )
    else:
        launch(
            _kernels().gate_up_kernel,
            tiles,
            x,
            *(x, gate_weight, up_weight, gate_bias, up_bias, *results, rows, hidden, width),
            *(x.stride(0), gate_weight.stride(0), up_weight.stride(0)),
            WHOLE_K=width % config.block_k == 0,
            **options,
        )
    return results


def _gate_up_results(
    x: torch.Tensor, gate_weight: torch.Tensor, product: bool, save: bool
) -> Triple:
    rows, hidden = x.shape[0], gate_weight.shape[0]
    saved = rows if save else 0
    return (
        x.new_empty(rows if product else 0, hidden),
        x.new_empty(saved, hidden),
        x.new_empty(saved, hidden),
    )


def gated_product(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up, elementwise on contiguous [T, H]: reads two, writes one."""
    rows, hidden = gate.shape
    product = torch.empty_like(gate)
    if _is_native(gate):
        native.gated_product(gate, up, product)
        return product
    config: TileConfig = config_for("pointwise", gate, rows)
    launch(
        _kernels().gated_product_kernel,
        num_tiles(rows, hidden, config),
        gate,
        *(gate, up, product, rows, hidden),
        **pointwise_options(config, limit_registers=divisible(hidden)),
    )
    return product


def launch_down_gradient(
    dy: torch.Tensor,
    down_weight: torch.Tensor | None,
    gate: torch.Tensor,
    up: torch.Tensor,
    product: bool,
    bias: bool,
) -> Triple:
    """Compute the gradients of gate and up, and their product and sums if wanted.

    Args:
        dy: [T, D], any strides, the gradient of the down projection's result; or d product itself,
            [T, H], where ``down_weight`` is None.
        down_weight: [D, H] or None.
        gate, up: contiguous [T, H], as forward kept them.
        product: whether the product is wanted.
        bias: whether the sums over rows are.

    Returns:
        grads [T, 2H], gate's in the first half of each row; product [T, H] and the biases'
        gradients [2H], float32 (float64 where ``dy`` is), of no rows where not wanted.
    """
    gate, up = (
        gate.contiguous(),
        up.contiguous(),
    )  # a hook of saved tensors may have changed strides
    rows, hidden = gate.shape
    if rows == 0 or _is_native(dy):
        results = _down_gradient_results(gate, product, _sums_shape(gate, bias))
        results[2].zero_()
        if rows > 0:
            d_product = dy if down_weight is None else dy @ down_weight
            native.down_gradient(d_product, gate, up, *results)
        return results
    config: TileConfig | None = None
    if down_weight is not None:
        config = config_for("down_gradient", gate, rows)
        if config is None or not takes(config, dy, down_weight):
            dy, down_weight, config = dy @ down_weight, None, None
    dy = tileable(dy)
    tile: TileConfig = config or config_for("pointwise", gate, rows)
    partials = (cdiv(rows, tile.block_m) if bias else 0, 2 * hidden)
    grads, recomputed, sums = _down_gradient_results(gate, product, partials)
    pointers = gate, up, grads, recomputed, sums
    if down_weight is None:
        launch(
            _kernels().gate_gradient_kernel,
            num_tiles(rows, hidden, tile),
            gate,
            *(dy, *pointers, rows, hidden, dy.stride(0)),
            PRODUCT=product,
            BIAS=bias,
            **pointwise_options(tile, limit_registers=divisible(hidden, dy.stride(0))),
        )
    else:
        down_weight = tileable(down_weight)
        text_width = dy.shape[1]
        tma = tile.tma and can_describe(dy, down_weight)
        launch(
            _kernels().down_gradient_kernel,
            num_tiles(rows, hidden, tile),
            gate,
            source(dy, [tile.block_m, tile.block_k], tma),
            source(down_weight, [tile.block_k, tile.block_n], tma),
            *(*pointers, rows, hidden, text_width, dy.stride(0), down_weight.stride(0)),
            PRODUCT=product,
            BIAS=bias,
            WHOLE_K=text_width % tile.block_k == 0,
            WHOLE_N=hidden % tile.block_n == 0,
            TMA=tma,
            PARTS=max(1, tile.block_n // 32),
            **product_options(tile, dy.dtype),
        )
    return grads, recomputed, sums.sum(0) if bias else sums


def _down_gradient_results(gate: torch.Tensor, product: bool, sums: tuple[int, ...]) -> Triple:
    rows, hidden = gate.shape
    return (
        gate.new_empty(rows, 2 * hidden),
        gate.new_empty(rows if product else 0, hidden),
        gate.new_empty(sums, dtype=sum_dtype(gate.dtype)),
    )


def _sums_shape(gate: torch.Tensor, bias: bool) -> tuple[int, ...]:
    return (2 * gate.shape[1],) if bias else (0, 2 * gate.shape[1])


def launch_input_gradient(
    grads: torch.Tensor, gate_weight: torch.Tensor, up_weight: torch.Tensor
) -> torch.Tensor:
    """Return d gate Wg + d up Wu, [T, C] in the dtype of ``grads``.

    Args:
        grads: contiguous [T, 2H], gate's in the first half of each row.
        gate_weight, up_weight: [H, C] in the dtype of ``grads``.
    """
    if len(grads) == 0:
        return grads.new_empty(0, gate_weight.shape[1])
    if _is_native(grads):
        return native.input_gradient(grads, gate_weight, up_weight)
    (rows, hidden), width = (len(grads), len(gate_weight)), gate_weight.shape[1]
    grad_gate, grad_up = grads.chunk(2, dim=1)
    config: TileConfig | None = config_for("input_gradient", grads, rows)
    if config is None or not takes(config, grad_gate, gate_weight, up_weight):
        if grads.dtype.itemsize < 4:
            # One product: the first of two would be rounded. The copy is small beside it.
            return grads @ torch.cat([gate_weight, up_weight])
        return torch.addmm(grad_gate @ gate_weight, grad_up, up_weight)
    gate_weight, up_weight = tileable(gate_weight), tileable(up_weight)
    grad_x = grads.new_empty(rows, width)
    options = product_options(config, grads.dtype)
    tiles = num_tiles(rows, width, config)
    pair = None
    if config.tma and can_describe(grad_gate, grad_up, grad_x):
        pair = pair_source(gate_weight, up_weight, [1, config.block_k, config.block_n])
    if pair is not None:
        weights, up_first = pair
        launch(
            _kernels().input_gradient_pair_kernel,
            tiles,
            grads,
            *(source(grads, [config.block_m, config.block_k], True), weights),
            *(source(grad_x, [config.block_m, config.block_n], True), rows, hidden, width),
            UP_FIRST=up_first,
            **options,
        )
    else:
        launch(
            _kernels().input_gradient_kernel,
            tiles,
            grads,
            *(grads, gate_weight, up_weight, grad_x, rows, hidden, width),
            *(gate_weight.stride(0), up_weight.stride(0)),
            WHOLE_K=hidden % config.block_k == 0,
            WHOLE_N=width % config.block_n == 0,
            **options,
        )
    return grad_x


gate_up = define_stage(
    "gate_up",
    lambda x, gate_weight, up_weight, gate_bias, up_bias, product, save: _gate_up_results(
        x, gate_weight, product, save
    ),
    launch_gate_up,
)
down_gradient = define_stage(
    "down_gradient",
    lambda dy, down_weight, gate, up, product, bias: _down_gradient_results(
        gate, product, _sums_shape(gate, bias)
    ),
    launch_down_gradient,
)
input_gradient = define_stage(
    "input_gradient",
    lambda grads, gate_weight, up_weight: grads.new_empty(grads.shape[0], gate_weight.shape[1]),
    launch_input_gradient,
)


# ---- PyTorch's products, in the form that is fastest on host memory. Compilers see other ones.


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return x W^T + b."""
    return _host_linear.below(x, weight, bias) if _is_native(x) else F.linear(x, weight, bias)


def transposed_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return left^T right, a weight's gradient."""
    return _host_transposed_product(left, right) if _is_native(left) else left.t() @ right


_host_linear = define_stage(
    "host_linear",
    lambda x, weight, bias: x.new_empty(x.shape[0], weight.shape[0]),
    native.linear,
)
_host_transposed_product = define_stage(
    "host_transposed_product",
    lambda left, right: left.new_empty(left.shape[1], right.shape[1]),
    native.transposed_product,
)
