"""Packing on the CPU, measured and written to a CSV: ``python -m benchmarks.packing_cpu``.

The timings are those of ``benchmarks/test_packing.py``; peak memory, which a process can only reach
once, is read from a process of its own for each variant.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from benchmarks.environment import ROOT, percentiles, write_csv
from benchmarks.packing_cases import MERGERS, PACKERS, Case
from benchmarks.test_packing import THREADS

MEMORY_CASE = Case(samples=64, text=220, width=2048, vocabulary=1_000)


BINS = "bin_pack or balance_bins"


def timings() -> list[dict[str, object]]:
    """One row per benchmark, in microseconds.

    The garbage collector is off, as its pauses are nobody's cost in particular; but on for the
    bins, whose many lists are what wakes it.
    """
    return _timings(f"not ({BINS})", "--benchmark-disable-gc") + _timings(BINS)


def _timings(chosen: str, *options: str) -> list[dict[str, object]]:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        status = pytest.main(
            [
                str(ROOT / "benchmarks" / "test_packing.py"),
                "--override-ini=addopts=",
                "--benchmark-only",
                "--benchmark-sort=fullname",
                "--benchmark-save-data",
                "--benchmark-max-time=0.4",
                f"-k={chosen}",
                *options,
                "--benchmark-warmup=on",
                "--benchmark-warmup-iterations=3",
                f"--benchmark-json={report}",
                "-q",
            ]
        )
        if status != 0:
            raise SystemExit(status)
        return rows_of_report(json.loads(report.read_text(encoding="utf-8")))


def rows_of_report(report: dict) -> list[dict[str, object]]:
    """pytest-benchmark's JSON as rows of the CSV."""
    rows = []
    for entry in report["benchmarks"]:
        test, _, label = entry["name"].partition("[")
        params = entry["params"] or {}
        variant = params.get("variant", test.removeprefix("test_"))
        times = {
            name: round(1e6 * value, 2)
            for name, value in percentiles(entry["stats"]["data"]).items()
        }
        rows.append(
            {
                "benchmark": test.removeprefix("test_"),
                "variant": variant,
                "case": label.rstrip("]").removeprefix(f"{variant}-").removesuffix(f"-{variant}"),
                "unit": "us",
                **times,
                "rounds": entry["stats"]["rounds"],
                "note": "; ".join(f"{key} {value}" for key, value in entry["extra_info"].items()),
            }
        )
    return rows


def peak_memory() -> list[dict[str, object]]:
    """One row per variant: the peak of a call above what its arguments and result take."""
    rows = []
    for benchmark, variants in (("pack_forward", PACKERS), ("merge_forward", MERGERS)):
        for variant in variants:
            command = [sys.executable, "-m", "benchmarks.packing_cpu", "--measure", variant]
            extra = [
                int(subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout)
                for _ in range(3)
            ]
            rows.append(
                {
                    "benchmark": f"{benchmark}_peak_extra_memory",
                    "variant": variant,
                    "case": MEMORY_CASE.name,
                    "unit": "KiB",
                    **percentiles(extra),
                    "rounds": len(extra),
                    "note": "",
                }
            )
    return rows


def measure_extra_kib(variant: str) -> int:
    """How much higher the process' peak gets in one call, less the result's own size."""
    torch.set_num_threads(THREADS)
    call = {**PACKERS, **MERGERS}[variant]
    small = Case(samples=1, text=4, width=8, vocabulary=10).batch(torch.float32, "cpu")
    call(small)  # code and thread pools are no part of it
    batch = MEMORY_CASE.batch(torch.float32, "cpu")
    before = peak_kib()
    result = call(batch)
    return peak_kib() - before - result.nbytes // 1024


def peak_kib() -> int:
    """The peak of this process' memory. (``ru_maxrss`` would start from that of its parent.)"""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (peak,) = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return int(peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.packing_cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/packing-cpu.csv")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(measure_extra_kib(arguments.measure))
        return
    torch.set_num_threads(THREADS)
    rows = timings() + peak_memory()
    write_csv(arguments.out, rows)
    print(f"{len(rows)} rows written to {arguments.out}")


if __name__ == "__main__":
    main()
