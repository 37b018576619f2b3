"""The gated unit's forward pass: two matrix products over one reading of x, and their gate.

Maths:  gate = x Wg^T + bg,   up = x Wu^T + bu,   product = silu(gate) * up
        x: [T, C], Wg and Wu: [H, C], each a plain Linear's weight -> [T, H]

Traffic: a tile of x is read once for both accumulators. Inference writes the product alone, H a
row; training also keeps gate and up, from which backward computes the product again; recomputation
in backward writes those two and no product. Everything between the products and what is stored
stays in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from tokenflex_kernels.launch_configs import TileConfig
from tokenflex_kernels.layout import neighbours
from tokenflex_kernels.triton_kernels.launch import launch
from tokenflex_kernels.triton_kernels.tiles import (
    can_describe,
    divisible,
    dot_precision,
    load_tile,
    num_tiles,
    source,
    takes,
    tile_position,
    tileable,
)

Results = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@triton.jit(do_not_specialize=["rows"])
def gate_up_kernel(
    x,
    gate_weight,
    up_weight,
    gate_bias,
    up_bias,
    product,
    gate,
    up,
    rows,
    hidden,
    width,
    x_stride,
    gate_stride,
    up_stride,
    GATE_BIAS: tl.constexpr,
    UP_BIAS: tl.constexpr,
    PRODUCT: tl.constexpr,
    SAVE: tl.constexpr,
    WHOLE_K: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    m, n = tile_position(rows, hidden, BLOCK_M, BLOCK_N, GROUP_M)
    g = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    u = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, width, BLOCK_K):
        a = load_tile(x, m, k, rows, width, x_stride, BLOCK_M, BLOCK_K, WHOLE_K, TMA)
        b = load_tile(gate_weight, n, k, hidden, width, gate_stride, BLOCK_N, BLOCK_K, WHOLE_K, TMA)
        g = tl.dot(a, b.T, g, input_precision=PRECISION)
        b = load_tile(up_weight, n, k, hidden, width, up_stride, BLOCK_N, BLOCK_K, WHOLE_K, TMA)
        u = tl.dot(a, b.T, u, input_precision=PRECISION)

    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    in_hidden = n + column < hidden
    if GATE_BIAS:
        g += tl.load(gate_bias + n + column, mask=in_hidden, other=0.0).to(tl.float32)[None, :]
    if UP_BIAS:
        u += tl.load(up_bias + n + column, mask=in_hidden, other=0.0).to(tl.float32)[None, :]
    tile = m.to(tl.int64) * hidden + n
    at = row[:, None] * hidden + column[None, :]
    inside = (m + row < rows)[:, None] & in_hidden[None, :]
    if SAVE:
        tl.store(gate + tile + at, g.to(gate.dtype.element_ty), mask=inside)
        tl.store(up + tile + at, u.to(up.dtype.element_ty), mask=inside)
    if PRODUCT:
        p = g * tl.sigmoid(g) * u
        tl.store(product + tile + at, p.to(product.dtype.element_ty), mask=inside)


def gate_up(
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    up_weight: torch.Tensor,
    gate_bias: torch.Tensor | None,
    up_bias: torch.Tensor | None,
    *,
    product: bool,
    save: bool,
    config: TileConfig | None,
    pointwise: TileConfig,
) -> Results:
    """Gate and up, and their product.

    Args:
        x: [T, C], any strides; weights [H, C] and biases [H] or None, all of one dtype.
        product: whether the product is wanted.
        save: whether gate and up are.
        config: of the fused kernel; None takes PyTorch's products and the pointwise kernel.
        pointwise: config of the latter.

    Returns:
        product, gate and up, each [T, H] in the dtype of x, or of no rows where not wanted.
    """
    if config is None or not takes(config, x, gate_weight, up_weight):
        return _by_library(
            x, gate_weight, up_weight, gate_bias, up_bias, product, save, pointwise=pointwise
        )
    x, gate_weight, up_weight = map(tileable, (x, gate_weight, up_weight))
    gate_bias, up_bias = (
        None if bias is None else neighbours(bias) for bias in (gate_bias, up_bias)
    )
    rows, width = x.shape
    hidden = gate_weight.shape[0]
    tma = config.tma and can_describe(x, gate_weight, up_weight)
    block_w = [config.block_n, config.block_k]
    results = (
        x.new_empty(rows if product else 0, hidden),
        x.new_empty(rows if save else 0, hidden),
        x.new_empty(rows if save else 0, hidden),
    )
    launch(
        gate_up_kernel,
        num_tiles(rows, hidden, config),
        x,
        source(x, [config.block_m, config.block_k], tma),
        source(gate_weight, block_w, tma),
        source(up_weight, block_w, tma),
        gate_bias,
        up_bias,
        *results,
        rows,
        hidden,
        width,
        x.stride(0),
        gate_weight.stride(0),
        up_weight.stride(0),
        GATE_BIAS=gate_bias is not None,
        UP_BIAS=up_bias is not None,
        PRODUCT=product,
        SAVE=save,
        WHOLE_K=width % config.block_k == 0,
        TMA=tma,
        PRECISION=dot_precision(x.dtype),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        num_warps=config.num_warps,
        maxnreg=config.max_registers,
        num_stages=config.num_stages,
    )
    return results


def _by_library(
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    up_weight: torch.Tensor,
    gate_bias: torch.Tensor | None,
    up_bias: torch.Tensor | None,
    product: bool,
    save: bool,
    *,
    pointwise: TileConfig,
) -> Results:
    gate = F.linear(x, gate_weight, gate_bias)
    up = F.linear(x, up_weight, up_bias)
    hidden = gate.shape[1]
    if product:
        result = gated_product(gate, up, config=pointwise)
    else:
        result = x.new_empty(0, hidden)
    if not save:
        gate, up = x.new_empty(0, hidden), x.new_empty(0, hidden)
    return result, gate, up


@triton.jit(do_not_specialize=["rows"])
def gated_product_kernel(
    gate,
    up,
    product,
    rows,
    hidden,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    m, n = tile_position(rows, hidden, BLOCK_M, BLOCK_N, GROUP_M)
    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    inside = (m + row < rows)[:, None] & (n + column < hidden)[None, :]
    tile = m.to(tl.int64) * hidden + n
    at = row[:, None] * hidden + column[None, :]
    g = tl.load(gate + tile + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + tile + at, mask=inside, other=0.0).to(tl.float32)
    p = g * tl.sigmoid(g) * u
    tl.store(product + tile + at, p.to(product.dtype.element_ty), mask=inside)


def gated_product(gate: torch.Tensor, up: torch.Tensor, *, config: TileConfig) -> torch.Tensor:
    """silu(gate) * up, elementwise on contiguous [T, H]: reads two, writes one."""
    rows, hidden = gate.shape
    product = torch.empty_like(gate)
    launch(
        gated_product_kernel,
        num_tiles(rows, hidden, config),
        gate,
        gate,
        up,
        product,
        rows,
        hidden,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        GROUP_M=config.group_m,
        num_warps=config.num_warps,
        maxnreg=config.max_registers if divisible(hidden) else None,
    )
    return product
