"""``tokenflex evaluate``: accuracy of a checkpoint at every count, on any data."""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenflex.cli.common import data_config, device, quiet_libraries, saved_frame_sampling
from tokenflex.cli.options import (
    ALLOW_OUTSIDE,
    counts_grids_or_auto,
    non_negative,
    positive,
)
from tokenflex.cli.parser import CommandLine

_DEFAULTS = {"size": 1024, "split": "test"}


def add_to(commands: CommandLine) -> None:
    """Add the command and its arguments."""
    evaluate = commands.add(
        "evaluate",
        _evaluate,
        "measure a checkpoint's accuracy at every count: a table, with --output a page and a plot",
        "tokenflex evaluate runs/demo/checkpoint --data digits --counts 4,9,2x6,16",
        extra="train",
    )
    evaluate.add_argument(
        "model",
        type=Path,
        nargs="?",
        metavar="MODEL",
        help="a checkpoint or a conversion: a folder, or org/name on the Hugging Face Hub",
    )
    evaluate.add_argument("--model", type=Path, dest="model_option", help="as MODEL")
    evaluate.add_argument(
        "--data",
        required=True,
        help="'digits', 'moving', 'reading', a file of messages or LLaVA records (JSONL or a JSON "
        "list), or the folder of a Hugging Face data set",
    )
    evaluate.add_argument("--format", help="format of the data (default: detected)")
    evaluate.add_argument(
        "--counts",
        type=counts_grids_or_auto,
        required=True,
        help="counts, grids of height x width, or auto (chosen per image): 64,144,12x16,auto",
    )
    evaluate.add_argument(
        "--penalty",
        type=float,
        help="with auto: share of right answers given up to save all tokens (default: the "
        "router's)",
    )
    evaluate.add_argument(
        "--score",
        default="forced",
        help="forced: the exact answer, without generating it (default); exact: the generated "
        "answer up to case and punctuation; choice: its option letter; contains: the answer in it",
    )
    evaluate.add_argument(
        "--baselines",
        action="store_true",
        help="also show smaller pictures, and strided, random and averaged tokens of the largest "
        "count, at every smaller one",
    )
    evaluate.add_argument(
        "--split", help="of digits, moving, reading or a Hugging Face data set (test)"
    )
    evaluate.add_argument(
        "--layouts",
        type=lambda text: tuple(text.split(",")),
        help="layouts of --data reading, such as wide,tall (default: all)",
    )
    evaluate.add_argument("--image-folder", type=Path, help="folder of relative image paths")
    evaluate.add_argument(
        "--max-frames",
        type=positive,
        help="the most frames of a video that are shown (default: the processor's)",
    )
    evaluate.add_argument(
        "--fps", type=float, help="frames per second of a video (default: the processor's)"
    )
    evaluate.add_argument("--allow-outside", action="store_true", help=ALLOW_OUTSIDE)
    evaluate.add_argument(
        "--max-broken-samples",
        type=non_negative,
        default=100,
        metavar="NUMBER",
        help="largest number of unreadable samples, which are left out and named (100)",
    )
    evaluate.add_argument(
        "--size",
        type=positive,
        help="number of canvases, clips or pages, with --data digits, moving or reading (1024)",
    )
    evaluate.add_argument(
        "--batch-size", type=positive, default=64, help="samples per forward pass (64)"
    )
    evaluate.add_argument("--workers", type=int, default=0, help="processes that read images (0)")
    evaluate.add_argument("--max-tiles", type=positive, help="largest number of tiles of an image")
    evaluate.add_argument(
        "--max-new-tokens", type=positive, default=64, help="length of an answer (64)"
    )
    evaluate.add_argument(
        "--output",
        type=Path,
        help="folder for report.json, report.md and accuracy.png (and baselines.png)",
    )


def _evaluate(options: argparse.Namespace) -> int:
    quiet_libraries()
    from tokenflex.evaluation.report import check_output
    from tokenflex.locks import locked
    from tokenflex.training.output import is_run

    output = options.output
    if output is None:
        return _evaluate_into(options)
    if is_run(output):
        raise ValueError(f"--output {output} is the folder of a training run; give another one")
    check_output(output)  # before the work, not after it
    if output.suffix == ".json":
        output.parent.mkdir(parents=True, exist_ok=True)
        return _evaluate_into(options)
    output.mkdir(parents=True, exist_ok=True)
    with locked(output):
        return _evaluate_into(options)


def _evaluate_into(options: argparse.Namespace) -> int:
    from tokenflex.checkpoints import load_model
    from tokenflex.counts import tokens_of
    from tokenflex.data.faults import BrokenSample, broken_records, check_broken, warn_of_broken
    from tokenflex.evaluation import evaluate
    from tokenflex.evaluation.baselines import METHODS, baseline_counts
    from tokenflex.evaluation.report import format_table, write_report
    from tokenflex.evaluation.scoring import SCORES
    from tokenflex.hub import local_checkpoint
    from tokenflex.models.loading import check_length
    from tokenflex.routing.selector import resolve_count
    from tokenflex.terminal import progress_bar
    from tokenflex.training.build import build_dataset

    if options.score not in SCORES:
        raise ValueError(f"--score must be one of {', '.join(SCORES)}, got {options.score!r}")
    checkpoint = _checkpoint_of(options)
    if options.penalty is not None and not any(isinstance(n, str) for n in options.counts):
        raise ValueError(f"--penalty is for the count auto, got it with {options.counts}")
    folder = local_checkpoint(checkpoint)
    counts = [resolve_count(count, folder, options.penalty) for count in options.counts]
    runs = len(counts)
    if options.baselines:
        runs += len(METHODS) * len(baseline_counts(counts)[0])
    keys = (*_DEFAULTS, "layouts", "image_folder", "allow_outside", "max_frames", "fps")
    given = {key: getattr(options, key) for key in keys}
    defaults = {**_DEFAULTS, **saved_frame_sampling(folder)}
    dataset = build_dataset(data_config(options.data, given, defaults, options.format))
    if len(known := broken_records(dataset)) > options.max_broken_samples:
        warn_of_broken(known)
    check_broken(known, options.max_broken_samples)
    model, processor = load_model(folder)
    for count in options.counts:
        if not isinstance(count, str):
            check_length(model.config, tokens_of(count))
    model.to(device())
    batches = -(len(dataset) // -options.batch_size) * runs
    with progress_bar("evaluation", batches, unit="batch") as bar:
        report = evaluate(
            model,
            processor,
            dataset,
            counts,
            score=options.score,
            batch_size=options.batch_size,
            workers=options.workers,
            max_tiles=options.max_tiles,
            max_new_tokens=options.max_new_tokens,
            max_broken_samples=options.max_broken_samples,
            baselines=options.baselines,
            on_batch=bar.update,
        )
    warn_of_broken([BrokenSample(**sample) for sample in report.get("broken_samples", [])])
    print(format_table(report))
    title = f"{checkpoint.absolute().name} on {Path(options.data).name}"
    if options.penalty is not None:
        report["penalty"] = options.penalty
        title += f", auto at a penalty of {options.penalty:g}"
    if options.output is not None:
        write_report(options.output, report, title)
    return 0


def _checkpoint_of(options: argparse.Namespace) -> Path:
    if (options.model is None) == (options.model_option is None):
        given = "none" if options.model is None else "both"
        raise ValueError(f"give one checkpoint, as MODEL or with --model, got {given}")
    return options.model or options.model_option
