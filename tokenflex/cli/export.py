"""``tokenflex export``: a model for other runtimes, or its language model alone."""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenflex.cli.common import quiet_libraries
from tokenflex.cli.options import counts_or_grids
from tokenflex.cli.parser import CommandLine
from tokenflex.serving.export.targets import LANGUAGE_MODEL, TARGETS


def add_to(commands: CommandLine) -> None:
    """Add the command and its arguments."""
    export = commands.add(
        "export",
        _export,
        "write a model as graphs for other runtimes, or its language model alone, and print the "
        "largest difference to the model",
        "tokenflex export runs/demo/checkpoint --to onnx --counts 4,9,16 --output runs/demo/onnx",
        extra="export",
    )
    export.add_argument(
        "model",
        type=Path,
        metavar="MODEL",
        help="a checkpoint or a conversion: a folder, or org/name on the Hugging Face Hub",
    )
    export.add_argument(
        "--to",
        required=True,
        choices=[*TARGETS, LANGUAGE_MODEL],
        metavar="TARGET",
        help="onnx, pt2 (torch.export) and openvino: graphs of the encoder, a projector for each "
        "count, the embedding and the language model. language-model: a checkpoint of "
        "transformers, for servers that take prompt_embeds (not of a model with image_positions: "
        "shared, such as the demo)",
    )
    export.add_argument(
        "--counts",
        type=counts_or_grids,
        help="vision tokens per tile: counts or grids of height x width, for example 64,144,12x16 "
        "(default: those the model was trained with); no part of a language model",
    )
    export.add_argument("--output", type=Path, required=True, help="folder, which must not exist")


def _export(options: argparse.Namespace) -> int:
    quiet_libraries()
    from tokenflex.serving.export.run import export
    from tokenflex.terminal import say

    export(options.model, options.output, options.to, options.counts, report=say)
    print(f"{options.output} holds the export")
    return 0
