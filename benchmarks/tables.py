"""``python -m benchmarks.tables``: write the figures of the documents anew from their CSV.

A document marks what is written from a CSV of ``results/``, and nothing between the marks is
written by hand:

    <!-- benchmarks: losses of cpu-amd-epyc-2-cores -->
    ..
    <!-- end of losses -->
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from benchmarks.machine import ROOT
from benchmarks.results import COMPILED, EAGER, OURS, SPARSE, Row, comparisons, read_csv
from benchmarks.targets import verdicts

DOCUMENTS = ("README.md", "docs/packing.md", "benchmarks/README.md")
RESULTS = ROOT / "benchmarks/results"
MARK = re.compile(
    r"(?P<begin><!-- benchmarks: (?P<name>[a-z-]+) of (?P<machine>[a-z0-9-]+) -->\n)"
    r".*?(?P<end><!-- end of (?P=name) -->)",
    flags=re.DOTALL,
)
FEW_SAMPLES = 5


def rewritten(text: str, results: Path = RESULTS) -> str:
    """Return a document with everything between its marks written from the CSVs in ``results``.

    Raises:
        ValueError: It marks a block that nothing here writes.
        OSError: It names a CSV that does not exist.
    """

    def block(mark: re.Match[str]) -> str:
        if mark["name"] not in BLOCKS:
            raise ValueError(f"block must be one of {', '.join(BLOCKS)}, got {mark['name']}")
        rows = read_csv(results / f"{mark['machine']}.csv")
        return f"{mark['begin']}{BLOCKS[mark['name']](rows)}\n{mark['end']}"

    return MARK.sub(block, text)


def table(*lines: Sequence[str]) -> str:
    """Return a table of Markdown, the header first."""
    rows = ["".join(f"| {cell} " if cell else "| " for cell in line) + "|" for line in lines]
    return "\n".join([rows[0], "|---" * len(lines[0]) + "|", *rows[1:]])


# ---- blocks


def machine(rows: Sequence[Row]) -> str:
    """The machine, and how much of the run to trust."""
    first, ok = rows[0], [row for row in rows if row["status"] == "ok"]
    no_time = sum("no time left" in row["status"] for row in rows)
    few = sum(int(row["samples"]) < FEW_SAMPLES for row in ok)
    sets = max(int(row["sets"] or 0) for row in ok)
    name = first["gpu"] or f"{first['cpu']}, {first['cores']} cores, threads: {first['threads']}"
    return (
        f"Measured on {name}; load before the run {first['load']}; torch {first['torch']}; commit "
        f"{first['commit']}. {len(ok)} rows have times, {few} of them from fewer than "
        f"{FEW_SAMPLES} samples; {no_time} found no time left. Inputs rotate through up to {sets} "
        "sets of buffers."
    )


def medians(
    op: str, mode: str, endings: Sequence[str], columns: dict[str, Sequence[str]]
) -> Callable[[Sequence[Row]], str]:
    """Return a block: medians in milliseconds, a line for each case whose name ends so.

    Args:
        op, mode: Of the rows.
        endings: What follows the comma in a case's name.
        columns: Title -> variants, the first that was measured.
    """

    def block(rows: Sequence[Row]) -> str:
        cases: dict[str, dict[str, Row]] = defaultdict(dict)
        for row in rows:
            ending = row["case"].partition(", ")[2]
            if (row["op"], row["mode"], row["status"]) == (op, mode, "ok") and ending in endings:
                cases[row["case"]][row["variant"]] = row
        lines = []
        for case, variants in cases.items():
            best = clearly_fastest(list(variants.values()))
            cells = []
            for names in columns.values():
                row = next((variants[name] for name in names if name in variants), None)
                cell = milliseconds(row) if row else ""
                cells.append(f"**{cell}**" if row and row is best else cell)
            lines.append([case, *cells])
        lines.insert(0, [mode.replace("+", " + "), *columns])
        used = [column for column in zip(*lines, strict=True) if any(column[1:])]
        return table(*zip(*used, strict=True))

    return block


def clearly_fastest(rows: Sequence[Row]) -> Row | None:
    """Return the row whose 80th percentile is below the others' 20th, where all have samples
    enough."""
    best = min(rows, key=lambda row: float(row["p50_us"]))
    others = [float(row["p20_us"]) for row in rows if row is not best]
    enough = all(int(row["samples"]) >= FEW_SAMPLES for row in rows)
    return best if enough and all(float(best["p80_us"]) < other for other in others) else None


def milliseconds(row: Row) -> str:
    value = float(row["p50_us"]) / 1000
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def losses(rows: Sequence[Row]) -> str:
    """Every case of packing and merging in which a peer is faster."""
    pairs = [
        pair for pair in comparisons(rows) if pair.ours["op"] in ("pack_embeddings", "merge_vision")
    ]
    lost = sorted((pair for pair in pairs if pair.figure.value < 1), key=lambda p: p.figure.value)
    lines = [
        (
            f"{pair.ours['op']}, {pair.ours['mode']}, {pair.ours['case']}",
            pair.peer["variant"],
            milliseconds(pair.ours),
            milliseconds(pair.peer),
            f"{pair.figure.value:.2f}",
        )
        for pair in lost
    ]
    header = ("case", "peer", "ours, ms", "peer, ms", "peer / ours")
    count = f"A peer is faster in {len(lost)} of {len(pairs)} comparisons:"
    return f"{count}\n\n{table(header, *lines)}"


def host_rows(rows: Sequence[Row], **columns: str) -> list[Row]:
    """Return the host costs that have these values, in the CSV's order."""
    columns["op"] = "host_cost"
    matches = [row for row in rows if all(row[key] == value for key, value in columns.items())]
    if not matches:
        raise ValueError(f"the CSV must have rows of {columns}, got none")
    return matches


def calls(rows: Sequence[Row]) -> str:
    """The cost of a call of the compiled ops."""

    def span(case: str) -> str:
        compiled = [r for r in host_rows(rows, case=case) if r["backend"] != "reference"]
        costs = [float(row["p50_us"]) for row in compiled]
        return f"{min(costs):.0f} to {max(costs):.0f}"

    return (
        f"A call of ours costs {span('no grad')} microseconds of checks and dispatch in this run "
        f"({span('grad')} where it records a gradient)."
    )


def planning(rows: Sequence[Row]) -> str:
    small, large = host_rows(rows, variant="plan_packing")
    (bins,) = host_rows(rows, variant="bin_pack")
    return (
        f"Planning takes {milliseconds(small)} ms for 16 samples of 500 tokens and "
        f"{milliseconds(large)} ms for 1600 of them (one million rows);\n"
        f"`bin_pack` takes {milliseconds(bins)} ms for 100 000 samples."
    )


def bins(rows: Sequence[Row]) -> str:
    lines = []
    for row in host_rows(rows, variant="balance_bins"):
        notes = dict(part.rsplit(" ", 1) for part in row["note"].split("; "))
        samples = f"{int(row['case']):,}".replace(",", " ")
        cells = (notes["bins"], notes["max/mean cost"], f"{milliseconds(row)} ms")
        lines.append((f"`balance_bins`, {samples} samples", *cells))
    (first_fit,) = host_rows(rows, variant="bin_pack")
    name = "`bin_pack`, tokens alone, 100 000 samples"
    lines.append((name, "", "", f"{milliseconds(first_fit)} ms"))
    return table(("", "bins", "costliest over mean", "time"), *lines)


def copies(rows: Sequence[Row]) -> str:
    """Memory that masked_scatter needs beyond its result."""
    scatter = ("embedding + masked_scatter", "forward")
    row = max(
        (row for row in rows if (row["variant"], row["mode"]) == scatter and row["peak_bytes"]),
        key=lambda row: int(row["tokens"]),
    )
    peak, result = float(row["peak_bytes"]) / 2**20, float(row["ideal_bytes"]) / 2 / 2**20
    return (
        "`masked_scatter` on an embedding's output also needs the packed buffer once more (peak "
        f"{peak:.0f} MiB for a result of {result:.0f} MiB);"
    )


def overview(rows: Sequence[Row]) -> str:
    """Each op against each peer, the worst case and the best, and the verdicts there are."""
    groups: dict[tuple[str, str], list[float]] = defaultdict(list)
    for pair in comparisons(rows):
        op = f"`{pair.ours['op']}` ({pair.ours['backend']})"
        groups[op, pair.peer["variant"]].append(pair.figure.value)
    lines = []
    for names, values in groups.items():
        slower = f"{sum(value < 1 for value in values)} of {len(values)}"
        lines.append((*names, f"{min(values):.2f}", f"{max(values):.2f}", slower))
    worst = "the peer's time over ours, worst case"
    judged = [(verdict.name, verdict.text) for verdict in verdicts(rows) if verdict.met is not None]
    return "\n\n".join(
        [
            table(("ours", "peer", worst, "best", "we are slower in"), *lines),
            table(("target", "verdict"), *judged),
        ]
    )


def summary(rows: Sequence[Row]) -> str:
    """The projector's ops beside PyTorch's own."""
    times: dict[str, list[float]] = {"pool_norm": [], "swiglu": [], "project_tokens": []}
    for pair in comparisons(rows):
        if pair.ours["op"] in times and pair.peer["variant"] in (EAGER, COMPILED):
            times[pair.ours["op"]].append(1 / pair.figure.value)
    parts = [
        f"`{op}` takes {min(values):.2g} to {max(values):.2g} times as long"
        for op, values in times.items()
        if values
    ]
    return f"Beside eager PyTorch and torch.compile, {', '.join(parts)}."


PACKERS = {
    "`pack_embeddings`": (OURS, SPARSE),
    "`masked_scatter`": ("embedding + masked_scatter",),
    "`index_put`": ("embedding + index_put", "embedding(sparse) + index_put"),
    "vLLM's merge": ("embedding + vLLM merge",),
    "nested (jagged)": ("embedding + nested jagged",),
}
MERGERS = {
    "`merge_vision`": (OURS,),
    "`masked_scatter`": ("masked_scatter",),
    "`index_put`": ("index_put",),
}
TRAINING = ("frozen table", "trained table", "sparse table gradient")
pack_medians = partial(medians, "pack_embeddings", columns=PACKERS)

BLOCKS: dict[str, Callable[[Sequence[Row]], str]] = {
    "machine": machine,
    "pack-forward": pack_medians("forward", [""]),
    "pack-backward": pack_medians("backward", ["frozen table"]),
    "pack-training": pack_medians("forward+backward", TRAINING),
    "merge-forward": medians("merge_vision", "forward", [""], MERGERS),
    "losses": losses,
    "calls": calls,
    "planning": planning,
    "bins": bins,
    "copies": copies,
    "overview": overview,
    "summary": summary,
}


def main() -> int:
    for name in DOCUMENTS:
        path = ROOT / name
        before = path.read_text(encoding="utf-8")
        after = rewritten(before)
        if after != before:
            path.write_text(after, encoding="utf-8")
        print(f"{name}: {'written' if after != before else 'as it was'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
