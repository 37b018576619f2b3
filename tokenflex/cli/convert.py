"""``tokenflex convert``: a stock model gets a token-adaptive projector; a Ristretto our layout."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenflex.cli.common import data_config, device, quiet_libraries
from tokenflex.cli.options import counts_or_grids, positive
from tokenflex.cli.parser import CommandLine

if TYPE_CHECKING:
    from tokenflex.counts import TokenCount

_OF_DISTILLATION = (
    *("format", "image_folder", "counts", "max_prompts", "steps", "batch_size"),
    *("learning_rate", "max_new_tokens", "lora"),
)
_OF_STOCK = ("images", "tokens", "init", "patch_merge", "max_images", "distill", *_OF_DISTILLATION)
DEFAULT_TOKENS = "256"
MAX_IMAGES = 32
MAX_PROMPTS = 2000
FAR_OFF = 0.5
"""Relative error on unseen pictures from which a user is told so."""


def add_to(commands: CommandLine) -> None:
    """Add the command and its arguments."""
    convert = commands.add(
        "convert",
        _convert,
        "give a stock vision-language model a token-adaptive projector, fitted on pictures, so "
        "that all commands take it; or write a released Ristretto as a TokenFLEX checkpoint, or "
        "the reverse",
        "tokenflex convert models/llava models/llava-tokenflex --images photos",
    )
    convert.add_argument(
        "source",
        type=Path,
        help="the stock model or the checkpoint: a folder, or org/name on the Hugging Face Hub",
    )
    convert.add_argument("target", type=Path, help="folder to write, which must not exist")
    stock = convert.add_argument_group("only for a stock model")
    stock.add_argument(
        "--images",
        type=Path,
        help="folder of a few dozen pictures like those that the model will see, or one picture: "
        "the new projector is fitted on them to give the stock projector's tokens",
    )
    stock.add_argument(
        "--tokens",
        help="vision tokens per image where a call gives no count: a count or a grid of height x "
        f"width (default {DEFAULT_TOKENS})",
    )
    stock.add_argument(
        "--init",
        choices=("fit", "random"),
        help="fit: imitate the stock projector (default); random: needs no pictures, and answers "
        "nothing before it is trained",
    )
    stock.add_argument(
        "--patch-merge",
        type=positive,
        help="concatenate so many by so many patches before they are pooled (default: as the stock "
        "projector does)",
    )
    stock.add_argument(
        "--max-images",
        type=positive,
        help=f"pictures to fit on, the first by name (default {MAX_IMAGES}); each needs memory",
    )
    stock.add_argument(
        "--distill",
        metavar="DATA",
        help="then train the projector, at counts drawn for each sample, to give the stock model's "
        "own answers to the questions of this data, in any format that evaluate takes",
    )
    _add_distillation(convert.add_argument_group("only with --distill"))
    convert.add_argument(
        "--system-message", help="first message of conversations, only from Ristretto"
    )


def _add_distillation(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--format", help="format of the data; detected by default")
    group.add_argument(
        "--image-folder", type=Path, help="folder that the data's image paths are relative to"
    )
    group.add_argument(
        "--counts",
        type=counts_or_grids,
        help="counts to draw from, with equal odds, for example 64,144,256 (default: --tokens, "
        "9/16 and 1/4 of it, at odds 5:3:2)",
    )
    group.add_argument(
        "--max-prompts", type=positive, help=f"most questions to learn from ({MAX_PROMPTS})"
    )
    group.add_argument("--steps", type=positive, help="optimiser steps (1000)")
    group.add_argument("--batch-size", type=positive, help="questions a step (8)")
    group.add_argument("--learning-rate", type=float, help="highest learning rate (0.001)")
    group.add_argument(
        "--max-new-tokens", type=positive, help="longest answer of the stock model (64)"
    )
    group.add_argument(
        "--lora",
        type=positive,
        metavar="RANK",
        help="also train low-rank adapters of the language model, which are merged into its "
        "weights at the end (needs peft)",
    )


def _convert(options: argparse.Namespace) -> int:
    quiet_libraries()
    from tokenflex.hub import checkpoint_config, local_checkpoint
    from tokenflex.models.configuration import TokenFlexConfig
    from tokenflex.models.loading import is_conversion_config
    from tokenflex.models.ristretto import MODEL_TYPE as RISTRETTO

    source = options.source
    if options.target.exists():
        raise FileExistsError(f"target folder {options.target} exists; name one that does not")
    values = checkpoint_config(source)
    if is_conversion_config(values):
        raise ValueError(f"{source} is a conversion already: all commands take it as it is")
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind not in (RISTRETTO, TokenFlexConfig.model_type):
        return _convert_stock(options)
    for name in _OF_STOCK:
        if getattr(options, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} is for a stock model, got a {kind}")
    from tokenflex.models.conversion import convert

    layout = convert(
        local_checkpoint(source), options.target, system_message=options.system_message
    )
    print(f"{options.target} holds the checkpoint in the layout of {layout}")
    return 0


def _convert_stock(options: argparse.Namespace) -> int:
    from tokenflex.counts import parse_count
    from tokenflex.dropin.conversion import convert_stock
    from tokenflex.images import open_image

    if options.system_message is not None:
        raise ValueError("--system-message is for a released Ristretto, got a stock model")
    init = options.init or "fit"
    if init == "random" and options.images is not None:
        raise ValueError("--images are to fit on: give none with --init random")
    if init == "fit" and options.images is None:
        raise ValueError(
            "--images must name a folder of pictures to fit the new projector on (or give --init "
            "random and train it)"
        )
    if options.distill is None:
        for name in _OF_DISTILLATION:
            if getattr(options, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} is for --distill, which is not given")
    train = None if options.distill is None else _distillation(options)
    pictures = []
    if options.images is not None:
        files = picture_files(options.images)[: options.max_images or MAX_IMAGES]
        pictures = [open_image(file) for file in files]
    count = parse_count(options.tokens or DEFAULT_TOKENS, name="--tokens")
    report = convert_stock(
        options.source,
        options.target,
        num_image_tokens=count,
        images=pictures,
        patch_merge=options.patch_merge,
        device=device(),
        train=train,
        progress=_tell,
    )
    if report is None and train is None:
        print("the new projector has random weights: train it before you ask the model anything")
    elif report is not None:
        print(in_words(report))
        print(counts_in_words(report, count))
    print(f"{options.target} holds the model and its processor: every command takes it")
    return 0


def _distillation(options: argparse.Namespace) -> Callable[[Any, Any], Any]:
    """Read the data, and return what :func:`convert_stock` calls to train a conversion."""
    from tokenflex.counts import TokenCounts
    from tokenflex.dropin.samples import PromptsOf
    from tokenflex.training.adapters import check_peft
    from tokenflex.training.build import build_dataset

    if options.lora is not None:
        check_peft("--lora")
    given = {"image_folder": options.image_folder}
    dataset = build_dataset(data_config(options.distill, given, name=options.format))
    samples = PromptsOf(dataset, options.max_prompts or MAX_PROMPTS)
    if len(samples) < 2:
        raise ValueError(
            f"--distill needs data with at least 2 questions about images, got {len(samples)}"
        )
    counts = options.counts and TokenCounts(tuple(options.counts), (1.0,) * len(options.counts))
    given = {
        name: getattr(options, name)
        for name in ("steps", "batch_size", "learning_rate", "max_new_tokens")
        if getattr(options, name) is not None
    }

    def train(model: Any, processor: Any) -> Any:
        from tokenflex.dropin import distill
        from tokenflex.terminal import progress_of_parts

        _tell(f"answering {len(samples)} questions with the stock model, and learning its answers")
        trained = model if options.lora is None else _with_adapters(model, options.lora)
        with progress_of_parts("") as on_progress:
            report = distill(
                trained, processor, samples, counts=counts, on_progress=on_progress, **given
            )
        print(agreement_table(report))
        return model if options.lora is None else trained.merge_and_unload()

    return train


def _with_adapters(model: Any, rank: int) -> Any:
    from peft import get_peft_model

    from tokenflex.dropin import projector_name
    from tokenflex.training.adapters import linear_layers, lora_config

    layers = linear_layers(
        model, [model.base_model.get_decoder()], head=model.get_output_embeddings()
    )
    return get_peft_model(
        model, lora_config([*layers], r=rank, modules_to_save=[projector_name(model)])
    )


def agreement_table(report: Any) -> str:
    """Return what a :class:`tokenflex.dropin.DistillationReport` says, a line for each count."""
    from tokenflex.terminal import text_table

    rows = [["tokens", "same answers", "same words", "KL of a word, nats"]]
    for count, after in report.after.items():
        before = report.before[count]
        name = "x".join(map(str, count)) if isinstance(count, tuple) else str(count)
        rows.append(
            [
                name,
                f"{before.answers:>10.1%} -> {after.answers:>8.1%}",
                f"{before.tokens:>10.1%} -> {after.tokens:>8.1%}",
                f"{before.divergence:>10.3f} -> {after.divergence:>8.3f}",
            ]
        )
    return (
        f"agreement with the stock model on {report.held_out} questions that were not trained on "
        f"({report.trained_on} were):\n{text_table(rows, left=0, widths=(8, 22, 22, 22))}"
    )


def picture_files(path: Path) -> list[Path]:
    """Return the pictures of a folder and those below it, by name; or the one at a path.

    Raises:
        FileNotFoundError: Nothing exists at the path.
        ValueError: The folder holds no file with the name of a picture.
    """
    from PIL import Image

    if not path.exists():
        raise FileNotFoundError(f"--images {path} does not exist")
    if path.is_file():
        return [path]
    suffixes = Image.registered_extensions()
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in suffixes)
    if not files:
        raise ValueError(f"--images {path} holds no pictures, such as .png or .jpg")
    return files


def in_words(report: Any) -> str:
    """Return what a :class:`tokenflex.dropin.FitReport` says."""
    lines = [
        f"the new projector's tokens differ from the stock projector's by {report.after:.1%} of "
        f"their size on these pictures ({report.tokens} tokens; {report.before:.1%} before)"
    ]
    if report.held_out is not None:
        lines.append(f"on pictures that it was not fitted on, they differ by {report.held_out:.1%}")
        if report.held_out > FAR_OFF:
            lines.append("that is far off: give more pictures, or train the projector")
    else:
        lines.append("give two pictures or more to know the error on pictures it has not seen")
    return "\n".join(lines)


def counts_in_words(report: Any, count: TokenCount) -> str:
    """Return how a default count compares with the stock model's tokens and the patches."""
    from tokenflex.counts import tokens_of

    asked, stock, patches = tokens_of(count), prod(report.stock_grid), prod(report.patch_grid)
    line = (
        f"vision tokens of an image, if a call gives no count: {asked} (the stock model's: {stock})"
    )
    if asked <= patches:
        return line
    height, width = report.patch_grid
    return (
        f"{line}\nthat is more than the {height} x {width} patches of the encoder, which are "
        f"repeated: convert with --tokens {min(report.patch_grid) ** 2}, or give fewer in each call"
    )


def _tell(step: str) -> None:
    from tokenflex.terminal import say

    say(f"{step} ...")
