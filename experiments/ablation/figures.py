"""Figures of an ablation's report, after Figures 1 and 3 of the paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.ablation import paper
from experiments.ablation.suites import MAIN, ODDS, POSITIONED, SPECIALISTS
from experiments.ablation.tables import task_of
from tokenflex.plots import finish, plt, save_figure

COLOURS = {
    "fixed-small": "#e07b39",
    "fixed-middle": "#4c9f70",
    "fixed-large": "#b5495b",
    "stochastic": "#1f4e79",
    "odds-1-1-1": "#3f8fa8",
    "odds-5-3-2": "#7a6bb0",
    "positions": "#1f4e79",
    "positions-spread": "#1f4e79",
}
COLOURS |= {name: COLOURS[plain] for name, plain in zip(POSITIONED, SPECIALISTS, strict=True)}
COUNT_COLOURS = ("#e07b39", "#4c9f70", "#b5495b")
"""Colours of the small, middle and large count."""
ADDED = {"claim": ("positions", *POSITIONED), "figure1": ("positions-spread",)}
"""Regimes beyond the paper that a figure draws beside its regimes, where the report has them."""
MOST_COLUMNS = 5
"""Most panels side by side, and entries of a legend in one row."""


def write_figures(report: Mapping[str, Any], folder: Path) -> None:
    """Write the figures of ``report.md``.

    They are ``claim.png``, ``figure1.png``, ``figure3.png`` and, if odds were compared,
    ``odds.png``.
    """
    main = [name for name in MAIN if name in report["regimes"]]
    odds = [name for name in ODDS if name in report["regimes"]]
    for name, counts in (("claim", report["counts"]), ("figure1", _squares(report))):
        figure = _beside_the_paper(report, main, counts, ADDED[name])
        save_figure(figure, folder / f"{name}.png")
    save_figure(_by_kind(report, main), folder / "figure3.png")
    if len(odds) > 1:
        save_figure(_by_kind(report, odds), folder / "odds.png")


def draw_gains(
    axes: Any,
    counts: Sequence[str],
    gains: Sequence[Mapping[str, Mapping[str, Any]]],
    *,
    sideways: bool = False,
) -> None:
    """Draw gains in points with their standard deviations over seeds, a colour for each count.

    Args:
        axes: The axes.
        counts: The small, middle and large count.
        gains: By count, what :func:`experiments.ablation.results.difference` returns; a count may
            be missing. The first is drawn at 0, the next at 1.
        sideways: Draw gains along the x axis, without lines between them.
    """
    shift, style = (0.2, "o") if sideways else (0.08, "o-")
    for i, (count, colour) in enumerate(zip(counts, COUNT_COLOURS, strict=True)):
        drawn = {at: row[count] for at, row in enumerate(gains) if count in row}
        places = [at + shift * (i - 1) for at in drawn]
        means = [100 * gain["mean"] for gain in drawn.values()]
        bars = [100 * (gain["spread"] or 0.0) for gain in drawn.values()]
        axes.errorbar(
            *((means, places) if sideways else (places, means)),
            **{"xerr" if sideways else "yerr": bars},
            fmt=style,
            color=colour,
            elinewidth=1,
            label=f"at {count} tokens",
        )


def _beside_the_paper(
    report: Mapping[str, Any], names: Sequence[str], counts: Sequence[str], added: Sequence[str]
) -> Any:
    """Draw regimes at ``counts`` beside the paper's figures.

    Args:
        report: The report.
        names: The regimes that the paper has too.
        counts: The counts of our panel. The trained ones are marked if there are others.
        added: Regimes beyond the paper, drawn dashed if the report has them.
    """
    figure, (ours, theirs) = plt.subplots(1, 2, figsize=(9.5, 4.2), layout="constrained")
    for name in names:
        row = report["regimes"][name]
        _curve(ours, row["accuracy"], counts, name, label=row["title"])
        trained = paper.TRAINED_WITH[name]
        theirs.plot(paper.COUNTS, trained, color=COLOURS[name], marker="o", linewidth=_width(name))
    for name in added:
        if name in report["regimes"]:
            row = report["regimes"][name]
            label = f"{row['title']} (ours)"
            _curve(ours, row["accuracy"], counts, name, label=label, linestyle="--")
    seeds = len(report["seeds"])
    bars = ", bars: standard deviation" if seeds > 1 else ""
    title = f"ours: {task_of(report)}, {seeds} seed{'s' * (seeds > 1)}{bars}"
    ours.set_title(title, loc="left", fontsize=10)
    ours.set_ylabel("accuracy, %")
    theirs.set_title("the paper's claim (second-hand), 8 benchmarks", loc="left", fontsize=10)
    _finish(ours, counts, report["counts"] if counts != report["counts"] else [], _unit(report))
    _finish(theirs, [str(count) for count in paper.COUNTS], [], "image")
    _legend(figure, ours)
    return figure


def _by_kind(report: Mapping[str, Any], names: Sequence[str]) -> Any:
    kinds = list(report["questions"])
    columns = min(-(len(kinds) // -2), MOST_COLUMNS)
    rows = max(-(len(kinds) // -columns), 2)
    figure, grid = plt.subplots(
        *(rows, columns),
        figsize=(9.5, 2.8 * rows),
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    cells = grid.flatten()
    for axes, kind in zip(cells, kinds, strict=False):
        for name in names:
            row = report["regimes"][name]
            _curve(axes, row["accuracy_by_kind"][kind], _squares(report), name, label=row["title"])
        axes.set_title(kind, loc="left", fontsize=10)
        axes.set_ylim(-2, 104)  # bars may extend beyond the range of a share
        _finish(axes, _squares(report), report["counts"], _unit(report))
    for axes in cells[len(kinds) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("accuracy, %")
    if columns > 3:  # too narrow for a label each
        for axes in {*cells} - {grid[-1, columns // 2]}:
            axes.set_xlabel("")
    _legend(figure, cells[0])
    return figure


def _curve(
    axes: Any,
    accuracy: Mapping[str, Any],
    counts: Sequence[str],
    name: str,
    *,
    label: str,
    linestyle: str = "-",
) -> None:
    axes.errorbar(
        [int(count) for count in counts],
        [100 * accuracy[count]["mean"] for count in counts],
        [100 * (accuracy[count]["spread"] or 0.0) for count in counts],
        color=COLOURS[name],
        marker="o",
        markersize=4.5,
        linewidth=_width(name),
        linestyle=linestyle,
        elinewidth=1,
        capsize=2.5,
        label=label,
    )


def _width(name: str) -> float:
    return 2.6 if name == "stochastic" else 1.6


def _squares(report: Mapping[str, Any]) -> list[str]:
    """Return the square counts in order; other grids are in the tables only."""
    counts = [*report["counts"], *report["unseen"]]
    return sorted((count for count in counts if count.isdecimal()), key=int)


def _unit(report: Mapping[str, Any]) -> str:
    """Return the name of what a count is of: pages of the reading task may be two tiles."""
    return {"digits": "image", "reading": "tile"}[task_of(report)]


def _finish(axes: Any, counts: Sequence[str], trained: Sequence[str], unit: str) -> None:
    for count in trained:
        axes.axvline(int(count), color="#cccccc", linewidth=1, linestyle=":", zorder=0)
    axes.set_xticks([int(count) for count in counts])
    axes.set_xlabel(f"vision tokens per {unit}" + (" (dotted: trained)" if trained else ""))
    finish(axes)


def _legend(figure: Any, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    columns = len(labels) if len(labels) <= MOST_COLUMNS else MOST_COLUMNS - 1
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
