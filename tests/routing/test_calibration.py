"""A curve makes a planted miscalibration right, and the cascade compares calibrated confidence."""

from __future__ import annotations

import numpy as np
import pytest

from tests.models.tiny import WIDTH, tiny_model
from tests.routing.planted import COUNTS, planted_grades
from tests.routing.test_cascade import OPTIONS, asked
from tokenflex.digits.processor import digits_processor
from tokenflex.routing.calibration import calibrated, check_curves, fit_curve
from tokenflex.routing.cascade import generate_with_escalation
from tokenflex.routing.router import Router, best, utilities
from tokenflex.routing.storage import attach_router, load_router, save_router
from tokenflex.routing.training import fit_router


def logit(p):
    return np.log(p) - np.log1p(-p)


def answers(scale: float, shift: float, number: int = 20_000):
    """Probabilities, and what is right by the curve of that scale and shift."""
    random = np.random.default_rng(0)
    probabilities = random.uniform(0.2, 0.99, number)
    chances = 1 / (1 + np.exp(-(scale * logit(probabilities) + shift)))
    return probabilities, random.random(number) < chances


@pytest.mark.parametrize("planted", [(0.4, -0.5), (1.0, 0.0), (2.0, 0.3)])
def test_a_planted_curve_is_found(planted):
    assert fit_curve(*answers(*planted)) == pytest.approx(planted, abs=0.06)


@pytest.mark.parametrize(("right", "share"), [(True, 51 / 52), (False, 1 / 52)])
def test_answers_of_one_kind_leave_the_curve_finite(right, share):
    probabilities = np.linspace(0.2, 1.0, 50)
    scale, shift = fit_curve(probabilities, np.full(50, right))
    assert calibrated(probabilities[:, None], [(scale, shift)]).mean() == pytest.approx(
        share, abs=1e-3
    )


def test_a_probability_that_means_the_opposite_is_replaced_by_the_share_that_is_right():
    probabilities, right = answers(2.0, 0.3)
    scale, shift = fit_curve(probabilities, ~right)
    assert scale == 0
    assert 1 / (1 + np.exp(-shift)) == pytest.approx((~right).mean(), abs=1e-3)


def test_certain_answers_and_none_have_a_curve():
    assert fit_curve(np.array([0.0, 1.0, 1.0]), np.array([True, False, True]))[0] >= 0
    assert fit_curve(np.zeros(0), np.zeros(0, dtype=bool)) == (0.0, 0.0)
    assert np.isfinite(calibrated(np.array([[0.0, 1.0]]), [(50.0, 0.0), (50.0, 9.0)])).all()


def test_each_count_has_its_own_curve():
    values = calibrated(np.full((2, 3), 0.5), [(1, 0), (1, 2), (0, -2)])
    assert values[0].tolist() == pytest.approx([0.5, 0.8808, 0.1192], abs=1e-4)


@pytest.mark.parametrize(
    ("curves", "error", "words"),
    [
        ([[1, 0]], ValueError, "must hold 3 curves, one per count, got 1"),
        ([[-1, 0]] * 3, ValueError, "scales of at least 0"),
        ([[1, float("nan")]] * 3, ValueError, "finite numbers"),
        ([[1]] * 3, TypeError, "pairs of scale and shift"),
        ("abc", TypeError, "pairs of scale and shift"),
        ({"4": 1}, TypeError, "pairs of scale and shift"),
        ([[True, 0]] * 3, TypeError, "pairs of scale and shift"),
    ],
)
def test_curves_that_are_none_are_refused(curves, error, words):
    with pytest.raises(error, match=f"calibration.*{words}"):
        Router(COUNTS, 4, 4, calibration=curves)
    assert check_curves("calibration", None, 3) is None


def test_a_router_is_fitted_with_both_curves_and_keeps_them_in_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr("tokenflex.routing.training.STEPS", 50)
    grades = planted_grades(40)
    grades.confidence.copy_(grades.right * 0.2 + 0.75)  # .95 where right, .75 where wrong
    router, _ = fit_router(grades)
    before = Router(COUNTS, 4, 6, confidence_calibration=router.confidence_calibration)
    found = calibrated(np.array([[0.95] * 3, [0.75] * 3]), before.confidence_calibration)
    assert (found[0] > 0.95).all()
    assert (found[1, :2] < 0.05).all()  # at 16 nothing was wrong
    save_router(router, tmp_path, {})
    loaded = load_router(tmp_path)
    assert loaded.calibration == router.calibration
    assert loaded.confidence_calibration == router.confidence_calibration
    pairs = grades.images[grades.pair_images], grades.questions
    assert np.array_equal(loaded.probabilities(*pairs), router.probabilities(*pairs))
    curves = loaded.calibration
    loaded.calibration = None
    assert np.allclose(
        calibrated(loaded.probabilities(*pairs), curves), router.probabilities(*pairs)
    )


def test_a_router_may_choose_from_grids(tmp_path):
    router = Router((16, (2, 3), 4), 4, 6)
    assert router.counts == (4, (2, 3), 16)
    save_router(router, tmp_path, {})
    assert load_router(tmp_path).counts == router.counts
    chances = np.array([[0.70, 0.75, 0.79]])  # 2x3 brings .05 more for 2/16 more tokens
    picks = [best(utilities(chances, router.counts, p)).item() for p in (0.0, 0.1, 0.39, 0.41)]
    assert picks == [2, 1, 1, 0]


@pytest.mark.parametrize("counts", [(4, (2, 2)), ((2, 3), (3, 2)), (4, (1, 6), (2, 3))])
def test_counts_of_equally_many_tokens_leave_no_choice(counts):
    with pytest.raises(ValueError, match="two or more of different numbers of tokens"):
        Router(counts, 4, 4)


# ---- the cascade


def cascade(curves=None, *, counts=None, **options):
    model = tiny_model(trained_num_image_tokens=COUNTS)
    if curves is not None:
        attach_router(model, Router(COUNTS, WIDTH, WIDTH, confidence_calibration=curves))
    return generate_with_escalation(
        model, **asked(digits_processor()), counts=counts, **OPTIONS, **options
    )


def test_a_cascade_compares_what_the_curve_of_its_count_says():
    """At 4 nothing is ever right, at 9 everything: raw confidence, about 1/50, says neither."""
    answers = cascade([(0.0, -5.0), (0.0, 5.0), (0.0, 5.0)], threshold=0.9)
    assert answers.counts == [9] * 6
    assert answers.calibrated
    assert answers.confidences == pytest.approx([0.9933] * 6, abs=1e-4)
    raw = cascade(threshold=0.9)
    assert not raw.calibrated
    assert raw.counts == [16] * 6


def test_curves_that_change_nothing_give_the_same_answers():
    raw = cascade(threshold=0.02)
    same = cascade([(1.0, 0.0)] * 3, threshold=0.02)
    assert same.counts == raw.counts
    assert same.confidences == pytest.approx(raw.confidences, abs=1e-6)


def test_a_count_that_the_router_does_not_know_leaves_confidence_as_it_is():
    answers = cascade([(0.0, 5.0)] * 3, counts=(4, (2, 3), 16), threshold=0.0)
    assert not answers.calibrated
    assert max(answers.confidences) < 0.9
    assert cascade([(0.0, 5.0)] * 3, counts=((2, 2), 16), threshold=0.0).calibrated
