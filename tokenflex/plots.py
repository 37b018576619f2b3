"""Pictures of reports."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from tokenflex.selection.curve import PROMPT_QUESTIONS, CurvePoint
from tokenflex.training.checkpoint import write_atomically

OVERALL = "#1f4e79"
KINDS = ("#e07b39", "#4c9f70", "#b5495b", "#7a6bb0", "#c2a03a", "#3f8fa8", "#8c6d5a", "#808080")
LABEL_GAP = 0.045


def plot_accuracy(report: dict[str, Any], path: Path) -> None:
    """Accuracy against vision tokens per image, overall and by kind of question.

    Args:
        report: what :func:`tokenflex.evaluation.evaluate` returns.
        path: the PNG to write, atomically.

    Raises:
        ValueError: ``report`` holds no accuracies.
    """
    accuracy, kinds, tokens = _checked(report)
    labels = sorted(accuracy, key=tokens.__getitem__)
    # What chooses a count per question is a point of its own beside the curve of the counts.
    counts = [label for label in labels if label[0].isdigit()]
    chosen = [label for label in labels if label not in counts]
    errors = report.get("standard_error", {})

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for some, line, marker in ((counts, "-", "o"), (chosen, "none", "*")):
        left.errorbar(
            [tokens[label] for label in some],
            [accuracy[label] for label in some],
            [1.96 * (errors.get(label) or 0.0) for label in some],
            color=OVERALL,
            linestyle=line,
            marker=marker,
            markersize=11 if some is chosen else 6,
            linewidth=2.5,
            elinewidth=1.2,
        )
    for label in labels:
        name = f"{label} " * (label in chosen)
        left.annotate(
            f"{name}{accuracy[label]:.2f}",
            (tokens[label], accuracy[label]),
            (0, 7),
            textcoords="offset points",
            ha="center",
        )
    bars = " (bars: 95 % interval)" * any(errors.values())
    left.set_title(f"all questions{bars}", loc="left", fontsize=11)
    left.set_ylabel("accuracy")

    for colour, (_, row) in zip(KINDS * 8, sorted(kinds.items()), strict=False):
        for some, line, marker in ((counts, "-", "o"), (chosen, "none", "*")):
            right.plot(
                [tokens[label] for label in some],
                [row[label] for label in some],
                color=colour,
                linestyle=line,
                marker=marker,
                markersize=4,
            )
    _label_ends(right, labels, tokens, kinds)
    right.set_title("by kind of question", loc="left", fontsize=11)
    for axes in (left, right):
        axes.set_xticks([tokens[label] for label in counts or labels])
        axes.set_xlabel("vision tokens per image")
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_ylim(top=1.05)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))
    plt.close(figure)


def _checked(
    report: Any,
) -> tuple[dict[str, float], dict[str, dict[str, float]], dict[str, float]]:
    """The report's accuracies, those of its named kinds of question, and each count's tokens."""
    accuracy = report.get("accuracy") if isinstance(report, dict) else None
    if not isinstance(accuracy, dict) or not accuracy:
        raise ValueError(f"report must hold accuracy (count -> share), got {accuracy!r}")
    tokens = report.get("vision_tokens_per_image")
    if tokens is None:
        if not all(count.isdecimal() for count in accuracy):
            raise ValueError(
                f"report must hold accuracy by count, got counts {', '.join(accuracy)}"
            )
        tokens = {count: float(count) for count in accuracy}
    if not isinstance(tokens, dict) or tokens.keys() != accuracy.keys():
        raise ValueError(
            f"report must hold vision_tokens_per_image at counts {', '.join(accuracy)}, got "
            f"{tokens!r}"
        )
    kinds = {kind: row for kind, row in report.get("accuracy_by_kind", {}).items() if kind}
    for kind, row in kinds.items():
        if not isinstance(row, dict) or row.keys() != accuracy.keys():
            raise ValueError(
                f"report must hold accuracy_by_kind of {kind!r} at counts {', '.join(accuracy)}, "
                f"got {row!r}"
            )
    return accuracy, kinds, tokens


def _label_ends(
    axes: Axes, labels: list[str], tokens: dict[str, float], kinds: dict[str, dict[str, float]]
) -> None:
    """Name each line at its left end, where the kinds differ most, without overlaps."""
    height = 2.0
    colours = dict(zip(sorted(kinds), KINDS * 8, strict=False))
    first, last = tokens[labels[0]], tokens[labels[-1]]
    span = last - first or 1
    for kind in sorted(kinds, key=lambda name: -kinds[name][labels[0]]):
        value = kinds[kind][labels[0]]
        height = min(value, height - LABEL_GAP)
        axes.annotate(
            f"{kind} {value:.2f}",
            (first, value),
            (first - 0.03 * span, height),
            ha="right",
            va="center",
            fontsize=8.5,
            color=colours[kind],
        )
    axes.set_xlim(first - 0.42 * span, last + 0.05 * span)


def plot_selection(points: Sequence[CurvePoint], path: Path) -> None:
    """Accuracy against vision tokens of every way of choosing the count.

    Args:
        points: what :func:`tokenflex.selection.curve.selection_curve` returns.
        path: the PNG to write, atomically.

    Raises:
        ValueError: ``points`` hold no count that is always used.
    """
    by_selector: dict[str, list[CurvePoint]] = defaultdict(list)
    for point in points:
        by_selector[point.selector].append(point)
    always = sorted(by_selector["always"], key=lambda point: point.tokens)
    if not always:
        raise ValueError("points must hold a count that is always used, got none")

    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    axes.axhline(always[-1].accuracy, color="#808080", linewidth=0.8, linestyle=":")
    _draw(axes, always, "always one count", color=OVERALL, marker="o", linestyle="none")
    for point in always:
        axes.annotate(
            point.setting,
            (point.tokens, point.accuracy),
            (7, 0),
            textcoords="offset points",
            va="center",
            color=OVERALL,
        )
    _draw(
        axes,
        by_selector["random"],
        "random mix of two",
        color="#808080",
        marker="x",
        linestyle="none",
    )
    tuned = [point for point in by_selector["router"] if point.setting != "own"]
    _draw(axes, tuned, "router", color=KINDS[0], marker="o", markersize=4)
    own = [point for point in by_selector["router"] if point.setting == "own"]
    _draw(axes, own, "router, own penalty", color=KINDS[0], marker="D", linestyle="none")
    _draw(
        axes,
        by_selector["budget"],
        f"budget, over {PROMPT_QUESTIONS} questions",
        color=KINDS[3],
        marker="^",
        markersize=4.5,
    )
    cascade = by_selector["cascade"]
    _draw(axes, cascade, "cascade, last answer", color=KINDS[1], marker="s", markersize=3.5)
    _draw(
        axes,
        [replace(point, tokens=point.prefill_tokens) for point in cascade],
        "cascade, all its tries",
        color=KINDS[1],
        linestyle="--",
        alpha=0.7,
    )
    _draw(axes, by_selector["oracle"], "oracle", color=KINDS[2], marker="*", linestyle="none")
    axes.set_xlabel("vision tokens a question")
    axes.set_ylabel("accuracy")
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", fontsize=8.5, frameon=False)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))
    plt.close(figure)


def _draw(axes: Axes, points: Sequence[CurvePoint], label: str, **style: Any) -> None:
    if points:
        rising = sorted(points, key=lambda point: point.tokens)
        axes.plot(
            [point.tokens for point in rising],
            [point.accuracy for point in rising],
            label=label,
            **style,
        )
