"""``tokenflex train``: train as a configuration says, or only print the plan."""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path
from typing import Any

from tokenflex.cli.common import quiet_libraries
from tokenflex.cli.options import positive
from tokenflex.cli.parser import CommandLine


def add_to(commands: CommandLine) -> None:
    """Add the command and its arguments."""
    train = commands.add(
        "train",
        _train,
        "train as a configuration says; a run that was stopped continues",
        "tokenflex train configs/demo.yaml",
        extra="train",
    )
    train.add_argument("config", type=Path, help="YAML file, see configs/")
    train.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="replace a value of the file, such as stages.0.batch_size=8; may be repeated",
    )
    train.add_argument("--output", type=Path, help="folder to write to, in place of the config's")
    train.add_argument(
        "--fresh", action="store_true", help="begin anew even if there is a state or a finished run"
    )
    train.add_argument(
        "--accept-changed-data",
        action="store_true",
        help="continue although data files have changed since the run was stopped",
    )
    train.add_argument(
        "--dry-run",
        action="store_true",
        help="print what each stage trains and costs, from configurations alone, and stop",
    )
    train.add_argument(
        "--processes", type=positive, default=1, help="of the dry run's memory, 1 by default"
    )


def _train(options: argparse.Namespace) -> int:
    from tokenflex.training.config import check_files, load_config

    config = load_config(options.config, options.set, plans=options.dry_run)
    if options.output is not None:
        config = config.model_copy(update={"output": options.output})
    options.running_output = config.output
    quiet_libraries()
    if options.dry_run:
        check_files(config, plans=True)
        from tokenflex.training.plan import format_plan, plan_run

        print(format_plan(plan_run(config, options.processes)))
        return 0
    from tokenflex.training.output import BEST, CHECKPOINT, finished_report

    finished = None if options.fresh else finished_report(config)
    if finished is not None:
        if int(os.environ.get("RANK", "0")) == 0:
            checkpoint, left = config.output / CHECKPOINT, "nothing to do"
            if config.evaluation is not None and "accuracy" not in finished:
                left = f"`tokenflex evaluate {checkpoint} ...` evaluates it"
            elif (
                config.evaluation is not None
                and config.evaluation.keep_best is not None
                and not (config.output / BEST).is_dir()
            ):
                left = "it kept no best model, which takes a new training"
            print(
                f"{config.output} holds this run, finished: {left}; --fresh trains anew. "
                f"Its model is in {checkpoint}"
            )
        return 0
    check_files(config)
    from tokenflex.training.agreement import OtherProcessError, is_lost_connection
    from tokenflex.training.loop import TrainingRun

    run = TrainingRun(config, fresh=options.fresh, accept_changed_data=options.accept_changed_data)
    try:
        report = run.run()
    except RuntimeError as error:
        if run.accelerator.num_processes > 1 and is_lost_connection(error):
            raise OtherProcessError(f"another process of the run is gone: {error}") from error
        raise
    finally:
        run.leave_group()
    if not run.is_main:
        return 0
    from tokenflex.training.curves import plot_curves

    plot_curves(config.output)
    if "accuracy" in report:
        from tokenflex.evaluation.report import format_table
        from tokenflex.plots import plot_accuracy

        picture = config.output / "accuracy.png"
        plot_accuracy(report, picture)
        _write_card(run, report, picture)
        print(format_table(report))
    if "best" in report:
        from tokenflex.training.best import in_words
        from tokenflex.training.output import BEST

        print(f"{config.output / BEST}: {in_words(report['best'])}")
    print(f"{report['seconds']:.0f} s of training; everything is in {config.output}")
    return 0


def _write_card(run: Any, report: dict[str, Any], picture: Path) -> None:
    """Show the accuracies of a finished run in the card of its checkpoint."""
    from tokenflex.files import write_atomically
    from tokenflex.models.cards import PICTURE, write_card
    from tokenflex.training.config import ConvertedModelConfig
    from tokenflex.training.output import CHECKPOINT

    folder, model = run.config.output / CHECKPOINT, run.config.model
    if isinstance(model, ConvertedModelConfig):
        sources = {"conversion": str(model.start)}
    else:
        sources = {"vision encoder": model.vision.path, "language model": model.text.path}
    write_atomically(folder / PICTURE, lambda path: shutil.copyfile(picture, path))
    write_card(
        folder, run.setup.model.config, report=report, sources=sources, name=run.config.output.name
    )
