"""The picture of a run, drawn from its CSV alone: how much faster ours is than each peer.

python -m benchmarks.plots CSV... --out FILE    # several machines side by side
"""

from __future__ import annotations

import argparse
import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullFormatter

from benchmarks.cases import MODES
from benchmarks.comparisons import Comparison, Results
from benchmarks.results import COLUMNS, COMPILED, EAGER, Row, read_csv
from tokenflex_kernels.options import output_file

OUR_COLOUR, GREY, LOSS = "#1f4e79", "#b0b0b0", "#c1121f"
PEER_COLOURS = ("#e07b39", "#4c9f70", "#b5495b", "#7a6bb0", "#c2a03a", "#8c6d5a", "#808080")
MORE_COLOURS = ("#56b4e9", "#111111", "#d88fc0")
OPS = (
    *("pool_norm", "swiglu", "project_tokens", "project_and_pack"),
    *("pack_embeddings", "merge_vision", "unpack_vision"),
)
MARKERS = {"float32": "o", "bfloat16": "D"}
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
LINE_INCHES = 0.5


class Panel(NamedTuple):
    """The comparisons of a machine and a number of threads."""

    title: str
    pairs: list[Comparison]


def draw(rows: Sequence[Row], csv_path: Path) -> list[Path]:
    """Draw the picture beside the CSV, and delete an earlier one that would be empty now."""
    path = csv_path.with_name(f"{csv_path.stem}-speed-up.png")
    figure = speed_up(panels_of(rows))
    if figure is None:
        path.unlink(missing_ok=True)
        return []
    save(figure, path)
    return [path]


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=130)
    plt.close(figure)


def machine(row: Row) -> str:
    name = row["gpu"] or f"{row['cpu']}, threads: {row['threads']}, load {row['load']}"
    return f"{name}   torch {row['torch']}   commit {row['commit']}"


def panels_of(rows: Sequence[Row]) -> list[Panel]:
    """Return a panel for each number of threads of a CPU, or one for a GPU."""
    panels = defaultdict(list)
    for pair in Results(rows).comparisons():
        row = pair.ours
        cpu = f"{re.sub(r'[(]R[)]', '', row['cpu'])}, threads: {row['threads']}"
        panels[row["gpu"] or cpu].append(pair)
    return [Panel(title, pairs) for title, pairs in panels.items()]


def speed_up(panels: Sequence[Panel]) -> Figure | None:
    """Draw a line for each op and mode, a dot for each case, and its interval as whiskers."""
    pairs = [pair for panel in panels for pair in panel.pairs]
    if not pairs:
        return None
    lines = sorted(
        {line_of(pair) for pair in pairs},
        key=lambda line: (OPS.index(line[0]), MODES.index(line[1])),
    )
    order = (EAGER, COMPILED)
    peers = sorted({*map(peer_of, pairs)}, key=lambda peer: (peer not in order, peer))
    colours = dict(zip(peers, cycle((OUR_COLOUR, *PEER_COLOURS, *MORE_COLOURS)), strict=False))
    values = [pair.figure.value for pair in pairs]
    limits = (0.8 * min(0.6, *values), 1.25 * max(2, *values))
    size = (1.9 + 4.2 * len(panels), LINE_INCHES * len(lines) + 1.7)
    figure, grid = plt.subplots(
        1, len(panels), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for axes, panel in zip(grid.flat, panels, strict=True):
        axes.set(xscale="log", xlim=limits, ylim=(len(lines) - 0.4, -0.6))
        axes.axvspan(limits[0], 1, color=LOSS, alpha=0.06, linewidth=0)
        axes.axvline(1, color="#222222", linewidth=1)
        for y, line in enumerate(lines):
            shown = [pair for pair in panel.pairs if line_of(pair) == line]
            draw_line(axes, shown, y, colours)
            if y and line[0] != lines[y - 1][0]:
                axes.axhline(y - 0.5, color=GREY, linewidth=0.8)
        axes.xaxis.set_major_locator(FixedLocator(TICKS))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(which="both", length=0, labelsize=8)
        sides = Counter(pair.side for pair in panel.pairs)
        counts = f"faster {sides[1]}, within noise {sides[0]}, slower {sides[-1]}"
        axes.set_title(f"{panel.title}\n{counts}", loc="left", fontsize=9)
        tidy(axes)
        axes.spines["left"].set_visible(False)
    names = [f"{op}\n{mode.replace('+', ' + ')}" for op, mode in lines]
    grid[0, 0].set_yticks(range(len(lines)), names, fontsize=8)
    meaning = (
        "time of the peer over ours: right of 1x ours is faster, left of it the peer\n"
        "A dot is a case, larger with more tokens; a line its 99 % interval"
    )
    figure.supxlabel(meaning, fontsize=9)
    handles = [dot(colour, "o", peer) for peer, colour in colours.items()]
    dtypes = dict.fromkeys(pair.ours["dtype"] for pair in pairs)
    handles += [dot("#555555", MARKERS.get(dtype, "s"), dtype) for dtype in dtypes]
    handles.append(dot("white", "o", "slower, beyond noise", LOSS))
    style = {"ncols": 1 + 2 * len(panels), "fontsize": 8, "frameon": False}
    figure.legend(handles=handles, loc="outside upper center", **style)
    return figure


def draw_line(axes: Axes, pairs: Sequence[Comparison], y: int, colours: dict[str, str]) -> None:
    """Draw the cases of an op and mode, each peer a little below the one before."""
    peers = [peer for peer in colours if any(peer_of(pair) == peer for pair in pairs)]
    for pair in sorted(pairs, key=lambda pair: pair.side, reverse=True):  # losses on top
        peer, (value, _, low, high) = peer_of(pair), pair.figure
        lane = y + 0.8 * ((peers.index(peer) + 0.5) / len(peers) - 0.5)
        if low and high and math.isfinite(high):
            axes.plot((low, high), (lane, lane), color=colours[peer], linewidth=0.8, alpha=0.5)
        marker = MARKERS.get(pair.ours["dtype"], "s")
        edge, width = (LOSS, 1.3) if pair.side < 0 else ("white", 0.4)
        dot_size = 2.5 + math.log10(1 + float(pair.ours["tokens"]))
        axes.plot(value, lane, marker, color=colours[peer], ms=dot_size, mec=edge, mew=width)


def dot(colour: str, marker: str, label: str, edge: str = "white") -> Line2D:
    """Return an entry of the legend."""
    width = 0.4 if edge == "white" else 1.3
    style: dict[str, Any] = {"markeredgecolor": edge, "markeredgewidth": width, "linestyle": ""}
    return Line2D([], [], color=colour, marker=marker, label=label, markersize=6, **style)


def line_of(pair: Comparison) -> tuple[str, str]:
    return pair.ours["op"], pair.ours["mode"]


def peer_of(pair: Comparison) -> str:
    """Return the peer's name without what all peers of packing begin with."""
    return re.sub(r"^(padded )?embedding(\(sparse\))? \+ ", "", pair.peer["variant"])


def tidy(axes: Axes, grid: Literal["x", "y", "both"] = "x") -> None:
    axes.grid(axis=grid, alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def picture(text: str) -> Path:
    """Parse the path of a PNG or SVG to write."""
    path = output_file(text)
    if path.suffix not in (".png", ".svg"):
        raise argparse.ArgumentTypeError(f"expected a name that ends in .png or .svg, got {text!r}")
    return path


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description=__doc__)
    parser.add_argument("csv", type=Path, nargs="+", help="results of one machine each")
    parser.add_argument("--out", type=picture, required=True, help="the picture, PNG or SVG")
    options = parser.parse_args(arguments)
    try:
        results = [read_csv(path, COLUMNS) for path in options.csv]
    except (OSError, ValueError) as error:
        parser.error(f"csv must be results of benchmarks: {error}")
    panels = [panel for rows in results for panel in panels_of(rows)]
    if (figure := speed_up(panels)) is None:
        parser.error(f"csv must have rows of ours beside a peer's, got none in {options.csv}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save(figure, options.out)


if __name__ == "__main__":
    main()
