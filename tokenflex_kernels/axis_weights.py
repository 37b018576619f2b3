"""The weights of pooling along one axis: both modes are separable linear maps, out = P_h X P_w^T.

Everything here is host arithmetic on two integers, cached, so that kernels and the reference read
the same numbers. Plain Python numbers, not tensors: a cached tensor would remember the mode it was
made in (inference, fake, another default device).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

MODES = ("adaptive", "resize")


class AxisMap(NamedTuple):
    """One axis of a pooling: cell i is sum_j weights[i][j] * patch j, divided by divisors[i].

    The division stays apart because PyTorch's pooling divides once, by the area of the window:
    rounding 1/3 and multiplying would cost accuracy. Row i of ``weights`` is non-negative and sums
    to ``divisors[i]``.
    """

    weights: tuple[tuple[float, ...], ...]
    """[cells][size]"""
    divisors: tuple[int, ...]
    """[cells]"""


def check_mode(mode: object, *, name: str = "mode") -> str:
    """``mode`` itself, once it is known to be one of ``MODES``; ``name`` is what errors call it."""
    if mode not in MODES:
        raise ValueError(f"{name} must be one of {', '.join(MODES)}, got {mode!r}")
    return str(mode)


@lru_cache(maxsize=512)
def axis_map(size: int, cells: int, mode: str) -> AxisMap:
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
    """
    if mode == "adaptive":
        windows = [
            range(cell * size // cells, -((cell + 1) * size // -cells)) for cell in range(cells)
        ]
        weights = [[float(patch in window) for patch in range(size)] for window in windows]
        return AxisMap(tuple(map(tuple, weights)), tuple(map(len, windows)))

    resized = -(size // -cells) * cells
    window = resized // cells
    weights = [[0.0] * size for _ in range(cells)]
    for row in range(resized):
        for patch, weight in _bilinear(row, size, resized):
            weights[row // window][patch] += weight
    return AxisMap(tuple(map(tuple, weights)), (window,) * cells)


def _bilinear(row: int, size: int, resized: int) -> list[tuple[int, float]]:
    """The (patch, weight) pairs of row ``row`` when ``size`` patches become ``resized`` rows.

    Aligned corners: row 0 reads patch 0 and the last row reads the last patch.
    """
    if resized == size:
        return [(row, 1.0)]
    before, part = divmod(row * (size - 1), resized - 1)
    after = part / (resized - 1)
    return [(before, 1.0 - after), (min(before + 1, size - 1), after)]
