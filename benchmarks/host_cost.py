"""What one call costs on the host: ``test_host_cost.py`` run by pytest-benchmark, as rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT
from benchmarks.harness import COLUMNS, Deadline, Row
from benchmarks.timing import percentiles
from tokenflex_kernels._backend import IMPLEMENTATIONS, select_backend

HOST_OPS = ("plan_packing", "bin_pack", "balance_bins")


def suite(device: str, quick: bool, _: Deadline) -> Iterator[Row]:
    """One row per op: microseconds of a call that has next to nothing to compute or move."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider"]
        options = [
            "--override-ini=addopts=",
            "--benchmark-only",
            "--benchmark-quiet",
            "--benchmark-save-data",
            f"--benchmark-max-time={0.05 if quick else 0.4}",
            "--benchmark-warmup=on",
            "--benchmark-warmup-iterations=3",
            f"--benchmark-json={report}",
        ]
        done = subprocess.run(
            [*command, *options, str(ROOT / "benchmarks" / "test_host_cost.py")],
            cwd=ROOT,
            env={**os.environ, "TOKENFLEX_BENCHMARK_DEVICE": device},
            capture_output=True,
            text=True,
        )
        if not report.exists() or not report.stat().st_size:
            last = (done.stdout + done.stderr).strip().splitlines()[-1:]
            why = f"failed: pytest ended with {done.returncode}: {' '.join(last)}"[:200]
            yield dict.fromkeys(COLUMNS, "") | {"op": "host_cost", "status": why}
            return
        yield from rows_of_report(json.loads(report.read_text(encoding="utf-8")), device)


def rows_of_report(report: dict[str, Any], device: str) -> list[Row]:
    """pytest-benchmark's JSON as rows of the CSV."""
    rows = []
    for entry in report["benchmarks"]:
        test, _, label = entry["name"].partition("[")
        params = entry["params"] or {}
        op = params.get("op", test.removeprefix("test_"))
        data = [1e6 * value for value in entry["stats"]["data"]]
        p20, p50, p80 = (round(value, 2) for value in percentiles(data).values())
        rows.append(
            dict.fromkeys(COLUMNS, "")
            | {
                "op": "host_cost",
                "case": label.rstrip("]").removeprefix(f"{op}-").removeprefix(op),
                "mode": "forward",
                "variant": op,
                "status": "ok",
                "backend": select_backend(op, "cpu" if op in HOST_OPS else device)
                if op in IMPLEMENTATIONS
                else "",
                "timing": "host",
                "p20_us": p20,
                "p50_us": p50,
                "p80_us": p80,
                "samples": len(data),
                "note": "; ".join(f"{key} {value}" for key, value in entry["extra_info"].items()),
            }
        )
    return rows
