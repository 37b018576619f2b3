"""``python -m tokenflex_kernels.budget``: predict the kernels' times without a GPU, and write them.

Prints a line for each launch at the reference shapes. ``--csv`` writes the table of predictions,
and ``--page`` writes the section of ``docs/kernels.md`` that is made from such a table.
``--accept`` states what is predicted now, less a margin, as the budgets. Exits with 1 if a stage
was over its budget, by more than another release of Triton than that of the budgets may be.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tokenflex_kernels.aot import set_target
from tokenflex_kernels.budget.model import REFERENCE_GPUS
from tokenflex_kernels.budget.page import read_csv, replace_section, write_csv
from tokenflex_kernels.budget.table import (
    compiler_remark,
    verdicts,
    with_budgets,
    write_budgets,
)
from tokenflex_kernels.options import output_file, refuse_interpreter


def _page(text: str) -> Path:
    """Parse the path of a page that has a section of predictions."""
    path = output_file(text)
    try:
        replace_section(path.read_text(encoding="utf-8"), [])
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(
            f"expected a page with a section of predictions, got {text!r}: {error}"
        ) from None
    return path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tokenflex_kernels.budget", description=__doc__)
    parser.add_argument(
        "--architecture", default="sm_90", choices=sorted(REFERENCE_GPUS), help="default: sm_90"
    )
    parser.add_argument("--csv", type=output_file, help="file to write the predictions to")
    parser.add_argument(
        "--page", type=_page, help="page whose section is written anew; needs --csv"
    )
    parser.add_argument("--accept", action="store_true", help="write budgets.csv anew")
    options = parser.parse_args(arguments)
    if options.page and not options.csv:
        parser.error("--page shows the table of --csv, which is not given")
    refuse_interpreter(parser)
    set_target(options.architecture)
    judged = verdicts(options.architecture)
    for verdict in judged:
        print(verdict.describe(), flush=True)
    over = [v for v in judged if v.fault and not v.is_of_another_compiler]
    little = sum(verdict.is_of_another_compiler for verdict in judged)
    if options.accept:
        write_budgets(judged)
        judged = with_budgets(judged)
    if options.csv:
        options.csv.parent.mkdir(parents=True, exist_ok=True)
        write_csv(options.csv, judged, REFERENCE_GPUS[options.architecture])
    if options.page:
        text = options.page.read_text(encoding="utf-8")
        options.page.write_text(replace_section(text, read_csv(options.csv)), encoding="utf-8")
    print(f"{len(judged)} predictions: {len(over)} over their budget")
    if little:
        print(compiler_remark(little))
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
