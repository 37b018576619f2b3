"""Device functions that kernels share: tiles in order, reading and writing one, terms of sums."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_position(
    rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr
):
    """Return the (row, column) of this program's tile: see `nth_tile_position`."""
    return nth_tile_position(tl.program_id(0), rows, columns, BLOCK_M, BLOCK_N, GROUP_M)


@triton.jit
def nth_tile_position(
    number, rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr
):
    """Return the (row, column) of a tile by its number.

    Programs that run at the same time should share what they read: GROUP_M tiles of rows are walked
    column by column, so that a group's rows and the weights both stay in L2.
    """
    tiles_m = tl.cdiv(rows, BLOCK_M)
    per_group = GROUP_M * tl.cdiv(columns, BLOCK_N)
    first_m = number // per_group * GROUP_M
    group_m = tl.minimum(tiles_m - first_m, GROUP_M)
    within = number % per_group
    return (first_m + within % group_m) * BLOCK_M, within // group_m * BLOCK_N


@triton.jit
def load_tile(
    source,
    row, column, rows, columns, stride,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, WHOLE_COLUMNS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """source[row : row + BLOCK_R, column : column + BLOCK_C], zeros beyond its rows and columns.

    ``source`` is a pointer to row-major elements, or with TMA a descriptor of them. WHOLE_COLUMNS
    promises that no tile reaches beyond the last column.
    """
    if TMA:
        return source.load([row, column])
    else:
        # int64 for where the tile is, int32 within it: fewer registers for the same address.
        r = tl.arange(0, BLOCK_R)
        c = tl.arange(0, BLOCK_C)
        tile = source + tl.cast(row, tl.int64) * stride + column
        at = tile + r[:, None] * stride + c[None, :]
        inside = (row + r < rows)[:, None]
        if not WHOLE_COLUMNS:
            inside = inside & (column + c < columns)[None, :]
        return tl.load(at, mask=inside, other=0.0)


@triton.jit
def store_tile(target, tile, row, column, rows, columns, stride, TMA: tl.constexpr):
    """Write ``tile`` to ``target`` at (row, column), in its dtype, up to its rows and columns.

    ``target`` is a pointer to row-major elements, or with TMA a descriptor of them.
    """
    if TMA:
        target.store([row, column], tile.to(target.dtype))
    else:
        r = tl.arange(0, tile.shape[0])
        c = tl.arange(0, tile.shape[1])
        start = target + tl.cast(row, tl.int64) * stride + column
        at = start + r[:, None] * stride + c[None, :]
        inside = (row + r < rows)[:, None] & (column + c < columns)[None, :]
        tl.store(at, tile.to(target.dtype.element_ty), mask=inside)


@triton.jit
def term(a, b, ALONE: tl.constexpr):
    """a * b, of float32, as a term of a sum over lanes.

    ALONE: a lane holds no more than one term. It adds that to the term of another lane, which adds
    the same two; but compilers fuse the product with this sum, and each lane then rounds the
    other's product and not its own. So the sums of lanes would differ, and where all of a warp
    store theirs to one word, as by Triton 3.9, it is not said whose stays. This product is rounded
    first, which takes no instruction more: the fused sum becomes a sum. A lane of several terms
    fuses them in order, and rounds what it hands to others.
    """
    if ALONE:
        return tl.fma(a, b, tl.zeros_like(a))
    else:
        return a * b
