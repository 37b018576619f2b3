"""Accuracy against vision tokens for every way of choosing the count, from one grading.

The model is not run here: each selector picks one of the graded counts for every question.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import combinations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tokenflex.evaluation.counts import label_of
from tokenflex.routing.budget import spread
from tokenflex.routing.calibration import calibrated
from tokenflex.routing.grading import Choice, Grades, mean_chances, routed, score
from tokenflex.routing.router import Router, best
from tokenflex.terminal import text_table

PENALTIES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
THRESHOLDS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999)
PROMPT_QUESTIONS = 8
"""Questions of a prompt that a budget is spread over."""
BUDGETS = 5
"""Budgets on the curve."""


@dataclass(frozen=True)
class CurvePoint:
    """Result of one selector at one setting. Every kind of question has the same weight.

    Attributes:
        selector: "always", "router", "budget", "cascade", "random" or "oracle".
        setting: The count, penalty, tokens per image, threshold or mixture.
        accuracy: Share of right answers.
        tokens: Vision tokens per question, of the final answer.
        prefill_tokens: The same with the tokens of discarded answers.
        accuracy_unweighted, tokens_unweighted: The first two with equal weights for all questions,
            whatever their kind.
    """

    selector: str
    setting: str
    accuracy: float
    tokens: float
    prefill_tokens: float
    accuracy_unweighted: float
    tokens_unweighted: float


def selection_curve(
    grades: Grades,
    router: Router | None = None,
    *,
    penalties: Sequence[float] = PENALTIES,
    thresholds: Sequence[float] = THRESHOLDS,
) -> list[CurvePoint]:
    """Evaluate every selector at every setting.

    ``always`` uses one count. ``router`` is evaluated at each penalty and, with the setting "own",
    at its own one. ``budget`` is evaluated at each of :func:`budgets_between`, see
    :func:`budgeted`, and ``cascade`` at each threshold, of calibrated confidence if the router
    brings curves. ``random`` is the expectation of a fair
    coin between two counts. ``oracle`` takes the smallest count that is answered right, or the
    smallest of all.

    Args:
        grades: Questions that neither the model nor the router was trained on.
        router: None leaves out the router and the budget, which needs its probabilities.
        penalties: Penalties of the router.
        thresholds: Thresholds of the cascade.

    Raises:
        ValueError: The router's counts differ from those of the grades.
    """
    always = [
        _point(grades, "always", label_of(count), np.full(len(grades), i))
        for i, count in enumerate(grades.counts)
    ]
    points = [*always]
    if router is not None:
        for name, penalty in [("own", router.penalty), *((f"{p:g}", p) for p in penalties)]:
            points.append(_point(grades, "router", name, routed(router, grades, penalty)))
        for tokens_per_image in budgets_between(grades.sizes):
            choice = budgeted(router, grades, tokens_per_image)
            points.append(_point(grades, "budget", f"{tokens_per_image}", choice))
    for threshold in thresholds:
        choice = escalated(confidence_of(grades, router), threshold)
        points.append(_point(grades, "cascade", f"{threshold:g}", choice, retries=True))
    points += [_coin(first, second) for first, second in combinations(always, 2)]
    points.append(_point(grades, "oracle", "", best(grades.right.double().numpy())))
    return points


def budgeted(router: Router, grades: Grades, tokens_per_image: int) -> Choice:
    """Spread a budget over prompts of ``PROMPT_QUESTIONS`` questions with images.

    A graded question shows few images, often a single one. Prompts are therefore composed, of
    different images as far as possible: the first questions of all samples in the data set's order,
    then the second ones, and so on. Each run of eight questions is a prompt; the last one may be
    shorter. :func:`tokenflex.routing.budget.spread` decides within a prompt as in ``generate``, by
    the router's probabilities without a penalty.

    A question about several images was graded with one count for all of them. It therefore counts
    as one image here: its worth is the mean of its images' probabilities, its cost their total.

    Args:
        router: Estimates the worth of each count.
        grades: Grades at the router's counts.
        tokens_per_image: Budget of a prompt for each tile of its images.

    Raises:
        ValueError: The router's counts differ from those of the grades, or the budget is below the
            smallest.
    """
    worth, tiles = mean_chances(router, grades), grades.tiles.tolist()
    choice = np.zeros(len(grades), dtype=np.int64)
    order = _by_turns(grades)
    for first in range(0, len(order), PROMPT_QUESTIONS):
        prompt = order[first : first + PROMPT_QUESTIONS]
        choice[prompt] = spread(
            worth[prompt].tolist(),
            [[size * tiles[question] for size in grades.sizes] for question in prompt],
            tokens_per_image * sum(tiles[question] for question in prompt),
            name=f"prompt {first // PROMPT_QUESTIONS}",
        )
    return choice


def budgets_between(counts: Sequence[int], number: int = BUDGETS) -> list[int]:
    """Return at most ``number`` token counts, evenly spaced between the smallest and largest."""
    smallest, largest = min(counts), max(counts)
    evenly = np.linspace(smallest, largest, number + 2)[1:-1].round().astype(int).tolist()
    return sorted({tokens for tokens in evenly if smallest < tokens < largest})


def escalated(confidence: NDArray[np.float64], threshold: float) -> Choice:
    """Return the cascade's choice: the first count with enough confidence, or the largest.

    Args:
        confidence: [questions, counts].
        threshold: Least confidence that is enough.
    """
    sure = confidence >= threshold
    sure[:, -1] = True
    return sure.argmax(1)


def confidence_of(grades: Grades, router: Router | None) -> NDArray[np.float64]:
    """Return the confidence of the model's answers, [questions, counts].

    It is calibrated by the router's curves, if the router brings some.
    """
    confidence = grades.confidence.double().numpy()
    if router is None or router.confidence_calibration is None:
        return confidence
    return calibrated(confidence, router.confidence_calibration)


def prefill_tokens(grades: Grades, choice: Choice, weights: torch.Tensor | None = None) -> float:
    """Return the vision tokens per question of all tries of a cascade that ends at ``choice``."""
    weights = grades.weights() if weights is None else weights
    tried = torch.tensor(grades.sizes).cumsum(0)[torch.from_numpy(choice)] * grades.tiles
    return float((weights * tried).sum())


def format_curve(points: Sequence[CurvePoint]) -> str:
    """Format the points as a text table."""
    rows = [["selector", "setting", "accuracy", "tokens", "prefill"]]
    rows += [
        [
            point.selector,
            point.setting,
            f"{point.accuracy:.3f}",
            f"{point.tokens:.2f}",
            f"{point.prefill_tokens:.2f}",
        ]
        for point in points
    ]
    return text_table(rows, left=2)


def as_rows(points: Sequence[CurvePoint]) -> list[dict[str, Any]]:
    """Return the points as JSON objects."""
    return [asdict(point) for point in points]


def _point(
    grades: Grades, selector: str, setting: str, choice: Choice, *, retries: bool = False
) -> CurvePoint:
    accuracy, tokens = score(grades, choice)
    prefill = prefill_tokens(grades, choice) if retries else tokens
    equal = torch.full((len(grades),), 1 / len(grades), dtype=torch.float64)
    return CurvePoint(selector, setting, accuracy, tokens, prefill, *score(grades, choice, equal))


def _coin(first: CurvePoint, second: CurvePoint) -> CurvePoint:
    figures = [
        (getattr(first, field.name) + getattr(second, field.name)) / 2
        for field in fields(CurvePoint)
        if field.type == "float"
    ]
    return CurvePoint("random", f"{first.setting} or {second.setting}", *figures)


def _by_turns(grades: Grades) -> list[int]:
    """Return the questions with images: the first of every sample, then the second, and so on."""
    seen: Counter[int] = Counter()
    turns = []
    for question, sample in enumerate(grades.samples.tolist()):
        if grades.tiles[question]:
            turns.append((seen[sample], question))
            seen[sample] += 1
    return [question for _, question in sorted(turns)]
