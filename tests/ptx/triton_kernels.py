"""Two kernels to plant bugs in, with all that those of the package have: kept apart, they stay."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product_kernel(
    a, b, c, rows, columns, depth,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """c = a b^T with a [rows, depth], b [columns, depth], and whole blocks of the depth."""
    m = tl.program_id(0) * BLOCK_M
    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, depth, BLOCK_K):
        if TMA:
            left = a.load([m, start])
            right = b.load([0, start])
        else:
            at = start + k[None, :]
            left = tl.load(a + (m + row[:, None]) * depth + at, (m + row < rows)[:, None], 0.0)
            right = tl.load(b + column[:, None] * depth + at, (column < columns)[:, None], 0.0)
        total = tl.dot(left, right.T, total)
    if TMA:
        c.store([m, 0], total.to(c.dtype))
    else:
        place = c + (m + row[:, None]) * columns + column[None, :]
        inside = (m + row < rows)[:, None] & (column < columns)[None, :]
        tl.store(place, total.to(c.dtype.element_ty), inside)


@triton.jit
def standardise_kernel(x, out, width, BLOCK: tl.constexpr):
    """Rows of mean 0 and variance 1; a program has a row, of several warps."""
    column = tl.arange(0, BLOCK)
    inside = column < width
    row = tl.program_id(0) * width
    values = tl.load(x + row + column, inside, 0.0).to(tl.float32)
    centred = tl.where(inside, values - tl.sum(values, 0) / width, 0.0)
    variance = tl.sum(centred * centred, 0) / width
    result = centred * tl.rsqrt(variance)
    tl.store(out + row + column, result.to(out.dtype.element_ty), inside)
