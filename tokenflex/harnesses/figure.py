"""The picture of a harness's table: a panel for each benchmark, a line for each of its metrics."""

from __future__ import annotations

from pathlib import Path

from tokenflex.harnesses.table import CountTable
from tokenflex.plots import BLUE, KINDS, finish, plt, save_figure

COLUMNS = 3


def plot_table(table: CountTable, path: Path) -> None:
    """Draw the scores of every benchmark against the counts, in the counts' order.

    Args:
        table: The table; missing scores are left out.
        path: The PNG file, written atomically.

    Raises:
        ValueError: The table has no score.
    """
    benchmarks = [*dict.fromkeys(name for (name, _), scores in table.rows.items() if scores)]
    if not benchmarks:
        raise ValueError("table must hold at least one score, got none")
    columns = min(COLUMNS, len(benchmarks))
    rows = -(len(benchmarks) // -columns)
    size = (max(4.8, 3.6 * columns), 3.2 * rows)
    figure, panels = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    places = {count: place for place, count in enumerate(table.counts)}
    for axes, benchmark in zip(panels.flat, benchmarks, strict=False):
        axes.set_title(benchmark, loc="left", fontsize=11, parse_math=False)
        lines = [(m, s) for (name, m), s in table.rows.items() if name == benchmark and s]
        for i, (metric, scores) in enumerate(lines):
            counts = [count for count in table.counts if count in scores]
            axes.errorbar(
                [places[count] for count in counts],
                [scores[count].value for count in counts],
                [1.96 * (scores[count].standard_error or 0.0) for count in counts],
                label=metric,
                color=(BLUE, *KINDS)[i % (1 + len(KINDS))],
                marker="o",
                markersize=4,
                elinewidth=1,
            )
        axes.set_xticks([*places.values()], [*places])
        axes.set_xlim(-0.5, len(places) - 0.5)
        axes.set_xlabel("vision tokens per tile")
        legend = axes.legend(fontsize=7.5, frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)
        finish(axes)
    for axes in panels.flat[len(benchmarks) :]:
        axes.remove()
    has_errors = any(s.standard_error for row in table.rows.values() for s in row.values())
    if has_errors:
        figure.supylabel("score (bars: 95 % interval)", fontsize=9)
    save_figure(figure, path)
