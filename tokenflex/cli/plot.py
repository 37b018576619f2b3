"""``tokenflex plot``: curves and accuracy of a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenflex.cli.parser import CommandLine


def add_to(commands: CommandLine) -> None:
    """Add the command and its arguments."""
    plot = commands.add(
        "plot",
        _plot,
        "draw the curves of a finished or running run, and its accuracy if it has a report",
        "tokenflex plot runs/demo",
        extra="train",
    )
    plot.add_argument("run_folder", type=Path, metavar="RUN", help="output folder of the run")


def _plot(options: argparse.Namespace) -> int:
    from tokenflex.files import read_json
    from tokenflex.plots import plot_accuracy, plot_baselines
    from tokenflex.training.curves import plot_curves

    path = options.run_folder / "report.json"
    if (options.run_folder / "metrics.jsonl").is_file():
        print(plot_curves(options.run_folder))
        if not path.is_file():  # a running run, or one without an evaluation
            return 0
    if not path.is_file():
        raise FileNotFoundError(f"report file {path} does not exist, nor metrics.jsonl beside it")
    report = read_json(path, "report file")
    plot_accuracy(report, options.run_folder / "accuracy.png")
    print(options.run_folder / "accuracy.png")
    if "baselines" in report:
        plot_baselines(report, options.run_folder / "baselines.png")
        print(options.run_folder / "baselines.png")
    return 0
