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
from pathlib import Path

from benchmarks.environment import ROOT, read_csv
from benchmarks.results import COMPILED, EAGER, OURS, SPARSE, Comparison, Row, comparisons
from benchmarks.targets import verdicts

DOCUMENTS = ("README.md", "docs/packing.md", "benchmarks/README.md")
RESULTS = ROOT / "benchmarks/results"
MARK = re.compile(
    r"(?P<begin><!-- benchmarks: (?P<name>[a-z-]+) of (?P<machine>[a-z0-9-]+) -->\n)"
    r".*?(?P<end><!-- end of (?P=name) -->)",
    flags=re.DOTALL,
)
FEW_SAMPLES = 5

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


def rewritten(text: str, results: Path = RESULTS) -> str:
    """A document with everything between its marks written from the CSVs in ``results``.

    Raises:
        ValueError: it marks a block that nothing here writes.
        OSError: it names a CSV that is not there.
    """

    def block(found: re.Match[str]) -> str:
        if found["name"] not in BLOCKS:
            raise ValueError(f"block must be one of {', '.join(BLOCKS)}, got {found['name']}")
        rows = read_csv(results / f"{found['machine']}.csv")
        return f"{found['begin']}{BLOCKS[found['name']](rows)}\n{found['end']}"

    return MARK.sub(block, text)


# ---- blocks


def machine(rows: Sequence[Row]) -> str:
    """What was measured on, and how much of it there is to trust."""
    one = rows[0]
    ok = [row for row in rows if row["status"] == "ok"]
    no_time = sum("no time left" in row["status"] for row in rows)
    few = sum(int(row["samples"]) < FEW_SAMPLES for row in ok)
    sets = max(int(row["sets"] or 0) for row in ok)
    place = one["gpu"] or f"{one['cpu']}, {one['cores']} cores, threads: {one['threads']}"
    return (
        f"Measured on {place}; load before the run {one['load']}; torch {one['torch']}; commit "
        f"{one['commit']}. {len(ok)} rows have times, {few} of them from fewer than {FEW_SAMPLES} "
        f"samples; {no_time} found no time left. Inputs rotate through up to {sets} sets of "
        "buffers."
    )


def packing(mode: str, endings: tuple[str, ...]) -> Callable[[Sequence[Row]], str]:
    return lambda rows: _table(rows, "pack_embeddings", mode, endings, PACKERS)


def merging(rows: Sequence[Row]) -> str:
    return _table(rows, "merge_vision", "forward", ("",), MERGERS)


def losses(rows: Sequence[Row]) -> str:
    """Every case of packing and merging in which a peer is faster."""
    ours = [
        one for one in comparisons(rows) if one.ours["op"] in ("pack_embeddings", "merge_vision")
    ]
    lost = sorted((one for one in ours if one.figure.value < 1), key=lambda one: one.figure.value)
    lines = [
        f"| {one.ours['op']}, {one.ours['mode']}, {one.ours['case']} | {one.peer['variant']} "
        f"| {_ms(one.ours)} | {_ms(one.peer)} | {one.figure.value:.2f} |"
        for one in lost
    ]
    return "\n".join(
        [
            f"A peer is faster in {len(lost)} of {len(ours)} comparisons:",
            "",
            "| case | peer | ours, ms | peer, ms | peer / ours |",
            "|---|---|---|---|---|",
            *lines,
        ]
    )


def calls(rows: Sequence[Row]) -> str:
    """What a call of the compiled ops costs."""

    def span(case: str) -> str:
        found = _host(rows, case)
        return f"{min(found):.0f} to {max(found):.0f}"

    return (
        f"A call of ours costs {span('no grad')} microseconds of checks and dispatch in this run "
        f"({span('grad')} where it records a gradient)."
    )


def planning(rows: Sequence[Row]) -> str:
    (small, large) = (_one_host(rows, "plan_packing", start) for start in ("16x", "1600x"))
    bins = _one_host(rows, "bin_pack", "")
    return (
        f"Planning takes {_ms(small)} ms for 16 samples of 500 tokens and {_ms(large)} ms for 1600 "
        f"of them (one million rows);\n`bin_pack` takes {_ms(bins)} ms for 100 000 samples."
    )


def bins(rows: Sequence[Row]) -> str:
    lines = []
    for samples, shown in (("2000", "2 000"), ("100000", "100 000")):
        row = _one_host(rows, "balance_bins", samples)
        notes = dict(part.rsplit(" ", 1) for part in row["note"].split("; "))
        lines.append(
            f"| `balance_bins`, {shown} samples | {notes['bins']} | {notes['max/mean cost']} "
            f"| {_ms(row)} ms |"
        )
    first_fit = _ms(_one_host(rows, "bin_pack", ""))
    return "\n".join(
        [
            "| | bins | costliest over mean | time |",
            "|---|---|---|---|",
            *lines,
            f"| `bin_pack`, tokens alone, 100 000 samples | | | {first_fit} ms |",
        ]
    )


def copies(rows: Sequence[Row]) -> str:
    """What masked_scatter needs beyond its result."""
    row = max(
        (
            row
            for row in rows
            if (row["variant"], row["mode"]) == ("embedding + masked_scatter", "forward")
            and row["peak_bytes"]
        ),
        key=lambda row: int(row["tokens"]),
    )
    peak, result = float(row["peak_bytes"]) / 2**20, float(row["ideal_bytes"]) / 2 / 2**20
    return (
        "`masked_scatter` on an embedding's output also needs the packed buffer once more (peak "
        f"{peak:.0f} MiB for a result of {result:.0f} MiB);"
    )


def overview(rows: Sequence[Row]) -> str:
    """Each op against each peer, the worst case and the best, and the verdicts there are."""
    groups: dict[tuple[str, str], list[Comparison]] = defaultdict(list)
    for one in comparisons(rows):
        op = f"`{one.ours['op']}` ({one.ours['backend']})"
        groups[op, one.peer["variant"]].append(one)
    lines = []
    for (op, peer), group in groups.items():
        values = [one.figure.value for one in group]
        slower = sum(value < 1 for value in values)
        lines.append(
            f"| {op} | {peer} | {min(values):.2f} | {max(values):.2f} | {slower} of {len(values)} |"
        )
    judged = [verdict for verdict in verdicts(rows) if verdict.met is not None]
    return "\n".join(
        [
            "| ours | peer | the peer's time over ours, worst case | best | we are slower in |",
            "|---|---|---|---|---|",
            *lines,
            "",
            "| target | verdict |",
            "|---|---|",
            *(f"| {verdict.target.name} | {verdict} |" for verdict in judged),
        ]
    )


def summary(rows: Sequence[Row]) -> str:
    """How the projector's plain-PyTorch ops stand beside PyTorch's own."""
    sentences = []
    for op in ("pool_norm", "swiglu", "project_tokens"):
        found = [
            1 / one.figure.value
            for one in comparisons(rows)
            if one.ours["op"] == op and one.peer["variant"] in (EAGER, COMPILED)
        ]
        if found:
            sentences.append(f"`{op}` takes {min(found):.2g} to {max(found):.2g} times as long")
    return f"Beside eager PyTorch and torch.compile, {', '.join(sentences)}."


BLOCKS: dict[str, Callable[[Sequence[Row]], str]] = {
    "machine": machine,
    "pack-forward": packing("forward", ("",)),
    "pack-backward": packing("backward", ("frozen table",)),
    "pack-training": packing(
        "forward+backward", ("frozen table", "trained table", "sparse table gradient")
    ),
    "merge-forward": merging,
    "losses": losses,
    "calls": calls,
    "planning": planning,
    "bins": bins,
    "copies": copies,
    "overview": overview,
    "summary": summary,
}


# ---- cells


def _table(
    rows: Sequence[Row],
    op: str,
    mode: str,
    endings: tuple[str, ...],
    columns: dict[str, tuple[str, ...]],
) -> str:
    """Medians in milliseconds, a line for each case whose name ends so."""
    cases: dict[str, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        ending = row["case"].partition(", ")[2]
        if (row["op"], row["mode"], row["status"]) == (op, mode, "ok") and ending in endings:
            cases[row["case"]][row["variant"]] = row
    table: list[list[str]] = []
    for case, variants in cases.items():
        best = _clearly_fastest(list(variants.values()))
        cells = []
        for names in columns.values():
            row = next((variants[name] for name in names if name in variants), None)
            cells.append(f"**{_ms(row)}**" if row and row is best else _ms(row) if row else "")
        table.append([case, *cells])
    used = [0, *(at for at in range(1, 1 + len(columns)) if any(line[at] for line in table))]
    header = [mode.replace("+", " + "), *columns]
    lines = [f"| {' | '.join(line[at] for at in used)} |" for line in (header, *table)]
    return "\n".join([lines[0], "|---" * len(used) + "|", *lines[1:]])


def _clearly_fastest(rows: Sequence[Row]) -> Row | None:
    """The one whose 80th percentile is below the others' 20th, where all have samples enough."""
    best = min(rows, key=lambda row: float(row["p50_us"]))
    others = [float(row["p20_us"]) for row in rows if row is not best]
    enough = all(int(row["samples"]) >= FEW_SAMPLES for row in rows)
    return best if enough and all(float(best["p80_us"]) < other for other in others) else None


def _ms(row: Row) -> str:
    value = float(row["p50_us"]) / 1000
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _host(rows: Sequence[Row], case: str) -> list[float]:
    return [
        float(row["p50_us"])
        for row in rows
        if (row["op"], row["case"], row["backend"]) == ("host_cost", case, "cpp")
    ]


def _one_host(rows: Sequence[Row], op: str, start: str) -> Row:
    for row in rows:
        if (row["op"], row["variant"]) == ("host_cost", op) and row["case"].startswith(start):
            return row
    raise ValueError(f"the CSV must have the host cost of {op} {start}, got no such row")


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
