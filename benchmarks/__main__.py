"""``python -m benchmarks``: measure this machine; write its CSV, its pictures and its verdicts.

Each suite runs in a process of its own with a share of the time. Rows are written as they come, to
a file beside the CSV of an earlier run, which is replaced when all suites have ended.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from benchmarks import (
    ceilings,
    end_to_end,
    host_cost,
    packing,
    pool_norm,
    project_tokens,
    swiglu,
)
from benchmarks.harness import NO_TIME, Deadline
from benchmarks.machine import DATA_SHEETS, ROOT, environment, machine_name
from benchmarks.processes import Watched
from benchmarks.report import report
from benchmarks.results import COLUMNS, OURS, NewRow, new_row, read_csv, write_csv

RESULTS = ROOT / "benchmarks/results"
INTERRUPTED_STATUS = 130  # as shells have it
SECONDS = {True: 95.0, False: 450.0}  # quick or not

# Each with its share of the time, on a GPU and on a CPU.
SUITES = {
    "ceilings": (ceilings.suite, {"cuda": 1, "cpu": 1}),
    "host_cost": (host_cost.suite, {"cuda": 2, "cpu": 3}),
    "packing": (packing.suite, {"cuda": 2.5, "cpu": 6}),
    "pool_norm": (pool_norm.suite, {"cuda": 2, "cpu": 2}),
    "project_tokens": (project_tokens.suite, {"cuda": 5, "cpu": 2.5}),
    "swiglu": (swiglu.suite, {"cuda": 3, "cpu": 1.5}),
    "end_to_end": (end_to_end.suite, {"cuda": 2, "cpu": 2}),
}


def run_suites(
    names: Sequence[str], device: str, quick: bool, seconds: float
) -> Iterator[list[NewRow]]:
    """Yield the rows of each suite, one process after the other."""
    deadline = Deadline(seconds)
    for index, name in enumerate(names):
        weights = [SUITES[other][1][device] for other in names[index:]]
        share = deadline.left * weights[0] / sum(weights)
        if share < 1:
            yield [new_row(op=f"{name} suite", status=NO_TIME)]
            continue
        print(f"{name}: up to {share:.0f} s", flush=True)
        yield from Watched(name, SUITES[name][0], device, quick).rows(share)
        print(f"{name}: {seconds - deadline.left:.0f} s gone", flush=True)


def add_shares(rows: Sequence[NewRow], shared: Mapping[str, object]) -> None:
    """Fill in the shares of the ceilings that were measured, and of those in the data sheet."""
    ceilings = {row["variant"]: row for row in rows if row["op"] == "ceiling"}
    sheet = DATA_SHEETS.get(str(shared["gpu"]), (None, None))
    for rate, ceiling, column, stated in (
        ("gb_per_s", "copy", "share_of_copy", sheet[0]),
        ("tflop_per_s", "matmul", "share_of_matmul", sheet[1]),
    ):
        measured = ceilings.get(ceiling, {}).get(rate)
        for row in rows:
            if row[rate] != "" and measured:
                row[column] = round(row[rate] / measured, 4)
            if row[rate] != "" and stated:
                row["share_of_sheet"] = round(row[rate] / stated, 4)


def failed(row: NewRow) -> bool:
    """Return whether a suite did not end, or something of ours went wrong (a peer may)."""
    ours = row["variant"].startswith(OURS) or row["op"] in ("end_to_end", "host_cost")
    return row["op"].endswith(" suite") or (ours and row["status"].startswith("failed"))


def measure(names: Sequence[str], device: str, quick: bool, seconds: float, folder: Path) -> int:
    """Run the suites and write their rows; return the exit status."""
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for the suites: ops and clocks of the CPU
        if "OMP_NUM_THREADS" not in os.environ:
            # On a CPU that others use too, threads wait for the one that has lost its core.
            os.environ["OMP_NUM_THREADS"] = "1"
            torch.set_num_threads(1)
    start = time.perf_counter()
    shared = environment(device)
    path = folder / f"{machine_name(shared)}{'-quick' if quick else ''}.csv"
    unfinished = path.with_name(f"{path.name}.unfinished")
    rows: list[NewRow] = []
    try:
        for more in run_suites(names, device, quick, seconds):
            rows += more
            add_shares(rows, shared)
            if rows:
                write_csv(unfinished, rows, shared)
    except KeyboardInterrupt:
        kept = f"{len(rows)} rows in {unfinished}" if rows else "nothing was measured"
        print(f"interrupted: {kept}", file=sys.stderr)
        return INTERRUPTED_STATUS
    os.replace(unfinished, path)
    report(read_csv(path), path)
    print(f"{len(rows)} rows in {path}, {time.perf_counter() - start:.0f} s")
    return int(any(failed(row) for row in rows))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few cases, under two minutes")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), help="default: cuda where there is one"
    )
    parser.add_argument(
        "--out", type=Path, help=f"folder for CSV and plots, default: {RESULTS.relative_to(ROOT)}"
    )
    parser.add_argument("--seconds", type=float, help="for all suites together")
    parser.add_argument("--only", help=f"suites, of {', '.join(SUITES)}; needs --out")
    parser.add_argument("--report", type=Path, help="measure nothing: plots and table of this CSV")
    options = parser.parse_args(arguments)
    if options.report:
        try:
            rows = read_csv(options.report, (*COLUMNS, "device", "cpu", "gpu", "torch", "commit"))
        except (OSError, ValueError) as error:
            parser.error(f"--report must be a CSV that was written here: {error}")
        report(rows, options.report)
        return 0
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA device, and PyTorch sees none")
    seconds = SECONDS[options.quick] if options.seconds is None else options.seconds
    if not 0 < seconds < math.inf:
        parser.error(f"--seconds must be positive and finite, got {seconds:g}")
    names = list(SUITES) if options.only is None else options.only.split(",")
    if unknown := [name for name in names if name not in SUITES]:
        parser.error(f"--only must be of {', '.join(SUITES)}, got {', '.join(unknown) or repr('')}")
    if options.only is not None and options.out is None:
        parser.error(
            f"--only measures a part, and would take the place of all in {RESULTS.name}: "
            "name another folder with --out"
        )
    folder = options.out or RESULTS
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out must be a folder to write to, got {folder}: {error.strerror}")
    return measure(names, device, options.quick, seconds, folder)


if __name__ == "__main__":
    sys.exit(main())
