"""The report of a run, from its CSV alone; ``python -m benchmarks.report`` updates the documents.

A report is a Markdown file and pictures beside the CSV. Documents quote parts of it between marks:

    <!-- benchmarks: overview of cpu-amd-epyc-2-cores -->
    ..
    <!-- end of overview -->
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.results import COMPILED, EAGER, KEY, RESULTS, ROOT, Results, Row, read_csv
from benchmarks.targets import verdicts
from tokenflex.files import write_atomically

DOCUMENTS = ("README.md", "benchmarks/README.md")
MARK = re.compile(
    r"(?P<begin><!-- benchmarks: (?P<name>[a-z-]+) of (?P<machine>[a-z0-9-]+) -->\n)"
    r".*?(?P<end><!-- end of (?P=name) -->)",
    flags=re.DOTALL,
)
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
    """Return the report as Markdown: every row, what was not measured, losses, and verdicts."""
    skipped = [row for row in rows if row["status"] != "ok"]
    reasons = [
        f"- {', '.join(filter(None, map(row.get, KEY)))}: {row['status']}" for row in skipped
    ]
    targets = table(("target", "verdict"), *((v.name, v.text) for v in verdicts(rows)))
    return "\n\n".join(
        [
            machine(rows),
            "## Measured\n\nMicroseconds of a call; * marks a variant that is clearly the fastest.",
            measured(rows),
            *(["## Not measured\n\n" + "\n".join(reasons)] if reasons else []),
            "## Where a peer is faster",
            losses(rows),
            "## Targets",
            targets + "\n",
        ]
    )


def table(*lines: Sequence[str], padded: bool = False) -> str:
    """Return a table of Markdown, the header first; ``padded`` aligns all columns but the last."""
    if padded:
        *widths, _ = [max(map(len, column)) for column in zip(*lines, strict=True)]
        lines = tuple(
            [*(f"{cell:{width}}" for cell, width in zip(line, widths, strict=False)), line[-1]]
            for line in lines
        )
    rows = ["".join(f"| {cell} " if cell else "| " for cell in line) + "|" for line in lines]
    return "\n".join([rows[0], "|---" * len(lines[0]) + "|", *rows[1:]])


def measured(rows: Sequence[Row]) -> str:
    """Return every row that was measured."""
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        if row["status"] == "ok":
            groups[row["op"], row["case"], row["mode"]].append(row)
    lines: list[Sequence[str]] = [
        (*KEY, "median", "wall clock", "of copy", "of matmul", "peak MiB", "backend", "note")
    ]
    for group in groups.values():
        best = clearly_fastest(group)
        for row in group:
            shares = (row["share_of_copy"], row["share_of_matmul"])
            cells = (
                f"{float(row['p50_us']):.1f}{'*' if row is best else ''}",
                f"{float(row['eager_us']):.1f}" if row["eager_us"] else "",
                *(f"{100 * float(share):.1f}%" if share else "" for share in shares),
                f"{int(row['peak_bytes']) / 2**20:.1f}" if row["peak_bytes"] else "",
            )
            lines.append((*(row[name] for name in KEY), *cells, row["backend"], row["note"]))
    return table(*lines, padded=True)


def clearly_fastest(rows: Sequence[Row]) -> Row | None:
    """Return the row whose 80th percentile is below the 20th of all others.

    None where no row is, a row has few samples, or there is nothing to compare.
    """
    best = min(rows, key=lambda row: float(row["p50_us"]))
    others = [float(row["p20_us"]) for row in rows if row is not best]
    enough = all(int(row["samples"]) >= FEW_SAMPLES for row in rows)
    clear = others and enough and all(float(best["p80_us"]) < other for other in others)
    return best if clear else None


def losses(rows: Sequence[Row]) -> str:
    """Return every case in which a peer is faster, the worst first."""
    pairs = Results(rows).comparisons()
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
    return f"{count}\n\n{table(header, *lines, padded=True)}"


# ---- parts that documents quote


def machine(rows: Sequence[Row]) -> str:
    """Return the machine, and how much of the run to trust."""
    first, ok = rows[0], [row for row in rows if row["status"] == "ok"]
    no_time = sum("no time left" in row["status"] for row in rows)
    few = sum(int(row["samples"]) < FEW_SAMPLES for row in ok)
    sets = max((int(row["sets"] or 0) for row in ok), default=0)
    name = first["gpu"] or f"{first['cpu']}, {first['cores']} cores, threads: {first['threads']}"
    return (
        f"Measured on {name}; load before the run {first['load']}; torch {first['torch']}; commit "
        f"{first['commit']}. {len(ok)} rows have times, {few} of them from fewer than "
        f"{FEW_SAMPLES} samples; {no_time} found no time left. Inputs rotate through up to {sets} "
        "sets of buffers."
    )


def overview(rows: Sequence[Row]) -> str:
    """Return each op against each peer, and the verdicts on what was measured."""
    groups: dict[tuple[str, str], list[float]] = defaultdict(list)
    for pair in Results(rows).comparisons():
        op = f"`{pair.ours['op']}` ({pair.ours['backend']})"
        groups[op, pair.peer["variant"]].append(pair.figure.value)
    lines = []
    for names, values in groups.items():
        slower = f"{sum(value < 1 for value in values)} of {len(values)}"
        lines.append((*names, f"{min(values):.2f}", f"{max(values):.2f}", slower))
    worst = "the peer's time over ours, worst case"
    judged = [(verdict.name, verdict.text) for verdict in verdicts(rows) if verdict.met is not None]
    peers = table(("ours", "peer", worst, "best", "we are slower in"), *lines)
    return f"{peers}\n\n{table(('target', 'verdict'), *judged)}"


def summary(rows: Sequence[Row]) -> str:
    """Return the projector's ops beside PyTorch's own, in a sentence."""
    times: dict[str, list[float]] = {"pool_norm": [], "swiglu": [], "project_tokens": []}
    for pair in Results(rows).comparisons():
        if pair.ours["op"] in times and pair.peer["variant"] in (EAGER, COMPILED):
            times[pair.ours["op"]].append(1 / pair.figure.value)
    parts = [
        f"`{op}` takes {min(values):.2g} to {max(values):.2g} times as long"
        for op, values in times.items()
        if values
    ]
    return f"Beside eager PyTorch and torch.compile, {', '.join(parts)}."


PARTS: dict[str, Callable[[Sequence[Row]], str]] = {
    "machine": machine,
    "overview": overview,
    "summary": summary,
}


def updated(text: str, results: Path = RESULTS) -> str:
    """Return a document with the text between its marks written from the CSVs in ``results``.

    Raises:
        ValueError: It marks a part that does not exist.
        OSError: It names a CSV that does not exist.
    """

    def part(mark: re.Match[str]) -> str:
        if mark["name"] not in PARTS:
            raise ValueError(f"part must be one of {', '.join(PARTS)}, got {mark['name']}")
        rows = read_csv(results / f"{mark['machine']}.csv")
        return f"{mark['begin']}{PARTS[mark['name']](rows)}\n{mark['end']}"

    return MARK.sub(part, text)


def main() -> int:
    for name in DOCUMENTS:
        path = ROOT / name
        before = path.read_text(encoding="utf-8")
        after = updated(before)
        if after != before:
            path.write_text(after, encoding="utf-8")
        print(f"{name}: {'updated' if after != before else 'unchanged'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
