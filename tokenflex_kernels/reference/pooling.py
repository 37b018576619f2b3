"""Pooling and LayerNorm in plain PyTorch."""

from __future__ import annotations

from collections import defaultdict
from contextlib import nullcontext

import torch
import torch.nn.functional as F

from tokenflex_kernels._checks import autocast_enabled
from tokenflex_kernels.axis_weights import axis_map
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
    """See :func:`tokenflex_kernels.pool_norm`. One pair of small products per kind of image."""
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
    """P_h X P_w^T for every image, images of the same two grids together."""
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
        map_h, map_w = axis_map(in_h, out_h, mode), axis_map(in_w, out_w, mode)
        # Two products in memory order: an einsum would transpose first, at three times the time.
        bands = x.new_tensor(map_h.weights) @ rows.reshape(-1, in_h, in_w * x.shape[1])
        sums = x.new_tensor(map_w.weights) @ bands.view(-1, out_h, in_w, x.shape[1])
        areas = torch.outer(x.new_tensor(map_h.divisors), x.new_tensor(map_w.divisors))
        cells = (sums / areas[..., None]).flatten(0, 2)
        sizes = [runs[index][0] * out_h * out_w for index in members]
        for index, part in zip(members, cells.split(sizes), strict=True):
            pooled[index] = part
    return torch.cat(pooled)
