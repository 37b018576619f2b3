"""``tokenflex init``: write a training configuration for an encoder, a language model and data."""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenflex.cli.common import data_config, quiet_libraries
from tokenflex.cli.options import ALLOW_OUTSIDE
from tokenflex.cli.parser import CommandLine


def add_to(commands: CommandLine) -> None:
    """Add the command and its arguments."""
    init = commands.add(
        "init",
        _init,
        "write a commented configuration that trains a model of your parts on your data",
        "tokenflex init --vision models/siglip --text models/qwen --data d.jsonl",
        extra="train",
    )
    init.add_argument(
        "--vision", required=True, help="folder or hub name of a vision encoder of transformers"
    )
    init.add_argument(
        "--text", required=True, help="folder or hub name of a language model of transformers"
    )
    init.add_argument(
        "--data",
        required=True,
        help="a file of messages or LLaVA records, tars, or the folder of a Hugging Face data set",
    )
    init.add_argument("--format", help="format of the data (default: detected)")
    init.add_argument("--image-folder", type=Path, help="folder of relative image paths")
    init.add_argument("--allow-outside", action="store_true", help=ALLOW_OUTSIDE)
    init.add_argument(
        "--config", type=Path, default=Path("train.yaml"), help="file to write (train.yaml)"
    )
    init.add_argument(
        "--output", type=Path, help="folder of the run (default: runs/ and the file's name)"
    )


def _init(options: argparse.Namespace) -> int:
    if options.config.exists():
        raise ValueError(f"--config {options.config} exists; give another file, or delete it")
    quiet_libraries()
    from tokenflex.files import write_text
    from tokenflex.formats import FORMATS
    from tokenflex.training.starter import starting_config

    if options.data in FORMATS:
        raise ValueError(f"--data must be a path, got the name of a format, {options.data!r}")

    given = {"image_folder": options.image_folder, "allow_outside": options.allow_outside}
    data = data_config(options.data, given, name=options.format)
    output = options.output or Path("runs") / options.config.stem
    start = starting_config(options.vision, options.text, data, output)
    options.config.parent.mkdir(parents=True, exist_ok=True)
    write_text(options.config, start.text)
    if start.broken:
        number = _number(len(start.broken), "sample")
        print(f"{number} cannot be read; the first: {start.broken[0].reason}")
    print(
        f"{options.config} is written; read it, then\n"
        f"  tokenflex train {options.config} --dry-run  # what each stage trains and costs\n"
        f"  tokenflex train {options.config}    # into {output}; continues when stopped"
    )
    if start.has_few_steps:
        print(
            f"One pass through {_number(start.samples, 'sample')} is "
            f"{_number(start.steps, 'step')} a stage, few for a projector that begins with random "
            "weights; for more:\n  --set stages.0.steps=500 --set stages.1.steps=500"
        )
    return 0


def _number(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"
