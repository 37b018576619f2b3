"""Draw the loss, learning rates, speed and accuracy of a run, finished or not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter, MaxNLocator, StrMethodFormatter

from tokenflex.plots import plt, save_figure
from tokenflex.training.records import read_lines

INK, SECOND, MUTED = "#1f4e79", "#e07b39", "#8a8f98"
COUNTS = ("#9ecae1", "#4292c6", "#08519c", "#08306b", "#c7b3e5", "#7a6bb0")
SHADE = "#f1f4f8"
SMOOTHED = 50  # lines in a mean, at most a tenth of all

Line = dict[str, Any]


def plot_curves(run: Path) -> Path:
    """Draw ``curves.png`` in the folder of a run, from ``metrics.jsonl`` and ``evaluations.jsonl``.

    Returns:
        The path of the picture.

    Raises:
        FileNotFoundError: The folder has no ``metrics.jsonl``.
        ValueError: The file has no line of a training run.
    """
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"metrics file {path} does not exist")
    lines = [line for line in read_lines(path) if {"global_step", "loss"} <= line.keys()]
    if not lines:
        raise ValueError(f"metrics file {path} holds no line of a training run")
    path = run / "evaluations.jsonl"
    evaluations = read_lines(path) if path.is_file() else []
    keys = {"global_step", "accuracy"}
    figure = _draw(lines, [line for line in evaluations if keys <= line.keys()])
    picture = run / "curves.png"
    save_figure(figure, picture)
    return picture


def _draw(lines: Sequence[Line], evaluations: Sequence[Line]) -> Any:
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
    for name, panel in axes.items():
        _shade(panel, stages, named=name == "loss")
        panel.set_xlabel("step")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.set_xlim(stages[0][1], max(stages[-1][2], stages[0][1] + 1))
        panel.grid(axis="y", alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(length=0)
    return figure


def _loss(axes: Axes, lines: Sequence[Line]) -> None:
    steps, losses = _series(lines, "loss")
    _faint_and_smooth(axes, steps, losses, INK)
    # A first loss far above all others would flatten what comes after.
    low, high = np.quantile(losses, [0, 0.99])
    margin = 0.08 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + 2 * margin)
    _title(axes, "loss", "each logged step, and their mean")


def _learning_rates(axes: Axes, lines: Sequence[Line]) -> None:
    colours = {"vision": SECOND, "projector": INK, "text": "#4c9f70"}
    rates = [line.get("learning_rate") or {} for line in lines]
    modules = [name for name in colours if any(name in rate for rate in rates)]
    for width, name in zip((4.2, 2.6, 1.1), modules, strict=False):  # lines may coincide
        values = [rate.get(name, np.nan) for rate in rates]
        axes.plot(_steps(lines), values, color=colours[name], linewidth=width, label=name)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.legend(frameon=False, fontsize=8.5, handlelength=1.2)
    _title(axes, "learning rate", "")


def _speed(axes: Axes, lines: Sequence[Line]) -> None:
    steps, speeds = _series(lines, "tokens_per_second")
    _faint_and_smooth(axes, steps, speeds, INK)
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_ylim(0, 1.15 * np.nanmax(speeds))
    shares = 100 * _series(lines, "mfu")[1]
    if np.isnan(shares).all():
        _title(axes, "tokens a second", "")
        return
    _title(axes, "tokens a second", "and MFU, in per cent", colour=SECOND)
    other = axes.twinx()
    _faint_and_smooth(other, steps, shares, SECOND)
    # Lower than the tokens, so that similar curves do not hide each other.
    other.set_ylim(0, 1.6 * np.nanmax(shares))
    other.tick_params(length=0, labelcolor=SECOND)
    other.spines[["top", "right"]].set_visible(False)


def _balance(axes: Axes, lines: Sequence[Line]) -> None:
    steps, values = _series(lines, "cost_balance")
    axes.plot(steps, values, ".", color=INK, alpha=0.35, markersize=3, markeredgewidth=0)
    axes.plot(steps, smooth(values), color=INK, linewidth=1.8)
    axes.axhline(1, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_ylim(0.98, max(1.1, 1.02 * np.nanmax(values)))
    _title(axes, "cost balance", "costliest bin over the mean")


def _accuracy(axes: Axes, evaluations: Sequence[Line]) -> None:
    counts = sorted({int(count) for line in evaluations for count in line["accuracy"]})
    steps = _steps(evaluations)
    for colour, count in zip(COUNTS * len(counts), counts, strict=False):
        values = [line["accuracy"].get(str(count), np.nan) for line in evaluations]
        axes.plot(steps, values, color=colour, marker="o", markersize=4, label=count, clip_on=False)
    highest = max(value for line in evaluations for value in line["accuracy"].values())
    axes.set_ylim(0, min(1.05, 1.3 * highest + 0.05))
    axes.legend(
        title="tokens per image", frameon=False, fontsize=8.5, title_fontsize=8.5, reverse=True
    )
    _title(axes, "accuracy", "during training")


def _faint_and_smooth(axes: Axes, steps: list[int], values: np.ndarray, colour: str) -> None:
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.9)
    axes.plot(steps, smooth(values), color=colour, linewidth=2)


def smooth(values: np.ndarray) -> np.ndarray:
    """Return a centred mean over :data:`SMOOTHED` lines, gaps left out."""
    window = np.ones(max(1, min(SMOOTHED, len(values) // 10)))
    is_known = np.isfinite(values)
    sums = np.convolve(np.where(is_known, values, 0.0), window, "same")
    with np.errstate(invalid="ignore"):
        return np.where(is_known, sums / np.convolve(is_known, window, "same"), np.nan)


def _stages(lines: Sequence[Line]) -> list[tuple[str, int, int]]:
    """Return (name, first step, last step) of each stage."""
    stages: list[tuple[str, int, int]] = []
    for line in lines:
        name = str(line.get("stage_name", line["stage"]))
        first = line["global_step"] - line["step"]
        if stages and stages[-1][1] == first:
            stages.pop()
        stages.append((name, first, line["global_step"]))
    return stages


def _shade(axes: Axes, stages: Sequence[tuple[str, int, int]], *, named: bool) -> None:
    axes.set_axisbelow(True)
    for index, (name, first, last) in enumerate(stages):
        if index % 2:
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


def _series(lines: Sequence[Line], key: str) -> tuple[list[int], np.ndarray]:
    """Return steps and values, with NaN where a line has none."""
    values = [line.get(key) for line in lines]
    return _steps(lines), np.array(
        [np.nan if value is None else value for value in values], dtype=float
    )
