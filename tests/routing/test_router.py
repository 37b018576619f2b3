"""The router finds what is planted, its penalty is a price, and its training touches nothing."""

from __future__ import annotations

import warnings
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experiments.routing.reliability import of_answers
from tests.models.test_modeling import CallCounter
from tests.models.tiny import tiny_model
from tests.routing.planted import COUNTS, mark_some_right, planted_grades
from tokenflex.digits.dataset import DigitsDataset
from tokenflex.digits.processor import digits_processor
from tokenflex.routing import training
from tokenflex.routing.grading import FEW_SAMPLES, Grades, drop_of, least_error, routed, score
from tokenflex.routing.router import Router, best, utilities
from tokenflex.routing.training import (
    check_largest_trained,
    costs_at_most,
    fit_router,
    train_router,
)


@pytest.fixture(scope="module")
def fitted():
    return fit_router(planted_grades(255))


def test_the_router_learns_which_question_needs_which_count_of_which_image(fitted):
    router, _ = fitted
    unseen = planted_grades(60, seed=1)
    smallest_right = best(unseen.right.double().numpy())
    agreement = (routed(router, unseen, 0.2) == smallest_right).mean()
    assert {0, 1, 2} == {*smallest_right.tolist()}
    assert agreement > 0.95


@pytest.fixture
def few_steps(monkeypatch):
    monkeypatch.setattr(training, "STEPS", 100)


def test_its_own_penalty_costs_no_more_than_it_may_and_saves_tokens(fitted):
    _, report = fitted
    assert report.largest_accuracy == pytest.approx(1)
    assert report.accuracy >= report.largest_accuracy
    assert report.tokens < 0.7 * report.largest_tokens
    assert report.penalty > 0


DROPS = (0.05, 0.1, 0.4)


@pytest.mark.usefixtures("few_steps")
def test_a_larger_drop_allows_a_larger_penalty():
    noisy = planted_grades(255)
    flipped = torch.rand(noisy.right.shape, generator=torch.Generator().manual_seed(3)) < 0.2
    noisy.right.logical_xor_(flipped)
    reports = [fit_router(noisy, max_drop=drop)[1] for drop in DROPS]
    tokens = [report.tokens for report in reports]
    assert tokens == sorted(tokens, reverse=True)
    assert tokens[0] > tokens[-1]
    for report, drop in zip(reports, DROPS, strict=True):
        lost = report.largest_accuracy - report.accuracy
        assert report.drop_error > 0
        assert lost + report.drop_error <= drop + 1e-9


@pytest.mark.usefixtures("few_steps")
def test_a_question_counts_on_one_side_of_the_split_with_its_image():
    grades = planted_grades(10)
    _, report = fit_router(grades, held_out=0.3)
    assert (report.questions, report.held_out_questions) == (28, 12)
    part = grades.of_samples(torch.tensor([False] * 7 + [True, False, True]))
    assert len(part) == 8
    assert part.samples.tolist() == [7] * 4 + [9] * 4
    assert part.pair_questions.tolist() == list(range(8))
    assert torch.equal(part.images[part.pair_images], grades.images[[7] * 4 + [9] * 4])


@pytest.mark.usefixtures("few_steps")
def test_one_seed_gives_one_router():
    first, again, other = (fit_router(planted_grades(9), seed=seed)[0] for seed in (0, 0, 1))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert not torch.equal(other.image.weight, again.image.weight)


@pytest.mark.usefixtures("few_steps")
def test_training_leaves_the_model_as_it_is_and_encodes_an_image_once(monkeypatch):
    mark_some_right(monkeypatch)
    model, processor = tiny_model().train(), digits_processor()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    encoder = CallCounter(model.model.vision_model)
    modes, asked = [], []
    model.register_forward_hook(lambda module, *_: modes.append(module.training))
    dataset = DigitsDataset("validation", size=6, questions=3)
    router, report = train_router(
        model, processor, dataset, COUNTS, batch_size=4, on_samples=asked.append
    )
    assert encoder.calls == 2
    assert asked == [4, 2]
    assert {*modes} == {False}
    assert model.training
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert report.questions + report.held_out_questions == 18
    assert report.parameters == sum(p.numel() for p in router.parameters())


# ---- what a choice costs


def coin_grades(samples: int, seed: int = 0) -> tuple[Grades, np.ndarray]:
    """Four questions a sample, of kinds as unlike in number as they come; all at 9 tokens."""
    grades = planted_grades(samples)
    generator = torch.Generator().manual_seed(seed)
    right = torch.rand(grades.right.shape, generator=generator) < torch.tensor([0.5, 0.8, 0.95])
    kinds = tuple("rare" if i % 11 == 0 else "frequent" for i in range(len(grades)))
    return replace(grades, right=right, kinds=kinds), np.ones(len(grades), dtype=np.int64)


def test_the_standard_error_of_a_cost_is_that_of_drawing_the_samples_again():
    grades, choice = coin_grades(60)
    drop, error = drop_of(grades, choice)
    largest, _ = score(grades, np.full(len(grades), 2))
    assert drop == pytest.approx(largest - score(grades, choice)[0])
    lost = (grades.right[:, 2].double() - grades.right[:, 1].double()).reshape(60, 4)
    rare = torch.tensor([kind == "rare" for kind in grades.kinds]).double().reshape(60, 4)
    drawn = torch.randint(60, (4000, 60), generator=torch.Generator().manual_seed(1))
    sums = [(lost * of_kind).sum(1)[drawn].sum(1) for of_kind in (rare, 1 - rare)]
    numbers = [of_kind.sum(1)[drawn].sum(1) for of_kind in (rare, 1 - rare)]
    drops = sum(s / n for s, n in zip(sums, numbers, strict=True)) / 2
    assert error == pytest.approx(float(drops.std()), rel=0.1)


def test_questions_about_one_image_are_no_more_than_one_for_the_standard_error():
    grades, choice = coin_grades(60)
    alike = replace(grades, right=grades.right[::4].repeat_interleave(4, dim=0))
    even = torch.full((240,), 1 / 240, dtype=torch.float64)
    drop, error = drop_of(alike, choice, even)
    lost = alike.right[::4, 2].double() - alike.right[::4, 1].double()
    assert drop == pytest.approx(float(lost.mean()))
    assert error == pytest.approx(float(lost.std()) / 60**0.5)


def test_a_choice_costs_its_standard_error_too():
    grades, choice = coin_grades(60)
    drop, error = drop_of(grades, choice)
    assert costs_at_most(drop + error, grades, choice)
    assert not costs_at_most(drop + 0.9 * error, grades, choice)
    assert costs_at_most(drop, grades, choice, margin=0)
    assert costs_at_most(0, grades, np.full(240, 2))  # the largest count costs nothing for certain


@pytest.mark.parametrize(
    ("samples", "observations"), [(1, 1), (FEW_SAMPLES - 1, FEW_SAMPLES - 1), (FEW_SAMPLES, 200)]
)
def test_answers_without_a_difference_leave_an_error(samples, observations):
    """Two more, half a loss and half a gain; below FEW_SAMPLES a sample is one observation."""
    grades = planted_grades(samples)
    grades.right[:] = True
    even = torch.full((len(grades),), 1 / len(grades), dtype=torch.float64)
    smallest = np.zeros(len(grades), dtype=np.int64)
    drop, error = drop_of(grades, smallest, even)
    assert (drop, error) == (0, pytest.approx(1 / (observations + 2)))
    assert costs_at_most(error, grades, smallest, even)
    assert not costs_at_most(0.99 * error, grades, smallest, even)


def test_a_wrong_answer_more_than_the_largest_counts_of_one_sample_leaves_an_error():
    """The spread over samples is 0, because there is one."""
    drop, error = drop_of(planted_grades(1), np.zeros(4, dtype=np.int64))
    assert (drop, error) == (0.5, pytest.approx(1 / 3))


def test_the_least_error_is_of_the_answers_that_a_smaller_count_gives():
    grades = planted_grades(FEW_SAMPLES)
    even = torch.full((200,), 1 / 200, dtype=torch.float64)
    choice = np.full(200, 2)
    assert least_error(grades, choice, even) == 0
    choice[:8] = 0  # 1 / 10 of eight answers of 200
    assert least_error(grades, choice, even) == pytest.approx(8 / 200 / 10)
    heavy = even / 2
    heavy[0] += 0.5  # which counts as little more than one answer
    assert least_error(grades, choice, heavy) == pytest.approx(float(heavy[:8].sum()) / 3, rel=0.03)
    texts = replace(grades, tiles=torch.cat([torch.zeros(8).long(), grades.tiles[8:]]))
    assert least_error(texts, choice, even) == 0  # no count applies to a question without images


def test_a_spread_above_the_least_error_is_the_error():
    """So a study of 200 samples and more chooses as it did."""
    grades, choice = coin_grades(210)
    weights = grades.weights()
    _, error = drop_of(grades, choice)
    assert 0 < least_error(grades, choice, weights) < error
    doubled = replace(grades, right=grades.right[:, [2, 2, 2]])
    assert drop_of(doubled, choice)[1] == least_error(grades, choice, weights)


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize(("samples", "held_out"), [(2, 1), (8, 2), (247, 49), (248, 50)])
def test_few_held_out_samples_are_warned_of_and_claim_no_certainty(samples, held_out):
    grades = planted_grades(samples)
    grades.right[:] = True
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        router, report = fit_router(grades)
    said = [str(w.message) for w in caught if "few samples to hold out" in str(w.message)]
    assert report.held_out_samples == held_out
    assert bool(said) is (held_out < FEW_SAMPLES)
    if said:
        assert f"hold out, {held_out}, where 50 or more" in said[0]
        assert "250 samples with images or more" in said[0]
        assert router.penalty == 0  # nothing was shown to cost a point at most
        assert report.drop_error > 0.01
    else:
        assert report.tokens < report.largest_tokens
        assert report.drop_error < 0.01


# ---- what no router can be made of


@pytest.mark.parametrize(
    ("counts", "trained"), [((4, 16, 25), [4, 9, 16]), ((4, (2, 8)), [4, [4, 4]]), ((4, 9), [16])]
)
def test_an_untrained_largest_count_is_refused_before_the_work(monkeypatch, counts, trained):
    model = tiny_model()
    model.config.trained_num_image_tokens = trained
    monkeypatch.setattr(training, "grade", None)
    with pytest.raises(ValueError, match=r"counts must have a count that the model was trained at"):
        train_router(model, digits_processor(), DigitsDataset("validation", size=2), counts)


@pytest.mark.parametrize(
    ("counts", "trained"),
    [
        ((4, 9), None),  # a config that names no counts
        ((4, 25), []),
        ((1, 9, 16), [4, 16]),  # smaller counts may be new
        ((4, (4, 4)), [16]),  # a square is its grid
        ((16, (4, 8)), [16, [4, 8]]),
    ],
)
def test_a_trained_largest_count_is_taken(counts, trained):
    model = tiny_model()
    model.config.trained_num_image_tokens = trained
    check_largest_trained(model, counts)


def test_answers_that_are_all_wrong_are_refused():
    grades = planted_grades(20)
    wrong = replace(grades, right=torch.zeros_like(grades.right))
    with pytest.raises(ValueError, match=r"dataset must hold .* got 0 at 4, 0 at 9, 0 at 16 of 80"):
        fit_router(wrong)
    # Right answers to questions without images are none that a router learns from.
    tiles = grades.tiles.clone()
    tiles[:4] = 0
    wrong.right[:4] = True
    with pytest.raises(ValueError, match="0 at 16 of 76 right"):
        fit_router(replace(wrong, tiles=tiles))


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize(("number", "is_few"), [(1, True), (4, False)])
def test_few_right_answers_are_warned_of(number, is_few):
    """At 5 % of 80 questions the warning ends."""
    grades = planted_grades(20)
    grades.right.zero_()
    grades.right[:number, 0] = True
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        router, _ = fit_router(grades)
    said = [str(warning.message) for warning in caught if "few questions" in str(warning.message)]
    assert bool(said) is is_few
    if said:
        assert "1 at 4, 0 at 9, 0 at 16 of 80" in said[0]
    assert router.confidence_calibration is not None


@pytest.mark.usefixtures("few_steps")
def test_questions_without_images_do_not_enter_the_curves():
    """They are answered right without a doubt, and no count has a part in it."""
    grades = planted_grades(20)
    alone, report = fit_router(grades)
    tiles = torch.cat([grades.tiles, torch.zeros(30, dtype=torch.int64)])
    texts = replace(
        grades,
        right=torch.cat([grades.right, torch.zeros(30, 3, dtype=torch.bool)]),
        confidence=torch.cat([grades.confidence, torch.full((30, 3), 0.99)]),
        tiles=tiles,
        samples=torch.cat([grades.samples, 20 + torch.arange(30)]),
        kinds=(*grades.kinds, *("text",) * 30),
        questions=torch.cat([grades.questions, torch.zeros(30, 6)]),
    )
    router, with_texts = fit_router(texts)
    assert router.confidence_calibration == alone.confidence_calibration
    assert (report.text_only_questions, with_texts.text_only_questions) == (0, 30)
    assert with_texts.questions + with_texts.held_out_questions == 80
    answers = of_answers(router, texts)
    assert {len(found["after"].right) for found in answers.values()} == {80}


# ---- the penalty


@given(
    st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=1, max_size=8),
    st.lists(st.floats(0, 5), min_size=2, max_size=6),
)
def test_no_question_gets_more_tokens_at_a_higher_penalty(chances, penalties):
    picks = [best(utilities(np.array(chances), COUNTS, p)) for p in sorted(penalties)]
    for cheap, dear in pairwise(picks):
        assert (dear <= cheap).all()


def test_the_penalty_is_in_shares_of_right_answers_per_all_of_the_largest_counts_tokens():
    chances = np.array([[0.70, 0.70, 0.79]])  # 16 brings .09 more than 4, for 75 % more of 16
    assert best(utilities(chances, COUNTS, 0.119)).tolist() == [2]
    assert best(utilities(chances, COUNTS, 0.121)).tolist() == [0]


def test_of_equal_counts_the_fewest_tokens_are_taken():
    assert best(utilities(np.array([[0.5, 0.5, 0.5], [0.4, 0.5, 0.5]]), COUNTS, 0.0)).tolist() == [
        0,
        1,
    ]


@pytest.mark.parametrize(("penalty", "error"), [(-0.1, ValueError), (float("nan"), ValueError)])
def test_penalties_that_are_none_are_refused(penalty, error):
    with pytest.raises(error, match="penalty must be finite and at least 0"):
        utilities(np.zeros((1, 3)), COUNTS, penalty)
    with pytest.raises(TypeError, match=r"penalty must be a number, got '0.1'"):
        utilities(np.zeros((1, 3)), COUNTS, "0.1")


# ---- what it is


def test_its_size_follows_from_two_widths():
    router = Router((64, 144, 256), 1152, 3584)
    parameters = sum(parameter.numel() for parameter in router.parameters())
    assert parameters == 16 * (2 * 1152 + 1 + 3584 + 1) + 3 * 17
    assert parameters < 100_000


@pytest.mark.parametrize(
    ("counts", "message"),
    [((4,), "two or more"), ((4, 4), "two or more"), ((4, 10), "counts.1. must be a perfect sq")],
)
def test_counts_that_leave_no_choice_are_refused(counts, message):
    with pytest.raises(ValueError, match=message):
        Router(counts, 4, 4)


def test_counts_come_in_rising_order():
    assert Router((16, 4, 9), 4, 4).counts == (4, 9, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"held_out": 0}, "held_out must"), ({"max_drop": 1}, "max_drop must")],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        fit_router(planted_grades(4), **options)


def test_one_sample_is_too_few():
    with pytest.raises(ValueError, match="at least 2 samples with images"):
        fit_router(planted_grades(1))


def test_accuracy_and_tokens_weigh_kinds_alike():
    grades = planted_grades(3).of_samples(torch.tensor([True, False, True]))
    # sample 0 is easy, sample 2 is not: fine questions are right at 9 in one of two
    assert score(grades, np.ones(8, dtype=np.int64)) == pytest.approx((0.75, 9.0))
    rare = planted_grades(3)
    rare = rare.of_samples(torch.tensor([True, True, True]))
    kinds = ("fine",) + ("coarse",) * 11
    rare = type(rare)(**{**rare.__dict__, "kinds": kinds})
    accuracy, _ = score(rare, np.zeros(12, dtype=np.int64))
    right = rare.right[:, 0].double()
    assert accuracy == pytest.approx(float((right[0] + right[1:].mean()) / 2))
