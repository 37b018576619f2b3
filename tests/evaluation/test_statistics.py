"""Standard errors are those of drawing other samples."""

from __future__ import annotations

from math import sqrt

import numpy as np
import pytest

from tokenflex.evaluation.statistics import Verdict, accuracy_of, vision_tokens_of


def verdict(sample: int, right: bool, kind: str = "") -> Verdict:
    return Verdict(sample, kind, right, 1, 4)


def test_one_question_a_sample_is_binomial():
    rows = [verdict(i, i < 30) for i in range(100)]
    one = accuracy_of(rows)
    assert one.value == 0.3
    assert one.standard_error == pytest.approx(sqrt(0.3 * 0.7 / 99))


def test_repeating_the_questions_of_a_sample_makes_nothing_surer():
    once = accuracy_of([verdict(i, i < 30) for i in range(100)])
    often = accuracy_of([verdict(i, i < 30) for i in range(100) for _ in range(8)])
    assert often.standard_error == pytest.approx(once.standard_error)


def test_questions_of_several_kinds_about_one_sample_are_one_draw():
    """Two kinds that are right together are as sure as one; were they draws of their own, surer."""
    one = accuracy_of([verdict(i, i < 30, "a") for i in range(100)])
    both = accuracy_of([verdict(i, i < 30, kind) for i in range(100) for kind in ("a", "b")])
    assert both.standard_error == pytest.approx(one.standard_error)
    # One right where the other is wrong: the mean is one half, whatever samples are drawn.
    opposed = [verdict(i, (i < 50) == (kind == "a"), kind) for i in range(100) for kind in "ab"]
    assert accuracy_of(opposed).standard_error == pytest.approx(0, abs=1e-12)


def test_the_mean_over_kinds_has_the_error_of_a_bootstrap_over_samples():
    """Two kinds of unequal size and chance, and samples that are right or wrong as a whole."""
    rng = np.random.default_rng(0)
    samples = []
    for sample in range(150):
        luck = rng.random() < 0.5
        kinds = ["a"] * rng.integers(1, 6) + ["b"] * rng.integers(0, 2)
        chance = {"a": 0.9 if luck else 0.3, "b": 0.6 if luck else 0.4}
        samples.append([verdict(sample, bool(rng.random() < chance[k]), k) for k in kinds])
    one = accuracy_of([row for rows in samples for row in rows])
    means = []
    for _ in range(600):
        drawn = [samples[i] for i in rng.integers(0, len(samples), len(samples))]
        means.append(accuracy_of([row for rows in drawn for row in rows]).value)
    assert one.standard_error == pytest.approx(np.std(means), rel=0.1)


def test_a_single_sample_says_nothing_of_others():
    assert accuracy_of([verdict(0, True), verdict(0, False)]).standard_error is None


def test_tokens_are_weighed_as_accuracy_is():
    """Three questions that cost 4, one that costs 16 for two images, one without images."""
    rows = [Verdict(i, "coarse", True, 1, 4) for i in range(3)]
    rows += [Verdict(3, "fine", False, 2, 16), Verdict(4, "text", True, 0, 0)]
    tokens = vision_tokens_of(rows)
    assert tokens.per_question == pytest.approx((4 + 16 + 0) / 3)
    assert tokens.per_image == pytest.approx((4 + 8) / 2)  # of the kinds that show images
    assert tokens.per_question_unweighted == pytest.approx(28 / 5)


def test_questions_without_images_cost_nothing():
    tokens = vision_tokens_of([Verdict(0, "a", True, 0, 0), Verdict(1, "b", True, 0, 0)])
    assert (tokens.per_image, tokens.per_question, tokens.per_question_unweighted) == (0, 0, 0)
