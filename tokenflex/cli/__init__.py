"""The command line: ``tokenflex info``, ``train``, ``evaluate``, ``route`` and others.

A command is a module of this package with a function ``add_to``, which adds the command and its
arguments. Such a module imports what the command needs inside of its functions, so that
``tokenflex --help`` is quick and ``tokenflex info`` works with the core alone.

A clone of the repository has more commands: modules ``command`` of the packages in
``experiments/``.
"""

from __future__ import annotations

import argparse
import os
import pkgutil
import signal
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

from tokenflex.cli.extras import install_hint
from tokenflex.cli.parser import USER_ERROR, CommandLine

REPOSITORY = Path(__file__).parents[2]
REPOSITORY_COMMANDS = ("ablate",)
"""Commands of ``experiments/``, which the installed package lacks."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code, 2 for anything that the user can mend."""
    words = [*(sys.argv[1:] if arguments is None else arguments)]
    line = CommandLine()
    for module in command_modules():
        module.add_to(line)
    command = next((word for word in words if not word.startswith("-")), None)
    if command in REPOSITORY_COMMANDS and command not in line.names:
        return _fail(
            f"{command} needs a clone of the repository, because the installed package does not "
            f"include experiments: run `python -m tokenflex {command}` in the clone"
        )
    options = line.parser.parse_args(words)
    try:
        return options.run(options)
    except KeyboardInterrupt:
        if options.debug:
            raise
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would only break the exit
        return _fail("interrupted" + _how_to_continue(options))
    except BrokenPipeError:  # the reader of the output has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ModuleNotFoundError as error:
        if options.debug or _is_ours(error):
            raise
        hint = install_hint(error.name or "", options.extra)
        return _fail(f"{options.command} needs {error.name}; {hint}")
    except Exception as error:
        reason = _what_to_mend(error)
        if options.debug or reason is None:  # a fault of the program: traceback, exit code 1
            raise
        return _fail(reason)


def command_modules() -> Iterator[ModuleType]:
    """Yield the modules that add commands, by name; those of the repository come last."""
    for info in pkgutil.iter_modules(__path__):
        if not info.name.startswith("_"):
            module = import_module(f"{__name__}.{info.name}")
            if hasattr(module, "add_to"):
                yield module
    folder = REPOSITORY / "experiments"
    if not (REPOSITORY / "pyproject.toml").is_file() or not folder.is_dir():
        return
    if str(REPOSITORY) not in sys.path:
        sys.path.append(str(REPOSITORY))
    for path in sorted(folder.glob("*/command.py")):
        name = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
        try:
            yield import_module(name)
        except ModuleNotFoundError as error:
            if not name.startswith(error.name or ""):  # not a foreign package of that name
                raise


_NO_DEVICE = (
    "No CUDA GPUs are available",
    "Found no NVIDIA driver",
    "CUDA driver version is insufficient",
    "Torch not compiled with CUDA enabled",
)


def _what_to_mend(error: Exception) -> str | None:
    """Return one line for an error that a user can mend; None for a fault of the program.

    A TypeError is a fault of the program. So is a RuntimeError, except for those of this package
    and those of PyTorch about the machine.
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
    return message if any(words in message for words in _NO_DEVICE) else None


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def _is_ours(error: ImportError) -> bool:
    """Return whether a module of this project, or a name in one, is missing."""
    return (error.name or "").partition(".")[0] in ("tokenflex", "tokenflex_kernels", "experiments")


def _fail(message: str) -> int:
    print(f"tokenflex: {message}", file=sys.stderr)
    return USER_ERROR


def _how_to_continue(options: argparse.Namespace) -> str:
    if resumable := getattr(options, "resumable", None):
        return f"; the same command continues from what is in {resumable}"
    output = getattr(options, "running_output", None)
    if output is None or not (output / "state.pt").exists():
        return ""
    return f"; {output / 'state.pt'} is whole: the same command continues from it"
