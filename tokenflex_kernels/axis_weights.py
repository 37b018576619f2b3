"""The weights of pooling along one axis: both modes are separable linear maps, out = P_h X P_w^T.

Everything here is host arithmetic on two integers, done in float64 and cached, so that kernels and
the reference read the same numbers. Each row of a map is non-negative and sums to 1.
"""

from __future__ import annotations

from functools import lru_cache

import torch

MODES = ("adaptive", "resize")


def check_mode(mode: object) -> str:
    """``mode`` itself, once it is known to be one of ``MODES``."""
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    return str(mode)


@lru_cache(maxsize=512)
def axis_map(size: int, cells: int, mode: str) -> torch.Tensor:
    """The pooling map of one axis, from ``size`` patches to ``cells`` output cells.

    ``adaptive`` is PyTorch's adaptive average pooling, the paper's projector (arXiv 2504.03154):
    cell i averages the patches floor(i*size/cells) .. ceil((i+1)*size/cells) - 1.

    ``resize`` is what the authors' released model does (LiAutoAD/Ristretto-3B): where ``cells``
    does not divide ``size``, the axis is first resized bilinearly with aligned corners to the next
    multiple of ``cells``, then averaged over windows that do not overlap.

    Args:
        size: patches along the axis, at least 1.
        cells: output cells along the axis, at least 1; may exceed ``size``.
        mode: "adaptive" or "resize".

    Returns:
        float64 [cells, size], shared between callers: do not write into it.
    """
    if mode == "adaptive":
        weights = torch.zeros(cells, size, dtype=torch.float64)
        for cell in range(cells):
            start = cell * size // cells
            end = -((cell + 1) * size // -cells)
            weights[cell, start:end] = 1.0 / (end - start)
        return weights
    resized = -(size // -cells) * cells
    window_mean = torch.eye(cells, dtype=torch.float64).repeat_interleave(resized // cells, dim=1)
    return window_mean @ _bilinear_map(size, resized) * (cells / resized)


def _bilinear_map(size: int, resized: int) -> torch.Tensor:
    """Bilinear interpolation with aligned corners along one axis, float64 [resized, size]."""
    if resized == size:
        return torch.eye(size, dtype=torch.float64)
    weights = torch.zeros(resized, size, dtype=torch.float64)
    for row in range(resized):
        # Aligned corners: row 0 reads patch 0 and the last row reads the last patch.
        whole, part = divmod(row * (size - 1), resized - 1)
        fraction = part / (resized - 1)
        weights[row, whole] += 1.0 - fraction
        weights[row, min(whole + 1, size - 1)] += fraction
    return weights
