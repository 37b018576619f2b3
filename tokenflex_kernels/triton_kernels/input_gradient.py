"""The gradient of the gated unit's input: two products into one accumulator.

Maths:  d x = d gate Wg + d up Wu            [d gate, d up]: [T, 2H], Wg and Wu: [H, C] -> [T, C]

Traffic: reads the gradients and both weights, writes C a row; two products of their own would write
and read the first one's result in between, rounded.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tokenflex_kernels.launch_configs import TileConfig
from tokenflex_kernels.triton_kernels.launch import launch
from tokenflex_kernels.triton_kernels.tiles import (
    can_describe,
    dot_precision,
    load_tile,
    num_tiles,
    source,
    takes,
    tile_position,
    tileable,
)


@triton.jit(do_not_specialize=["rows"])
def input_gradient_kernel(
    grad_gate,
    grad_up,
    gate_weight,
    up_weight,
    grad_x,
    rows,
    hidden,
    width,
    grad_stride,
    gate_stride,
    up_stride,
    WHOLE_K: tl.constexpr,
    WHOLE_N: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    m, n = tile_position(rows, width, BLOCK_M, BLOCK_N, GROUP_M)
    dx = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, hidden, BLOCK_K):
        a = load_tile(grad_gate, m, k, rows, hidden, grad_stride, BLOCK_M, BLOCK_K, WHOLE_K, TMA)
        b = load_tile(gate_weight, k, n, hidden, width, gate_stride, BLOCK_K, BLOCK_N, WHOLE_N, TMA)
        dx = tl.dot(a, b, dx, input_precision=PRECISION)
    for k in range(0, hidden, BLOCK_K):
        a = load_tile(grad_up, m, k, rows, hidden, grad_stride, BLOCK_M, BLOCK_K, WHOLE_K, TMA)
        b = load_tile(up_weight, k, n, hidden, width, up_stride, BLOCK_K, BLOCK_N, WHOLE_N, TMA)
        dx = tl.dot(a, b, dx, input_precision=PRECISION)

    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    tile = grad_x + m.to(tl.int64) * width + n
    tl.store(
        tile + row[:, None] * width + column[None, :],
        dx.to(grad_x.dtype.element_ty),
        mask=(m + row < rows)[:, None] & (n + column < width)[None, :],
    )


def input_gradient(
    grads: torch.Tensor,
    gate_weight: torch.Tensor,
    up_weight: torch.Tensor,
    *,
    config: TileConfig | None,
) -> torch.Tensor:
    """d gate Wg + d up Wu.

    Args:
        grads: contiguous [T, 2H], gate's in the first half of each row.
        gate_weight, up_weight: [H, C] in the dtype of ``grads``.
        config: None takes two of PyTorch's products.

    Returns:
        [T, C] in the dtype of ``grads``.
    """
    grad_gate, grad_up = grads.chunk(2, dim=1)
    if config is None or not takes(config, grad_gate, gate_weight, up_weight):
        return torch.addmm(grad_gate @ gate_weight, grad_up, up_weight)
    gate_weight, up_weight = tileable(gate_weight), tileable(up_weight)
    rows, hidden = grad_gate.shape
    width = gate_weight.shape[1]
    tma = config.tma and can_describe(grad_gate, grad_up, gate_weight, up_weight)
    block_a = [config.block_m, config.block_k]
    block_b = [config.block_k, config.block_n]
    grad_x = grads.new_empty(rows, width)
    launch(
        input_gradient_kernel,
        num_tiles(rows, width, config),
        grads,
        source(grad_gate, block_a, tma),
        source(grad_up, block_a, tma),
        source(gate_weight, block_b, tma),
        source(up_weight, block_b, tma),
        grad_x,
        rows,
        hidden,
        width,
        grads.stride(0),
        gate_weight.stride(0),
        up_weight.stride(0),
        WHOLE_K=hidden % config.block_k == 0,
        WHOLE_N=width % config.block_n == 0,
        TMA=tma,
        PRECISION=dot_precision(grads.dtype),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        num_warps=config.num_warps,
        maxnreg=config.max_registers,
        num_stages=config.num_stages,
    )
    return grad_x
