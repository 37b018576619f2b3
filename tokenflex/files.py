"""Reading and writing of files: JSON parsed with one set of rules, files replaced in one step."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
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


def excerpt(value: Any, length: int = 80) -> str:
    """Describe a value for an error message, in at most ``length`` printable characters.

    Texts, numbers and short lists of them are quoted, and cut off where they are long. Of another
    list the size is named, and of an object the keys, so that no deep or large one is walked.
    """
    if isinstance(value, dict):
        keys = ", ".join(str(key)[:length] for key in list(value)[:length])
        described = f"an object with keys {keys}" if value else "an object without keys"
    elif isinstance(value, (list, tuple)) and 0 < len(value) <= 8 and _are_plain(value):
        described = f"[{', '.join(excerpt(element, 20) for element in value)}]"
    elif isinstance(value, (list, tuple)):
        described = f"a list of {len(value)}" if value else "an empty list"
    elif isinstance(value, (str, bytes)):
        described = repr(value[:length])
        described += "" if len(value) <= length else "..."
    elif value is None or isinstance(value, (bool, float)):
        described = repr(value)
    elif isinstance(value, int):
        described = repr(value) if value.bit_length() < 4 * length else "an integer of many digits"
    else:
        described = f"a {type(value).__name__}"
    return printable(described, length)


def _are_plain(values: Sequence[Any]) -> bool:
    return all(value is None or isinstance(value, (str, int, float)) for value in values)


def printable(text: str, length: int) -> str:
    """Return ``text`` on one line of at most ``length`` characters, all of which can be printed."""
    line = " ".join(text[: 4 * length].split())
    line = line.encode("utf-8", "backslashreplace").decode()
    return line if len(line) <= length else line[: length - 3] + "..."


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
