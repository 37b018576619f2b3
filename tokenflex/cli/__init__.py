"""The command line: ``tokenflex info``, ``train``, ``evaluate``, ``ablate``, ``route`` and others.

A command is a file: its arguments, then what it does. Its imports are its own, so that
``tokenflex info`` works with the core alone.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from tokenflex.cli import (
    ablate,
    convert,
    evaluate,
    generate,
    harness,
    info,
    plot,
    route,
    train,
)
from tokenflex.cli.parser import USER_ERROR, CommandLine

COMMANDS = (info, train, evaluate, harness, route, generate, convert, ablate, plot)  # as in --help


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code, 2 for anything the user can mend."""
    line = CommandLine()
    for command in COMMANDS:
        command.add_to(line)
    options = line.parser.parse_args(arguments)
    try:
        return options.run(options)
    except KeyboardInterrupt:
        if options.debug:
            raise
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the impatient: we are on our way out
        return _fail("interrupted" + _how_to_continue(options))
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ModuleNotFoundError as error:
        if options.debug or (error.name or "").startswith("tokenflex"):
            raise
        trains = ("train", "evaluate", "ablate", "route", "plot")
        extra = "train" if options.command in trains else "hf"
        return _fail(f"{options.command} needs {error.name}; pip install 'tokenflex[{extra}]'")
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        if options.debug:
            raise
        return _fail(" ".join(str(error).split()))


def _fail(message: str) -> int:
    print(f"tokenflex: {message}", file=sys.stderr)
    return USER_ERROR


def _how_to_continue(options: argparse.Namespace) -> str:
    if options.command == "ablate":
        return f"; the same command continues from what is in {options.output}"
    output = getattr(options, "running_output", None)
    if output is None or not (output / "state.pt").exists():
        return ""
    return f"; {output / 'state.pt'} is whole: the same command continues from it"
