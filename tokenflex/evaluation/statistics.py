"""Accuracy with its standard error, and vision tokens of questions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt


@dataclass(frozen=True)
class Verdict:
    """Result of one question.

    Attributes:
        sample: Index of the sample; questions about the same images are not independent.
        kind: Kind of question, by which accuracies are grouped.
        right: True for a right answer.
        images: Number of images.
        vision_tokens: Vision tokens of all images together.
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
        value: The share, or the mean of the shares of several kinds, so that kinds have the same
            weight.
        standard_error: Standard error of ``value``; None for a single sample.
    """

    value: float
    standard_error: float | None


def accuracy_of(verdicts: Sequence[Verdict]) -> Accuracy:
    """Return the mean over kinds, with a standard error robust to questions that share a sample.

    The influence of a sample is the sum over its questions of
    (right - share of the kind) / (questions of the kind * kinds). The variance is the sum of the
    squared influences times S / (S - 1) for S samples (the linearised, cluster-robust variance of a
    ratio). For one question a sample and one kind it is the binomial p (1 - p) / (S - 1).
    """
    by_kind = group_by_kind(verdicts)
    shares = {kind: sum(v.right for v in rows) / len(rows) for kind, rows in by_kind.items()}
    influence: dict[int, float] = defaultdict(float)
    for kind, rows in by_kind.items():
        for verdict in rows:
            weight = 1 / (len(rows) * len(by_kind))
            influence[verdict.sample] += (verdict.right - shares[kind]) * weight
    accuracy = sum(shares.values()) / len(shares)
    samples = len(influence)
    if samples < 2:
        return Accuracy(accuracy, None)
    variance = sum(value * value for value in influence.values()) * samples / (samples - 1)
    return Accuracy(accuracy, sqrt(variance))


@dataclass(frozen=True)
class VisionTokens:
    """Vision tokens of questions. Kinds have the same weight, as in the accuracy.

    Attributes:
        per_image: Tokens per image, as the mean over the kinds with images; 0 if there are none.
        per_question: Tokens per question, as the mean over kinds.
        per_question_unweighted: Tokens per question, as the mean over all questions.
    """

    per_image: float
    per_question: float
    per_question_unweighted: float


def vision_tokens_of(verdicts: Sequence[Verdict]) -> VisionTokens:
    """Return the vision tokens of one or more questions."""
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
    """Return the verdicts of each kind; kinds are sorted."""
    groups: dict[str, list[Verdict]] = defaultdict(list)
    for verdict in verdicts:
        groups[verdict.kind].append(verdict)
    return dict(sorted(groups.items()))
