"""The report of a run, from its CSV alone: a Markdown file and pictures beside it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from benchmarks.results import KEY, Results, Row, speed_up
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
    reasons = [
        f"- {', '.join(filter(None, (row[name] for name in KEY)))}: {row['status']}"
        for row in rows
        if row["status"] != "ok"
    ]
    targets = [(verdict.name, verdict.text) for verdict in verdicts(rows)]
    sections = {
        "Every row": f"Microseconds; * marks a clearly fastest variant.\n\n{measured(results)}",
        "Not measured": "\n".join(reasons),
        "Each op against each peer": overview(results),
        "Where a peer is faster": losses(results),
        "Mixed counts": mixed_counts(results),
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
    name = first["gpu"] or f"{first['cpu']}, {first['cores']} cores, threads: {first['threads']}"
    return (
        f"Measured on {name}; load before the run {first['load']}; torch {first['torch']}; commit "
        f"{first['commit']}. {len(ok)} rows have times, {few} of them from fewer than "
        f"{FEW_SAMPLES} samples; {no_time} found no time left. Inputs rotate through up to {sets} "
        "sets of buffers."
    )


def measured(results: Results) -> str:
    """Return every row that was measured."""
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in results.measured:
        groups[row["op"], row["case"], row["mode"]].append(row)
    titles = (
        *("median", "wall clock", "of copy", "of matmul", "peak MiB", "saved MiB"),
        *("backend", "note"),
    )
    lines: list[Sequence[str]] = [(*KEY, *titles)]
    for group in groups.values():
        best = clearly_fastest(group)
        for row in group:
            shares = (row["share_of_copy"], row["share_of_matmul"])
            sizes = (row["peak_bytes"], row["saved_bytes"])
            cells = (
                f"{float(row['p50_us']):.1f}{'*' if row is best else ''}",
                f"{float(row['eager_us']):.1f}" if row["eager_us"] else "",
                *(f"{100 * float(share):.1f}%" if share else "" for share in shares),
                *(f"{int(size) / 2**20:.1f}" if size else "" for size in sizes),
            )
            lines.append((*(row[name] for name in KEY), *cells, row["backend"], row["note"]))
    return table(*lines)


def clearly_fastest(rows: Sequence[Row]) -> Row | None:
    """Return the row whose 80th percentile is below the 20th of all others.

    None where no row is, a row has few samples, or there is nothing to compare.
    """
    best = min(rows, key=lambda row: float(row["p50_us"]))
    others = [float(row["p20_us"]) for row in rows if row is not best]
    enough = all(int(row["samples"]) >= FEW_SAMPLES for row in rows)
    clear = others and enough and all(float(best["p80_us"]) < other for other in others)
    return best if clear else None


def overview(results: Results) -> str:
    """Return each op against each peer: the worst case and the best."""
    groups: dict[tuple[str, str], list[float]] = defaultdict(list)
    for pair in results.comparisons():
        op = f"{pair.ours['op']} ({pair.ours['backend']})"
        groups[op, pair.peer["variant"]].append(pair.figure.value)
    lines = []
    for names, values in groups.items():
        slower = f"{sum(value < 1 for value in values)} of {len(values)}"
        lines.append((*names, f"{min(values):.2f}", f"{max(values):.2f}", slower))
    worst = "the peer's time over ours, worst case"
    return table(("ours", "peer", worst, "best", "we are slower in"), *lines)


def losses(results: Results) -> str:
    """Return every case in which a peer is faster, the worst first."""
    pairs = results.comparisons()
    lost = sorted((p for p in pairs if p.figure.value < 1), key=lambda pair: pair.figure.value)
    lines = [
        (
            *(pair.ours[name] for name in ("op", "case", "mode")),
            pair.peer["variant"],
            f"{float(pair.ours['p50_us']):.1f}",
            f"{float(pair.peer['p50_us']):.1f}",
            f"{pair.figure.value:.2f} {pair.figure.remark}".rstrip(),
        )
        for pair in lost
    ]
    header = ("op", "case", "mode", "peer", "ours", "peer's", "peer / ours")
    count = f"A peer is faster in {len(lost)} of {len(pairs)} comparisons."
    return f"{count}\n\n{table(header, *lines)}"


def mixed_counts(results: Results) -> str:
    """Compare mixed batches with uniform ones of equal image and token counts."""
    lines = []
    for row in results.measured:
        uniform = results.uniform(row)
        if row["case"].endswith("mixed") and uniform and (figure := speed_up(uniform, row)):
            ratio = f"{figure.value:.2f} {figure.remark}".rstrip()
            lines.append((*(row[name] for name in KEY), ratio))
    return table((*KEY, "mixed / uniform"), *lines) if lines else ""


def table(*lines: Sequence[str]) -> str:
    """Return a table of Markdown, the header first, all columns but the last aligned."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)][:-1]
    header, *rows = [
        "".join(f"| {cell:{width}} " for cell, width in zip(line, [*widths, 0], strict=True)) + "|"
        for line in lines
    ]
    return "\n".join([header, "|---" * len(lines[0]) + "|", *rows])
