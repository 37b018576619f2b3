"""``tokenflex ablate``: compare ways of training on one budget."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tokenflex.cli.common import quiet_libraries
from tokenflex.cli.options import positive
from tokenflex.cli.parser import CommandLine


def add_to(commands: CommandLine) -> None:
    """Add the command and its arguments."""
    ablate = commands.add(
        "ablate",
        _ablate,
        "train models at fixed and stochastic counts on one budget and report their accuracy at "
        "every count; continues after an interruption",
        "tokenflex ablate --output runs/ablate",
        extra="train",
    )
    scale = ablate.add_mutually_exclusive_group()
    scale.add_argument(
        "--scale",
        choices=("small", "large"),
        default="small",
        help="small: 32 px canvases, counts 4, 9, 16, on two CPU cores (the default); "
        "large: 64 px canvases, counts 16, 36, 64, for a GPU",
    )
    scale.add_argument(
        "--quick",
        action="store_const",
        dest="scale",
        const="quick",
        help="one seed of a few regimes of the suite paper or limited; exit code 1 if a check of "
        "their accuracies fails",
    )
    ablate.add_argument(
        "--task",
        choices=("digits", "reading"),
        default="digits",
        help="digits (the default) or reading: pages, tables and charts, counts 16, 36, 64",
    )
    ablate.add_argument(
        "--suite",
        default="paper",
        help="paper: fixed and stochastic counts (the default); gap: one model beside "
        "specialists; unseen: accuracy at counts that were not trained; extremes: the same, far "
        "from those, into runs/ablate-extremes; limited: one model beside specialists by size of "
        "the training data and steps, into runs/ablate-limited",
    )
    ablate.add_argument("--seeds", type=positive, help="number of seeds; small 3, large 1, quick 1")
    ablate.add_argument(
        "--output", type=Path, help="folder (default: runs/ablate, -large, -quick, -reading)"
    )
    ablate.add_argument(
        "--jobs", type=positive, help="parallel runs (default: one per core, one on a GPU)"
    )


_SCALE_OPTIONS = {"large": "scale large", "quick": "quick"}


def _ablate(options: argparse.Namespace) -> int:
    quiet_libraries()
    from experiments.ablation.checks import QUICK_CHECKS
    from experiments.ablation.run import ablate
    from experiments.ablation.scales import SCALES
    from experiments.ablation.tables import accuracy_table

    if options.task == "reading":
        if options.scale != "small":
            raise ValueError(
                f"--task reading has one scale, got it with --{_SCALE_OPTIONS[options.scale]}"
            )
        options.scale = "reading"
    elif options.suite in ("extremes", "limited") and options.scale == "small":
        options.scale = options.suite
    if options.output is None:
        suffix = "" if options.scale == "small" else f"-{options.scale}"
        options.output = Path(f"runs/ablate{suffix}")
    checks = None
    if options.scale == "quick":
        if options.suite not in QUICK_CHECKS:
            raise ValueError(
                f"--quick is of the suites {' and '.join(QUICK_CHECKS)}, got it with --suite "
                f"{options.suite}"
            )
        scale, checks = QUICK_CHECKS[options.suite]
    else:
        scale = SCALES[options.scale]
    options.resumable = options.output
    report = ablate(
        scale,
        options.output,
        suite=options.suite,
        seeds=options.seeds,
        at_once=options.jobs,
    )
    print(accuracy_table(report))
    page = "report.md" if options.suite == "paper" else f"{options.suite}.md"
    print(f"\nthe whole report is {options.output / page}")
    failed = False
    for check in checks(report) if checks else ():
        print(check, file=sys.stdout if check.holds else sys.stderr)
        failed = failed or not check.holds
    return 1 if failed else 0
