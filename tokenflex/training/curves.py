"""Curves of a run, finished or running: loss, learning rates, speed, balance and accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter, MaxNLocator, StrMethodFormatter

from tokenflex.counts import parse_count, tokens_of
from tokenflex.plots import BLUE, finish, plt, save_figure
from tokenflex.training.records import read_lines

ORANGE, GREEN, MUTED, SHADE = "#e07b39", "#4c9f70", "#8a8f98", "#f1f4f8"
COUNTS = ("#9ecae1", "#4292c6", "#08519c", "#08306b", "#c7b3e5", "#7a6bb0")
SMOOTHED = 50
"""Lines of the file in a mean, or a tenth of the file if that is less."""

Line = dict[str, Any]


def plot_curves(run: Path) -> Path:
    """Draw ``curves.png`` in the folder of a run, from ``metrics.jsonl`` and ``evaluations.jsonl``.

    Returns:
        The path of the PNG file.

    Raises:
        FileNotFoundError: There is no ``metrics.jsonl``.
        ValueError: The file holds no line of a training run.
    """
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"metrics file {path} does not exist")
    lines = [line for line in read_lines(path) if {"global_step", "loss"} <= line.keys()]
    if not lines:
        raise ValueError(f"metrics file {path} holds no line of a training run")
    evaluations: list[Line] = []
    if (run / "evaluations.jsonl").is_file():
        records = read_lines(run / "evaluations.jsonl")
        evaluations = [line for line in records if {"global_step", "accuracy"} <= line.keys()]
    picture = run / "curves.png"
    save_figure(_draw(lines, evaluations), picture)
    return picture


def _draw(lines: Sequence[Line], evaluations: Sequence[Line]) -> Figure:
    top = ["loss", "loss", "accuracy" if evaluations else "loss"]
    layout: list[Any] = [top, ["rate", "speed", "balance"]]
    figure, axes = plt.subplot_mosaic(
        layout,
        figsize=(12, 6.4),
        height_ratios=(1.35, 1),
        layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1),
    )
    _loss(axes["loss"], lines)
    _learning_rates(axes["rate"], lines)
    _speed(axes["speed"], lines)
    _balance(axes["balance"], lines)
    if evaluations:
        _accuracy(axes["accuracy"], evaluations)
    stages = _stages(lines)
    for name, part in axes.items():
        _shade(part, stages, named=name == "loss")
        part.set_xlabel("step")
        part.xaxis.set_major_locator(MaxNLocator(integer=True))
        part.set_xlim(stages[0][1], max(stages[-1][2], stages[0][1] + 1))
        finish(part)
        part.tick_params(length=0)
    return figure


def _loss(axes: Axes, lines: Sequence[Line]) -> None:
    losses = _series(lines, "loss")
    _faint_and_smooth(axes, lines, losses, BLUE)
    # A first loss far above all others would flatten the rest.
    low, high = np.quantile(losses, [0, 0.99])
    margin = 0.08 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + 2 * margin)
    _title(axes, "loss", "each logged step, and their mean")


def _learning_rates(axes: Axes, lines: Sequence[Line]) -> None:
    colours = {"vision": ORANGE, "projector": BLUE, "text": GREEN}
    rates = [line.get("learning_rate") or {} for line in lines]
    modules = [name for name in colours if any(name in rate for rate in rates)]
    for width, name in zip((4.2, 2.6, 1.1), modules, strict=False):  # equal rates stay visible
        values = [rate.get(name, np.nan) for rate in rates]
        axes.plot(_steps(lines), values, color=colours[name], linewidth=width, label=name)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.legend(frameon=False, fontsize=8.5, handlelength=1.2)
    _title(axes, "learning rate", "")


def _speed(axes: Axes, lines: Sequence[Line]) -> None:
    speeds, shares = _series(lines, "tokens_per_second"), 100 * _series(lines, "mfu")
    _faint_and_smooth(axes, lines, speeds, BLUE)
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_ylim(0, 1.15 * np.nanmax(speeds))
    if np.isnan(shares).all():
        _title(axes, "tokens a second", "")
        return
    _title(axes, "tokens a second", "and MFU, in per cent", colour=ORANGE)
    right = axes.twinx()
    _faint_and_smooth(right, lines, shares, ORANGE)
    right.set_ylim(0, 1.6 * np.nanmax(shares))  # below the tokens, so that both stay visible
    right.tick_params(length=0, labelcolor=ORANGE)
    right.spines[["top", "right"]].set_visible(False)


def _balance(axes: Axes, lines: Sequence[Line]) -> None:
    values = _series(lines, "cost_balance")
    axes.plot(_steps(lines), values, ".", color=BLUE, alpha=0.35, markersize=3, markeredgewidth=0)
    axes.plot(_steps(lines), smooth(values), color=BLUE, linewidth=1.8)
    axes.axhline(1, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_ylim(0.98, max(1.1, 1.02 * np.nanmax(values)))
    _title(axes, "cost balance", "costliest bin over the mean")


def _accuracy(axes: Axes, evaluations: Sequence[Line]) -> None:
    labels = {count for line in evaluations for count in line["accuracy"]}
    counts = sorted(labels, key=lambda count: (tokens_of(parse_count(count)), count))
    for colour, count in zip(COUNTS * len(counts), counts, strict=False):
        values = [line["accuracy"].get(count, np.nan) for line in evaluations]
        axes.plot(
            _steps(evaluations),
            values,
            color=colour,
            marker="o",
            markersize=4,
            label=count,
            clip_on=False,
        )
    highest = max(value for line in evaluations for value in line["accuracy"].values())
    axes.set_ylim(0, min(1.05, 1.3 * highest + 0.05))
    axes.legend(
        title="tokens per image", frameon=False, fontsize=8.5, title_fontsize=8.5, reverse=True
    )
    _title(axes, "accuracy", "during training")


def _faint_and_smooth(axes: Axes, lines: Sequence[Line], values: np.ndarray, colour: str) -> None:
    axes.plot(_steps(lines), values, color=colour, alpha=0.25, linewidth=0.9)
    axes.plot(_steps(lines), smooth(values), color=colour, linewidth=2)


def smooth(values: np.ndarray) -> np.ndarray:
    """Return the centred mean over :data:`SMOOTHED` lines, leaving out missing values."""
    window = np.ones(max(1, min(SMOOTHED, len(values) // 10)))
    finite = np.isfinite(values)
    sums = np.convolve(np.where(finite, values, 0.0), window, "same")
    with np.errstate(invalid="ignore"):
        return np.where(finite, sums / np.convolve(finite, window, "same"), np.nan)


def _stages(lines: Sequence[Line]) -> list[tuple[str, int, int]]:
    """Return (name, first step, last step) of each stage."""
    stages: list[tuple[str, int, int]] = []
    for line in lines:
        first = line["global_step"] - line["step"]
        if stages and stages[-1][1] == first:
            stages.pop()
        stages.append((str(line.get("stage_name", line["stage"])), first, line["global_step"]))
    return stages


def _shade(axes: Axes, stages: Sequence[tuple[str, int, int]], *, named: bool) -> None:
    axes.set_axisbelow(True)
    for i, (name, first, last) in enumerate(stages):
        if i % 2:
            axes.axvspan(first, last, color=SHADE, zorder=0, linewidth=0)
        if named:
            axes.annotate(
                f" {name}",
                (first, 1),
                (3, -4),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                va="top",
                fontsize=8.5,
                color=MUTED,
            )


def _title(axes: Axes, title: str, more: str, *, colour: str = MUTED) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_title(more, loc="right", fontsize=8.5, color=colour)


def _steps(lines: Sequence[Line]) -> list[int]:
    return [line["global_step"] for line in lines]


def _series(lines: Sequence[Line], key: str) -> np.ndarray:
    """Return a value of each line, NaN for a missing one."""
    return np.array(
        [np.nan if (value := line.get(key)) is None else value for line in lines], float
    )
