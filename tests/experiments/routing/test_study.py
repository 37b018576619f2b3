"""The study chooses settings on held-out data, computes its verdict, and sees miscalibration."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from experiments.routing.__main__ import report_of
from experiments.routing.pages import page_of, verdict
from experiments.routing.reliability import Predictions, at_least
from experiments.routing.study import (
    GradedCheckpoint,
    at_counts,
    cheapest,
    is_met,
    measured,
    summarise,
)
from tests.routing.planted import COUNTS, planted_grades


def predictions(said: float, right: float, number: int = 1000) -> Predictions:
    return Predictions(np.full(number, said), np.arange(number) < right * number)


def test_a_planted_miscalibration_is_the_error():
    assert predictions(0.9, 0.6).error() == pytest.approx(0.3)
    assert predictions(0.7, 0.7).error() == pytest.approx(0.0, abs=1e-9)
    both = Predictions(np.array([0.95] * 3 + [0.05]), np.array([True, True, False, True]))
    # three of four are .95 - 2/3 off, one .95
    assert both.error() == pytest.approx((3 * (0.95 - 2 / 3) + 0.95) / 4)
    assert Predictions(np.array([1.0, 0.0]), np.array([True, False])).error() == 0
    expected = {"answers": 0.75, "mean": pytest.approx(0.95), "right": pytest.approx(2 / 3)}
    assert at_least(both) == expected


def row(checkpoint: str, drop: float, share: float, tries: float) -> dict:
    names = {"checkpoint": checkpoint, "rule": "cascade", "weighting": "kinds"}
    return {**names, "drop": drop, "share": share, "tries_share": tries, "hindsight_share": None}


def test_the_verdict_follows_from_the_figures():
    rows = [row("a", 0.004, 0.5, 0.7), row("a", 0.012, 0.6, 0.8), row("b", 0.01, 0.6, 0.6)]
    (figures,) = summarise(rows, 0.01, 0.6)
    assert figures["drop"] == pytest.approx(0.026 / 3)
    assert (figures["met"], figures["met_with_all_tries"]) == (True, False)
    assert (figures["checkpoints"], figures["checkpoints_met"]) == (2, 2)
    assert figures["of_seeds"]["share"] == pytest.approx(0.1 / 2**0.5)
    assert figures["of_checkpoints"]["drop"] == pytest.approx(0.002 / 2**0.5)
    (worse,) = summarise([*rows[:2], row("b", 0.011, 0.5, 0.5)], 0.01, 0.6)
    assert worse["drop"] < 0.01  # one checkpoint does not make up for another
    assert (worse["met"], worse["checkpoints_met"]) == (False, 1)
    study = {"max_drop": 0.01, "limit": 0.6}
    assert "Kinds alike: met by cascade." in verdict({**study, "means": [figures]})
    assert "Kinds alike: missed by cascade." in verdict({**study, "means": [worse]})
    other = {**figures, "rule": "router"}
    assert "met by router; missed by cascade" in verdict({**study, "means": [other, worse]})


@pytest.mark.parametrize(
    ("drop", "share", "met"), [(0.01, 0.6, True), (0.0101, 0.6, False), (0.01, 0.601, False)]
)
def test_the_target_has_two_bounds(drop, share, met):
    assert is_met({"drop": drop, "share": share}, 0.01, 0.6) is met


def test_the_cheapest_setting_that_costs_little_is_chosen():
    grades = planted_grades(30)
    choices = {i: np.full(len(grades), i) for i in range(3)}
    weights = grades.weights()
    # 9 costs a sixth, 4 half; a sixth has a standard error of 4.4 points.
    assert cheapest(grades, choices, weights, 0.17, margin=0) == 1
    assert cheapest(grades, choices, weights, 0.17) == 2
    assert cheapest(grades, choices, weights, 0.22) == 1
    assert cheapest(grades, choices, weights, 0.1) == 2
    assert cheapest(grades, {i: choices[i] for i in (0, 1)}, weights, 0.1) == 1  # costs least
    figures = measured(grades, choices[1], weights, retries=True)
    assert figures["drop"] == pytest.approx(1 / 6)
    assert (figures["share"], figures["tries_share"]) == pytest.approx((9 / 16, 13 / 16))


def test_settings_are_of_validation_and_figures_of_test(monkeypatch):
    """On the test split the largest count is wrong: it decides nothing, and all rules gain."""
    monkeypatch.setattr("tokenflex.routing.training.STEPS", 50)
    monkeypatch.setattr("experiments.routing.study.THRESHOLDS", (0.5, 0.95))
    fitted = planted_grades(24)
    right = fitted.right.clone()
    right[:, 2] = False
    test = replace(fitted, right=right)
    report = report_of([GradedCheckpoint("a", fitted, test)], (4, 16), 1)
    assert report["trained"]["counts"] == ["4", "16"]
    assert report["unseen"]["counts"] == ["4", "9", "16"]
    assert report["trained"]["always"]["a"]["kinds"] == pytest.approx({"4": 0.5, "16": 0.0})
    assert all(row["drop"] <= 0 for row in report["trained"]["rows"])
    # Chosen on the test split, all would be at the smallest count.
    assert all(row["share"] > 0.3 for row in report["trained"]["rows"])
    cascade = [r for r in report["trained"]["rows"] if r["rule"] == "cascade, raw"]
    assert {row["setting"] for row in cascade} == {0.5}  # .9 where right, .4 where wrong
    rest = {"data": "planted", "note": "", "commit": "c", "machine": "m"}
    page = page_of({**report, **rest})
    assert "## With counts that were never trained: 4, 9, 16" in page
    assert page.count("| cascade, raw |") == 4


def test_grades_at_some_counts_are_those_columns():
    grades = planted_grades(3)
    some = at_counts(grades, (16, 4))
    assert some.counts == (4, 16)
    assert torch.equal(some.right, grades.right[:, [0, 2]])
    assert at_counts(grades, COUNTS).counts == COUNTS
