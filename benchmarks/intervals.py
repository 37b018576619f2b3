"""Medians of paired timings, with intervals that hold whatever the noise is distributed like.

Two variants that take turns meet the same drift of the machine, which the ratio of neighbours
cancels. What is left are bursts of others' work, which the median ignores. The interval is that of
order statistics: the number of ratios below the true median is binomial, whatever the distribution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.99  # a run has hundreds of comparisons


class Interval(NamedTuple):
    """A median, and the bounds that the true one lies between."""

    median: float
    low: float
    high: float


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Return the median and its interval; the bounds are infinite for too few values."""
    ordered, number = np.sort(np.asarray(values, dtype=float)), len(values)
    tail, outside = 0.0, 0
    while (tail := tail + math.comb(number, outside) / 2**number) <= (1 - confidence) / 2:
        outside += 1  # so many values of each end lie outside
    bounds = (ordered[outside - 1], ordered[-outside]) if outside else (-math.inf, math.inf)
    return Interval(float(np.median(ordered)), float(bounds[0]), float(bounds[1]))


def paired_ratio(above: Sequence[float], below: Sequence[float]) -> Interval:
    """Return the ratio of two variants that took turns, one value a turn of each."""
    return median_interval(np.asarray(above) / np.asarray(below))
