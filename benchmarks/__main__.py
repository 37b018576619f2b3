"""``python -m benchmarks``: measure this machine; write its CSV, its pictures and its report.

Each suite runs in a process of its own with a share of the time. Rows are written as they come, to
a file beside the CSV of an earlier run, which is replaced when all suites have ended.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks import ceilings, host_cost, packing, pool_norm, project_tokens, swiglu
from benchmarks.harness import NO_TIME, Deadline
from benchmarks.processes import watched_rows
from benchmarks.report import report
from benchmarks.results import (
    COLUMNS,
    OURS,
    RESULTS,
    ROOT,
    NewRow,
    add_shares,
    environment,
    machine_name,
    new_row,
    read_csv,
    write_csv,
)

SUITES = {
    "ceilings": ceilings,
    "host_cost": host_cost,
    "packing": packing,
    "pool_norm": pool_norm,
    "project_tokens": project_tokens,
    "swiglu": swiglu,
}
INTERRUPTED_STATUS = 130  # the convention of shells
SECONDS = {True: 95.0, False: 450.0}  # quick or not


def run_suites(
    names: Sequence[str], device: str, quick: bool, seconds: float
) -> Iterator[list[NewRow]]:
    """Yield the rows of each suite, one process after the other."""
    deadline = Deadline(seconds)
    for index, name in enumerate(names):
        weights = [SUITES[other].SHARES[device] for other in names[index:]]
        share = deadline.left * weights[0] / sum(weights)
        if share < 1:
            yield [new_row(op=f"{name} suite", status=NO_TIME)]
            continue
        print(f"{name}: up to {share:.0f} s", flush=True)
        yield from watched_rows(name, SUITES[name].suite, device, quick, share)
        print(f"{name}: ended after {seconds - deadline.left:.0f} s in all", flush=True)


def failed(row: NewRow) -> bool:
    """Return whether a suite did not end, or something of ours went wrong (a peer may)."""
    ours = row["variant"].startswith(OURS) or row["op"] == "host_cost"
    return row["op"].endswith(" suite") or (ours and row["status"].startswith("failed"))


def measure(names: Sequence[str], device: str, quick: bool, seconds: float, folder: Path) -> int:
    """Run the suites and write their rows; return the exit status."""
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for the suites: ops and clocks of the CPU
        if "OMP_NUM_THREADS" not in os.environ:
            # On a shared CPU, threads wait for the thread that has lost its core.
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
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if available")
    parser.add_argument(
        "--out",
        type=Path,
        help=f"folder for CSV, pictures and report, default: {RESULTS.relative_to(ROOT)}",
    )
    parser.add_argument("--seconds", type=float, help="time limit for all suites together")
    parser.add_argument("--only", help=f"suites, of {', '.join(SUITES)}; needs --out")
    parser.add_argument("--report", type=Path, help="measure nothing: report on this CSV again")
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
            f"--only measures a part, and would replace the complete run in {RESULTS.name}: "
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
