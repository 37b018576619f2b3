"""The curve: every selector counted by hand, and the order that must hold between them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes

from experiments.routing.curve import (
    CurvePoint,
    as_rows,
    budgeted,
    budgets_between,
    escalated,
    format_curve,
    selection_curve,
)
from experiments.routing.figures import plot_selection
from tests.models.tiny import WIDTH, picture, tiny_model
from tests.routing.planted import COUNTS, FixedRouter, planted_grades
from tokenflex.data.samples import Conversation, Sample, Turn
from tokenflex.digits.processor import digits_processor
from tokenflex.routing.choice import choose_counts
from tokenflex.routing.grading import Grades, grade, routed
from tokenflex.routing.router import Router
from tokenflex.routing.storage import attach_router

BUDGET_8 = ("budget", "8")


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


def test_questions_may_weigh_alike_beside_kinds(grades):
    """Three of one kind, right never, at 16 and from 9 on, and one of another, right always."""
    uneven = replace(grades, kinds=("easy", "hard", "hard", "hard"))
    points = selection_curve(uneven, FixedRouter(*[[1, 0, 0]] * 4, penalty=0.0))
    smallest = by_setting(points, "always")["4"]
    assert (smallest.accuracy, smallest.accuracy_unweighted) == pytest.approx((0.5, 0.25))
    assert (smallest.tokens, smallest.tokens_unweighted) == pytest.approx((14 / 3, 5.0))
    coin = by_setting(points, "random")["4 or 16"]
    assert (coin.accuracy, coin.accuracy_unweighted) == pytest.approx((4 / 6, 0.5))
    assert coin.tokens_unweighted == pytest.approx((5 + 20) / 2)


def test_a_budget_counted_by_hand(grades):
    """One prompt of five tiles: 40 tokens at 8 a tile. 20 are spent at the start; 9 for the second
    question brings .5 for 5 tokens, 9 for the third .8 for 10; 5 are left, and nothing fits."""
    router = FixedRouter([1, 0, 0], [0, 0.5, 0.6], [0, 0.8, 1], [0, 0.1, 0.2])
    assert budgeted(router, grades, 8).tolist() == [0, 1, 1, 1]  # .1 for the last 5
    (point,) = [p for p in selection_curve(grades, router) if (p.selector, p.setting) == BUDGET_8]
    assert point.accuracy == pytest.approx(0.5)
    assert point.tokens == point.prefill_tokens == pytest.approx((4 + 9 + 18 + 9) / 4)


@pytest.mark.parametrize(
    ("counts", "budgets"),
    [
        ((4, 9, 16), [6, 8, 10, 12, 14]),
        ((64, 144, 256), [96, 128, 160, 192, 224]),
        ((1, 4), [2, 3]),
    ],
)
def test_budgets_lie_between_the_smallest_count_and_the_largest(counts, budgets):
    assert budgets_between(counts) == budgets


def test_prompts_of_a_budget_are_of_different_images_and_none_exceeds_it():
    """20 samples of four questions; the last prompt of each turn goes on with the next turn."""
    grades = planted_grades(20)
    router = rising_router(4, 6)
    turns = [4 * sample + turn for turn in range(4) for sample in range(20)]
    prompts = [turns[first : first + 8] for first in range(0, 80, 8)]
    sizes = np.array(COUNTS)
    for tokens in budgets_between(COUNTS):
        chosen = budgeted(router, grades, tokens)
        for prompt in prompts:
            spent = sizes[chosen[prompt]].sum()
            assert 8 * tokens - 12 < spent <= 8 * tokens  # or another upgrade would have fitted
            alone = budgeted(router, questions_of(grades, prompt), tokens)
            assert chosen[prompt].tolist() == alone.tolist()


def rising_router(vision_width: int, text_width: int) -> Router:
    """Random, but tokens are worth something everywhere."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        router = Router(COUNTS, vision_width, text_width)
    torch.nn.init.constant_(router.right.bias[:1], -2.0)
    torch.nn.init.constant_(router.right.bias[2:], 2.0)
    return router


def questions_of(grades: Grades, places: list[int]) -> Grades:
    """Some questions, each a sample of its own."""
    every = torch.arange(len(places))
    return Grades(
        counts=grades.counts,
        right=grades.right[places],
        confidence=grades.confidence[places],
        tiles=grades.tiles[places],
        samples=every,
        kinds=tuple(grades.kinds[place] for place in places),
        images=grades.images[grades.pair_images[places]],
        questions=grades.questions[places],
        pair_images=every,
        pair_questions=every,
    )


def test_a_budget_is_spread_as_generation_spreads_it():
    """The same question about eight pictures, in eight prompts and in one."""
    model, processor = tiny_model(), digits_processor()
    pictures = [picture(seed) for seed in range(8)]
    router = rising_router(WIDTH, WIDTH)
    attach_router(model, router)
    talk = Conversation((Turn("user", "odd"), Turn("assistant", "3")))
    grades = grade(
        model, processor, [Sample(str(i), (p,), (talk,)) for i, p in enumerate(pictures)], COUNTS
    )
    inputs = processor(
        images=[pictures],
        text=["<image> " * 8 + "odd"],
        num_image_tokens="auto",
        add_special_tokens=False,
    )
    for tokens in (6, 10, 14):
        chosen = choose_counts(model, **inputs, budget=8 * tokens)["num_image_tokens"]
        assert len({*chosen}) > 1
        assert [COUNTS[i] for i in budgeted(router, grades, tokens)] == chosen


def test_a_question_without_images_takes_no_part_in_a_budget(grades):
    none = Grades(**{**grades.__dict__, "pair_images": torch.tensor([1, 3]),
                     "pair_questions": torch.tensor([1, 3]),
                     "tiles": torch.tensor([0, 1, 0, 1])})  # fmt: skip
    router = FixedRouter([0, 0.1, 1], [0, 0.5, 0.6])
    assert budgeted(router, none, 10).tolist() == [0, 1, 0, 1]


def test_a_cascade_at_its_ends_is_one_count(grades):
    points = selection_curve(grades, thresholds=(0.0, 1.01))
    always, cascade = by_setting(points, "always"), by_setting(points, "cascade")
    for threshold, count in (("0", "4"), ("1.01", "16")):
        assert cascade[threshold].accuracy == pytest.approx(always[count].accuracy)
        assert cascade[threshold].tokens == pytest.approx(always[count].tokens)
    assert cascade["1.01"].prefill_tokens == pytest.approx(29 * 1.25)
    assert escalated(grades.confidence.double().numpy(), 1.01).tolist() == [2] * 4


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


def test_the_plot_draws_each_selectors_points(grades, tmp_path, monkeypatch):
    points = selection_curve(grades, FixedRouter([0.1, 0.5, 0.6]))
    drawn = {}

    draw = Axes.plot

    def plot(self, x, y, *, label, **style):
        drawn[label] = [*zip(x, y, strict=True)]
        return draw(self, x, y, label=label, **style)

    monkeypatch.setattr(Axes, "plot", plot)
    plot_selection(points, tmp_path / "curve.png")
    labels = {"always": "always one count", "budget": "budget, over 8 questions"}
    labels |= {"random": "random mix of two", "oracle": "oracle", "cascade": "cascade, last answer"}
    for selector, label in labels.items():
        own = [(p.tokens, p.accuracy) for p in points if p.selector == selector]
        assert sorted(drawn[label]) == sorted(own)
        assert own


def test_choices_are_places_of_counts(grades):
    assert routed(FixedRouter([0, 0, 1]), grades, 0.0).dtype == np.int64
