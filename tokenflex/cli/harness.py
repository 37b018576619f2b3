"""``tokenflex harness``: public benchmarks at every count."""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenflex.cli.common import quiet_libraries
from tokenflex.cli.options import comma_separated, positive
from tokenflex.cli.parser import CommandLine


def add_to(commands: CommandLine) -> None:
    """The command and its arguments."""
    harness = commands.add(
        "harness",
        _harness,
        "a public harness's benchmarks at every count, in one table",
        "tokenflex harness lmms-eval runs/demo/checkpoint --benchmarks mmstar --counts 4,9,16 "
        "--output runs/mmstar",
    )
    harness.add_argument("harness", metavar="HARNESS", help="lmms-eval or vlmevalkit")
    harness.add_argument("model", type=Path, metavar="MODEL", help="checkpoint folder")
    harness.add_argument("--benchmarks", required=True, help="the harness's names, with commas")
    harness.add_argument(
        "--counts", type=comma_separated, required=True, help="as of evaluate: 64,144,12x16,auto"
    )
    harness.add_argument("--output", type=Path, required=True, help="folder for table.md and .json")
    harness.add_argument("--max-tiles", type=positive, help="cut images into at most so many")
    harness.add_argument("--batch-size", type=positive, default=1, help="questions, of lmms-eval")
    harness.add_argument("--limit", type=positive, help="questions a benchmark, of lmms-eval")
    harness.add_argument("--run-py", type=Path, help="the script in a copy of VLMEvalKit")
    harness.add_argument(
        "arguments", nargs="*", metavar="-- ARGUMENT", help="more for VLMEvalKit's script"
    )


def _harness(options: argparse.Namespace) -> int:
    quiet_libraries()
    from tokenflex.errors import ReportedError
    from tokenflex.files import check_replaceable, write_atomically, write_json
    from tokenflex.harnesses.driver import HARNESSES, run_lmms_eval, run_vlmevalkit

    benchmarks = options.benchmarks.split(",")
    common = (options.model, options.counts, benchmarks)
    if options.harness not in HARNESSES:
        raise ValueError(f"HARNESS must be one of {', '.join(HARNESSES)}, got {options.harness!r}")
    if (options.harness == "vlmevalkit") != (options.run_py is not None):
        raise ValueError("--run-py must be given with vlmevalkit, and only there")
    if not options.model.is_dir():
        raise FileNotFoundError(f"checkpoint folder {options.model} does not exist")
    # Before the work, not after it.
    keys = ("benchmark", "metric", "count", "value")
    check_replaceable(options.output / "table.json", keys, [options.output / "table.md"])
    options.output.mkdir(parents=True, exist_ok=True)
    if options.harness == "lmms-eval":
        table = run_lmms_eval(
            *common,
            max_tiles=options.max_tiles,
            batch_size=options.batch_size,
            limit=options.limit,
        )
    else:
        table = run_vlmevalkit(
            *common,
            run_py=options.run_py,
            work_dir=options.output / "vlmevalkit",
            max_tiles=options.max_tiles,
            arguments=options.arguments,
        )
    page = table.markdown()
    print(page, end="")
    write_atomically(
        options.output / "table.md", lambda path: path.write_text(page, encoding="utf-8")
    )
    write_json(options.output / "table.json", table.as_json())
    if table.missing:
        raise ReportedError(
            f"{len(table.missing)} scores are missing, the first of "
            f"{' '.join(table.missing[0])}: the harness's own messages say why"
        )
    return 0
