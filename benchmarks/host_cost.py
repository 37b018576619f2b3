"""What one call costs on the host: ``test_host_cost.py`` run by pytest-benchmark, as rows."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT
from benchmarks.harness import COLUMNS, NO_TIME, Deadline, Row
from benchmarks.timing import percentiles
from tokenflex_kernels._backend import IMPLEMENTATIONS, select_backend

HOST_OPS = ("plan_packing", "bin_pack", "balance_bins")
OPS = tuple(op for op in IMPLEMENTATIONS if op not in HOST_OPS)


def suite(device: str, quick: bool, deadline: Deadline) -> Iterator[Row]:
    """One row per op: microseconds of a call that has next to nothing to compute or move.

    Raises:
        ModuleNotFoundError: pytest or pytest-benchmark is not installed.
    """
    for module in ("pytest", "pytest_benchmark"):
        if importlib.util.find_spec(module) is None:
            package = module.replace("_", "-")
            raise ModuleNotFoundError(
                f"{package} is not installed (pip install 'tokenflex[bench]')"
            )
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.jsonl"
        command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider"]
        options = [
            "--override-ini=addopts=",
            "--benchmark-only",
            "--benchmark-quiet",
            f"--benchmark-max-time={0.05 if quick else 0.4}",
            "--benchmark-warmup=on",
            "--benchmark-warmup-iterations=3",
        ]
        why = ""
        try:
            done = subprocess.run(
                [*command, *options, str(ROOT / "benchmarks" / "test_host_cost.py")],
                cwd=ROOT,
                env={
                    **os.environ,
                    "TOKENFLEX_BENCHMARK_DEVICE": device,
                    "TOKENFLEX_BENCHMARK_REPORT": str(report),
                },
                capture_output=True,
                text=True,
                timeout=max(1.0, deadline.left),
            )
            if done.returncode:
                print(done.stdout, done.stderr, file=sys.stderr)
                why = f"failed: pytest ended with {done.returncode}"
        except subprocess.TimeoutExpired:
            why = NO_TIME
        lines = report.read_text(encoding="utf-8").splitlines() if report.exists() else []
        yield from (row_of_report(json.loads(line), device) for line in lines)
        if why:
            yield dict.fromkeys(COLUMNS, "") | {"op": "host_cost", "status": why}


def row_of_report(entry: dict[str, Any], device: str) -> Row:
    """What ``test_host_cost.py`` reports of one test, as a row of the CSV."""
    test, _, label = entry["name"].partition("[")
    op = entry["op"] or test.removeprefix("test_")
    data = [1e6 * value for value in entry["seconds"]]
    p20, p50, p80 = (round(value, 2) for value in percentiles(data).values())
    backend = ""
    if op in IMPLEMENTATIONS:
        backend = select_backend(op, "cpu" if op in HOST_OPS else device)
    return dict.fromkeys(COLUMNS, "") | {
        "op": "host_cost",
        "case": label.rstrip("]").removeprefix(f"{op}-").removeprefix(op),
        "mode": "forward",
        "variant": op,
        "status": "ok",
        "backend": backend,
        "timing": "host",
        "p20_us": p20,
        "p50_us": p50,
        "p80_us": p80,
        "samples": len(data),
        "note": "; ".join(f"{key} {value}" for key, value in entry["note"].items()),
    }
