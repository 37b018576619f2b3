"""Pooling and LayerNorm in plain PyTorch.

A cell is made of the patches of its window and of no others, forward and backward: a product with
a matrix that has zeros outside the windows would spread one NaN or infinity over the whole image.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from tokenflex_kernels.axis_weights import CACHED_MAPS, LARGE_AXIS, axis_map
from tokenflex_kernels.checks import autocast_enabled
from tokenflex_kernels.library import (
    batch,
    below_autograd,
    define,
    differentiate_linear,
    side_by_side,
)
from tokenflex_kernels.pool_plan import PoolPlan, Run

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
        rows = (
            torch.cat([patches[index] for index in members])
            if len(members) > 1
            else (patches[members[0]])
        )
        cells = _pool_alike(rows, (in_h, in_w), (out_h, out_w), mode)
        sizes = [runs[index][0] * out_h * out_w for index in members]
        for index, part in zip(members, cells.split(sizes), strict=True):
            pooled[index] = part
    return torch.cat(pooled)


def _pool_alike(
    x: torch.Tensor, in_grid: tuple[int, int], out_grid: tuple[int, int], mode: str
) -> torch.Tensor:
    """P_h X P_w^T for images of one grid: [images * H * W, C] -> [images * h * w, C]."""
    (in_h, in_w), (out_h, out_w), width = in_grid, out_grid, x.shape[1]
    is_average = mode == "adaptive" or (in_h % out_h == 0 and in_w % out_w == 0)
    # Other devices take some grids only, or have no deterministic gradient. Of a single cell, the
    # gradient is slower.
    if is_average and x.device.type == "cpu" and width > 0 and out_h * out_w > 1:
        images = x.reshape(-1, in_h, in_w, width).permute(0, 3, 1, 2)
        return F.adaptive_avg_pool2d(images, out_grid).permute(0, 2, 3, 1).reshape(-1, width)
    bands = pool_axis(x.reshape(-1, in_h, in_w * width), out_h, mode)
    return pool_axis(bands.reshape(-1, in_w, width), out_w, mode).reshape(-1, width)


# ---- one axis of any map, as an op: a compiler need not know its tables


class _Bags(NamedTuple):
    """Weighted sums of rows: of those before the second start, then before the third, and so on."""

    rows: np.ndarray
    weights: np.ndarray
    starts: np.ndarray


def _bags_of_cells(size: int, cells: int, mode: str) -> _Bags:
    """Return the patches of each cell."""
    axis = axis_map(size, cells, mode)
    _, patches = axis.entries()
    return _Bags(patches, axis.averages(), np.cumsum(axis.counts) - axis.counts)


def _bags_of_patches(size: int, cells: int, mode: str) -> _Bags:
    """Return the cells that each patch is part of: the transpose."""
    axis = axis_map(size, cells, mode)
    numbers, patches = axis.entries()
    order = np.argsort(patches, kind="stable")
    starts = np.searchsorted(patches[order], np.arange(size))
    return _Bags(numbers[order], axis.averages()[order], starts)


_bags_of_cells_of_small = lru_cache(CACHED_MAPS)(_bags_of_cells)
_bags_of_patches_of_small = lru_cache(CACHED_MAPS)(_bags_of_patches)


def _pool_axis(x: torch.Tensor, cells: int, mode: str) -> torch.Tensor:
    is_small = max(x.shape[1], cells) <= LARGE_AXIS
    make = _bags_of_cells_of_small if is_small else _bags_of_cells
    return _weighted_sums(x, make(x.shape[1], cells, mode))


def _spread_axis(grad: torch.Tensor, size: int, mode: str) -> torch.Tensor:
    is_small = max(size, grad.shape[1]) <= LARGE_AXIS
    make = _bags_of_patches_of_small if is_small else _bags_of_patches
    return _weighted_sums(grad, make(size, grad.shape[1], mode))


def _weighted_sums(x: torch.Tensor, bags: _Bags) -> torch.Tensor:
    """The sums for each x[i], [images, size, D] -> [images, bags, D]."""
    images, size, width = x.shape
    if x.numel() == 0:
        return x.new_zeros(images, len(bags.starts), width)
    rows, weights, starts = (torch.from_numpy(array).to(x.device) for array in bags)
    weights = weights.to(x.dtype)
    if images > 1:
        image = torch.arange(images, device=x.device)[:, None]
        rows = (rows + image * size).flatten()
        starts = (starts + image * len(weights)).flatten()
        weights = weights.expand(images, -1).flatten()
    sums, *_ = torch.embedding_bag(
        x.reshape(-1, width), rows, starts, mode=0, per_sample_weights=weights
    )
    return sums.view(images, len(bags.starts), width)


pool_axis = define(
    "pool_axis(Tensor x, SymInt cells, str mode)",
    lambda x, cells, mode: x.new_empty(x.shape[0], cells, x.shape[2]),
    _pool_axis,
    keys=["CompositeExplicitAutograd"],
)
spread_axis = define(
    "spread_axis(Tensor grad, SymInt size, str mode)",
    lambda grad, size, mode: grad.new_empty(grad.shape[0], size, grad.shape[2]),
    _spread_axis,
    keys=["CompositeExplicitAutograd"],
)


class _PoolAxis(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cells: int, mode: str) -> torch.Tensor:
        ctx.size, ctx.mode = x.shape[1], mode
        with below_autograd():
            return pool_axis(x, cells, mode)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return spread_axis(grad, ctx.size, ctx.mode), None, None


class _SpreadAxis(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: torch.Tensor, size: int, mode: str) -> torch.Tensor:
        ctx.cells, ctx.mode = grad.shape[1], mode
        with below_autograd():
            return spread_axis(grad, size, mode)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return pool_axis(grad, ctx.cells, ctx.mode), None, None


differentiate_linear("pool_axis", pool_axis, _PoolAxis, floats=1)
differentiate_linear("spread_axis", spread_axis, _SpreadAxis, floats=1)
batch("pool_axis", side_by_side(pool_axis, floats=1))
batch("spread_axis", side_by_side(spread_axis, floats=1))
