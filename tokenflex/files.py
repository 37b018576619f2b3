"""Reading and writing of files: JSON parsed with one set of rules, files replaced in one step."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def parse_json(content: bytes, name: str) -> Any:
    """Parse JSON in UTF-8, with or without a byte-order mark.

    Args:
        content: The bytes of one JSON value.
        name: What errors call it, for example ``data.jsonl:3``.

    Raises:
        ValueError: The content is not JSON in UTF-8, or nests too deeply. The message does not
            quote the content.
    """
    try:
        return json.loads(content.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError(f"{name} nests lists and objects too deeply") from None
    except ValueError as error:  # also UnicodeDecodeError and integers of thousands of digits
        raise ValueError(f"{name} is not JSON in UTF-8: {error}") from None


def read_json(path: Path, kind: str = "file") -> Any:
    """Read a JSON file.

    Args:
        path: The file.
        kind: What errors call it, for example "checkpoint file".

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: As :func:`parse_json`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{kind} {path} does not exist")
    return parse_json(path.read_bytes(), f"{kind} {path}")


def write_atomically(
    path: Path, write: Callable[[Path], object], *, make_room: Callable[[], object] = lambda: None
) -> None:
    """Let ``write`` fill a temporary file, then put it in the place of ``path`` in one step.

    ``make_room`` is called in between, when the new file is whole and on the disk.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        make_room()
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    text = json.dumps(value, indent=2) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
