"""``python -m benchmarks``: measure this machine, write its CSV, plots and verdicts.

Each suite runs in a process of its own with a share of the time, and adds its rows to a file line
by line: what was measured stays, whatever happens later.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.environment import ROOT, environment, machine_name, read_csv, write_csv
from benchmarks.harness import COLUMNS, Deadline, DeviceLostError, Row, shares
from benchmarks.report import print_report
from benchmarks.suites import SUITES

SECONDS = {True: 95.0, False: 450.0}  # quick or not
GRACE_SECONDS = 10.0  # what has begun may go on so long after its suite's time


def run(names: list[str], device: str, quick: bool, seconds: float) -> list[Row]:
    """The rows of the suites, one process after the other."""
    deadline = Deadline(seconds)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for index, name in enumerate(names):
            weights = [SUITES[other][1][device] for other in names[index:]]
            share = deadline.left * weights[0] / sum(weights)
            if share < 1:
                rows.append(_note(name, "not run: no time left"))
                continue
            rows += _run_suite(name, device, quick, share, Path(folder) / f"{name}.jsonl")
            print(f"{name}: {len(rows)} rows, {seconds - deadline.left:.0f} s gone", flush=True)
    return rows


def _run_suite(name: str, device: str, quick: bool, seconds: float, path: Path) -> list[Row]:
    print(f"{name}: up to {seconds:.0f} s", flush=True)
    command = [sys.executable, "-m", "benchmarks", "--suite", name, "--rows", str(path)]
    command += ["--device", device, "--seconds", str(seconds), *["--quick"][: int(quick)]]
    why = ""
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        if process.wait(timeout=seconds + GRACE_SECONDS):
            why = f"failed: the process ended with {process.returncode}"
    except subprocess.TimeoutExpired:
        why = f"stopped after {seconds + GRACE_SECONDS:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # compilers that it started too
            process.wait()
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines]
    return [*rows, _note(name, why)] if why else rows


def _note(name: str, status: str) -> Row:
    """What became of a suite that did not end by itself."""
    return dict.fromkeys(COLUMNS, "") | {"op": f"{name} suite", "status": status}


def run_one(name: str, device: str, quick: bool, seconds: float, path: Path) -> int:
    """One suite in this process; 1 if the device failed for good."""
    suite, _ = SUITES[name]
    # Importing takes a while too, so a suite aims at less than it is given.
    with path.open("w", encoding="utf-8") as file:
        try:
            for row in suite(device, quick, Deadline(0.8 * seconds)):
                file.write(json.dumps(row) + "\n")
                file.flush()
        except DeviceLostError as error:
            print(error, file=sys.stderr)
            return 1
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few cases, under two minutes")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), help="default: cuda where there is one"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks/results", help="folder for CSV and plots"
    )
    parser.add_argument("--seconds", type=float, help="for all suites together")
    parser.add_argument("--only", help=f"suites, of {', '.join(SUITES)}")
    parser.add_argument("--report", type=Path, help="measure nothing: plots and table of this CSV")
    parser.add_argument("--suite", choices=SUITES, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.report:
        if not options.report.is_file():
            parser.error(f"--report must be a CSV that was written before, got {options.report}")
        _report(options.report)
        return 0
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA device, and PyTorch sees none")
    seconds = SECONDS[options.quick] if options.seconds is None else options.seconds
    if seconds <= 0:
        parser.error(f"--seconds must be positive, got {seconds:g}")
    if options.suite:
        return run_one(options.suite, device, options.quick, seconds, options.rows)
    names = options.only.split(",") if options.only else list(SUITES)
    if unknown := [name for name in names if name not in SUITES]:
        parser.error(f"--only must be of {', '.join(SUITES)}, got {', '.join(unknown)}")

    start = time.perf_counter()
    shared = environment(device)
    rows = run(names, device, options.quick, seconds)
    rates = {
        row["variant"]: row for row in rows if row["op"] == "ceiling" and row["status"] == "ok"
    }
    shares(
        rows,
        rates["copy"]["gb_per_s"] if "copy" in rates else None,
        rates["matmul"]["tflop_per_s"] if "matmul" in rates else None,
    )
    path = options.out / f"{machine_name(shared)}{'-quick' if options.quick else ''}.csv"
    write_csv(path, rows, shared)
    _report(path)
    print(f"{len(rows)} rows in {path}, {time.perf_counter() - start:.0f} s")
    return int(any(row["op"].endswith(" suite") for row in rows))


def _report(path: Path) -> None:
    """Table, verdicts and plots, from the CSV alone."""
    rows = read_csv(path)
    print_report(rows)
    try:
        from benchmarks.plots import draw
    except ModuleNotFoundError as error:
        print(f"no plots: {error.name} is not installed (pip install 'tokenflex[bench]')")
        return
    for picture in draw(rows, path):
        print(f"drew {picture}")


if __name__ == "__main__":
    sys.exit(main())
