"""Pooling and LayerNorm in plain PyTorch."""

from __future__ import annotations

from collections import defaultdict
from contextlib import nullcontext
from itertools import accumulate

import torch
import torch.nn.functional as F

from tokenflex_kernels._checks import Grid, autocast_enabled
from tokenflex_kernels.axis_weights import axis_map

_AS_IS = nullcontext()


def pool_norm(
    x: torch.Tensor,
    in_grids: list[Grid],
    out_grids: list[Grid],
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
        pooled = _pool(x.to(compute_dtype), in_grids, out_grids, mode)
        if weight is not None:
            scale = weight.to(compute_dtype)
            shift = None if bias is None else bias.to(compute_dtype)
            pooled = F.layer_norm(pooled, (width,), scale, shift, eps)
    return pooled.to(x.dtype)


def _pool(x: torch.Tensor, in_grids: list[Grid], out_grids: list[Grid], mode: str) -> torch.Tensor:
    """P_h X P_w^T for every image, images of the same two grids together."""
    if not in_grids:
        return x
    starts = [0, *accumulate(height * width for height, width in in_grids)]
    alike: dict[tuple[Grid, Grid], list[int]] = defaultdict(list)
    for image, grids in enumerate(zip(in_grids, out_grids, strict=True)):
        alike[grids].append(image)

    pooled: list[torch.Tensor] = [x] * len(in_grids)
    for ((in_h, in_w), (out_h, out_w)), images in alike.items():
        rows = torch.stack([x[starts[i] : starts[i + 1]] for i in images])
        patches = rows.unflatten(1, (in_h, in_w))
        map_h, map_w = axis_map(in_h, out_h, mode), axis_map(in_w, out_w, mode)
        sums = torch.einsum(
            "ih,bhwc,jw->bijc", x.new_tensor(map_h.weights), patches, x.new_tensor(map_w.weights)
        )
        areas = torch.outer(x.new_tensor(map_h.divisors), x.new_tensor(map_w.divisors))
        cells = (sums / areas[..., None]).flatten(1, 2)
        for image, tokens in zip(images, cells, strict=True):
            pooled[image] = tokens
    return torch.cat(pooled)
