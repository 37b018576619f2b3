"""Intervals of paired timings, on synthetic machines whose noise is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.comparisons import Figure
from benchmarks.intervals import median_interval, paired_ratio

TURNS = 30


def timings(seed, ratio):
    """Return times of two variants that take turns on a machine that others use.

    The machine drifts by half, another process steals a burst from one sample in five, and the
    clock itself is off by 3 %.
    """
    rng = np.random.default_rng(seed)
    drift = 1 + 0.5 * np.sin(np.linspace(0, 5, TURNS) + rng.uniform(0, 6))

    def clock(cost):
        bursts = rng.exponential(4.0, TURNS) * (rng.random(TURNS) < 0.2)
        return cost * drift * rng.lognormal(0, 0.03, TURNS) + bursts

    return clock(ratio), clock(1.0)


def sides(ratio, runs=300):
    figures = (paired_ratio(*timings(seed, ratio)) for seed in range(runs))
    return [Figure(median, low=low, high=high).side_of(1) for median, low, high in figures]


def test_equal_variants_are_within_noise():
    assert sum(side != 0 for side in sides(1.0)) <= 6  # 1 % of 300, and chance


@pytest.mark.parametrize("bias", [0.9, 1.1])
def test_a_bias_of_a_tenth_is_seen_on_its_side(bias):
    seen = sides(bias)
    wanted = 1 if bias > 1 else -1
    assert sum(side == wanted for side in seen) >= 0.8 * len(seen)
    assert -wanted not in seen


def test_unpaired_times_would_miss_that_bias():
    """The ratio of medians differs between runs by more than the bias."""
    ratios = [np.median(a) / np.median(b) for a, b in (timings(seed, 1.1) for seed in range(300))]
    paired = [paired_ratio(*timings(seed, 1.1)).median for seed in range(300)]
    assert np.std(paired) < 0.7 * np.std(ratios)
    assert np.mean(paired) == pytest.approx(1.1, rel=0.02)


def test_bounds_are_those_of_the_binomial_distribution():
    # P(X <= 6) = 0.0007 and P(X <= 7) = 0.0026 of 30; P(X <= 8) = 0.008 is above half a percent.
    assert median_interval(range(30)) == (14.5, 7, 22)
    assert median_interval([3.0, 1.0, 2.0] * 3, confidence=0.95) == (2, 1, 3)
    assert median_interval(range(8)) == (3.5, 0, 7)
    assert median_interval(range(7)) == (3, -math.inf, math.inf)


def test_a_figure_without_an_interval_is_on_one_side_and_a_margin_widens_one():
    assert [Figure(value).side_of(1) for value in (0.99, 1.0, 1.01)] == [-1, 1, 1]
    figure = Figure(0.97, low=0.95, high=0.98)
    assert [figure.side_of(1, margin) for margin in (0.0, 0.03)] == [-1, 0]
    assert str(figure) == "0.97 (0.95 to 0.98)"
