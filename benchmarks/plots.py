"""Pictures of a run, drawn from its CSV alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks.results import OURS, WALL_CLOCK, Comparison, Row, comparisons

OUR_COLOUR = "#1f4e79"
OUR_OTHERS = ("#5b8db8", "#9dbfdb")
PEER_COLOURS = ("#e07b39", "#4c9f70", "#b5495b", "#7a6bb0", "#c2a03a", "#8c6d5a", "#808080")
TITLES = {
    "pool_norm": "pool + LayerNorm",
    "swiglu": "gate/up + SwiGLU",
    "project_tokens": "projector",
    "pack_embeddings": "packing",
    "merge_vision": "merging",
}


def draw(rows: Sequence[Row], csv_path: Path) -> list[Path]:
    """Write every picture that the rows have something for, beside the CSV, and delete the others:
    they would be of an earlier run.

    Args:
        rows: of the CSV, values as written there.
        csv_path: its path; pictures are called after it.
    """
    ok = [row for row in rows if row["status"] == "ok"]
    written = []
    for name, picture in (
        ("throughput", throughput),
        ("speed-up", speed_up),
        ("memory", memory),
        ("mixed-counts", mixed_counts),
        ("end-to-end", end_to_end),
    ):
        path = csv_path.with_name(f"{csv_path.stem}-{name}.png")
        figure = picture(ok)
        if figure is None:
            path.unlink(missing_ok=True)
            continue
        figure.suptitle(_machine(rows[0]), x=0.01, ha="left", fontsize=9, color="#555555")
        figure.savefig(path, dpi=130)
        plt.close(figure)
        written.append(path)
    return written


def throughput(rows: Sequence[Row]) -> Figure | None:
    """Bandwidth and arithmetic against T, the measured ceilings as lines."""
    panels = [
        ("pool_norm", "forward", "gb_per_s", "GB/s", "copy"),
        ("swiglu", "forward", "tflop_per_s", "TFLOP/s", "matmul"),
        ("project_tokens", "forward+backward", "tflop_per_s", "TFLOP/s", "matmul"),
        ("pack_embeddings", "forward", "gb_per_s", "GB/s", "copy"),
    ]
    chosen = {panel: found for panel in panels if (found := _by_variant(rows, *panel[:3]))}
    if not chosen:
        return None
    figure, grid = plt.subplots(2, 2, figsize=(11, 9), layout="constrained")
    for axes in grid.flat[len(chosen) :]:
        axes.remove()
    for axes, (panel, variants) in zip(grid.flat, chosen.items(), strict=False):
        op, mode, column, unit, ceiling = panel
        for (variant, label), colour in _coloured(variants):
            points = sorted((int(row["tokens"]), float(row[column])) for row in variants[variant])
            width = 2.2 if variant == OURS else 1.4
            axes.plot(*zip(*points, strict=True), "o-", label=label, color=colour, linewidth=width)
        for row in rows:
            if row["op"] == "ceiling" and row["variant"] == ceiling:
                value = float(row[column])
                axes.axhline(value, color="#999999", linestyle="--", linewidth=1)
                text = f"measured {ceiling}: {value:.3g} {unit}"
                axes.annotate(
                    text,
                    (0.01, value),
                    (0, 3),
                    xycoords=("axes fraction", "data"),
                    textcoords="offset points",
                    fontsize=8,
                    color="#777777",
                )
        axes.set_title(f"{TITLES[op]}, {mode}", loc="left", fontsize=11)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel("T, rows of the result")
        axes.set_ylabel(unit)
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
        axes.legend(
            fontsize=8,
            frameon=False,
            ncols=2,
            loc="upper left",
            bbox_to_anchor=(0, -0.16),  # below, where it covers nothing
        )
        _plain(axes)
    return figure


def speed_up(rows: Sequence[Row]) -> Figure | None:
    """The time of each peer over ours: a bar for the worst case, a dot for every one."""
    groups: dict[tuple[str, str], list[Comparison]] = defaultdict(list)
    for one in comparisons(rows):
        op, mode, ending = one.kind
        if op not in TITLES:
            continue
        title = ", ".join(filter(None, (TITLES[op], mode, ending)))
        groups[title, one.peer["variant"]].append(one)
    if not groups:
        return None
    figure, axes = plt.subplots(figsize=(11, 0.25 * len(groups) + 1.6), layout="constrained")
    bars = sorted(groups.items(), key=lambda group: list(TITLES).index(group[1][0].kind[0]))
    titles = dict.fromkeys(title for (title, _), _ in bars)
    colours = dict(zip(titles, PEER_COLOURS * len(titles), strict=False))
    for at, ((title, _), group) in enumerate(bars):
        worst = min(group, key=lambda one: one.figure.value)
        values = [one.figure.value for one in group]
        axes.barh(-at, worst.figure.value - 1, left=1, color=colours[title], height=0.72)
        axes.plot(values, [-at] * len(values), ".", color="#333333", markersize=4)
        axes.annotate(
            f"{worst.figure.value:.2f} at T={worst.peer['tokens']}",
            (max(1, *values), -at),
            (6, 0),
            textcoords="offset points",
            va="center",
            fontsize=7.5,
        )
    labels = [_pair_label(title, peer, group) for (title, peer), group in bars]
    axes.set_yticks([-at for at in range(len(bars))], labels, fontsize=7.5)
    axes.set_ylim(-len(bars) + 0.4, 0.6)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    ratios = [one.figure.value for _, group in bars for one in group]
    axes.set_xlim(0.8 * min(1, *ratios), 3 * max(1, *ratios))
    axes.xaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(
        "time of the peer over ours (right of 1: we are faster); bar and number: the worst case, "
        "dots: all",
        fontsize=9,
    )
    _plain(axes, grid="x")
    return figure


def _pair_label(title: str, peer: str, group: Sequence[Comparison]) -> str:
    clock = f", {WALL_CLOCK}" if any(one.figure.remark for one in group) else ""
    return f"{title} ({group[0].ours['backend']}):  {peer}{clock}"


def memory(rows: Sequence[Row]) -> Figure | None:
    """What a training step of projector and packing keeps and reaches, per token."""
    chosen = []
    for op, ending in (("project_tokens", ""), ("pack_embeddings", "frozen table")):
        largest: dict[str, Row] = {}
        for row in _of(rows, op, "forward+backward"):
            if _plain_case(row) and row["case"].endswith(ending) and row["saved_bytes"]:
                best = largest.setdefault(row["variant"], row)
                if int(row["tokens"]) > int(best["tokens"]):
                    largest[row["variant"]] = row
        if largest:
            chosen.append((op, list(largest.values())))
    if not chosen:
        return None
    lines = [len(variants) for _, variants in chosen]
    figure, grid = plt.subplots(
        len(chosen),
        2,
        figsize=(11, 0.36 * sum(lines) + 1.3 * len(chosen)),
        sharey="row",
        squeeze=False,
        layout="constrained",
        height_ratios=lines,
    )
    for panels, (op, variants) in zip(grid, chosen, strict=True):
        for axes, column, title in zip(
            panels,
            ("saved_bytes", "peak_bytes"),
            ("kept from forward to backward", "peak of forward + backward"),
            strict=True,
        ):
            _bars(
                axes,
                variants,
                lambda row, column=column: float(row[column] or 0) / int(row["tokens"]) / 1024,
                lambda row: f"{_label(row)}, T={row['tokens']}",
            )
            axes.set_title(f"{TITLES[op]}: {title}", loc="left", fontsize=10)
            axes.set_xlabel("KiB a token", fontsize=9)
    return figure


def mixed_counts(rows: Sequence[Row]) -> Figure | None:
    """A batch of 64, 144 and 256 tokens against one of as many images and tokens, all alike."""
    groups = []
    for op in ("pool_norm", "project_tokens"):
        for mode in ("forward", "forward+backward"):
            found = {(row["case"], row["variant"]): row for row in _of(rows, op, mode)}
            for (case, variant), row in found.items():
                uniform = found.get((case.replace("mixed", "uniform"), variant))
                if case.endswith("mixed") and uniform:
                    groups.append((f"{TITLES[op]}, {mode}: {_label(row)}", uniform, row))
    if not groups:
        return None
    figure, axes = plt.subplots(figsize=(10, 0.62 * len(groups) + 1.6), layout="constrained")
    for at, (_, uniform, mixed) in enumerate(groups):
        for offset, row, colour in ((0.19, uniform, "#b0b0b0"), (-0.19, mixed, OUR_COLOUR)):
            share = float(row["p50_us"]) / float(uniform["p50_us"])
            axes.barh(offset - at, share, height=0.36, color=colour)
            text = f"{float(row['p50_us']) / 1000:.3g} ms"
            axes.annotate(
                text,
                (share, offset - at),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
    axes.set_yticks([-at for at in range(len(groups))], [group[0] for group in groups], fontsize=8)
    axes.set_xlabel(
        "time over that of the uniform batch (grey); the mixed batch has as many images and tokens",
        fontsize=9,
    )
    axes.margins(x=0.1)
    _plain(axes, grid="x")
    return figure


def end_to_end(rows: Sequence[Row]) -> Figure | None:
    """A training step: fixed and mixed counts, padded and packed."""
    steps = [row for row in rows if row["op"] == "end_to_end"]
    if not steps:
        return None
    figure, panels = plt.subplots(
        1, 4, figsize=(13, 0.45 * len(steps) + 1.4), sharey=True, layout="constrained"
    )
    for axes, value, title in (
        (panels[0], lambda row: float(row["p50_us"]) / 1000, "milliseconds a step"),
        (panels[1], lambda row: float(row["tokens_per_s"]), "tokens a second, no padding"),
        (
            panels[2],
            lambda row: 100 * float(row["share_of_matmul"] or 0),
            "% of the measured matmul rate",
        ),
        (panels[3], lambda row: float(row["peak_bytes"] or 0) / 2**20, "peak memory, MiB"),
    ):
        _bars(axes, steps, value, lambda row: f"{row['case']}, {row['variant']}")
        axes.set_title(title, loc="left", fontsize=10)
    return figure


# ---- choosing rows


def _of(rows: Sequence[Row], op: str, mode: str) -> list[Row]:
    return [row for row in rows if (row["op"], row["mode"]) == (op, mode)]


def _plain_case(row: Row) -> bool:
    """One width and one kind of grid, as the sizes of a series have them."""
    words = ("mixed", "uniform", "D=3584", "D=64", "D=8", "text + 0 vision")
    return not any(row["case"].endswith(word) or f"{word} " in row["case"] for word in words)


def _by_variant(rows: Sequence[Row], op: str, mode: str, column: str) -> dict[str, list[Row]]:
    found = defaultdict(list)
    for row in _of(rows, op, mode):
        if _plain_case(row) and row[column]:
            found[row["variant"]].append(row)
    return dict(found)


def _label(row: Row) -> str:
    return f"{row['variant']} ({row['backend']})" if row["backend"] else row["variant"]


# ---- drawing


def _coloured(variants: dict[str, list[Row]]) -> list[tuple[tuple[str, str], str]]:
    ours, peers = iter((OUR_COLOUR, *OUR_OTHERS)), iter(PEER_COLOURS)
    return [
        ((name, _label(rows[0])), next(ours if name.startswith(OURS) else peers))
        for name, rows in variants.items()
    ]


def _bars(
    axes: Axes,
    rows: Sequence[Row],
    value: Callable[[Row], float],
    label: Callable[[Row], str] = _label,
) -> None:
    for at, row in enumerate(rows):
        ours = row["variant"].startswith(OURS) or row["variant"] == "packed"
        height = value(row)
        axes.barh(-at, height, color=OUR_COLOUR if ours else "#b0b0b0", height=0.66)
        axes.annotate(
            f"{height:.4g}",
            (height, -at),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.set_yticks([-at for at in range(len(rows))], [label(row) for row in rows], fontsize=8)
    axes.margins(x=0.16)
    _plain(axes, grid="x")


def _plain(axes: Axes, grid: str = "both") -> None:
    axes.grid(axis=grid, alpha=0.25)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _machine(row: Row) -> str:
    place = row["gpu"] or f"{row['cpu']}, threads: {row['threads']}, load {row['load']}"
    return f"{place}   torch {row['torch']}   commit {row['commit']}"
