"""The rules that choose counts, each at a setting of held-out data, measured on test data.

A rule is the router with a penalty, a budget spread by the router, or the cascade with a threshold;
beside them stand one count for all questions, and a table of one for each first word of a question.
Its setting is the cheapest that costs at most ``max_drop`` of the largest count's accuracy, a
standard error included, on data that neither the model nor the router's weights were fitted on.
Test data decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch

from experiments.routing.curve import (
    budgeted,
    budgets_between,
    confidence_of,
    escalated,
    prefill_tokens,
)
from experiments.routing.reliability import summary
from tokenflex.counts import TokenCount
from tokenflex.evaluation.counts import label_of
from tokenflex.routing.grading import Choice, Grades, routed, score
from tokenflex.routing.router import Router
from tokenflex.routing.training import (
    MARGIN,
    PENALTIES,
    costs_at_most,
    fit_router,
    split_samples,
)

MAX_DROP = 0.01
"""Accuracy that a rule may cost: one point."""
LIMIT = 0.6
"""Share of the largest count's tokens that a rule may take."""
HELD_OUT = 0.2
THRESHOLDS = tuple((1 / (1 + np.exp(-np.linspace(-2, 9, 34)))).round(5).tolist())
BUDGETS = 23
"""Budgets that a setting is chosen from: all whole numbers between 4 and 16, or 24 steps."""
WEIGHTINGS = ("kinds", "questions")
"""Equal weights of all kinds of questions, or of all questions."""
FIGURES = ("drop", "share", "tries_share")
CASCADES = ("cascade", "cascade, raw")
TRIVIAL = ("one count", "first word")
"""Rules that see no picture: what the others must be better than."""

Row = dict[str, Any]
"""A rule on one checkpoint with one router seed."""


@dataclass(frozen=True)
class GradedCheckpoint:
    """A checkpoint's grades: those that routers are fitted on, and those of the test split."""

    name: str
    fitted: Grades
    test: Grades

    def at(self, counts: Sequence[TokenCount]) -> GradedCheckpoint:
        """Return the grades at some of the counts."""
        fitted, test = (at_counts(grades, counts) for grades in (self.fitted, self.test))
        return GradedCheckpoint(self.name, fitted, test)


def at_counts(grades: Grades, counts: Sequence[TokenCount]) -> Grades:
    """Return the grades at some of their counts, in their order."""
    kept = [i for i, count in enumerate(grades.counts) if count in counts]
    return replace(
        grades,
        counts=tuple(grades.counts[i] for i in kept),
        right=grades.right[:, kept],
        confidence=grades.confidence[:, kept],
    )


def study(
    checkpoints: Sequence[GradedCheckpoint],
    seeds: Sequence[int],
    *,
    max_drop: float = MAX_DROP,
    limit: float = LIMIT,
) -> dict[str, Any]:
    """Return every rule's rows, their means with a verdict, and the calibration, as JSON objects.

    Args:
        checkpoints: One or more checkpoints, graded at the same counts.
        seeds: Seeds of the routers of each checkpoint.
        max_drop: Accuracy that a rule may cost.
        limit: Share of the largest count's tokens that a rule may take at that.
    """
    rows: list[Row] = []
    calibration = []
    for checkpoint in checkpoints:
        for seed in seeds:
            router, _ = fit_router(
                checkpoint.fitted, max_drop=max_drop, held_out=HELD_OUT, seed=seed
            )
            _, held_out = split_samples(checkpoint.fitted, HELD_OUT, seed)
            names = {"checkpoint": checkpoint.name, "seed": seed}
            rows += [
                {**names, **row} for row in _rows(router, held_out, checkpoint, max_drop=max_drop)
            ]
            calibration.append({**names, **summary(router, checkpoint.test)})
    return {
        "counts": [label_of(count) for count in checkpoints[0].test.counts],
        "max_drop": max_drop,
        "limit": limit,
        "margin": MARGIN,
        "always": {checkpoint.name: _always(checkpoint.test) for checkpoint in checkpoints},
        "rows": rows,
        "means": summarise(rows, max_drop, limit),
        "calibration": calibration,
    }


def _always(grades: Grades) -> dict[str, dict[str, float]]:
    """Return each count's accuracies, by weighting."""
    return {
        weighting: {
            label_of(count): score(grades, np.full(len(grades), i), _weights(grades, weighting))[0]
            for i, count in enumerate(grades.counts)
        }
        for weighting in WEIGHTINGS
    }


def _rows(
    router: Router, held_out: Grades, checkpoint: GradedCheckpoint, *, max_drop: float
) -> Iterator[Row]:
    budgets = budgets_between(held_out.sizes, BUDGETS)
    rules: list[tuple[str, Grades, Sequence[float], Callable[[Grades, Any], Choice]]] = [
        ("router", held_out, PENALTIES, lambda grades, p: routed(router, grades, p)),
        ("budget", held_out, budgets, lambda g, n: budgeted(router, g, n)),
        # Nothing of the cascade but its curves was fitted on these questions.
        (CASCADES[0], checkpoint.fitted, THRESHOLDS, _cascade(router)),
        (CASCADES[1], checkpoint.fitted, THRESHOLDS, _cascade(None)),
        (TRIVIAL[0], checkpoint.fitted, range(len(held_out.counts)), _one_count),
        (TRIVIAL[1], checkpoint.fitted, PENALTIES, by_first_word(checkpoint.fitted)),
    ]
    for rule, chosen_on, settings, choose in rules:
        choices = {setting: choose(chosen_on, setting) for setting in settings}
        on_test = {setting: choose(checkpoint.test, setting) for setting in settings}
        for weighting in WEIGHTINGS:
            weights = _weights(checkpoint.test, weighting)
            setting = cheapest(chosen_on, choices, _weights(chosen_on, weighting), max_drop)
            row = measured(checkpoint.test, on_test[setting], weights, rule in CASCADES)
            best = cheapest(checkpoint.test, on_test, weights, max_drop, margin=0)
            hindsight = measured(checkpoint.test, on_test[best], weights, rule in CASCADES)
            yield {
                "rule": rule,
                "weighting": weighting,
                "setting": setting,
                **row,
                "hindsight_share": hindsight["share"] if hindsight["drop"] <= max_drop else None,
            }


def _cascade(router: Router | None) -> Callable[[Grades, float], Choice]:
    return lambda grades, threshold: escalated(confidence_of(grades, router), threshold)


def _one_count(grades: Grades, index: float) -> Choice:
    return np.full(len(grades), int(index))


def by_first_word(fitted: Grades) -> Callable[[Grades, float], Choice]:
    """Return a rule with the count that is best for a question's first word, less a penalty.

    The last word of a kind's name is the first of its questions: "tall word" asks "word l5w3".
    Words that ``fitted`` has not get the largest count.
    """
    words = np.array([kind.split()[-1] for kind in fitted.kinds])
    right = fitted.right.double().numpy()
    accuracy = {word: right[words == word].mean(0) for word in {*words.tolist()}}
    shares = np.array(fitted.sizes) / fitted.sizes[-1]

    def choose(grades: Grades, penalty: float) -> Choice:
        best = {word: int(np.argmax(row - penalty * shares)) for word, row in accuracy.items()}
        largest = len(shares) - 1
        return np.array([best.get(kind.split()[-1], largest) for kind in grades.kinds])

    return choose


def cheapest(
    grades: Grades,
    choices: Mapping[float, Choice],
    weights: torch.Tensor | None,
    max_drop: float,
    margin: float = MARGIN,
) -> float:
    """Return the setting with the fewest tokens that costs at most ``max_drop`` of accuracy.

    ``margin`` standard errors are part of the cost. If all settings cost more, it is the one that
    is right most often.
    """
    scores = {setting: score(grades, choice, weights) for setting, choice in choices.items()}
    allowed = [
        setting
        for setting, choice in choices.items()
        if costs_at_most(max_drop, grades, choice, weights, margin)
    ]
    if not allowed:
        return max(scores, key=lambda s: (scores[s][0], -scores[s][1]))
    return min(allowed, key=lambda s: (scores[s][1], -scores[s][0]))


def measured(
    grades: Grades, choice: Choice, weights: torch.Tensor | None, retries: bool
) -> dict[str, float]:
    """Return accuracy and tokens of a choice beside those of the largest count.

    Args:
        grades: The questions.
        choice: The choice for each.
        weights: float64, the weight of each question, adding up to 1; None for kinds alike.
        retries: Smaller counts were tried before, as in a cascade.

    Returns:
        ``accuracy`` and ``tokens``, ``drop``, the accuracy below the largest count's, ``share``,
        the tokens as a share of the largest count's, and ``tries_share``, the same of all tries.
    """
    accuracy, tokens = score(grades, choice, weights)
    largest_accuracy, largest_tokens = score(grades, _largest(grades), weights)
    tries = prefill_tokens(grades, choice, weights) if retries else tokens
    return {
        "accuracy": accuracy,
        "tokens": tokens,
        "drop": largest_accuracy - accuracy,
        "share": tokens / largest_tokens,
        "tries_share": tries / largest_tokens,
    }


def is_met(
    figures: Mapping[str, float], max_drop: float, limit: float, tokens: str = "tries_share"
) -> bool:
    """Return whether no more accuracy is lost, and no more tokens are taken, than allowed.

    ``tokens`` names the figure that is the share of tokens. ``"tries_share"`` has all that a rule
    takes; ``"share"`` leaves out the discarded answers of a cascade.
    """
    return figures["drop"] <= max_drop + 1e-9 and figures[tokens] <= limit + 1e-9


def summarise(rows: Sequence[Row], max_drop: float, limit: float) -> list[Row]:
    """Return the mean of each rule and weighting over checkpoints and seeds, with its verdict.

    The target is met where each checkpoint meets it by its mean over seeds, with the tokens of all
    tries: a cascade takes those of its discarded answers too.

    Spreads are standard deviations: ``of_seeds`` over the seeds of a checkpoint, averaged over
    checkpoints, and ``of_checkpoints`` over the checkpoints' means. None stands for a single one.
    """
    means = []
    for rule, weighting in dict.fromkeys((row["rule"], row["weighting"]) for row in rows):
        of_rule = [row for row in rows if (row["rule"], row["weighting"]) == (rule, weighting)]
        by_checkpoint: dict[str, list[Row]] = {}
        for row in of_rule:
            by_checkpoint.setdefault(row["checkpoint"], []).append(row)
        figures = {name: mean(row[name] for row in of_rule) for name in FIGURES}
        groups = [*by_checkpoint.values()]
        by_mean = [{name: mean(row[name] for row in g) for name in FIGURES} for g in groups]
        met = [is_met(row, max_drop, limit) for row in by_mean]
        means.append(
            {
                "rule": rule,
                "weighting": weighting,
                "checkpoints": len(groups),
                **figures,
                "of_seeds": {n: _mean_spread([[r[n] for r in g] for g in groups]) for n in FIGURES},
                "of_checkpoints": {n: _mean_spread([[row[n] for row in by_mean]]) for n in FIGURES},
                "met": all(met),
                "met_by_last_answers": all(is_met(r, max_drop, limit, "share") for r in by_mean),
                "checkpoints_met": sum(met),
                "runs": len(of_rule),
                "runs_met": sum(is_met(row, max_drop, limit) for row in of_rule),
            }
        )
    return means


def _mean_spread(groups: Sequence[Sequence[float]]) -> float | None:
    spreads = [stdev(values) for values in groups if len(values) > 1]
    return mean(spreads) if spreads else None


def _weights(grades: Grades, weighting: str) -> torch.Tensor | None:
    if weighting == "kinds":
        return None
    return torch.full((len(grades),), 1 / len(grades), dtype=torch.float64)


def _largest(grades: Grades) -> Choice:
    return np.full(len(grades), len(grades.counts) - 1)
