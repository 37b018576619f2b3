"""``tokenflex convert``: a stock model gets a token-adaptive projector; a Ristretto our layout."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tokenflex.cli.common import device, quiet_libraries
from tokenflex.cli.options import positive
from tokenflex.cli.parser import CommandLine

_OF_STOCK = ("images", "tokens", "init", "patch_merge", "max_images")
DEFAULT_TOKENS = "256"
MAX_IMAGES = 32
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
    convert.add_argument("source", type=Path, help="folder of the stock model or the checkpoint")
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
    convert.add_argument(
        "--system-message", help="first message of conversations, only from Ristretto"
    )


def _convert(options: argparse.Namespace) -> int:
    quiet_libraries()
    from tokenflex.checkpoints import is_conversion
    from tokenflex.files import checkpoint_folder, read_json
    from tokenflex.models.configuration import TokenFlexConfig
    from tokenflex.models.ristretto import MODEL_TYPE as RISTRETTO

    source = checkpoint_folder(options.source)
    if options.target.exists():
        raise FileExistsError(f"target folder {options.target} exists; name one that does not")
    if is_conversion(source):
        raise ValueError(f"{source} is a conversion already: all commands take it as it is")
    values = read_json(source / "config.json", "checkpoint file")
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind not in (RISTRETTO, TokenFlexConfig.model_type):
        return _convert_stock(options)
    for name in _OF_STOCK:
        if getattr(options, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} is for a stock model, got a {kind}")
    from tokenflex.models.conversion import convert

    layout = convert(source, options.target, system_message=options.system_message)
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
    pictures = []
    if options.images is not None:
        files = picture_files(options.images)[: options.max_images or MAX_IMAGES]
        pictures = [open_image(file) for file in files]
    report = convert_stock(
        options.source,
        options.target,
        num_image_tokens=parse_count(options.tokens or DEFAULT_TOKENS, name="--tokens"),
        images=pictures,
        patch_merge=options.patch_merge,
        device=device(),
        progress=_tell,
    )
    if report is None:
        print("the new projector has random weights: train it before you ask the model anything")
    else:
        print(in_words(report))
    print(f"{options.target} holds the model and its processor: every command takes it")
    return 0


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


def _tell(step: str) -> None:
    print(f"{step} ...", flush=True)
