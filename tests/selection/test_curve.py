"""The curve: every selector counted by hand, and the order that must hold between them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.selection.planted import COUNTS, FixedRouter, planted_grades
from tokenflex.plots import plot_selection
from tokenflex.selection.curve import (
    CurvePoint,
    as_rows,
    escalated,
    format_curve,
    routed,
    selection_curve,
)
from tokenflex.selection.grading import Grades
from tokenflex.selection.router import Router


def by_setting(points, selector) -> dict[str, CurvePoint]:
    return {point.setting: point for point in points if point.selector == selector}


@pytest.fixture
def grades() -> Grades:
    """Four questions of one kind: right at all counts, from 9 on, at 16 only, never; the third
    is about an image of two tiles."""
    right = torch.tensor([[1, 1, 1], [0, 1, 1], [0, 0, 1], [0, 0, 0]]).bool()
    confidence = torch.tensor([[0.9, 0.9, 0.9], [0.3, 0.9, 0.9], [0.3, 0.6, 0.7], [0.8, 0.1, 0.1]])
    every = torch.arange(4)
    return Grades(
        counts=COUNTS,
        right=right,
        confidence=confidence,
        tiles=torch.tensor([1, 1, 2, 1]),
        samples=every,
        kinds=("",) * 4,
        images=torch.zeros(4, 64),
        questions=torch.zeros(4, 32),
        pair_images=every,
        pair_questions=every,
    )


def test_every_selector_counted_by_hand(grades):
    router = FixedRouter([1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0], penalty=0.5)
    points = selection_curve(grades, router, penalties=(4.0,), thresholds=(0.0, 0.5, 0.7, 1.5))
    always = by_setting(points, "always")
    assert [always[str(n)].accuracy for n in COUNTS] == pytest.approx([0.25, 0.5, 0.75])
    assert [always[str(n)].tokens for n in COUNTS] == pytest.approx([5, 11.25, 20])
    routers = by_setting(points, "router")
    assert routers["own"].accuracy == pytest.approx(0.75)
    assert routers["own"].tokens == pytest.approx((4 + 9 + 32 + 4) / 4)
    assert routers["4"].tokens == pytest.approx(5)
    cascade = by_setting(points, "cascade")
    assert cascade["0.5"].accuracy == pytest.approx(0.5)
    assert cascade["0.5"].tokens == pytest.approx((4 + 9 + 18 + 4) / 4)
    assert cascade["0.5"].prefill_tokens == pytest.approx((4 + 13 + 26 + 4) / 4)
    assert cascade["0.7"].accuracy == pytest.approx(0.75)
    coins = by_setting(points, "random")
    assert coins["4 or 16"].accuracy == pytest.approx(0.5)
    assert coins["4 or 16"].tokens == pytest.approx(12.5)
    (oracle,) = by_setting(points, "oracle").values()
    assert oracle.accuracy == pytest.approx(0.75)
    assert oracle.tokens == pytest.approx((4 + 9 + 32 + 4) / 4)


def test_a_cascade_at_its_ends_is_one_count(grades):
    points = selection_curve(grades, thresholds=(0.0, 1.01))
    always, cascade = by_setting(points, "always"), by_setting(points, "cascade")
    for threshold, count in (("0", "4"), ("1.01", "16")):
        assert cascade[threshold].accuracy == pytest.approx(always[count].accuracy)
        assert cascade[threshold].tokens == pytest.approx(always[count].tokens)
    assert cascade["1.01"].prefill_tokens == pytest.approx(29 * 1.25)
    assert escalated(grades, 1.01).tolist() == [2] * 4


def test_no_selector_beats_the_oracle_and_tokens_fall_with_the_penalty():
    grades = planted_grades(30)
    flips = torch.rand(grades.right.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    grades.right.logical_xor_(flips)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        router = Router(COUNTS, 4, 6)
    points = selection_curve(grades, router)
    (oracle,) = by_setting(points, "oracle").values()
    assert all(point.accuracy <= oracle.accuracy + 1e-12 for point in points)
    tokens = [p.tokens for p in points if p.selector == "router" and p.setting != "own"]
    assert tokens == sorted(tokens, reverse=True)
    assert len({*tokens}) > 2


def test_images_of_a_question_share_a_count_by_their_mean(grades):
    two = Grades(**{**grades.__dict__, "pair_images": torch.tensor([0, 1, 2, 3, 0]),
                    "pair_questions": torch.tensor([0, 1, 2, 2, 3])})  # fmt: skip
    router = FixedRouter([1, 0, 0], [0, 1, 0], [0, 0.4, 1], [0, 0.7, 0], [0, 0, 1])
    assert routed(router, two, 0.0).tolist() == [0, 1, 1, 2]
    # 16 brings .15 more than 9 on average, .3 in sum, and costs 7/16 of the penalty more
    router = FixedRouter([1, 0, 0], [1, 0, 0], [0, 0.4, 0.6], [0, 0.4, 0.5], [1, 0, 0])
    assert routed(router, two, 0.5).tolist() == [0, 0, 1, 0]


def test_a_question_without_images_costs_nothing(grades):
    none = Grades(**{**grades.__dict__, "pair_images": torch.tensor([1]),
                     "pair_questions": torch.tensor([1]),
                     "tiles": torch.tensor([0, 1, 0, 0])})  # fmt: skip
    router = FixedRouter([0, 0, 1])
    assert routed(router, none, 0.0).tolist() == [0, 2, 0, 0]
    assert by_setting(selection_curve(none, router), "router")["own"].tokens == pytest.approx(4)


def test_another_ladder_than_the_routers_is_refused(grades):
    with pytest.raises(ValueError, match=r"at the router's counts, \(4, 16\), got \(4, 9, 16\)"):
        selection_curve(grades, FixedRouter([0, 1], counts=(4, 16)))


def test_the_table_and_the_plot_show_every_selector(grades, tmp_path):
    points = selection_curve(grades, FixedRouter([1, 0, 0]))
    lines = format_curve(points).splitlines()
    assert len(lines) == len(points) + 1
    assert lines[1].split() == ["always", "4", "0.250", "5.00", "5.00"]
    assert as_rows(points)[0]["selector"] == "always"
    plot_selection(points, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"
    plot_selection([p for p in points if p.selector == "always"], tmp_path / "one.png")
    with pytest.raises(ValueError, match="always used"):
        plot_selection([], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_choices_are_places_of_counts(grades):
    assert routed(FixedRouter([0, 0, 1]), grades, 0.0).dtype == np.int64
