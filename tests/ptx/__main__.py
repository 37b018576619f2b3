"""``python -m tests.ptx``: execute every case of ``cases``, and write what came out.

Prints a line for each case, writes a row for each launch as CSV, and exits with 1 if a result is
wrong or an access is not ordered.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time

import torch

from tests.ptx.cases import Case, Outcome, cases_of
from tests.ptx.parse import PtxError
from tokenflex_kernels.gpus import is_amd
from tokenflex_kernels.launch_configs import INTERPRETER, read_table
from tokenflex_kernels.options import names_of, output_file, refuse_interpreter

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
    known = [name for name in read_table() if name != INTERPRETER and not is_amd(name)]
    parser.add_argument(
        "--architectures",
        type=names_of(known),
        default="sm_90,sm_80",
        help=f"comma-separated, of {', '.join(known)}; default: %(default)s",
    )
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    parser.add_argument("--out", type=output_file, help="write a CSV file")
    options = parser.parse_args(arguments)
    refuse_interpreter(parser)
    every = [case for architecture in options.architectures for case in cases_of(architecture)]
    cases = [case for case in every if options.only in case.name]
    if not cases:
        names = sorted({case.name.split("-")[0] for case in every})
        parser.error(
            f"--only must be part of a case's name, got {options.only!r}, which none of the "
            f"{len(every)} has; names begin with {', '.join(names)}"
        )
    torch.set_num_threads(1)
    rows: list[dict[str, object]] = []
    failed = 0
    for case in cases:
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
    print(f"{len(cases)} cases, {failed} with faults")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
