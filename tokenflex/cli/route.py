"""``tokenflex route``: a checkpoint's router, trained and measured."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tokenflex.cli.common import device, quiet_libraries
from tokenflex.cli.options import ALLOW_OUTSIDE, counts_or_grids, positive
from tokenflex.cli.parser import CommandLine


def add_to(commands: CommandLine) -> None:
    """The command and its arguments."""
    route = commands.add(
        "route",
        _route,
        "make a checkpoint choose its own counts: train its router, and measure it on other data",
        "tokenflex route --model runs/demo/checkpoint --data digits --counts 4,9,16",
    )
    route.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    route.add_argument(
        "--data",
        required=True,
        help="'digits' (validation split), or data as evaluate takes it, unseen by the model",
    )
    route.add_argument(
        "--counts", type=counts_or_grids, required=True, help="for example 64,144,256"
    )
    route.add_argument(
        "--measure-on",
        help="'digits' (test split), or other data; for digits, digits if not given",
    )
    route.add_argument(
        "--max-drop",
        type=float,
        default=0.01,
        help="share of right answers that auto may cost where no penalty is named (0.01)",
    )
    route.add_argument("--image-folder", type=Path, help="what image paths are relative to")
    route.add_argument("--allow-outside", action="store_true", help=ALLOW_OUTSIDE)
    route.add_argument("--size", type=positive, default=1024, help="canvases of digits (1024)")
    route.add_argument("--batch-size", type=positive, default=64, help="samples a pass")


def _route(options: argparse.Namespace) -> int:
    quiet_libraries()
    from tokenflex.locks import locked
    from tokenflex.routing.storage import FOLDER, check_router_folder

    if not options.model.is_dir():
        raise FileNotFoundError(f"checkpoint folder {options.model} does not exist")
    check_router_folder(options.model)  # before the work, not after it
    with locked(options.model / FOLDER):
        return _route_into(options)


def _route_into(options: argparse.Namespace) -> int:
    from dataclasses import asdict

    from tqdm import tqdm

    from tokenflex.models.loading import check_length, load_checkpoint
    from tokenflex.routing.curve import as_rows, format_curve, selection_curve
    from tokenflex.routing.grading import grade
    from tokenflex.routing.router import check_counts
    from tokenflex.routing.storage import CURVE, save_router
    from tokenflex.routing.training import train_router

    counts = check_counts(options.counts)
    if options.data == "digits" and (options.image_folder or options.allow_outside):
        raise ValueError("--image-folder and --allow-outside do not fit --data digits")
    measured = options.measure_on or ("digits" if options.data == "digits" else None)
    asked = _dataset(options.data, "validation", options)
    others = None if measured is None else _dataset(measured, "test", options)
    model, processor = load_checkpoint(options.model)
    check_length(model.config, max(counts))
    model.to(device())
    samples = len(asked) + (0 if others is None else len(others))
    with tqdm(total=samples, desc="asking", unit="sample", dynamic_ncols=True) as bar:
        router, report = train_router(
            model,
            processor,
            asked,
            counts,
            max_drop=options.max_drop,
            batch_size=options.batch_size,
            on_samples=bar.update,
        )
        grades = None
        if others is not None:
            grades = grade(
                model,
                processor,
                others,
                counts,
                batch_size=options.batch_size,
                on_samples=bar.update,
            )
    summary: dict[str, Any] = {"counts": list(router.counts), **asdict(report)}
    if grades is not None:
        points = selection_curve(grades, router)
        summary["curve"] = as_rows(points)
    folder = save_router(router, options.model, summary)
    if grades is not None:
        from tokenflex.plots import plot_selection

        plot_selection(points, folder / CURVE)
        print(format_curve(points))
    print(
        f"{report.parameters} parameters, {report.grading_seconds:.0f} s of asking and "
        f"{report.fitting_seconds:.0f} s of fitting; held out, auto costs "
        f"{report.largest_accuracy - report.accuracy:.3f} of accuracy at "
        f"{report.tokens / report.largest_tokens:.0%} of the tokens"
    )
    print(f"the router is in {folder}")
    return 0


def _dataset(data: str, digits_split: str, options: argparse.Namespace) -> Any:
    """'digits' in a split and size, or what evaluation reads, too."""
    from tokenflex.formats import detect_format
    from tokenflex.training.build import build_dataset
    from tokenflex.training.data_config import DataConfig

    if data == "digits":
        return build_dataset(DataConfig(name="digits", split=digits_split, size=options.size))
    values: dict[str, Any] = {"name": detect_format(data), "path": Path(data)}
    if options.image_folder is not None:
        values |= {"image_folder": options.image_folder}
    return build_dataset(DataConfig(**values, allow_outside=options.allow_outside))
