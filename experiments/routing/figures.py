"""The figure of the routing study."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.routing.curve import PROMPT_QUESTIONS, CurvePoint
from experiments.routing.reliability import Predictions
from tokenflex.plots import BLUE, GREY, KINDS, finish, plt, save_figure


def plot_selection(points: Sequence[CurvePoint], path: Path) -> None:
    """Draw accuracy against vision tokens of every way of choosing the count.

    Args:
        points: See :func:`experiments.routing.curve.selection_curve`.
        path: The PNG file, written atomically.

    Raises:
        ValueError: ``points`` hold no count that is always used.
    """
    of: dict[str, list[CurvePoint]] = defaultdict(list)
    for point in points:
        of["own" if point.setting == "own" else point.selector].append(point)
    always = sorted(of["always"], key=lambda point: point.tokens)
    if not always:
        raise ValueError("points must hold a count that is always used, got none")
    tries = [replace(point, tokens=point.prefill_tokens) for point in of["cascade"]]
    budget = f"budget, over {PROMPT_QUESTIONS} questions"
    rows: list[tuple[Sequence[CurvePoint], str, str, dict[str, Any]]] = [
        (always, "always one count", BLUE, {"marker": "o", "linestyle": "none"}),
        (of["random"], "random mix of two", GREY, {"marker": "x", "linestyle": "none"}),
        (of["router"], "router", KINDS[0], {"marker": "o", "markersize": 4}),
        (of["own"], "router, own penalty", KINDS[0], {"marker": "D", "linestyle": "none"}),
        (of["budget"], budget, KINDS[3], {"marker": "^", "markersize": 4.5}),
        (of["cascade"], "cascade, last answer", KINDS[1], {"marker": "s", "markersize": 3.5}),
        (tries, "cascade, all its tries", KINDS[1], {"linestyle": "--", "alpha": 0.7}),
        (of["oracle"], "oracle", KINDS[2], {"marker": "*", "linestyle": "none"}),
    ]
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    axes.axhline(always[-1].accuracy, color=GREY, linewidth=0.8, linestyle=":")
    for point in always:
        axes.annotate(
            point.setting,
            (point.tokens, point.accuracy),
            (7, 0),
            textcoords="offset points",
            va="center",
            color=BLUE,
        )
    for selected, label, colour, style in rows:
        if selected:
            rising = sorted(selected, key=lambda point: point.tokens)
            tokens = [point.tokens for point in rising]
            accuracy = [point.accuracy for point in rising]
            axes.plot(tokens, accuracy, label=label, color=colour, **style)
    axes.set_xlabel("vision tokens a question")
    axes.set_ylabel("accuracy")
    finish(axes)
    axes.legend(loc="lower right", fontsize=8.5, frameon=False)
    save_figure(figure, path)


def plot_reliability(
    panels: Mapping[str, Mapping[str, Mapping[str, Predictions]]], path: Path
) -> None:
    """Draw the share of right answers against the probability that was given them.

    Args:
        panels: For each row of the figure, its name and the predictions by count, "before"
            calibration and "after". All rows have the same counts.
        path: The PNG file, written atomically.
    """
    counts = [*next(iter(panels.values()))]
    size = (2.3 * len(counts) + 0.4, 2.5 * len(panels) + 0.4)
    figure, grid = plt.subplots(
        len(panels),
        len(counts),
        figsize=size,
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    for row, (name, by_count) in zip(grid, panels.items(), strict=True):
        for axes, count in zip(row, counts, strict=True):
            axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=":")
            for (when, found), colour in zip(
                by_count[count].items(), (KINDS[0], BLUE), strict=True
            ):
                points = [(mean, right) for answers, mean, right in found.bins() if answers]
                label = f"{when}, ECE {100 * found.error():.1f}"
                axes.plot(*zip(*points, strict=True), "o-", ms=3, color=colour, label=label)
            axes.set_title(f"{name}, {count}", fontsize=9, loc="left")
            finish(axes)
            axes.legend(fontsize=7, frameon=False, loc="upper left")
        row[0].set_ylabel("share right")
    for axes in grid[-1]:
        axes.set_xlabel("probability")
    save_figure(figure, path)
