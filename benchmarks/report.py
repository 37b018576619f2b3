"""The report of a run, from its CSV alone: a Markdown file and pictures beside it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.comparisons import Comparison, Results, where
from benchmarks.results import KEY, Row, suite_of
from benchmarks.targets import verdicts
from tokenflex.files import write_atomically

FEW_SAMPLES = 5


def report(rows: Sequence[Row], path: Path) -> None:
    """Print the report, and write it and its pictures beside the CSV at ``path``."""
    text = report_text(rows)
    print(text)
    page = path.with_suffix(".md")
    write_atomically(page, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    try:
        from benchmarks.plots import draw
    except ModuleNotFoundError as error:
        print(
            f"no plots: {error.name} is not installed (pip install 'tokenflex[bench]'); "
            f"any beside {path.name} are of an earlier run"
        )
        return
    for picture in draw(rows, path):
        print(f"drew {picture}")


def report_text(rows: Sequence[Row]) -> str:
    """Return the report as Markdown."""
    results = Results(rows)
    targets = [(v.name, v.text) for v in verdicts(rows) if v.device in ("", rows[0]["device"])]
    sections = {
        "Not measured": not_measured(rows),
        "Noise": noise(results),
        "Each op against each peer": overview(results),
        "Where a peer is faster": losses(results),
        "Targets": table(("target", "verdict"), *targets),
    }
    parts = [f"## {title}\n\n{text}\n" for title, text in sections.items() if text]
    return "\n".join([f"{machine(results)}\n", *parts])


def machine(results: Results) -> str:
    """Return the machine, and how much of the run to trust."""
    first, ok = results.rows[0], results.measured
    no_time = sum("no time left" in row["status"] for row in results.rows)
    few = sum(int(row["samples"]) < FEW_SAMPLES for row in ok)
    sets = max((int(row["sets"] or 0) for row in ok), default=0)
    name = first["gpu"] or f"{first['cpu']}, {first['cores']} cores"

    def distinct(column: str) -> str:
        return ", ".join(dict.fromkeys(row[column] for row in results.rows))

    return (
        f"Measured on {name}; threads {distinct('threads')}; load before {distinct('load')}; torch "
        f"{distinct('torch')}; commit {distinct('commit')}. {len(ok)} rows have times, {few} of "
        f"them from fewer than {FEW_SAMPLES} samples; {no_time} found no time left. Inputs rotate "
        f"through up to {sets} sets of buffers."
    )


def not_measured(rows: Sequence[Row]) -> str:
    """Return the reasons of rows without times, equal ones once."""
    names = ("op", "case", "mode", "variant")
    counts = Counter(
        f"- {', '.join(filter(None, (row[name] for name in names)))}: {row['status']}"
        for row in rows
        if row["status"] != "ok"
    )
    return "\n".join(f"{line} ({n} times)" if n > 1 else line for line, n in counts.items())


def noise(results: Results) -> str:
    """Return how far controls, variants compared with themselves, were from 1."""
    controls = results.controls()
    if not controls:
        return ""
    lines = []
    for (suite, threads), margin in results.margins.items():
        figures = [
            pair.figure
            for pair in controls
            if (suite_of(pair.peer), pair.peer["threads"]) == (suite, threads)
        ]
        wrong = sum(figure.side_of(1) != 0 for figure in figures)
        median = np.median([abs(figure.value - 1) for figure in figures])
        lines.append(
            (suite, threads, f"{wrong} of {len(figures)}", f"{median:.1%}", f"{margin:.1%}")
        )
    columns = ("suite", "threads", "intervals without 1", "median distance from 1", "margin")
    return (
        "A control is a variant that takes turns with itself. Comparisons are called within noise "
        "if their 99 % interval, widened by the margin, has 1: the margin is what 95 % of the "
        "controls of the suite need, or the largest of all suites where it has none.\n\n"
        f"{table(columns, *lines)}"
    )


def overview(results: Results) -> str:
    """Return each op against each peer: the worst case and the best."""
    groups: dict[tuple[str, str], list[Comparison]] = defaultdict(list)
    for pair in results.comparisons():
        op = f"{pair.ours['op']} ({pair.ours['backend']})"
        groups[op, pair.peer["variant"]].append(pair)
    lines = []
    for names, pairs in groups.items():
        worst = min(pairs, key=lambda pair: pair.figure.value)
        values = [pair.figure.value for pair in pairs]
        sides = Counter(pair.side for pair in pairs)
        counts = (f"{sides[side]} of {len(pairs)}" for side in (-1, 0))
        rest = (f"{np.median(values):.2f}", f"{max(values):.2f}", *counts, where(worst.peer))
        lines.append((*names, str(worst.figure), *rest))
    titles = ("ours", "peer", "the peer's time over ours, worst case", "median", "best")
    return table((*titles, "we are slower in", "within noise in", "worst case"), *lines)


def losses(results: Results) -> str:
    """Return every case in which a peer is faster, the worst first."""
    pairs = results.comparisons()
    lost = sorted((p for p in pairs if p.side < 0), key=lambda pair: pair.figure.value)
    lines = [
        (
            *(pair.ours[name] for name in KEY[:-1]),
            pair.peer["variant"],
            f"{float(pair.ours['p50_us']):.1f}",
            f"{float(pair.peer['p50_us']):.1f}",
            str(pair.figure),
        )
        for pair in lost
    ]
    header = (*KEY[:-1], "peer", "ours", "peer's", "peer / ours")
    equal = sum(pair.side == 0 for pair in pairs)
    count = (
        f"A peer is faster in {len(lost)} of {len(pairs)} comparisons; {equal} are within noise."
    )
    return f"{count}\n\n{table(header, *lines)}" if lost else count


def table(*lines: Sequence[str]) -> str:
    """Return a table of Markdown, the header first, all columns but the last aligned."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)][:-1]
    header, *rows = [
        "".join(f"| {cell:{width}} " for cell, width in zip(line, [*widths, 0], strict=True)) + "|"
        for line in lines
    ]
    return "\n".join([header, "|---" * len(lines[0]) + "|", *rows])
