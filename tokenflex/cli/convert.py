"""``tokenflex convert``: checkpoints from and to the layout of the released model."""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenflex.cli.common import quiet_libraries
from tokenflex.cli.parser import CommandLine


def add_to(commands: CommandLine) -> None:
    """Add the command and its arguments."""
    convert = commands.add(
        "convert",
        _convert,
        "write a released Ristretto checkpoint as a TokenFLEX one, or the reverse",
        "tokenflex convert models/Ristretto-3B models/ristretto-tokenflex",
    )
    convert.add_argument("source", type=Path, help="checkpoint folder, in either layout")
    convert.add_argument("target", type=Path, help="folder to write, which must not exist")
    convert.add_argument(
        "--system-message", help="first message of conversations, only from Ristretto"
    )


def _convert(options: argparse.Namespace) -> int:
    quiet_libraries()
    from tokenflex.models.conversion import convert

    layout = convert(options.source, options.target, system_message=options.system_message)
    print(f"{options.target} holds the checkpoint in the layout of {layout}")
    return 0
