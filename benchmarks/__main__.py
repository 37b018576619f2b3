"""``python -m benchmarks``: measure this machine, write its CSV, plots and verdicts.

Each suite runs in a process of its own with a share of the time, and adds its rows to a file line
by line: what was measured stays, whatever happens later. The CSV of an earlier run is replaced when
all suites have ended.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from benchmarks.environment import (
    DATA_SHEETS,
    ROOT,
    environment,
    machine_name,
    read_csv,
    write_csv,
)
from benchmarks.harness import COLUMNS, NO_TIME, Deadline, DeviceLostError, Row, shares
from benchmarks.report import print_report
from benchmarks.results import OURS
from benchmarks.suites import SUITES

RESULTS = ROOT / "benchmarks/results"
INTERRUPTED = "not run: interrupted"
INTERRUPTED_STATUS = 130  # as shells have it
SECONDS = {True: 95.0, False: 450.0}  # quick or not
GRACE_SECONDS = 10.0  # what has begun may go on so long after its suite's time


def run(names: list[str], device: str, quick: bool, seconds: float) -> Iterator[list[Row]]:
    """The rows of each suite, one process after the other.

    Raises:
        KeyboardInterrupt: after the rows that the suite had written until then.
    """
    deadline = Deadline(seconds)
    with tempfile.TemporaryDirectory() as folder:
        for index, name in enumerate(names):
            weights = [SUITES[other][1][device] for other in names[index:]]
            share = deadline.left * weights[0] / sum(weights)
            if share < 1:
                yield [_note(name, NO_TIME)]
                continue
            rows = _run_suite(name, device, quick, share, Path(folder) / f"{name}.jsonl")
            print(f"{name}: {len(rows)} rows, {seconds - deadline.left:.0f} s gone", flush=True)
            yield rows
            if rows and rows[-1]["status"] == INTERRUPTED:
                raise KeyboardInterrupt


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
    except KeyboardInterrupt:
        why = INTERRUPTED
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # compilers that it started too
            process.wait()
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]  # the last may be torn
    return [*rows, _note(name, why)] if why else rows


def _note(name: str, status: str) -> Row:
    """What became of a suite that did not end by itself."""
    return dict.fromkeys(COLUMNS, "") | {"op": f"{name} suite", "status": status}


def run_one(name: str, device: str, quick: bool, seconds: float, path: Path) -> int:
    """One suite in this process; 1 if the device failed for good, or a package is missing."""
    suite, _ = SUITES[name]
    # Importing takes a while too, so a suite aims at less than it is given.
    with path.open("w", encoding="utf-8") as file:

        def write(row: Row) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()

        try:
            for row in suite(device, quick, Deadline(0.8 * seconds)):
                write(row)
        except ModuleNotFoundError as error:
            write(_note(name, f"not run: {error}"))
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
        "--out", type=Path, help=f"folder for CSV and plots, default: {RESULTS.relative_to(ROOT)}"
    )
    parser.add_argument("--seconds", type=float, help="for all suites together")
    parser.add_argument("--only", help=f"suites, of {', '.join(SUITES)}; needs --out")
    parser.add_argument("--report", type=Path, help="measure nothing: plots and table of this CSV")
    parser.add_argument("--suite", choices=SUITES, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.report:
        try:
            rows = read_csv(options.report, (*COLUMNS, *environment("cpu")))
        except (OSError, UnicodeDecodeError, ValueError) as error:
            parser.error(f"--report must be a CSV that was written here: {error}")
        _report(rows, options.report)
        return 0
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA device, and PyTorch sees none")
    seconds = SECONDS[options.quick] if options.seconds is None else options.seconds
    if not 0 < seconds < math.inf:
        parser.error(f"--seconds must be positive and finite, got {seconds:g}")
    if options.suite:
        return run_one(options.suite, device, options.quick, seconds, options.rows)
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
    return _measure(names, device, options.quick, seconds, folder)


def _measure(names: list[str], device: str, quick: bool, seconds: float, folder: Path) -> int:
    """Run the suites and write their rows; how the run ended, as an exit status."""
    if device == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        # On a CPU that others use too, threads wait for the one that has lost its core.
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
    start = time.perf_counter()
    shared = environment(device)
    path = folder / f"{machine_name(shared)}{'-quick' if quick else ''}.csv"
    unfinished = path.with_name(f"{path.name}.unfinished")
    rows: list[Row] = []
    try:
        for more in run(names, device, quick, seconds):
            rows += more
            _add_shares(rows, shared)
            if rows:
                write_csv(unfinished, rows, shared)
    except KeyboardInterrupt:
        kept = f"{len(rows)} rows in {unfinished}" if rows else "nothing was measured"
        print(f"interrupted: {kept}", file=sys.stderr)
        return INTERRUPTED_STATUS
    os.replace(unfinished, path)
    _report(read_csv(path), path)
    print(f"{len(rows)} rows in {path}, {time.perf_counter() - start:.0f} s")
    return int(any(failed(row) for row in rows))


def failed(row: Row) -> bool:
    """Whether a suite did not end, or something of ours went wrong (a peer may)."""
    ours = row["variant"].startswith(OURS) or row["op"] in ("end_to_end", "host_cost")
    return row["op"].endswith(" suite") or (ours and row["status"].startswith("failed"))


def _add_shares(rows: list[Row], shared: Mapping[str, object]) -> None:
    rates = {
        row["variant"]: row for row in rows if row["op"] == "ceiling" and row["status"] == "ok"
    }
    shares(
        rows,
        rates["copy"]["gb_per_s"] if "copy" in rates else None,
        rates["matmul"]["tflop_per_s"] if "matmul" in rates else None,
        DATA_SHEETS.get(str(shared["gpu"])),
    )


def _report(rows: list[dict[str, str]], path: Path) -> None:
    """Table, verdicts and plots, from the CSV alone."""
    print_report(rows)
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


if __name__ == "__main__":
    sys.exit(main())
