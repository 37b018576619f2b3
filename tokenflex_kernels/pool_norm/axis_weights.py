"""The weights of pooling along one axis: both modes are separable linear maps, out = P_h X P_w^T.

The kernels and the reference read the same numbers, computed on the host from two integers. A map
holds only its windows, in O(size + cells). They are arrays, because a cached tensor would remember
the mode it was made in (inference, fake, another default device).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

MODES = ("adaptive", "resize")
CACHED_MAPS = 512
LARGE_AXIS = 512  # patches or cells; the maps of longer axes are made anew, in milliseconds


class AxisMap(NamedTuple):
    """One axis of a pooling: cell i is the weighted sum of its window, divided by divisors[i].

    The window of cell i is ``counts[i]`` neighbouring patches from ``first[i]`` on, those with a
    weight that is not zero. Its weights are positive and sum to its divisor. The division is
    separate because PyTorch's pooling divides once, by the area of the window: rounding 1/3 and
    multiplying would cost accuracy. Windows only move forward.
    """

    first: np.ndarray  # int64 [cells]
    counts: np.ndarray  # int64 [cells]
    starts: np.ndarray  # int64 [cells]: the first of each window's weights in ``values``
    values: np.ndarray  # float64 [sum of counts]: the weights of one window after another
    divisors: tuple[int, ...]  # [cells]

    def entries(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the cell and the patch of each of ``values``, int64."""
        cells = np.repeat(np.arange(len(self.first)), self.counts)
        return cells, np.arange(len(cells)) - np.repeat(self.starts - self.first, self.counts)

    def averages(self) -> np.ndarray:
        """Return ``values`` over the divisors of their windows, float64."""
        return self.values / np.repeat(np.array(self.divisors), self.counts)


def check_mode(mode: object, *, name: str = "mode") -> str:
    """Check that ``mode`` is one of ``MODES``, and return it; errors call it ``name``."""
    if mode not in MODES:
        raise ValueError(f"{name} must be one of {', '.join(MODES)}, got {mode!r}")
    return str(mode)


def axis_map(size: int, cells: int, mode: str) -> AxisMap:
    """Return the pooling map of one axis, from ``size`` patches to ``cells`` output cells.

    ``adaptive`` is PyTorch's adaptive average pooling, the paper's projector (arXiv 2504.03154):
    cell i averages the patches floor(i*size/cells) .. ceil((i+1)*size/cells) - 1.

    ``resize`` is what the authors' released model does (LiAutoAD/Ristretto-3B): where ``cells``
    does not divide ``size``, the axis is first resized bilinearly with aligned corners to the next
    multiple of ``cells``, then averaged over windows that do not overlap.

    Args:
        size: patches along the axis, at least 1.
        cells: output cells along the axis, at least 1; may exceed ``size``.
        mode: "adaptive" or "resize".
    """
    make = _cached_map if max(size, cells) <= LARGE_AXIS else _make_map
    return make(size, cells, mode)


def is_average(size: int, cells: int, mode: str) -> bool:
    """Return whether the map is that of adaptive pooling, which PyTorch has an op for."""
    return mode == "adaptive" or (mode == "resize" and size % cells == 0)


def _make_map(size: int, cells: int, mode: str) -> AxisMap:
    if is_average(size, cells, mode):
        cell = np.arange(cells)
        first = cell * size // cells
        counts = -((cell + 1) * size // -cells) - first
        starts = np.cumsum(counts) - counts
        return AxisMap(first, counts, starts, np.ones(counts.sum()), tuple(counts.tolist()))

    resized = -(size // -cells) * cells
    window = resized // cells
    # Each resized row lies between two patches. Corners are aligned: the first row is the first
    # patch, the last row the last patch.
    before, part = np.divmod(np.arange(resized) * (size - 1), resized - 1)
    after = part / (resized - 1)
    first = before[::window]
    counts = (before + (after > 0) + 1)[window - 1 :: window] - first
    starts = np.cumsum(counts) - counts
    index = before - np.repeat(first - starts, window)  # of the first weight of each row
    pairs = np.stack([index, index + (after > 0)], 1), np.stack([1.0 - after, after], 1)
    values = np.bincount(pairs[0].ravel(), pairs[1].ravel(), minlength=int(counts.sum()))
    return AxisMap(first, counts, starts, values, (window,) * cells)


_cached_map = lru_cache(CACHED_MAPS)(_make_map)
