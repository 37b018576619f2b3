"""Where the labels of a plot go, so that none hides another."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

LABEL_GAP = 0.062  # between two lines of small text, as a share of the axes' height

# (points right, points up, horizontal, vertical alignment), the best first.
_PLACES = (
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
_STEPS = 40  # points that stand for a stretch of a line
_ABOVE = 8  # pixels by which a label may rise above the axes, under their title
_LABEL, _OUTSIDE = 1000, 100000  # what hiding a label, or leaving the axes, counts in such points


def spread(heights: Sequence[float], gap: float = LABEL_GAP) -> list[float]:
    """``heights``, falling, in axes fractions: moved apart as little as it takes, between 0 and 1.

    Args:
        heights: from the highest to the lowest.
        gap: between neighbours; less where there is no room for it.
    """
    if len(heights) > 1:
        gap = min(gap, 1 / (len(heights) - 1))
    moved: list[float] = []
    for height in heights:
        moved.append(min(height, moved[-1] - gap) if moved else min(height, 1.0))
    floor = 0.0
    for place in reversed(range(len(moved))):
        moved[place] = max(moved[place], floor)
        floor = moved[place] + gap
    return moved


def label_points(axes: Axes, labels: Sequence[tuple[str, float, float]]) -> None:
    """Write each label beside its point, where it hides least of lines, points and other labels.

    Args:
        axes: drawn once, so that its size is known; its lines are what is not to be hidden.
        labels: (text, x, y) of each, in data coordinates.
    """
    drawn = _drawn(axes)
    taken: list[Bbox] = []
    for text, x, y in labels:
        label = axes.annotate(text, (x, y), (0, 0), textcoords="offset points", fontsize=9.5)
        label.set_in_layout(False)
        boxes = [_put(label, place) for place in range(len(_PLACES))]
        costs = [_cost(box, axes, drawn, taken) for box in boxes]
        best = int(np.argmin(costs))
        taken.append(_put(label, best))


def _put(label: Annotation, place: int) -> Bbox:
    right, up, horizontal, vertical = _PLACES[place]
    label.set_position((right, up))
    label.set(ha=horizontal, va=vertical)
    return label.get_window_extent()


def _cost(box: Bbox, axes: Axes, drawn: NDArray[np.float64], taken: Sequence[Bbox]) -> int:
    inside = (drawn >= (box.x0, box.y0)) & (drawn <= (box.x1, box.y1))
    hidden = int(inside.all(1).sum()) + _LABEL * sum(box.overlaps(other) for other in taken)
    area = axes.get_window_extent()
    area = Bbox.from_extents(area.x0, area.y0, area.x1, area.y1 + _ABOVE)
    outside = not (area.containsx(box.x0) and area.containsx(box.x1))
    outside |= not (area.containsy(box.y0) and area.containsy(box.y1))
    return hidden + _OUTSIDE * outside


def _drawn(axes: Axes) -> NDArray[np.float64]:
    """Pixels [N, 2] of every point and along every line between points."""
    parts = [np.zeros((0, 2))]
    for line in axes.get_lines():
        points = axes.transData.transform(line.get_xydata())
        # A marker has a size: four pixels each way stand for it.
        parts += [points + step for step in ((0, 0), (4, 0), (-4, 0), (0, 4), (0, -4))]
        if line.get_linestyle() != "None":
            share = np.linspace(0, 1, _STEPS)[:, None]
            parts += [start * (1 - share) + end * share for start, end in pairwise(points)]
    return np.concatenate(parts)
