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
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tokenflex.files import excerpt, write_atomically
from tokenflex.plot_labels import label_points, spread
from tokenflex.routing.curve import PROMPT_QUESTIONS, CurvePoint

OVERALL = "#1f4e79"
KINDS = ("#e07b39", "#4c9f70", "#b5495b", "#7a6bb0", "#c2a03a", "#3f8fa8", "#8c6d5a", "#808080")
LONGEST_NAME = 24  # of a kind, in characters: what is longer would leave no room for the axes
TICK_GAP = 0.06  # between ticks at least, as a share of the axis


def plot_accuracy(report: dict[str, Any], path: Path) -> None:
    """Accuracy against vision tokens per image, overall and by kind of question.

    Square counts are a line. Grids and what chooses a count per question are points of their own
    beside it, with their names: as many vision tokens in another shape are another model.

    Args:
        report: what :func:`tokenflex.evaluation.evaluate` returns.
        path: the PNG to write, atomically.

    Raises:
        ValueError: ``report`` holds no accuracies.
    """
    figure = _accuracy_figure(report)
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Write ``figure`` as a PNG, atomically, and let go of it."""
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))
    plt.close(figure)


def _accuracy_figure(report: Any) -> Figure:
    accuracy, kinds, tokens = _checked(report)
    labels = sorted(accuracy, key=tokens.__getitem__)
    squares = [label for label in labels if label.isdecimal()]
    errors = report.get("standard_error", {})
    bars = {label: 1.96 * (errors.get(label) or 0.0) for label in labels}
    rows = [accuracy, *kinds.values()]
    lowest = min(accuracy[label] - bars[label] for label in labels)
    lowest = min(lowest, *(value for row in rows for value in row.values()))

    height = max(3.6, 1.2 + 0.2 * len(kinds))
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9, height), sharey=True, layout="constrained"
    )
    interval = " (bars: 95 % interval)" * any(errors.values())
    for axes, title in ((left, f"all questions{interval}"), (right, "by kind of question")):
        axes.set_title(title, loc="left", fontsize=11, pad=12)
        axes.set_xlabel("vision tokens per image")
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        _set_tokens_axis(axes, [tokens[label] for label in squares], [*tokens.values()])
    left.set_ylabel("accuracy")
    left.set_ylim(max(0.0, 1 - 1.1 * max(1 - lowest, 0.1)), 1)

    _draw_row(left, accuracy, tokens, OVERALL, bars=bars, linewidth=2.5, markersize=6)
    colours = dict(zip(sorted(kinds), KINDS * (1 + len(kinds) // len(KINDS)), strict=False))
    for kind, colour in colours.items():
        _draw_row(right, kinds[kind], tokens, colour, markersize=4)
    _name_kinds(right, tokens[labels[0]], {k: kinds[k][labels[0]] for k in kinds}, colours)

    figure.draw_without_rendering()  # the axes have their sizes now
    others = [label for label in labels if label not in squares]
    named = [
        (f"{label} " * (label in others) + f"{accuracy[label]:.2f}", tokens[label], accuracy[label])
        for label in labels
    ]
    label_points(left, named)
    if kinds:
        lows = {label: min(row[label] for row in kinds.values()) for label in others}
        label_points(right, [(label, tokens[label], low) for label, low in lows.items()])
    return figure


def _set_tokens_axis(axes: Axes, squares: Sequence[float], tokens: Sequence[float]) -> None:
    """Room around all points, and a tick at each square count that has room for it."""
    first, last = min(tokens), max(tokens)
    room = 0.13 * (last - first) or 0.25 * max(last, 1.0)
    axes.set_xlim(first - room, last + 2 * room)  # labels stand right of their points
    if not squares:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        return
    ticks: list[float] = []
    for tick in sorted(squares, reverse=True):
        if not ticks or ticks[-1] - tick > TICK_GAP * (last - first + 3 * room):
            ticks.append(tick)
    axes.set_xticks(ticks, [f"{tick:.1f}".removesuffix(".0") for tick in ticks])


def _draw_row(
    axes: Axes,
    row: dict[str, float],
    tokens: dict[str, float],
    colour: str,
    *,
    bars: dict[str, float] | None = None,
    markersize: float,
    **style: Any,
) -> None:
    """Squares as a line, grids as hollow squares, a choice per question as a star."""
    for marker, line, size, fill in (("o", "-", 1.0, colour), _GRID, _CHOSEN):
        some = sorted((label for label in row if _marker(label) == marker), key=tokens.__getitem__)
        if not some:
            continue
        accuracy = [row[label] for label in some]
        reach = [0.0 if bars is None else bars[label] for label in some]
        axes.errorbar(
            [tokens[label] for label in some],
            accuracy,
            # No share of right answers is below 0 or above 1.
            [
                [min(one, value) for one, value in zip(reach, accuracy, strict=True)],
                [min(one, 1 - value) for one, value in zip(reach, accuracy, strict=True)],
            ],
            color=colour,
            linestyle=line,
            marker=marker,
            markersize=size * markersize,
            markerfacecolor=fill or colour,
            elinewidth=1.2,
            clip_on=False,  # or a point at 1 would be half of one
            **style,
        )


_GRID = ("s", "none", 1.1, "white")
_CHOSEN = ("*", "none", 1.8, "")


def _marker(label: str) -> str:
    if label.isdecimal():
        return "o"
    return "s" if label[0].isdigit() else "*"


def _name_kinds(
    axes: Axes, first: float, values: dict[str, float], colours: dict[str, str]
) -> None:
    """Name each kind left of the axes, at the height of its first point where that is free."""
    names = sorted(values, key=lambda kind: -values[kind])
    bottom, top = axes.get_ylim()
    heights = spread([(values[kind] - bottom) / (top - bottom) for kind in names])
    for kind, height in zip(names, heights, strict=True):
        short = kind if len(kind) <= LONGEST_NAME else f"{kind[: LONGEST_NAME - 1]}\u2026"
        axes.annotate(
            f"{short} {values[kind]:.2f}",
            (first, values[kind]),
            (-0.03, height),
            textcoords="axes fraction",
            ha="right",
            va="center",
            fontsize=8.5,
            color=colours[kind],
            parse_math=False,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colours[kind],
                "linewidth": 0.5,
                "alpha": 0.6,
                "relpos": (1, 0.5),  # from the end of the name, not through it
            },
        )
    if names:
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", left=False)


def _checked(
    report: Any,
) -> tuple[dict[str, float], dict[str, dict[str, float]], dict[str, float]]:
    """The report's accuracies, those of its named kinds of question, and each count's tokens."""
    accuracy = report.get("accuracy") if isinstance(report, dict) else None
    if not isinstance(accuracy, dict) or not accuracy:
        raise ValueError(f"report must hold accuracy (count -> share), got {excerpt(accuracy)}")
    counts = list(accuracy)
    _check_row("accuracy", accuracy, counts)
    tokens = report.get("vision_tokens_per_image")
    if tokens is None:
        if not all(count.isdecimal() and len(count) < 16 for count in counts):
            raise ValueError(
                f"report must hold accuracy by count, got {excerpt(accuracy)} and no "
                "vision_tokens_per_image"
            )
        tokens = {count: float(count) for count in counts}
    _check_row("vision_tokens_per_image", tokens, counts)
    errors = report.get("standard_error", {})
    if not isinstance(errors, dict) or not all(e is None or _is_share(e) for e in errors.values()):
        raise ValueError(f"report must hold standard_error by count, got {excerpt(errors)}")
    by_kind = report.get("accuracy_by_kind", {})
    if not isinstance(by_kind, dict):
        raise ValueError(f"report must hold accuracy_by_kind, got {excerpt(by_kind)}")
    kinds = {kind: row for kind, row in by_kind.items() if kind}
    for kind, row in kinds.items():
        _check_row(f"accuracy_by_kind of {excerpt(kind)}", row, counts)
    return accuracy, kinds, tokens


def _check_row(name: str, row: Any, counts: list[str]) -> None:
    """Refuse a row of a report that is not a finite number at each count."""
    if not isinstance(row, dict) or {*row} != {*counts} or not all(map(_is_share, row.values())):
        raise ValueError(
            f"report must hold {name} as a number at counts {excerpt(counts)}, got {excerpt(row)}"
        )


def _is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and abs(value) < 1e18  # not NaN either


def plot_selection(points: Sequence[CurvePoint], path: Path) -> None:
    """Accuracy against vision tokens of every way of choosing the count.

    Args:
        points: what :func:`tokenflex.routing.curve.selection_curve` returns.
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
    save_figure(figure, path)


def _draw(axes: Axes, points: Sequence[CurvePoint], label: str, **style: Any) -> None:
    if points:
        rising = sorted(points, key=lambda point: point.tokens)
        axes.plot(
            [point.tokens for point in rising],
            [point.accuracy for point in rising],
            label=label,
            **style,
        )
