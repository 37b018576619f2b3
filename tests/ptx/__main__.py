"""``python -m tests.ptx``: execute every case of ``cases``, and write what came out.

Prints a line for each case, writes a row for each launch as CSV, and exits with 1 if a result is
wrong or an access is not ordered.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from pathlib import Path

import torch

from tests.ptx.cases import Case, Outcome, cases_of
from tests.ptx.parse import PtxError

CLASSES = ("global", "shared", "shuffle", "tensor", "special", "control", "other")
COLUMNS = (
    *("architecture", "case", "kernel", "config", "programs", "warps", "error_share", "races"),
    *("bytes_loaded", "bytes_stored"),
    *(f"{name}_instructions" for name in CLASSES),
)


def rows_of(case: Case, outcome: Outcome) -> list[dict[str, object]]:
    """Return a row for each launch; the error is the worst of the case, as a share of its limit."""
    worst = max(
        result.error / result.allowed if result.allowed else float(result.error > 0)
        for result in outcome.results.values()
    )
    return [
        {
            "architecture": case.architecture,
            "case": case.name,
            "kernel": execution.kernel,
            "config": execution.config,
            "programs": execution.programs,
            "warps": execution.warps,
            "error_share": f"{worst:.3f}",
            "races": len(execution.races),
            "bytes_loaded": execution.bytes_loaded,
            "bytes_stored": execution.bytes_stored,
            **{f"{name}_instructions": execution.instructions[name] for name in CLASSES},
        }
        for execution in outcome.executions
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.ptx", description=__doc__)
    parser.add_argument("--architectures", default="sm_90,sm_80", help="default: %(default)s")
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    parser.add_argument("--out", type=Path, help="write a CSV file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows: list[dict[str, object]] = []
    failed = 0
    for architecture in options.architectures.split(","):
        for case in cases_of(architecture):
            if options.only not in case.name:
                continue
            start = time.perf_counter()
            try:
                outcome = case.run()
            except PtxError as error:
                faults = [str(error)]
            else:
                faults = outcome.faults
                rows += rows_of(case, outcome)
            failed += bool(faults)
            seconds = time.perf_counter() - start
            print(f"{case!s:60} {seconds:6.1f} s  {'; '.join(faults) or 'right'}", flush=True)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with options.out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    print(f"{failed} cases with faults")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
