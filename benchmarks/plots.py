"""Pictures of a run, drawn from its CSV alone."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, Literal

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.results import OURS, WALL_CLOCK, Comparison, Results, Row

OUR_COLOUR, GREY = "#1f4e79", "#b0b0b0"
OUR_COLOURS = (OUR_COLOUR, "#5b8db8", "#9dbfdb")
PEER_COLOURS = ("#e07b39", "#4c9f70", "#b5495b", "#7a6bb0", "#c2a03a", "#8c6d5a", "#808080")
NOT_OPS = ("ceiling", "host_cost", "end_to_end")
GRADIENTS = ("frozen table", "trained table", "sparse table gradient")
# Cases outside a series of sizes: other widths, several kinds of grid, other gradients.
OTHER = re.compile(r"mixed|uniform|D=(?!2048\b)|\+ 0 vision|trained table|sparse table gradient")


def draw(rows: Sequence[Row], csv_path: Path) -> list[Path]:
    """Draw the pictures beside the CSV, and delete earlier ones that would have no content now."""
    measured = [row for row in rows if row["status"] == "ok"]
    written = []
    for picture in (throughput, speed_up):
        name = picture.__name__.replace("_", "-")
        path = csv_path.with_name(f"{csv_path.stem}-{name}.png")
        figure = picture(measured)
        if figure is None:
            path.unlink(missing_ok=True)
            continue
        figure.suptitle(machine(rows[0]), x=0.01, ha="left", fontsize=9, color="#555555")
        save(figure, path)
        written.append(path)
    return written


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=130)
    plt.close(figure)


def machine(row: Row) -> str:
    name = row["gpu"] or f"{row['cpu']}, threads: {row['threads']}, load {row['load']}"
    return f"{name}   torch {row['torch']}   commit {row['commit']}"


# ---- pictures


def throughput(rows: Sequence[Row]) -> Figure | None:
    """Bandwidth, or arithmetic, of each op and mode against T, the measured ceiling as a line."""
    panels: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        is_op = row["op"] not in NOT_OPS and (row["gb_per_s"] or row["tflop_per_s"])
        if is_op and row["mode"] != "backward" and not OTHER.search(row["case"]):
            panels[row["op"], row["mode"]].append(row)
    if not panels:
        return None
    lines = -(-len(panels) // 2)
    figure, grid = plt.subplots(
        lines, 2, figsize=(11, 4.5 * lines), squeeze=False, layout="constrained"
    )
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    for axes, ((op, mode), panel) in zip(grid.flat, panels.items(), strict=False):
        moves = panel[0]["gb_per_s"]
        column, unit = ("gb_per_s", "GB/s") if moves else ("tflop_per_s", "TFLOP/s")
        series = defaultdict(list)
        for row in panel:
            series[label(row)].append((int(row["tokens"]), float(row[column])))
        ours, peers = iter(OUR_COLOURS), cycle(PEER_COLOURS)
        for name, points in series.items():
            colour = next(ours if name.startswith(OURS) else peers)
            width = 2.2 if name.startswith(f"{OURS} ") else 1.4
            line = zip(*sorted(points), strict=True)
            axes.plot(*line, "o-", label=name, color=colour, linewidth=width)
        ceiling = "copy" if moves else "matmul"
        for row in rows:
            if row["op"] == "ceiling" and row["variant"] == ceiling:
                value = float(row[column])
                axes.axhline(value, color=GREY, linestyle="--", linewidth=1)
                text = f"measured {ceiling}: {value:.3g} {unit}"
                left = (0.01, value)  # a share of the axis, and a value
                note(axes, text, left, (0, 6), xycoords=("axes fraction", "data"))
        axes.set_title(f"{op}, {mode}", loc="left", fontsize=11)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel("T, rows of the result")
        axes.set_ylabel(unit)
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
        below = (0, -0.16)  # where the legend covers nothing
        axes.legend(fontsize=8, frameon=False, ncols=2, loc="upper left", bbox_to_anchor=below)
        tidy(axes, grid="both")
    return figure


def speed_up(rows: Sequence[Row]) -> Figure | None:
    """The time of each peer over ours: a bar for the worst case, a dot for every case."""
    groups: dict[tuple[str, str], list[Comparison]] = defaultdict(list)
    for pair in Results(rows).comparisons():
        ending = next((end for end in GRADIENTS if pair.ours["case"].endswith(end)), "")
        title = ", ".join(filter(None, (pair.ours["op"], pair.ours["mode"], ending)))
        groups[title, pair.peer["variant"]].append(pair)
    if not groups:
        return None
    figure, axes = plt.subplots(figsize=(11, 0.25 * len(groups) + 1.6), layout="constrained")
    colours = dict(zip(dict.fromkeys(title for title, _ in groups), cycle(PEER_COLOURS)))
    labels, ratios = [], []
    for at, ((title, peer), pairs) in enumerate(groups.items()):
        values = [pair.figure.value for pair in pairs]
        worst = min(pairs, key=lambda pair: pair.figure.value)
        axes.barh(-at, min(values) - 1, left=1, color=colours[title], height=0.72)
        axes.plot(values, [-at] * len(values), ".", color="#333333", markersize=4)
        note(axes, f"{min(values):.2f} at T={worst.peer['tokens']}", (max(1, *values), -at))
        clock = f", {WALL_CLOCK}" if any(pair.figure.remark for pair in pairs) else ""
        labels.append(f"{title} ({pairs[0].ours['backend']}):  {peer}{clock}")
        ratios += values
    axes.set_yticks([-at for at in range(len(groups))], labels, fontsize=7.5)
    axes.set_ylim(-len(groups) + 0.4, 0.6)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlim(0.8 * min(1, *ratios), 3 * max(1, *ratios))
    axes.xaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", labelsize=7)
    reading = "right of 1: we are faster\nbar and number: the worst case; dots: all"
    axes.set_xlabel(f"time of the peer over ours; {reading}", fontsize=9)
    tidy(axes)
    return figure


# ---- drawing


def label(row: Row) -> str:
    return f"{row['variant']} ({row['backend']})" if row["backend"] else row["variant"]


def note(
    axes: Axes, text: str, at: tuple[float, float], offset: tuple[float, float] = (4, 0), **how: Any
) -> None:
    """Write beside a point."""
    axes.annotate(text, at, offset, textcoords="offset points", va="center", fontsize=8, **how)


def tidy(axes: Axes, grid: Literal["x", "y", "both"] = "x") -> None:
    axes.grid(axis=grid, alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
