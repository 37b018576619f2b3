"""Shares of right answers, how far chance may have moved them, and what the questions cost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt


@dataclass(frozen=True)
class Verdict:
    """One question that was answered.

    Attributes:
        sample: the sample it belongs to; questions about the same images are not independent.
        kind: what accuracies are grouped by.
        right: whether the answer is.
        images: how many it shows.
        vision_tokens: of all of them together.
    """

    sample: int
    kind: str
    right: bool
    images: int
    vision_tokens: int


@dataclass(frozen=True)
class Accuracy:
    """A share of right answers.

    Attributes:
        value: the share; of several kinds, the mean of theirs, so that rare kinds weigh the same.
        standard_error: of ``value``; None for a single sample, which says nothing about others.
    """

    value: float
    standard_error: float | None


def accuracy_of(verdicts: Sequence[Verdict]) -> Accuracy:
    """The mean over kinds, with a standard error that is robust to questions sharing a sample.

    Each sample moves the mean by its influence, the sum over its questions of
    (right - share of the kind) / (questions of the kind * kinds); the variance is the sum of their
    squares times S / (S - 1) for S samples (the linearised, cluster-robust variance of a ratio).
    For one question a sample and one kind this is the binomial p (1 - p) / (S - 1).
    """
    by_kind = group_by_kind(verdicts)
    shares = {kind: sum(v.right for v in rows) / len(rows) for kind, rows in by_kind.items()}
    influence: dict[int, float] = defaultdict(float)
    for kind, rows in by_kind.items():
        for verdict in rows:
            weight = 1 / (len(rows) * len(by_kind))
            influence[verdict.sample] += (verdict.right - shares[kind]) * weight
    value = sum(shares.values()) / len(shares)
    samples = len(influence)
    if samples < 2:
        return Accuracy(value, None)
    variance = sum(one * one for one in influence.values()) * samples / (samples - 1)
    return Accuracy(value, sqrt(variance))


@dataclass(frozen=True)
class VisionTokens:
    """What questions cost, weighed as accuracy is: the mean over kinds.

    Attributes:
        per_image: of a kind, tokens of its questions by the images they show; of several, the mean
            of those that show any; 0 if none does.
        per_question: of a kind, the mean over its questions; of several, the mean of theirs.
        per_question_unweighted: the mean over all questions, whatever their kind: what asking
            exactly these questions costs.
    """

    per_image: float
    per_question: float
    per_question_unweighted: float


def vision_tokens_of(verdicts: Sequence[Verdict]) -> VisionTokens:
    """Vision tokens of one or more questions."""
    sums = [
        (sum(v.vision_tokens for v in rows), sum(v.images for v in rows), len(rows))
        for rows in group_by_kind(verdicts).values()
    ]
    shown = [tokens / images for tokens, images, _ in sums if images]
    return VisionTokens(
        per_image=sum(shown) / len(shown) if shown else 0.0,
        per_question=sum(tokens / questions for tokens, _, questions in sums) / len(sums),
        per_question_unweighted=sum(v.vision_tokens for v in verdicts) / len(verdicts),
    )


def group_by_kind(verdicts: Sequence[Verdict]) -> dict[str, list[Verdict]]:
    """The verdicts of each kind, kinds in order."""
    groups: dict[str, list[Verdict]] = defaultdict(list)
    for verdict in verdicts:
        groups[verdict.kind].append(verdict)
    return dict(sorted(groups.items()))
