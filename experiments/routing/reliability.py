"""Shares of answers that are right, beside the probability that was stated of them."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.routing.curve import confidence_of, escalated
from tokenflex.evaluation.counts import label_of
from tokenflex.routing.grading import Grades, mean_chances
from tokenflex.routing.router import Router

BINS = 15
"""Bins of equal width, as in Guo et al. 2017."""
STATED = 0.9
"""The confidence of the cascade whose answers are checked."""


@dataclass(frozen=True)
class Predictions:
    """Probabilities of being right, and what was right: two arrays [answers]."""

    probabilities: NDArray[np.float64]
    right: NDArray[np.bool_]

    def bins(self, number: int = BINS) -> list[tuple[int, float, float]]:
        """Return (answers, mean probability, share right) of each bin of equal width.

        A bin without answers has zeros.
        """
        index = np.minimum((self.probabilities * number).astype(int), number - 1)
        sizes = np.bincount(index, minlength=number)
        means, shares = (
            np.bincount(index, weights=values.astype(float), minlength=number) / sizes.clip(1)
            for values in (self.probabilities, self.right)
        )
        return [*zip(sizes.tolist(), means.tolist(), shares.tolist(), strict=True)]

    def error(self, number: int = BINS) -> float:
        """Return the expected calibration error, from 0 to 1.

        It is the mean over all answers of the distance between the share right and the mean
        probability of their bin: equation 3 of Guo et al., "On calibration of modern neural
        networks", ICML 2017. Few answers make it larger than it is.
        """
        bins = self.bins(number)
        gaps = sum(answers * abs(mean - share) for answers, mean, share in bins)
        return gaps / max(len(self.right), 1)


def of_router(router: Router, grades: Grades) -> dict[str, dict[str, Predictions]]:
    """Return the router's p(right) of questions with images, by count, "before" and "after"."""
    before = copy(router)
    before.calibration = None
    asked = grades.tiles.numpy() > 0
    chances = {"before": mean_chances(before, grades), "after": mean_chances(router, grades)}
    return {
        label_of(count): {
            when: Predictions(values[asked, i], grades.right.numpy()[asked, i])
            for when, values in chances.items()
        }
        for i, count in enumerate(grades.counts)
    }


def of_answers(router: Router, grades: Grades) -> dict[str, dict[str, Predictions]]:
    """Return the confidence of the model's answers by count, "before" and "after".

    The entry "cascade" has the final answers of cascades at a confidence of 0.9: before, the first
    answers whose least certain token is that likely, and after, with calibration. Questions without
    images are left out, because no count applies to them.
    """
    asked = grades.tiles.numpy() > 0
    right = grades.right.numpy()[asked]
    values = {
        "before": grades.confidence.double().numpy()[asked],
        "after": confidence_of(grades, router)[asked],
    }
    predictions = {
        label_of(count): {
            when: Predictions(confidences[:, i], right[:, i])
            for when, confidences in values.items()
        }
        for i, count in enumerate(grades.counts)
    }
    rows = np.arange(len(right))
    final = {when: escalated(confidences, STATED) for when, confidences in values.items()}
    predictions["cascade"] = {
        when: Predictions(values[when][rows, choice], right[rows, choice])
        for when, choice in final.items()
    }
    return predictions


def at_least(predictions: Predictions, stated: float = STATED) -> dict[str, Any]:
    """Return the share of answers of at least that confidence, and how many of them are right."""
    sure = predictions.probabilities >= stated
    return {
        "answers": float(sure.mean()),
        "mean": float(predictions.probabilities[sure].mean()) if sure.any() else None,
        "right": float(predictions.right[sure].mean()) if sure.any() else None,
    }


def summary(router: Router, grades: Grades) -> dict[str, Any]:
    """Return the calibration errors before and after, and what a confidence of 0.9 means."""
    answers = of_answers(router, grades)
    parts = {"router": of_router(router, grades), "answers": answers}
    return {
        **{
            part: {
                label: {when: found.error() for when, found in of_label.items()}
                for label, of_label in predictions.items()
            }
            for part, predictions in parts.items()
        },
        "stated": STATED,
        "at_least": {when: at_least(found) for when, found in answers["cascade"].items()},
    }


def format_calibration(summary: dict[str, Any]) -> str:
    """Format the calibration errors as a text table, in points."""
    rows = [f"{'calibration error':<24}{'before':>8}{'after':>8}"]
    for part, name in (("router", "p(right)"), ("answers", "confidence")):
        for label, errors in summary[part].items():
            cells = "".join(f"{100 * errors[when]:>8.1f}" for when in ("before", "after"))
            rows.append(f"{f'{name}, {label}':<24}{cells}")
    return "\n".join(rows)
