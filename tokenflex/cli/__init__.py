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
        if options.debug or _is_ours(error):
            raise
        trains = ("train", "evaluate", "ablate", "route", "plot")
        extra = "train" if options.command in trains else "hf"
        return _fail(f"{options.command} needs {error.name}; pip install 'tokenflex[{extra}]'")
    except Exception as error:
        reason = _what_to_mend(error)
        if options.debug or reason is None:  # a fault of the program: its traceback, exit code 1
            raise
        return _fail(reason)


_NO_DEVICE = (
    "No CUDA GPUs are available",
    "Found no NVIDIA driver",
    "CUDA driver version is insufficient",
    "Torch not compiled with CUDA enabled",
)


def _what_to_mend(error: Exception) -> str | None:
    """Return the line for an error that a user can mend; None for a fault of the program.

    The second kind includes TypeError, and RuntimeError but for our own and those of PyTorch that
    are about the machine.
    """
    from tokenflex.errors import ReportedError

    message = " ".join(str(error).split())
    if isinstance(error, ImportError):
        return None if _is_ours(error) else message
    if isinstance(error, (ValueError, OSError, ReportedError)):
        return message
    if _is_out_of_memory(error):
        return (
            "out of memory: less of it is needed with fewer tokens, tiles or samples at a time "
            f"({message or type(error).__name__})"
        )
    if any(words in message for words in _NO_DEVICE):
        return message
    return None


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def _is_ours(error: ImportError) -> bool:
    """Return whether a module of this package is missing, or a name in one."""
    return (error.name or "").partition(".")[0] in ("tokenflex", "tokenflex_kernels")


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
