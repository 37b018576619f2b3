"""Pooling and LayerNorm in plain PyTorch.

Only the patches of its window are added up for a cell, forward and backward: a product with a
matrix that has zeros outside the windows would spread one NaN or infinity over the whole image.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from tokenflex_kernels.checks import autocast_enabled
from tokenflex_kernels.library import (
    Op,
    batch,
    below_autograd,
    define,
    differentiate_linear,
    side_by_side,
)
from tokenflex_kernels.pool_norm.axis_weights import (
    CACHED_MAPS,
    LARGE_AXIS,
    axis_map,
    is_average,
)
from tokenflex_kernels.pool_norm.plan import RUN_FIELDS, PoolPlan, Run
from tokenflex_kernels.tracing import is_exporting

_AS_IS = nullcontext()


def pool_norm(
    x: torch.Tensor,
    plan: PoolPlan,
    *,
    mode: str,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """See :func:`tokenflex_kernels.pool_norm`. Images of the same two grids are pooled together."""
    width = x.shape[1]
    compute_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    # Autocast would round the sums to its own dtype.
    with torch.autocast(x.device.type, enabled=False) if autocast_enabled(x.device) else _AS_IS:
        pooled = _pool(x.to(compute_dtype), plan.runs, mode)
        if weight is not None:
            scale = weight.to(compute_dtype)
            shift = None if bias is None else bias.to(compute_dtype)
            pooled = F.layer_norm(pooled, (width,), scale, shift, eps)
    return pooled.to(x.dtype)


def _pool(x: torch.Tensor, runs: tuple[Run, ...], mode: str) -> torch.Tensor:
    if not runs:
        return x
    alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, (_, *grids) in enumerate(runs):
        alike[tuple(grids)].append(index)
    patches = x.split([images * in_h * in_w for images, in_h, in_w, _, _ in runs])

    pooled = list(patches)
    for (in_h, in_w, out_h, out_w), members in alike.items():
        rows = [patches[index] for index in members]
        rows_alike = torch.cat(rows) if len(rows) > 1 else rows[0]
        cells = _pool_alike(rows_alike, (in_h, in_w), (out_h, out_w), mode)
        sizes = [runs[index][0] * out_h * out_w for index in members]
        for index, part in zip(members, cells.split(sizes), strict=True):
            pooled[index] = part
    return torch.cat(pooled)


def spread(grad: torch.Tensor, grids: torch.Tensor, patches: int, mode: str) -> torch.Tensor:
    """Return the gradient of the patches of a batch, [patches, C]; it has all derivatives.

    Args:
        grad: of the pooled cells, [cells, C].
        grids: of the batch, see :attr:`PoolPlan.grids`.
        patches: rows of the batch.
        mode: "adaptive" or "resize".
    """
    runs = tuple(map(tuple, grids.view(-1, RUN_FIELDS).tolist()))
    x = grad.new_zeros(patches, grad.shape[1], requires_grad=True)
    return torch.autograd.grad(_pool(x, runs, mode), x, grad, create_graph=True)[0]


def _pool_alike(
    x: torch.Tensor, in_grid: tuple[int, int], out_grid: tuple[int, int], mode: str
) -> torch.Tensor:
    """Return P_h X P_w^T for images of one grid: [images * H * W, C] -> [images * h * w, C]."""
    (in_h, in_w), (out_h, out_w), width = in_grid, out_grid, x.shape[1]
    averages = is_average(in_h, out_h, mode) and is_average(in_w, out_w, mode)
    # Other devices take some grids only, or have no deterministic gradient. Of a single cell, the
    # gradient is slower.
    if averages and x.device.type == "cpu" and width > 0 and out_h * out_w > 1:
        images = x.reshape(-1, in_h, in_w, width).permute(0, 3, 1, 2)
        return F.adaptive_avg_pool2d(images, out_grid).permute(0, 2, 3, 1).reshape(-1, width)
    if is_exporting():
        rows, columns = (_axis_matrix(x, *axis, mode) for axis in ((in_h, out_h), (in_w, out_w)))
        bands = rows @ x.reshape(-1, in_h, in_w * width)
        return (columns @ bands.reshape(-1, in_w, width)).reshape(-1, width)
    bands = pool_axis(x.reshape(-1, in_h, in_w * width), out_h, mode)
    return pool_axis(bands.reshape(-1, in_w, width), out_w, mode).reshape(-1, width)


def _axis_matrix(x: torch.Tensor, size: int, cells: int, mode: str) -> torch.Tensor:
    """Return the weights of an axis as a matrix [cells, size], for graphs without our op.

    A NaN then spreads along the axis: a product has it times zero.
    """
    axis = axis_map(size, cells, mode)
    matrix = np.zeros((cells, size))
    matrix[axis.entries()] = axis.averages()
    return torch.tensor(matrix.tolist(), dtype=x.dtype, device=x.device)


# ---- One axis of any map, as an op: a compiler need not know its tables.

# Weighted sums of rows: the rows and their weights, and the index of the first of each sum.
Bags = tuple[np.ndarray, np.ndarray, np.ndarray]


def _bags(size: int, cells: int, mode: str, transposed: bool) -> Bags:
    """Return the patches of each cell, or transposed, the cells that each patch is part of."""
    axis = axis_map(size, cells, mode)
    cell_numbers, patches = axis.entries()
    if not transposed:
        return patches, axis.averages(), axis.starts
    order = np.argsort(patches, kind="stable")
    starts = np.searchsorted(patches[order], np.arange(size))
    return cell_numbers[order], axis.averages()[order], starts


_cached_bags = lru_cache(2 * CACHED_MAPS)(_bags)


def _pool_axis(x: torch.Tensor, cells: int, mode: str) -> torch.Tensor:
    return _weighted_sums(x, x.shape[1], cells, mode, False)


def _spread_axis(grad: torch.Tensor, size: int, mode: str) -> torch.Tensor:
    return _weighted_sums(grad, size, grad.shape[1], mode, True)


def _weighted_sums(x: torch.Tensor, size: int, cells: int, mode: str, spread: bool) -> torch.Tensor:
    """Return [images, cells, D] of [images, size, D], or with ``spread`` the other way round."""
    make = _cached_bags if max(size, cells) <= LARGE_AXIS else _bags
    bags = make(size, cells, mode, spread)
    images, num_rows, width = x.shape
    if x.numel() == 0:
        return x.new_zeros(images, len(bags[2]), width)
    rows, weights, starts = (torch.from_numpy(array).to(x.device) for array in bags)
    weights = weights.to(x.dtype)
    if images > 1:
        image = torch.arange(images, device=x.device)[:, None]
        rows = (rows + image * num_rows).flatten()
        starts = (starts + image * len(weights)).flatten()
        weights = weights.expand(images, -1).flatten()
    sums, *_ = torch.embedding_bag(
        x.reshape(-1, width), rows, starts, mode=0, per_sample_weights=weights
    )
    return sums.view(images, len(bags[2]), width)


def _shape(x: torch.Tensor, length: int, mode: str) -> torch.Tensor:
    return x.new_empty(x.shape[0], length, x.shape[2])


_HOST_AND_DEVICE = ["CompositeExplicitAutograd"]
pool_axis = define("pool_axis", _shape, _pool_axis, keys=_HOST_AND_DEVICE)
spread_axis = define("spread_axis", _shape, _spread_axis, keys=_HOST_AND_DEVICE)


def _transposes(op: Op, transpose: Op) -> type[torch.autograd.Function]:
    """Return the Function of ``op``, whose derivative is the other op."""

    class Axis(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, length: int, mode: str) -> torch.Tensor:
            ctx.length, ctx.mode = x.shape[1], mode
            with below_autograd():
                return op(x, length, mode)

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
            return transpose(grad, ctx.length, ctx.mode), None, None

    return Axis


differentiate_linear("pool_axis", pool_axis, _transposes(pool_axis, spread_axis), floats=1)
differentiate_linear("spread_axis", spread_axis, _transposes(spread_axis, pool_axis), floats=1)
batch("pool_axis", side_by_side(pool_axis, floats=1))
batch("spread_axis", side_by_side(spread_axis, floats=1))
