"""The plot of accuracy against vision tokens, and the style that all figures share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

BLUE, GREY = "#1f4e79", "#808080"
KINDS = ("#e07b39", "#4c9f70", "#b5495b", "#7a6bb0", "#c2a03a", "#3f8fa8", "#8c6d5a", GREY)
LONGEST_NAME = 24
"""Characters of a kind's name; a longer one would leave no room for the axes."""
TICK_GAP = 0.06
"""Smallest distance between ticks, as a share of the axis."""

Row = Mapping[str, float]


def save_figure(figure: Figure, path: Path) -> None:
    """Write ``figure`` as a PNG, atomically, and close it."""
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))
    plt.close(figure)


def finish(axes: Axes, *, grid: str = "y") -> None:
    """Draw the grid and remove the frame's upper and right side."""
    axes.grid(axis=grid, alpha=0.3)  # type: ignore[arg-type]
    axes.spines[["top", "right"]].set_visible(False)


def plot_accuracy(report: dict[str, Any], path: Path) -> None:
    """Draw accuracy against vision tokens per image, overall and by kind of question.

    Square counts form a line. Grids and selectors are named points beside it, because as many
    vision tokens in another shape are another model.

    Args:
        report: Accuracies as :func:`tokenflex.evaluation.evaluate` returns them.
        path: The PNG file, written atomically.

    Raises:
        ValueError: ``report`` holds no accuracies.
    """
    accuracy, kinds, tokens = _checked(report)
    labels = sorted(accuracy, key=tokens.__getitem__)
    squares = [label for label in labels if label.isdecimal()]
    others = [label for label in labels if label not in squares]
    errors = report.get("standard_error", {})
    bars = {label: 1.96 * (errors.get(label) or 0.0) for label in labels}
    lowest = min(
        *(accuracy[label] - bars[label] for label in labels),
        *(value for row in (accuracy, *kinds.values()) for value in row.values()),
    )

    height = max(3.6, 1.2 + 0.2 * len(kinds))
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9, height), sharey=True, layout="constrained"
    )
    interval = " (bars: 95 % interval)" if any(errors.values()) else ""
    for axes, title in ((left, f"all questions{interval}"), (right, "by kind of question")):
        axes.set_title(title, loc="left", fontsize=11, pad=12)
        axes.set_xlabel("vision tokens per image")
        finish(axes)
        _set_tokens_axis(axes, [tokens[label] for label in squares], [*tokens.values()])
    left.set_ylabel("accuracy")
    left.set_ylim(max(0.0, 1 - 1.1 * max(1 - lowest, 0.1)), 1)

    _draw_row(left, accuracy, tokens, BLUE, bars, linewidth=2.5, markersize=6)
    colours = dict(zip(sorted(kinds), KINDS * (1 + len(kinds) // len(KINDS)), strict=False))
    for kind, colour in colours.items():
        _draw_row(right, kinds[kind], tokens, colour, dict.fromkeys(labels, 0.0), markersize=4)
    _name_kinds(right, tokens[labels[0]], {k: kinds[k][labels[0]] for k in kinds}, colours)

    figure.draw_without_rendering()  # label_points needs the size of the axes
    texts = {label: f"{label} " if label in others else "" for label in labels}
    label_points(left, [(f"{texts[c]}{accuracy[c]:.2f}", tokens[c], accuracy[c]) for c in labels])
    if kinds:
        lows = {label: min(row[label] for row in kinds.values()) for label in others}
        label_points(right, [(label, tokens[label], low) for label, low in lows.items()])
    save_figure(figure, path)


def plot_baselines(report: dict[str, Any], path: Path) -> None:
    """Draw the accuracy of baselines beside the model's, on all and on difficult questions.

    Args:
        report: As :func:`tokenflex.evaluation.evaluate` returns it with baselines.
        path: The PNG file, written atomically.

    Raises:
        ValueError: ``report`` holds no baselines.
    """
    accuracy, _, tokens = _checked(report)
    baselines = report.get("baselines")
    if not isinstance(baselines, dict):
        raise ValueError(f"report must hold baselines, got {excerpt(baselines)}")
    difficult, full = baselines["difficult"], baselines["full"]
    labels = [*difficult["questions"]]
    model = next(iter(difficult["accuracy"]))
    costs = baselines["vision_tokens_per_image"]
    costly = {m for m, row in costs.items() if row and min(row.values()) >= tokens[full]}
    every = {
        "accuracy": {model: {k: accuracy[k] for k in (*labels, full)}, **baselines["accuracy"]},
        "standard_error": {
            model: report.get("standard_error", {}),
            **baselines["standard_error"],
        },
    }
    titles = (
        "all questions (bars: 95 % interval)",
        f"difficult: right at {full}, wrong when resized",
    )
    figure, panels = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
    colours = dict(zip(baselines["accuracy"], KINDS, strict=False)) | {model: BLUE}
    for axes, title, shares in zip(panels, titles, (every, difficult), strict=True):
        axes.set_title(title, loc="left", fontsize=11, pad=18)
        axes.set_xlabel("vision tokens per image")
        finish(axes)
        shown = [label for label in (*labels, full) if label in shares["accuracy"][model]]
        squares = [tokens[label] for label in shown if label.isdecimal()]
        _set_tokens_axis(axes, squares, [tokens[label] for label in shown])
        # The model is drawn over the others.
        for method in sorted(shares["accuracy"], key=lambda method: method == model):
            row = {k: v for k, v in shares["accuracy"][method].items() if v is not None}
            order = sorted(row, key=tokens.__getitem__)
            errors = shares["standard_error"][method]
            bars = [1.96 * (errors.get(label) or 0.0) for label in order]
            axes.errorbar(
                [tokens[label] for label in order],
                [row[label] for label in order],
                [
                    [min(bar, row[label]) for bar, label in zip(bars, order, strict=True)],
                    [min(bar, 1 - row[label]) for bar, label in zip(bars, order, strict=True)],
                ],
                label=f"{method} (costs {full})" if method in costly else method,
                color=colours[method],
                linestyle="--" if method in costly else "-",
                marker="o",
                linewidth=2.5 if method == model else 1.2,
                markersize=6 if method == model else 4,
                elinewidth=0.8,
                clip_on=False,
            )
    for label in labels:
        number = difficult["questions"][label]
        panels[1].annotate(
            f"{number} question{'s' * (number != 1)}",
            (tokens[label], 1.0),
            ha="center",
            va="bottom",
            fontsize=8.5,
            annotation_clip=False,
        )
    panels[0].set_ylim(0, 1)
    panels[0].set_ylabel("accuracy")
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    save_figure(figure, path)


def plot_lines(
    lines: Mapping[str, Sequence[tuple[float, float, float]]],
    path: Path,
    *,
    label: str = "vision tokens per image",
    logarithmic: bool = False,
) -> None:
    """Draw accuracies against vision tokens, a line of points for each name.

    Args:
        lines: Name -> points of (vision tokens, accuracy, its standard error).
        path: The PNG file, written atomically.
        label: Label of the axis of tokens.
        logarithmic: Draw the tokens on a logarithmic axis.

    Raises:
        ValueError: There are no points.
    """
    tokens = sorted({point[0] for points in lines.values() for point in points})
    if not tokens:
        raise ValueError(f"lines must hold at least one point, got {excerpt(lines)}")
    figure, axes = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    colours = (BLUE, *KINDS)
    for i, (name, points) in enumerate(lines.items()):
        rising = sorted(points)
        bars = [1.96 * error for _, _, error in rising]
        axes.errorbar(
            [point[0] for point in rising],
            [point[1] for point in rising],
            [
                [min(bar, share) for bar, (_, share, _) in zip(bars, rising, strict=True)],
                [min(bar, 1 - share) for bar, (_, share, _) in zip(bars, rising, strict=True)],
            ],
            label=name,
            color=colours[i % len(colours)],
            marker="o",
            markersize=5,
            elinewidth=1,
            clip_on=False,
        )
    if logarithmic:
        axes.set_xscale("log", base=2)
    axes.set_xticks(tokens, [f"{number:g}" for number in tokens])
    axes.minorticks_off()
    axes.set_ylim(0, 1)
    axes.set_xlabel(label)
    has_bars = any(error for points in lines.values() for _, _, error in points)
    axes.set_ylabel("accuracy" + " (bars: 95 % interval)" * has_bars)
    finish(axes)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    save_figure(figure, path)


def _set_tokens_axis(axes: Axes, squares: Sequence[float], tokens: Sequence[float]) -> None:
    """Leave room around all points, and set a tick at each square count that has room for it."""
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
    row: Row,
    tokens: Row,
    colour: str,
    bars: Row,
    *,
    markersize: float,
    **style: Any,
) -> None:
    """Draw squares as a line, grids as hollow squares, and selectors as stars."""
    groups: dict[str, list[str]] = {"o": [], "s": [], "*": []}
    for label in sorted(row, key=tokens.__getitem__):
        marker = "o" if label.isdecimal() else "s" if label[0].isdigit() else "*"
        groups[marker].append(label)
    for marker, line, size, fill in (
        ("o", "-", 1.0, colour),
        ("s", "none", 1.1, "white"),
        ("*", "none", 1.8, colour),
    ):
        labels = groups[marker]
        if labels:
            axes.errorbar(
                [tokens[label] for label in labels],
                [row[label] for label in labels],
                # No share of right answers is below 0 or above 1.
                [
                    [min(bars[label], row[label]) for label in labels],
                    [min(bars[label], 1 - row[label]) for label in labels],
                ],
                color=colour,
                linestyle=line,
                marker=marker,
                markersize=size * markersize,
                markerfacecolor=fill,
                elinewidth=1.2,
                clip_on=False,  # a point at 1 would be cut in half
                **style,
            )


def _name_kinds(axes: Axes, first: float, values: Row, colours: Mapping[str, str]) -> None:
    """Name each kind left of the axes, near the height of its first point."""
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
                "relpos": (1, 0.5),  # start at the end of the name
            },
        )
    if names:
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", left=False)


def _checked(report: Any) -> tuple[Row, dict[str, Row], Row]:
    """Return the report's accuracies, those of its named kinds, and each count's tokens."""
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
    if not isinstance(errors, dict) or not all(e is None or _is_finite(e) for e in errors.values()):
        raise ValueError(f"report must hold standard_error by count, got {excerpt(errors)}")
    by_kind = report.get("accuracy_by_kind", {})
    if not isinstance(by_kind, dict):
        raise ValueError(f"report must hold accuracy_by_kind, got {excerpt(by_kind)}")
    kinds = {kind: row for kind, row in by_kind.items() if kind}
    for kind, row in kinds.items():
        _check_row(f"accuracy_by_kind of {excerpt(kind)}", row, counts)
    return accuracy, kinds, tokens


def _check_row(name: str, row: Any, counts: list[str]) -> None:
    if not isinstance(row, dict) or {*row} != {*counts} or not all(map(_is_finite, row.values())):
        raise ValueError(
            f"report must hold {name} as a number at counts {excerpt(counts)}, got {excerpt(row)}"
        )


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and abs(value) < 1e18  # False for NaN too
