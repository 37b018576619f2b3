"""Pictures of reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

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
    accuracy, kinds = _checked(report)
    counts = sorted(int(count) for count in accuracy)

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    overall = [accuracy[str(count)] for count in counts]
    left.plot(counts, overall, color=OVERALL, marker="o", linewidth=2.5)
    for count, value in zip(counts, overall, strict=True):
        left.annotate(
            f"{value:.2f}", (count, value), (0, 7), textcoords="offset points", ha="center"
        )
    left.set_title("all questions", loc="left", fontsize=11)
    left.set_ylabel("accuracy on held-out images")

    for colour, (_, row) in zip(KINDS * 8, sorted(kinds.items()), strict=False):
        right.plot(counts, [row[str(c)] for c in counts], color=colour, marker="o", markersize=4)
    _label_ends(right, counts, kinds)
    right.set_title("by kind of question", loc="left", fontsize=11)
    for axes in (left, right):
        axes.set_xticks(counts)
        axes.set_xlabel("vision tokens per image")
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_ylim(top=1.05)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))
    plt.close(figure)


def _checked(report: Any) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """The report's accuracies, and those of its named kinds of question."""
    accuracy = report.get("accuracy") if isinstance(report, dict) else None
    if not isinstance(accuracy, dict) or not accuracy:
        raise ValueError(f"report must hold accuracy (count -> share), got {accuracy!r}")
    if not all(count.isdecimal() for count in accuracy):
        raise ValueError(f"report must hold accuracy by count, got counts {', '.join(accuracy)}")
    kinds = {kind: row for kind, row in report.get("accuracy_by_kind", {}).items() if kind}
    for kind, row in kinds.items():
        if not isinstance(row, dict) or row.keys() != accuracy.keys():
            raise ValueError(
                f"report must hold accuracy_by_kind of {kind!r} at counts {', '.join(accuracy)}, "
                f"got {row!r}"
            )
    return accuracy, kinds


def _label_ends(axes: Axes, counts: list[int], kinds: dict[str, dict[str, float]]) -> None:
    """Name each line at its left end, where the kinds differ most, without overlaps."""
    height = 2.0
    colours = dict(zip(sorted(kinds), KINDS * 8, strict=False))
    for kind in sorted(kinds, key=lambda name: -kinds[name][str(counts[0])]):
        value = kinds[kind][str(counts[0])]
        height = min(value, height - LABEL_GAP)
        axes.annotate(
            f"{kind} {value:.2f}",
            (counts[0], value),
            (counts[0] - 0.03 * (counts[-1] - counts[0] or 1), height),
            ha="right",
            va="center",
            fontsize=8.5,
            color=colours[kind],
        )
    span = counts[-1] - counts[0] or 1
    axes.set_xlim(counts[0] - 0.42 * span, counts[-1] + 0.05 * span)
