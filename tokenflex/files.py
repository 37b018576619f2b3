"""Files: JSON parsed by one set of rules, values quoted in errors, atomic writes."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def parse_json(content: bytes, name: str) -> Any:
    """Parse JSON in UTF-8, with or without a byte-order mark.

    Args:
        content: The bytes of one JSON value.
        name: Name of the content in error messages, for example ``data.jsonl:3``.

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
        kind: Kind of the file in error messages, for example "checkpoint file".

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: As :func:`parse_json`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{kind} {path} does not exist")
    return parse_json(path.read_bytes(), f"{kind} {path}")


def checkpoint_folder(path: str | Path) -> Path:
    """Return the path of a checkpoint folder, or raise FileNotFoundError if none exists there."""
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"checkpoint folder {folder} does not exist")
    return folder


def excerpt(value: Any, length: int = 80) -> str:
    """Describe a value for an error message, in at most ``length`` printable characters.

    Texts, numbers and short lists of them are quoted, and cut off if they are long. Another list
    is described by its size and an object by its keys, so that no deep or large value is walked.
    Data URLs, base64 and bytes are described by their length.
    """
    if isinstance(value, dict):
        keys = ", ".join(
            describe_payload(str(key)) or str(key)[:length] for key in [*value][:length]
        )
        described = f"an object with keys {keys}" if value else "an object without keys"
    elif isinstance(value, (list, tuple)) and 0 < len(value) <= 8 and _are_plain(value):
        described = f"[{', '.join(excerpt(element, 20) for element in value)}]"
    elif isinstance(value, (list, tuple)):
        described = f"a list of {len(value)}" if value else "an empty list"
    elif isinstance(value, (bytes, bytearray, memoryview)):
        described = f"{len(value):,} bytes"
    elif isinstance(value, str) and (payload := describe_payload(value)) is not None:
        described = payload
    elif isinstance(value, str):
        described = repr(value[:length])
        described += "" if len(value) <= length else "..."
    elif value is None or isinstance(value, (bool, float)):
        described = repr(value)
    elif isinstance(value, int):
        described = repr(value) if value.bit_length() < 4 * length else "an integer of many digits"
    else:
        described = f"a {type(value).__name__}"
    return printable(described, length)


_DATA_URL = re.compile(
    r"\s*data:(?:[\w.+-]+/[\w.+-]+[;,]|[;,]|(?:image|video|audio)/)", re.IGNORECASE
)
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]+={0,2}")
_IMAGE_IN_BASE64 = ("/9j/", "iVBORw0KGg", "R0lGOD", "UklGR", "SUkqA", "TU0AK")
_IMAGE_BASE64_LENGTH, _BASE64_LENGTH = 24, 100
"""Least length of an unbroken text that counts as base64, with an image's start and without."""


def describe_payload(text: str) -> str | None:
    """Describe a data URL or base64 by its length; None for any other text."""
    if _DATA_URL.match(text):
        return f"a data URL of {len(text):,} characters"
    start = text[:4096].lstrip()
    least = _IMAGE_BASE64_LENGTH if start.startswith(_IMAGE_IN_BASE64) else _BASE64_LENGTH
    unbroken = "".join(start.splitlines()).rstrip()
    if len(unbroken) >= least and not unbroken.isdigit() and _BASE64.fullmatch(unbroken):
        return f"base64 of {len(text):,} characters"
    return None


def _are_plain(values: Sequence[Any]) -> bool:
    return all(value is None or isinstance(value, (str, int, float)) for value in values)


def printable(text: str, length: int) -> str:
    """Return ``text`` on one line of at most ``length`` characters, all of which can be printed."""
    line = " ".join(text[: 4 * length].split())
    line = line.encode("utf-8", "backslashreplace").decode()
    return line if len(line) <= length else line[: length - 3] + "..."


def check_utf8(text: str, name: str) -> str:
    """Return ``text`` if UTF-8 can hold it.

    Raises:
        ValueError: Half of a surrogate pair is in it. The message begins with ``name``.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} holds half of a surrogate pair at character {error.start}, which is no text"
        ) from None
    return text


def check_replaceable(report: Path, keys: Collection[str], others: Iterable[Path] = ()) -> None:
    """Refuse to replace a report that this package has not written.

    Args:
        report: A JSON file, which need not exist.
        keys: Keys of an object, or of each in a list, that this package writes there.
        others: Files that are written beside it. They are this package's if the report exists.

    Raises:
        FileExistsError: A file that this package has not written would be replaced.
    """
    if report.exists():
        try:
            value = read_json(report)
        except (OSError, ValueError):
            value = None
        rows = value if isinstance(value, list) else [value]
        is_ours = all(isinstance(row, dict) and row.keys() >= {*keys} for row in rows)
        foreign = [] if is_ours else [report]
    else:
        foreign = [path for path in others if path.exists()]
    if foreign:
        raise FileExistsError(
            f"{foreign[0]} exists and is not a report of this command; give another output, or "
            "move it"
        )


def write_atomically(
    path: Path, write: Callable[[Path], object], *, make_room: Callable[[], object] = lambda: None
) -> None:
    """Let ``write`` fill a temporary file, then rename it to ``path``.

    When this returns, the file and its name are on the disk. Its permissions follow the umask.
    ``make_room`` is called before the renaming, when the new file is whole and on the disk.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        mode = _create(temporary)
        write(temporary)
        with temporary.open("rb+") as file:
            os.chmod(temporary, mode)  # safetensors leaves files that their owner alone can read
            os.fsync(file.fileno())
        make_room()
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _create(path: Path) -> int:
    """Create an empty file or replace one; return the mode that the umask gives it."""
    path.unlink(missing_ok=True)
    with path.open("xb") as file:
        return stat.S_IMODE(os.fstat(file.fileno()).st_mode)


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk, if its file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``path`` at the end, or vanishes after an error.

    When this returns, the folder and its files are on the disk.

    Raises:
        OSError: ``path`` is a folder that is not empty, or a file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        settle_folder(temporary)
        temporary.rename(path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_folder(folder: Path, name: str = "output") -> None:
    """Refuse a path that is no folder and cannot become one.

    Raises:
        ValueError: It or a path above it is a file or a broken link; the message begins with
            ``name``.
    """
    for path in (folder, *folder.parents):
        if os.path.lexists(path) and not path.is_dir():
            kind = "is a file" if path.exists() else "links to nothing"
            raise ValueError(f"{name} must be a folder, but {path} {kind}")


def settle_folder(folder: Path) -> None:
    """Put a folder and all that is in it on the disk, with the permissions of the umask."""
    probe = folder / f".{os.getpid()}.tmp"
    mode = _create(probe)
    probe.unlink()
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            path = Path(parent, name)
            with path.open("rb+") as file:
                os.chmod(path, mode)
                os.fsync(file.fileno())
        sync_folder(Path(parent))


def write_text(path: Path, text: str) -> None:
    """Write ``text`` in UTF-8, atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    text = json.dumps(value, indent=2) + "\n"
    write_text(path, text)
