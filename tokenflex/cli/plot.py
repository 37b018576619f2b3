"""``tokenflex plot``: the pictures of a run, drawn again."""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenflex.cli.parser import CommandLine


def add_to(commands: CommandLine) -> None:
    """The command and its arguments."""
    plot = commands.add(
        "plot",
        _plot,
        "draw a run's curves, finished or still going, and its report if there is one",
        "tokenflex plot runs/demo",
    )
    plot.add_argument("run_folder", type=Path, metavar="RUN", help="the output folder of a run")


def _plot(options: argparse.Namespace) -> int:
    from tokenflex.files import read_json
    from tokenflex.plots import plot_accuracy
    from tokenflex.training.curves import plot_curves

    path = options.run_folder / "report.json"
    if (options.run_folder / "metrics.jsonl").is_file():
        print(plot_curves(options.run_folder))
        if not path.is_file():  # a run that is still going, or evaluates nothing
            return 0
    if not path.is_file():
        raise FileNotFoundError(f"report file {path} does not exist, nor metrics.jsonl beside it")
    report = read_json(path, "report file")
    plot_accuracy(report, options.run_folder / "accuracy.png")
    print(options.run_folder / "accuracy.png")
    return 0
