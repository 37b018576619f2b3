"""The report of a run, from its CSV alone: every row, what was not measured, verdicts, pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.results import Row
from benchmarks.targets import verdicts

NAMES = ("op", "case", "mode", "variant")


def report(rows: Sequence[Row], path: Path) -> None:
    """Print the report, and draw the pictures beside the CSV.

    Args:
        rows: Of the CSV.
        path: Of the CSV; pictures are called after it.
    """
    print_table([row for row in rows if row["status"] == "ok"])
    if skipped := [row for row in rows if row["status"] != "ok"]:
        print("\nnot measured:")
    for row in skipped:
        print(f"  {', '.join(row[name] for name in NAMES if row[name])}: {row['status']}")
    if savings := token_savings(rows):
        print("\nend to end:", *savings, sep="\n  ")
    print("\ntargets:")
    for verdict in verdicts(rows):
        print(f"  {verdict.name:62} {verdict.text}")
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


def print_table(rows: Sequence[Row]) -> None:
    """Print the median, the wall clock on a GPU and the shares of the ceilings of each row."""
    header = [*NAMES, "p50", "eager", "copy", "matmul", "backend"]
    lines = [header]
    for row in rows:
        eager = f"{float(row['eager_us']):.1f}" if row["eager_us"] else ""
        shares = (row["share_of_copy"], row["share_of_matmul"])
        percents = [f"{100 * float(share):.1f}%" if share else "" for share in shares]
        median = f"{float(row['p50_us']):.1f} us"
        lines.append([*(row[name] for name in NAMES), median, eager, *percents, row["backend"]])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print()
    for line in lines:
        cells = [
            f"{cell:>{width}}" if 4 <= at < 8 else f"{cell:{width}}"
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def token_savings(rows: Sequence[Row]) -> list[str]:
    """Say how much of the tokens that mixed counts save, end to end, becomes time."""
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
