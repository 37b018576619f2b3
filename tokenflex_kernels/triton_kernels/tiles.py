"""What the matrix products share: the order of tiles, and how a tile is read."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from tokenflex_kernels.launch_configs import TileConfig
from tokenflex_kernels.layout import neighbours
from tokenflex_kernels.triton_kernels.launch import cdiv

MAX_BLOCK = 512  # rows of a tile


@triton.jit
def tile_position(
    rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr
):
    """The (row, column) of this program's tile.

    Programs that run at the same time should share what they read: GROUP_M tiles of rows are walked
    column by column, so that a group's rows and the weights both stay in L2.
    """
    program = tl.program_id(0)
    tiles_m = tl.cdiv(rows, BLOCK_M)
    per_group = GROUP_M * tl.cdiv(columns, BLOCK_N)
    first_m = program // per_group * GROUP_M
    group_m = tl.minimum(tiles_m - first_m, GROUP_M)
    within = program % per_group
    return (first_m + within % group_m) * BLOCK_M, within // group_m * BLOCK_N


@triton.jit
def load_tile(
    source,
    row,
    column,
    rows,
    columns,
    stride,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WHOLE_COLUMNS: tl.constexpr,
    TMA: tl.constexpr,
):
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


def num_tiles(rows: int, columns: int, config: TileConfig) -> int:
    """Programs of a product with a result of [rows, columns]."""
    return cdiv(rows, config.block_m) * cdiv(columns, config.block_n)


def tileable(matrix: torch.Tensor) -> torch.Tensor:
    """``matrix`` as ``load_tile`` can read it, a copy if need be: offsets in a tile are int32."""
    matrix = neighbours(matrix)
    return matrix if matrix.stride(0) < 2**31 // MAX_BLOCK else matrix.contiguous()


def divisible(*numbers: int) -> bool:
    """Whether all are multiples of 16, as sides, strides and addresses of wide loads have to be."""
    return all(number % 16 == 0 for number in numbers)


def takes(config: TileConfig, rows: torch.Tensor, *weights: torch.Tensor) -> bool:
    """Whether this config is for a product of ``rows`` and ``weights``: see ``ragged``."""
    return config.ragged or (
        divisible(rows.data_ptr(), rows.shape[1], rows.stride(0))
        and all(divisible(w.data_ptr(), *w.shape, w.stride(0)) for w in weights)
    )


def can_describe(*matrices: torch.Tensor) -> bool:
    """Whether tensor-map descriptors can hold these: 16-byte addresses and strides."""
    return all(
        matrix.data_ptr() % 16 == 0
        and matrix.stride(0) * matrix.element_size() % 16 == 0
        and matrix.stride(0) > 0
        and matrix.stride(1) == 1
        for matrix in matrices
    )


def source(matrix: torch.Tensor, block: list[int], tma: bool) -> torch.Tensor | TensorDescriptor:
    """What ``load_tile`` reads tiles of ``block`` from."""
    if not tma:
        return matrix
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), block)


def dot_precision(dtype: torch.dtype) -> str:
    """How float32 tiles are multiplied: IEEE unless the user allows tf32, as PyTorch's products."""
    # The legacy flag sets the new one; reading the legacy one after the new was set is an error.
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if dtype == torch.float32 and allowed else "ieee"
