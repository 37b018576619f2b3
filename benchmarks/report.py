"""The table of a run: every row, what was not measured and why, and a verdict on every target."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.results import Row
from benchmarks.targets import verdicts


def token_savings(rows: Sequence[Row]) -> list[str]:
    """End to end: how much of the tokens that mixed counts save becomes time."""
    steps = {
        (row["case"].split()[0], row["variant"]): row
        for row in rows
        if row["op"] == "end_to_end" and row["status"] == "ok"
    }
    lines = []
    for variant in ("packed", "padded"):
        fixed, mixed = steps.get(("fixed", variant)), steps.get(("mixed", variant))
        if not fixed or not mixed:
            continue
        tokens = 1 - int(mixed["tokens"]) / int(fixed["tokens"])
        seconds = 1 - float(mixed["p50_us"]) / float(fixed["p50_us"])
        lines.append(
            f"{variant}: mixed counts save {tokens:.1%} of the sequence and {seconds:.1%} of the "
            f"time: {seconds / tokens:.0%} of the saving becomes time"
        )
    return lines


_HEADER = {name: name for name in ("op", "case", "mode", "variant")}


def print_report(rows: Sequence[Row]) -> None:
    """Every row that was measured, what was not and why, and the verdicts."""
    measured = [row for row in rows if row["status"] == "ok"]
    names = ("op", "case", "mode", "variant")
    widths = {name: 2 + max(len(one[name]) for one in [_HEADER, *measured]) for name in names}

    def line(row: Row, *values: str) -> str:
        left = "".join(f"{row[name]:{widths[name]}}" for name in names)
        p50, eager, copy, matmul, backend = values
        return f"{left}{p50:>12}{eager:>11}{copy:>7}{matmul:>8}  {backend}"

    print("\n" + line(_HEADER, "p50", "eager", "copy", "matmul", "backend"))
    for row in measured:
        shares = (_percent(row["share_of_copy"]), _percent(row["share_of_matmul"]))
        p50 = f"{float(row['p50_us']):.1f} us"
        print(line(row, p50, _micro(row["eager_us"]), *shares, row["backend"]))
    skipped = [row for row in rows if row["status"] != "ok"]
    if skipped:
        print("\nnot measured:")
    for row in skipped:
        name = ", ".join(filter(None, (row["op"], row["case"], row["mode"], row["variant"])))
        print(f"  {name}: {row['status']}")
    if savings := token_savings(rows):
        print("\nend to end:")
    for line in savings:
        print(f"  {line}")
    print("\ntargets:")
    for verdict in verdicts(rows):
        print(f"  {verdict.target.name:62} {verdict}")


def _micro(value: str) -> str:
    return f"{float(value):.1f}" if value else ""


def _percent(value: str) -> str:
    return f"{100 * float(value):.1f}%" if value else ""
