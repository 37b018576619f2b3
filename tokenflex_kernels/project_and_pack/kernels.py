"""The Triton kernel of the down projection that writes into the packed buffer.

    packed[vision_rows[t]] = product[t] Wd^T + bd      product: [T, H], Wd: [D, H] -> T rows of D

The grid is that of a matrix product: one program for each tile of [T, D]. A program reads the row
numbers of its tile, 4 bytes a token, once its sums are complete, and writes each row of the tile to
its own place, wherever the plan has it. Text rows are another kernel's.

Traffic: that of the product, which writes T D numbers. A product followed by a packing writes them,
reads them, and writes them again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokenflex_kernels.tiles import load_tile, tile_position


@triton.jit(do_not_specialize=["rows"])
def packed_down_kernel(
    product, weight, bias, vision_rows, packed,
    rows, width, hidden, product_stride, weight_stride,
    BIAS: tl.constexpr, WHOLE_K: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    m, n = tile_position(rows, width, BLOCK_M, BLOCK_N, GROUP_M)
    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, hidden, BLOCK_K):
        a = load_tile(product, m, k, rows, hidden, product_stride, BLOCK_M, BLOCK_K, WHOLE_K, TMA)
        b = load_tile(weight, n, k, width, hidden, weight_stride, BLOCK_N, BLOCK_K, WHOLE_K, TMA)
        y = tl.dot(a, b.T, y, input_precision=PRECISION)

    token = m + tl.arange(0, BLOCK_M)
    column = n + tl.arange(0, BLOCK_N)
    in_width = column < width
    if BIAS:
        y += tl.load(bias + column, mask=in_width, other=0.0).to(tl.float32)[None, :]
    row = tl.load(vision_rows + token, mask=token < rows, other=0).to(tl.int64)
    tl.store(
        packed + row[:, None] * width + column[None, :],
        y.to(packed.dtype.element_ty),
        mask=(token < rows)[:, None] & in_width[None, :],
    )
