"""Accuracy against vision tokens for every way of choosing the count, from one grading.

Nothing here runs the model: each selector picks, for each question, one of the counts that it was
graded at.
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

from tokenflex.routing.budget import spread
from tokenflex.routing.grading import Grades
from tokenflex.routing.router import Router, best, utilities

PENALTIES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
THRESHOLDS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999)
PROMPT_QUESTIONS = 8  # over which a budget is spread
BUDGETS = 5  # of them on the curve

Choice = NDArray[np.int64]  # [questions], the place of each question's count


@dataclass(frozen=True)
class CurvePoint:
    """What one selector gives at one setting. Every kind of question weighs the same.

    Attributes:
        selector: "always", "router", "budget", "cascade", "random" or "oracle".
        setting: the count, penalty, tokens an image, threshold or mixture.
        accuracy: share of right answers.
        tokens: vision tokens a question, of the answer that counts.
        prefill_tokens: with those of the answers that were given up.
        accuracy_unweighted, tokens_unweighted: the first two with every question weighing the same,
            whatever its kind.
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
    """Every selector at every setting.

    ``always`` one count; ``router`` at each penalty and, named "own", at its own; ``budget`` at
    each of :func:`budgets_between`, see :func:`budgeted`; ``cascade`` at each threshold;
    ``random``, a coin between two counts, as expected; ``oracle``, the smallest count that is
    right, or the smallest of all where none is.

    Args:
        grades: of questions that neither the model nor the router was trained on.
        router: if None, it and the budget, which is spread by its word, are left out.
        penalties: of the router.
        thresholds: of the cascade.

    Raises:
        ValueError: the router chooses from other counts than the grades hold.
    """
    always = [
        _point(grades, "always", str(count), np.full(len(grades), i))
        for i, count in enumerate(grades.counts)
    ]
    points = [*always]
    if router is not None:
        for name, penalty in [("own", router.penalty), *((f"{p:g}", p) for p in penalties)]:
            points.append(_point(grades, "router", name, routed(router, grades, penalty)))
        for tokens_per_image in budgets_between(grades.counts):
            chosen = budgeted(router, grades, tokens_per_image)
            points.append(_point(grades, "budget", f"{tokens_per_image}", chosen))
    for threshold in thresholds:
        chosen = escalated(grades, threshold)
        points.append(_point(grades, "cascade", f"{threshold:g}", chosen, retries=True))
    for one, other in combinations(always, 2):
        points.append(_coin(one, other))
    points.append(_point(grades, "oracle", "", best(grades.right.double().numpy())))
    return points


def routed(router: Router, grades: Grades, penalty: float) -> Choice:
    """The router's choice. A question about several images gets one count for all of them, by the
    mean of their chances, for it was graded so; ``generate`` chooses for each image.

    Raises:
        ValueError: the router chooses from other counts than the grades hold.
    """
    return best(utilities(_chances(router, grades), grades.counts, penalty))


def budgeted(router: Router, grades: Grades, tokens_per_image: int) -> Choice:
    """The choice of a budget, spread over prompts of ``PROMPT_QUESTIONS`` questions with images.

    A graded question shows few images, often one, which leaves nothing to spread. So prompts are
    put together, of different images as long as there are such: in the data set's order come all
    samples' first questions, then all their second ones, and so on; each eight in a row are a
    prompt, the last ones perhaps fewer. Within a prompt :func:`tokenflex.routing.budget.spread`
    decides, as ``generate`` has it do, by the router's chances without a penalty.

    A question about several images gets one count for all of them, for it was graded so: it stands
    in its prompt as one image would, worth the mean of its images' chances, at the cost of all.

    Args:
        router: says what a count is worth.
        grades: at its counts.
        tokens_per_image: a prompt's budget is as many times its images, once for each tile of one.

    Raises:
        ValueError: the router chooses from other counts than the grades hold, or the budget is
            below the smallest.
    """
    worth, tiles = _chances(router, grades), grades.tiles.tolist()
    choice = np.zeros(len(grades), dtype=np.int64)
    order = _by_turns(grades)
    for first in range(0, len(order), PROMPT_QUESTIONS):
        prompt = order[first : first + PROMPT_QUESTIONS]
        choice[prompt] = spread(
            worth[prompt].tolist(),
            [[count * tiles[question] for count in grades.counts] for question in prompt],
            tokens_per_image * sum(tiles[question] for question in prompt),
            name=f"prompt {first // PROMPT_QUESTIONS}",
        )
    return choice


def budgets_between(counts: Sequence[int]) -> list[int]:
    """Tokens an image, at most ``BUDGETS`` of them, evenly between the smallest count and the
    largest; those two are ``always``."""
    smallest, largest = min(counts), max(counts)
    evenly = np.linspace(smallest, largest, BUDGETS + 2)[1:-1].round().astype(int).tolist()
    return sorted({tokens for tokens in evenly if smallest < tokens < largest})


def escalated(grades: Grades, threshold: float) -> Choice:
    """The cascade's choice: the first count whose confidence is not below ``threshold``, or the
    largest, as :func:`tokenflex.routing.cascade.generate_with_escalation` answers."""
    sure = grades.confidence.double().numpy() >= threshold
    sure[:, -1] = True
    return sure.argmax(1)


def score(
    grades: Grades, choice: Choice, weights: torch.Tensor | None = None
) -> tuple[float, float]:
    """(accuracy, vision tokens a question) at chosen counts.

    Args:
        grades: K questions.
        choice: of each.
        weights: float64 [K], adding up to 1; if None, every kind weighs the same.
    """
    weights = grades.weights() if weights is None else weights
    picked = torch.from_numpy(choice)
    right = grades.right.gather(1, picked[:, None]).squeeze(1)
    tokens = torch.tensor(grades.counts)[picked] * grades.tiles
    return float((weights * right).sum()), float((weights * tokens).sum())


def format_curve(points: Sequence[CurvePoint]) -> str:
    """The points as a table of text."""
    rows = [f"{'selector':<10}{'setting':<10}{'accuracy':>9}{'tokens':>8}{'prefill':>9}"]
    rows += [
        f"{point.selector:<10}{point.setting:<10}{point.accuracy:>9.3f}{point.tokens:>8.2f}"
        f"{point.prefill_tokens:>9.2f}"
        for point in points
    ]
    return "\n".join(rows)


def as_rows(points: Sequence[CurvePoint]) -> list[dict[str, Any]]:
    """The points as JSON takes them."""
    return [asdict(point) for point in points]


def _point(
    grades: Grades, selector: str, setting: str, choice: Choice, *, retries: bool = False
) -> CurvePoint:
    accuracy, tokens = score(grades, choice)
    prefill = tokens
    if retries:
        tried = torch.tensor(grades.counts).cumsum(0)[torch.from_numpy(choice)] * grades.tiles
        prefill = float((grades.weights() * tried).sum())
    alike = torch.full((len(grades),), 1 / len(grades), dtype=torch.float64)
    return CurvePoint(selector, setting, accuracy, tokens, prefill, *score(grades, choice, alike))


def _coin(one: CurvePoint, other: CurvePoint) -> CurvePoint:
    """Either of two counts for each question, as expected."""
    figures = [
        (getattr(one, field.name) + getattr(other, field.name)) / 2
        for field in fields(CurvePoint)
        if field.type == "float"
    ]
    return CurvePoint("random", f"{one.setting} or {other.setting}", *figures)


def _by_turns(grades: Grades) -> list[int]:
    """The questions that show images: every sample's first, then every sample's second ..."""
    asked: Counter[int] = Counter()
    turns = []
    for question, sample in enumerate(grades.samples.tolist()):
        if grades.tiles[question]:
            turns.append((asked[sample], question))
            asked[sample] += 1
    return [question for _, question in sorted(turns)]


def _chances(router: Router, grades: Grades) -> NDArray[np.float64]:
    """The router's chance of a right answer, [questions, counts]; 0 for one without images."""
    if router.counts != grades.counts:
        raise ValueError(
            f"grades must be at the router's counts, {router.counts}, got {grades.counts}"
        )
    owners = grades.pair_questions.numpy()
    sums = np.zeros((len(grades), len(grades.counts)))
    np.add.at(
        sums,
        owners,
        router.probabilities(
            grades.images[grades.pair_images], grades.questions[grades.pair_questions]
        ),
    )
    images = np.bincount(owners, minlength=len(grades)).clip(1)
    return sums / images[:, None]
