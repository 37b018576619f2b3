"""Types of the commands' options; argparse shows the error of a value that is not allowed.

They check what a command is about to write, too, so that hours of work do not end in a folder that
cannot be made.
"""

from __future__ import annotations

import os
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable, Iterable
from pathlib import Path


def positive(text: str) -> int:
    """Parse an int of at least 1."""
    try:
        value = int(text)
    except ValueError:
        raise ArgumentTypeError(f"expected a whole number, got {text!r}") from None
    if value < 1:
        raise ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def time_limit(text: str) -> float:
    """Parse a number of seconds above 0; infinity stands for no limit."""
    try:
        value = float(text)
    except ValueError:
        raise ArgumentTypeError(f"expected a number of seconds, got {text!r}") from None
    if not value > 0:
        raise ArgumentTypeError(f"expected seconds above 0, got {value:g}")
    return value


def names_of(known: Iterable[str]) -> Callable[[str], list[str]]:
    """Return a type for names of ``known`` with commas between them, each of which is kept once."""
    names = list(known)

    def parse(text: str) -> list[str]:
        given = list(dict.fromkeys(text.split(",")))
        if unknown := [name for name in given if name not in names]:
            words = ", ".join(name or "an empty name" for name in unknown)
            raise ArgumentTypeError(f"expected names of {', '.join(names)}, got {words}")
        return given

    return parse


def output_file(text: str) -> Path:
    """Parse the path of a file that can be written: in a folder that exists or can be made."""
    path = Path(text)
    try:
        if path.is_dir():
            raise ArgumentTypeError(f"expected a file to write, got the folder {text!r}")
        if path.exists() and not os.access(path, os.W_OK):
            raise ArgumentTypeError(f"expected a file to write, got {text!r}, which is read-only")
        _check_folder(path.absolute().parent, "a file to write", text)
    except OSError as error:
        raise ArgumentTypeError(
            f"expected a file to write, got {text!r}: {error.strerror}"
        ) from None
    return path


def output_folder(text: str) -> Path:
    """Parse the path of a folder that can be written to: one that exists or can be made."""
    path = Path(text)
    try:
        _check_folder(path.absolute(), "a folder to write to", text)
    except OSError as error:
        raise ArgumentTypeError(
            f"expected a folder to write to, got {text!r}: {error.strerror}"
        ) from None
    return path


def _check_folder(folder: Path, expected: str, text: str) -> None:
    """Refuse a folder that is none, or that can be neither written to nor made."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        raise ArgumentTypeError(f"expected {expected}, got {text!r}: {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ArgumentTypeError(f"expected {expected}, got {text!r}: {existing} is read-only")


def refuse_interpreter(parser: ArgumentParser) -> None:
    """End a command that compiles kernels with a usage error if Triton would interpret them."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 makes Triton interpret: unset it to compile")
