"""Figures of an ablation's report, after Figures 1 and 3 of the paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.ablation import paper
from experiments.ablation.suites import MAIN, ODDS
from experiments.ablation.tables import task_of
from tokenflex.plots import finish, plt, save_figure

COLOURS = {
    "fixed-small": "#e07b39",
    "fixed-middle": "#4c9f70",
    "fixed-large": "#b5495b",
    "stochastic": "#1f4e79",
    "odds-1-1-1": "#3f8fa8",
    "odds-5-3-2": "#7a6bb0",
    "positions-spread": "#1f4e79",
}
ADDED = "positions-spread"
"""A regime beyond the paper, drawn beside its regimes at counts that were never trained."""


def write_figures(report: Mapping[str, Any], folder: Path) -> None:
    """Write ``figure1.png``, ``figure3.png`` and, if odds were compared, ``odds.png``."""
    main = [name for name in MAIN if name in report["regimes"]]
    odds = [name for name in ODDS if name in report["regimes"]]
    save_figure(_figure1(report, main), folder / "figure1.png")
    save_figure(_by_kind(report, main), folder / "figure3.png")
    if len(odds) > 1:
        save_figure(_by_kind(report, odds), folder / "odds.png")


def _figure1(report: Mapping[str, Any], names: Sequence[str]) -> Any:
    figure, (ours, theirs) = plt.subplots(1, 2, figsize=(9.5, 4.2), layout="constrained")
    for name in names:
        row = report["regimes"][name]
        _curve(ours, row["accuracy"], _squares(report), name, label=row["title"])
        trained = paper.TRAINED_WITH[name]
        theirs.plot(paper.COUNTS, trained, color=COLOURS[name], marker="o", linewidth=_width(name))
    if ADDED in report["regimes"]:
        row = report["regimes"][ADDED]
        label = f"{row['title']} (ours)"
        _curve(ours, row["accuracy"], _squares(report), ADDED, label=label, linestyle="--")
    seeds = len(report["seeds"])
    bars = ", bars: standard deviation" if seeds > 1 else ""
    title = f"{task_of(report)} task, {seeds} seed{'s' * (seeds > 1)}{bars}"
    ours.set_title(title, loc="left", fontsize=10)
    ours.set_ylabel("accuracy, %")
    theirs.set_title("the paper's claim (second-hand), 8 benchmarks", loc="left", fontsize=10)
    _finish(ours, _squares(report), report["counts"])
    _finish(theirs, [str(count) for count in paper.COUNTS], [])
    _legend(figure, ours)
    return figure


def _by_kind(report: Mapping[str, Any], names: Sequence[str]) -> Any:
    kinds = list(report["questions"])
    figure, grid = plt.subplots(
        2, -(len(kinds) // -2), figsize=(9.5, 5.6), sharey=True, layout="constrained", squeeze=False
    )
    cells = grid.flatten()
    for axes, kind in zip(cells, kinds, strict=False):
        for name in names:
            row = report["regimes"][name]
            _curve(axes, row["accuracy_by_kind"][kind], _squares(report), name, label=row["title"])
        axes.set_title(kind, loc="left", fontsize=10)
        axes.set_ylim(-2, 104)  # bars may extend beyond the range of a share
        _finish(axes, _squares(report), report["counts"])
    for axes in cells[len(kinds) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("accuracy, %")
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
        label=label,
    )


def _width(name: str) -> float:
    return 2.6 if name == "stochastic" else 1.6


def _squares(report: Mapping[str, Any]) -> list[str]:
    """Return the square counts in order; other grids are in the tables only."""
    counts = [*report["counts"], *report["unseen"]]
    return sorted((count for count in counts if count.isdecimal()), key=int)


def _finish(axes: Any, counts: Sequence[str], trained: Sequence[str]) -> None:
    for count in trained:
        axes.axvline(int(count), color="#cccccc", linewidth=1, linestyle=":", zorder=0)
    axes.set_xticks([int(count) for count in counts])
    axes.set_xlabel("vision tokens per image" + (" (dotted: trained)" if trained else ""))
    finish(axes)


def _legend(figure: Any, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
