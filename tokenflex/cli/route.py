"""``tokenflex route``: train a checkpoint's router, and measure it on other data."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenflex.cli.common import data_config, device, quiet_libraries, saved_frame_sampling
from tokenflex.cli.options import ALLOW_OUTSIDE, counts_or_grids, positive
from tokenflex.cli.parser import CommandLine

if TYPE_CHECKING:
    from tokenflex.routing.grading import Grades
    from tokenflex.routing.router import Router

study: Callable[[Grades, Router], tuple[dict[str, Any], Callable[[Path], str]]] | None = None
"""Hook of ``experiments/routing``: measures a router. It returns entries of the router's report,
and a function that draws into the router's folder and returns a table."""


def add_to(commands: CommandLine) -> None:
    """Add the command and its arguments."""
    route = commands.add(
        "route",
        _route,
        "train a router that chooses the counts of a checkpoint, and measure it on other data",
        "tokenflex route --model runs/demo/checkpoint --data digits --counts 4,9,16",
        extra="train",
    )
    route.add_argument(
        "--model", type=Path, required=True, help="folder of a checkpoint or a conversion"
    )
    route.add_argument(
        "--data",
        required=True,
        help="a built-in task such as digits (its validation split), or data as of evaluate that "
        "the model has not seen",
    )
    route.add_argument(
        "--counts",
        type=counts_or_grids,
        required=True,
        help="of different numbers of tokens, for example 64,144,256 or 16,8x4,64",
    )
    route.add_argument(
        "--measure-on",
        help="a built-in task (its test split), or other data; needs a clone of the repository "
        "(default: that of --data, if it is a built-in task)",
    )
    route.add_argument(
        "--max-drop",
        type=float,
        default=0.01,
        help="share of right answers that the router may cost without a --penalty (0.01)",
    )
    route.add_argument("--image-folder", type=Path, help="folder of relative image paths")
    route.add_argument("--allow-outside", action="store_true", help=ALLOW_OUTSIDE)
    route.add_argument(
        "--size", type=positive, default=1024, help="samples of a built-in task (1024)"
    )
    route.add_argument("--batch-size", type=positive, default=64, help="samples per pass (64)")


def _route(options: argparse.Namespace) -> int:
    quiet_libraries()
    from tokenflex.locks import locked
    from tokenflex.routing.storage import check_router_folder

    folder = check_router_folder(options.model)  # before the work, not after it
    with locked(folder):
        return _route_into(options)


def _route_into(options: argparse.Namespace) -> int:
    from dataclasses import asdict

    from tokenflex.checkpoints import load_model
    from tokenflex.counts import tokens_of
    from tokenflex.evaluation.counts import labels_of
    from tokenflex.models.loading import check_length
    from tokenflex.routing.grading import grade
    from tokenflex.routing.router import check_counts
    from tokenflex.routing.storage import save_router
    from tokenflex.routing.training import check_largest_trained, train_router
    from tokenflex.terminal import progress_bar

    counts = check_counts(options.counts)
    if has_splits(options.data) and (options.image_folder or options.allow_outside):
        raise ValueError(f"--image-folder and --allow-outside do not fit --data {options.data}")
    if options.measure_on and study is None:
        raise ValueError(
            "--measure-on needs a clone of the repository, which has the study of the router"
        )
    measured = options.measure_on or (options.data if has_splits(options.data) else None)
    trained_on = _dataset(options.data, "validation", options)
    others = _dataset(measured, "test", options) if measured and study else None
    model, processor = load_model(options.model)
    check_length(model.config, tokens_of(counts[-1]))
    check_largest_trained(model, counts)
    model.to(device())
    samples = len(trained_on) + (0 if others is None else len(others))
    with progress_bar("grading", samples, unit="sample") as bar:
        batches = {"batch_size": options.batch_size, "on_samples": bar.update}
        router, report = train_router(
            model, processor, trained_on, counts, max_drop=options.max_drop, **batches
        )
        grades = None if others is None else grade(model, processor, others, counts, **batches)
    summary: dict[str, Any] = {"counts": labels_of(router.counts), **asdict(report)}
    draw = None
    if grades is not None and study is not None:
        entries, draw = study(grades, router)
        summary |= entries
    folder = save_router(router, options.model, summary)
    if draw is not None:
        print(draw(folder))
    print(
        f"{report.parameters} parameters, {report.grading_seconds:.0f} s of asking and "
        f"{report.fitting_seconds:.0f} s of fitting; on {report.held_out_samples} held-out "
        f"sample{'' if report.held_out_samples == 1 else 's'}, auto costs "
        f"{report.largest_accuracy - report.accuracy:.3f} ± {report.drop_error:.3f} of accuracy at "
        f"{report.tokens / report.largest_tokens:.0%} of the tokens"
    )
    if report.text_only_questions:
        print(
            "questions without an image, left out because no count applies to them: "
            f"{report.text_only_questions}"
        )
    if measured and study is None:
        print("no curve was measured: that needs a clone of the repository")
    print(f"the router is in {folder}")
    return 0


def has_splits(data: str) -> bool:
    """Return whether ``data`` names a built-in task, which has splits of any size."""
    from tokenflex.formats import FORMATS

    return data in FORMATS and {"split", "size"} <= {*FORMATS[data].keys}


def _dataset(data: str, split: str, options: argparse.Namespace) -> Any:
    """Open a built-in task in a split and size, or data at a path."""
    from tokenflex.training.build import build_dataset

    if has_splits(data):
        given = {"split": split, "size": options.size}
    else:
        given = {"image_folder": options.image_folder, "allow_outside": options.allow_outside}
    return build_dataset(data_config(data, given, saved_frame_sampling(options.model)))
