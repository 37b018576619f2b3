"""Placement of a plot's labels, so that none hides another."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

LABEL_GAP = 0.062
"""Distance between two lines of small text, as a share of the axes' height."""

# (points right, points up, horizontal, vertical alignment), in order of preference.
_PLACEMENTS = (
    (7, -3, "left", "top"),
    (8, 0, "left", "center"),
    (7, 4, "left", "bottom"),
    (0, 8, "center", "bottom"),
    (0, -8, "center", "top"),
    (-7, 4, "right", "bottom"),
    (-8, 0, "right", "center"),
    (-7, -3, "right", "top"),
    (7, -17, "left", "top"),
    (-7, -17, "right", "top"),
)
_STEPS = 40  # points that represent a line segment
_ABOVE = 8  # pixels that a label may rise above the axes
_LABEL, _OUTSIDE = 1000, 100000  # cost of hiding a label and of leaving the axes, in points


def spread(heights: Sequence[float], gap: float = LABEL_GAP) -> list[float]:
    """Move falling ``heights`` apart as little as possible, between 0 and 1.

    Args:
        heights: From the highest to the lowest, in axes fractions.
        gap: Distance between neighbours; it is reduced where room is missing.
    """
    if len(heights) > 1:
        gap = min(gap, 1 / (len(heights) - 1))
    moved: list[float] = []
    for height in heights:
        moved.append(min(height, moved[-1] - gap) if moved else min(height, 1.0))
    floor = 0.0
    for i in reversed(range(len(moved))):
        moved[i] = max(moved[i], floor)
        floor = moved[i] + gap
    return moved


def label_points(axes: Axes, labels: Sequence[tuple[str, float, float]]) -> None:
    """Write each label beside its point, where it hides least of lines, points and other labels.

    Args:
        axes: Axes that were drawn once, so that their size is known.
        labels: (text, x, y) of each label, in data coordinates.
    """
    drawn = _drawn(axes)
    taken: list[Bbox] = []
    for text, x, y in labels:
        label = axes.annotate(text, (x, y), (0, 0), textcoords="offset points", fontsize=9.5)
        label.set_in_layout(False)
        boxes = [_place(label, *placement) for placement in _PLACEMENTS]
        best = int(np.argmin([_cost(box, axes, drawn, taken) for box in boxes]))
        taken.append(_place(label, *_PLACEMENTS[best]))


def _place(label: Annotation, right: int, up: int, horizontal: str, vertical: str) -> Bbox:
    label.set_position((right, up))
    label.set(ha=horizontal, va=vertical)
    return label.get_window_extent()


def _cost(box: Bbox, axes: Axes, drawn: NDArray[np.float64], taken: Sequence[Bbox]) -> int:
    inside = (drawn >= (box.x0, box.y0)) & (drawn <= (box.x1, box.y1))
    hidden = int(inside.all(1).sum()) + _LABEL * sum(box.overlaps(other) for other in taken)
    area = axes.get_window_extent()
    fits = area.x0 <= box.x0 <= box.x1 <= area.x1
    fits &= area.y0 <= box.y0 <= box.y1 <= area.y1 + _ABOVE
    return hidden + _OUTSIDE * (not fits)


def _drawn(axes: Axes) -> NDArray[np.float64]:
    """Return pixels [N, 2] of every point and along every line."""
    parts = [np.zeros((0, 2))]
    for line in axes.get_lines():
        points = axes.transData.transform(line.get_xydata())
        # Four pixels each way represent the size of a marker.
        parts += [points + step for step in ((0, 0), (4, 0), (-4, 0), (0, 4), (0, -4))]
        if line.get_linestyle() != "None":
            share = np.linspace(0, 1, _STEPS)[:, None]
            parts += [start * (1 - share) + end * share for start, end in pairwise(points)]
    return np.concatenate(parts)
