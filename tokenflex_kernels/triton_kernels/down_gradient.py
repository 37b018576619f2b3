"""Backward through the gate: its derivative in the epilogue of the down projection's product.

Maths, with dy the gradient of the output y = product Wd^T and s = sigmoid(gate):

    d product = dy Wd                                         dy: [T, D], Wd: [D, H] -> [T, H]
    d gate = d product * up * s * (1 + gate * (1 - s)),   d up = d product * gate * s
    product = gate * s * up, computed again: forward did not keep it
    d bg = sum_t d gate,   d bu = sum_t d up

Traffic: reads dy and Wd, gate and up; writes (d gate, d up) side by side, [T, 2H], so that the
gradients of both weights are one product, and the product if the down weight is trained. d product
itself is never stored. The sums over rows come as one partial sum a tile, for PyTorch to add up in
a fixed order.

Without Wd the same epilogue runs on a given d product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tokenflex_kernels.launch_configs import TileConfig
from tokenflex_kernels.triton_kernels.launch import cdiv, launch
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


@triton.jit
def _store_gradients(
    dp,
    gate,
    up,
    grads,
    product,
    partial_bias,
    m,
    n,
    rows,
    hidden,
    PRODUCT: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """All that follows from one float32 tile of d product, [BLOCK_M, BLOCK_N]."""
    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    in_hidden = n + column < hidden
    inside = (m + row < rows)[:, None] & in_hidden[None, :]
    tile = m.to(tl.int64) * hidden + n
    at = row[:, None] * hidden + column[None, :]
    g = tl.load(gate + tile + at, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    silu = g * s
    u = tl.load(up + tile + at, mask=inside, other=0.0).to(tl.float32)
    if PRODUCT:
        tl.store(product + tile + at, (silu * u).to(product.dtype.element_ty), mask=inside)
    du = dp * silu
    dg = dp * u * (s + silu * (1.0 - s))
    tile_grads = grads + m.to(tl.int64) * (2 * hidden) + n
    at_grads = row[:, None] * (2 * hidden) + column[None, :]
    tl.store(tile_grads + at_grads, dg.to(grads.dtype.element_ty), mask=inside)
    tl.store(tile_grads + hidden + at_grads, du.to(grads.dtype.element_ty), mask=inside)
    if BIAS:  # rows beyond the last have gate = up = 0 and add nothing
        sums = partial_bias + (m // BLOCK_M).to(tl.int64) * (2 * hidden) + n
        tl.store(sums + column, tl.sum(dg, 0), mask=in_hidden)
        tl.store(sums + hidden + column, tl.sum(du, 0), mask=in_hidden)


@triton.jit
def _columns(tile, part: tl.constexpr, PARTS: tl.constexpr):
    """One of PARTS (1, 2 or 4) equal parts of the columns of ``tile``."""
    if PARTS == 1:
        return tile
    else:
        halves = tl.permute(tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        if part < PARTS // 2:
            return _columns(left, part, PARTS // 2)
        else:
            return _columns(right, part - PARTS // 2, PARTS // 2)


@triton.jit(do_not_specialize=["rows"])
def down_gradient_kernel(
    dy,
    down_weight,
    gate,
    up,
    grads,
    product,
    partial_bias,
    rows,
    hidden,
    text_width,
    dy_stride,
    down_stride,
    PRODUCT: tl.constexpr,
    BIAS: tl.constexpr,
    WHOLE_K: tl.constexpr,
    WHOLE_N: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
):
    m, n = tile_position(rows, hidden, BLOCK_M, BLOCK_N, GROUP_M)
    dp = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, text_width, BLOCK_K):
        a = load_tile(dy, m, k, rows, text_width, dy_stride, BLOCK_M, BLOCK_K, WHOLE_K, TMA)
        b = load_tile(
            down_weight, k, n, text_width, hidden, down_stride, BLOCK_K, BLOCK_N, WHOLE_N, TMA
        )
        dp = tl.dot(a, b, dp, input_precision=PRECISION)
    # The epilogue holds five values an element: a part of the columns at a time, for the registers.
    for part in tl.static_range(PARTS):
        _store_gradients(
            _columns(dp, part, PARTS), gate, up, grads, product, partial_bias,
            m, n + part * (BLOCK_N // PARTS), rows, hidden,
            PRODUCT, BIAS, BLOCK_M, BLOCK_N // PARTS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def gate_gradient_kernel(
    dp,
    gate,
    up,
    grads,
    product,
    partial_bias,
    rows,
    hidden,
    dp_stride,
    PRODUCT: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    m, n = tile_position(rows, hidden, BLOCK_M, BLOCK_N, GROUP_M)
    tile = load_tile(dp, m, n, rows, hidden, dp_stride, BLOCK_M, BLOCK_N, False, False)
    _store_gradients(
        tile.to(tl.float32), gate, up, grads, product, partial_bias, m, n, rows, hidden,
        PRODUCT, BIAS, BLOCK_M, BLOCK_N,
    )  # fmt: skip


def down_gradient(
    dy: torch.Tensor,
    down_weight: torch.Tensor | None,
    gate: torch.Tensor,
    up: torch.Tensor,
    *,
    product: bool,
    bias: bool,
    config: TileConfig | None,
    pointwise: TileConfig,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of gate and up, and what else is computed on the way.

    Args:
        dy: [T, D], any strides; or d product itself, [T, H], where ``down_weight`` is None.
        down_weight: [D, H] or None.
        gate, up: contiguous [T, H], as forward kept them.
        product: whether the product is wanted.
        bias: whether the sums over rows are.
        config: of the fused kernel; None takes PyTorch's product and the pointwise kernel.
        pointwise: config of the latter.

    Returns:
        grads [T, 2H], gate's in the first half of each row; product [T, H] and the biases'
        gradients float32 [2H], of no rows where not wanted.
    """
    if down_weight is not None and (config is None or not takes(config, dy, down_weight)):
        dy, down_weight = dy @ down_weight, None
    dy = tileable(dy)
    rows, hidden = gate.shape
    tile = pointwise if down_weight is None or config is None else config
    grads = gate.new_empty(rows, 2 * hidden)
    recomputed = gate.new_empty(rows if product else 0, hidden)
    tiles_m = cdiv(rows, tile.block_m)
    partial_bias = gate.new_empty(tiles_m if bias else 0, 2 * hidden, dtype=torch.float32)
    results = (gate, up, grads, recomputed, partial_bias)
    if down_weight is None:
        launch(
            gate_gradient_kernel,
            num_tiles(rows, hidden, tile),
            gate,
            dy,
            *results,
            rows,
            hidden,
            dy.stride(0),
            PRODUCT=product,
            BIAS=bias,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            GROUP_M=tile.group_m,
            num_warps=tile.num_warps,
            maxnreg=tile.max_registers if divisible(hidden, dy.stride(0)) else None,
        )
    else:
        down_weight = tileable(down_weight)
        tma = tile.tma and can_describe(dy, down_weight)
        launch(
            down_gradient_kernel,
            num_tiles(rows, hidden, tile),
            gate,
            source(dy, [tile.block_m, tile.block_k], tma),
            source(down_weight, [tile.block_k, tile.block_n], tma),
            *results,
            rows,
            hidden,
            dy.shape[1],
            dy.stride(0),
            down_weight.stride(0),
            PRODUCT=product,
            BIAS=bias,
            WHOLE_K=dy.shape[1] % tile.block_k == 0,
            WHOLE_N=hidden % tile.block_n == 0,
            TMA=tma,
            PRECISION=dot_precision(dy.dtype),
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            GROUP_M=tile.group_m,
            PARTS=max(1, tile.block_n // 32),
            num_warps=tile.num_warps,
            maxnreg=tile.max_registers,
            num_stages=tile.num_stages,
        )
    return grads, recomputed, partial_bias.sum(0) if bias else partial_bias
