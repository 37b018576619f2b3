"""``tokenflex harness``: public benchmarks at every count."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tokenflex.cli.common import quiet_libraries
from tokenflex.cli.extras import install_hint
from tokenflex.cli.options import comma_separated, positive
from tokenflex.cli.parser import CommandLine

if TYPE_CHECKING:
    from tokenflex.harnesses.table import CountTable


def add_to(commands: CommandLine) -> None:
    """Add the command and its arguments."""
    harness = commands.add(
        "harness",
        _harness,
        "run a public harness's benchmarks at every count, into one table",
        "tokenflex harness lmms-eval runs/demo/checkpoint --benchmarks mmstar --counts 4,9,16 "
        "--output runs/mmstar",
    )
    harness.add_argument("harness", metavar="HARNESS", help="lmms-eval or vlmevalkit")
    harness.add_argument(
        "model",
        type=Path,
        metavar="MODEL",
        help="a checkpoint or a conversion: a folder, or org/name on the Hugging Face Hub",
    )
    harness.add_argument("--benchmarks", required=True, help="the harness's names, with commas")
    harness.add_argument(
        "--counts", type=comma_separated, required=True, help="for example 64,144,12x16,auto"
    )
    harness.add_argument(
        "--output", type=Path, required=True, help="folder for table.md, .json and .png"
    )
    harness.add_argument("--max-tiles", type=positive, help="most tiles of an image")
    lmms_eval = harness.add_argument_group("only for lmms-eval")
    lmms_eval.add_argument("--batch-size", type=positive, help="questions per batch; default 1")
    lmms_eval.add_argument("--limit", type=positive, help="questions of each benchmark")
    lmms_eval.add_argument(
        "--include-path",
        type=Path,
        action="append",
        metavar="FOLDER",
        help="folder with your own tasks; may be given several times",
    )
    vlmevalkit = harness.add_argument_group(
        "only for vlmevalkit",
        "Arguments after -- are passed to VLMEvalKit's script: -- --judge exact_matching",
    )
    vlmevalkit.add_argument("--run-py", type=Path, help="the script in a copy of VLMEvalKit")
    harness.passed_on = "arguments"


def _harness(options: argparse.Namespace) -> int:
    quiet_libraries()
    from tokenflex.files import check_replaceable, write_json, write_text
    from tokenflex.harnesses.driver import HarnessError

    _check(options)
    keys = ("benchmark", "metric", "count", "value")
    others = [options.output / "table.md", options.output / "table.png"]
    check_replaceable(options.output / "table.json", keys, others)
    options.output.mkdir(parents=True, exist_ok=True)
    try:
        table = _run(options)
        print(table.text())
        write_text(options.output / "table.md", table.markdown())
        write_json(options.output / "table.json", table.as_json())
        _draw(table, options.output / "table.png")
        if table.missing:
            raise HarnessError(
                f"{len(table.missing)} scores are missing, the first of "
                f"{' '.join(table.missing[0])}: the harness's own messages say why"
            )
    except HarnessError as error:
        if options.debug:
            raise
        print(f"tokenflex: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _draw(table: CountTable, path: Path) -> None:
    """Draw the table if it has scores; without matplotlib say what the picture needs."""
    if not any(table.rows.values()):
        path.unlink(missing_ok=True)  # that of a table before
        return
    try:
        from tokenflex.harnesses.figure import plot_table
    except ModuleNotFoundError as error:
        print(
            f"warning: no picture is drawn, which needs {error.name}; "
            f"{install_hint(error.name or '', 'train')}",
            file=sys.stderr,
        )
    else:
        plot_table(table, path)


def _run(options: argparse.Namespace) -> CountTable:
    from tokenflex.harnesses.driver import run_lmms_eval, run_vlmevalkit

    arguments = (options.model, options.counts, options.benchmarks.split(","))
    if options.harness == "lmms-eval":
        return run_lmms_eval(
            *arguments,
            max_tiles=options.max_tiles,
            include_path=options.include_path or (),
            batch_size=options.batch_size or 1,
            limit=options.limit,
        )
    return run_vlmevalkit(
        *arguments,
        run_py=options.run_py,
        work_dir=options.output / "vlmevalkit",
        max_tiles=options.max_tiles,
        arguments=options.arguments,
    )


def _check(options: argparse.Namespace) -> None:
    """Refuse options that the named harness would not use."""
    from tokenflex.harnesses.driver import HARNESSES
    from tokenflex.hub import local_checkpoint

    if options.harness not in HARNESSES:
        raise ValueError(f"HARNESS must be one of {', '.join(HARNESSES)}, got {options.harness!r}")
    is_lmms_eval = options.harness == "lmms-eval"
    if is_lmms_eval == (options.run_py is not None):
        raise ValueError("--run-py must be given with vlmevalkit, and only there")
    if is_lmms_eval and options.arguments:
        raise ValueError(
            "arguments after -- are for VLMEvalKit's script, and lmms-eval takes none: got "
            f"{' '.join(options.arguments)}"
        )
    for name in ("batch_size", "limit", "include_path"):
        if not is_lmms_eval and getattr(options, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} is for lmms-eval, not for vlmevalkit")
    local_checkpoint(options.model)
