"""A user's own data: a file of records, and images that are files."""

from __future__ import annotations

import itertools
import json
import os
import re
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from tokenflex.data.faults import BrokenSample
from tokenflex.data.records import MAX_PATH_LENGTH, MAX_RECORD_BYTES, Record, read_record
from tokenflex.data.samples import Sample
from tokenflex.files import describe_payload, excerpt, parse_json
from tokenflex.images import image_size, open_image

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_NAMED_IN_ERRORS = 3


class MessagesDataset:
    """Samples from a file of records, one a line (JSONL) or all in one JSON list.

    A record is ``{"images": ["a.png"], "messages": [{"role": "user", "content": "What is it?"},
    {"role": "assistant", "content": "A cat."}]}``, or one in LLaVA's layout (see
    :class:`tokenflex.data.llava.LlavaDataset`). ``content`` is a string, with ``<image>`` where
    images stand (before the first user turn if nowhere), or a list of ``{"type": "image"}`` and
    ``{"type": "text", "text": ...}`` parts. A single image may also be given as ``image``. ``id``
    and ``kind`` (a label to group accuracies by) are optional.

    The whole file is read and checked at once. A record that is not of this form keeps its index,
    stands in :attr:`broken`, and raises when it is asked for. Images are opened when they are asked
    for.

    Args:
        path: The file, in UTF-8 with or without a byte-order mark.
        image_folder: What image paths are relative to. The file's own folder if None.
        allow_outside: Read images whose path leaves that folder, by ``..``, from the root of the
            file system, or by a symbolic link. Otherwise such a record is broken.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: It holds no samples, or none that can be read. The message names the first ones.
    """

    def __init__(
        self,
        path: str | Path,
        image_folder: str | Path | None = None,
        *,
        allow_outside: bool = False,
    ) -> None:
        path = Path(path)
        self.folder = ImageFolder(
            path.parent if image_folder is None else image_folder, allow_outside
        )
        self.path = path
        self._lines = array("Q")  # of the records; none of those of a list
        self._records = self._read()  # of a broken one, the reason
        if not self._records:
            raise ValueError(f"data file {path} holds no samples, in a list or one a line")
        if len(self.broken) == len(self._records):
            named = "; ".join(one.reason for one in self.broken[:_NAMED_IN_ERRORS])
            raise ValueError(
                f"data file {path} holds no samples that can be read, out of "
                f"{len(self._records)}: {named}"
            )

    def _read(self) -> list[Record | str]:
        """Read and check the file's records.

        Raises:
            FileNotFoundError: The file does not exist.
            ValueError: It is a list that is cut off.
        """
        if not self.path.is_file():
            raise FileNotFoundError(f"data file {self.path} does not exist")
        name = str(self.path)
        with self.path.open("rb") as file:
            if first_byte(file) == b"[":
                # A byte that is not UTF-8 becomes half of a surrogate pair: its record is refused.
                text = file.read().decode("utf-8", "surrogateescape")
                try:
                    return [
                        self._checked(value, f"{name}[{place}]")
                        for place, value in enumerate(_elements(text, name))
                    ]
                except _NoListError:
                    pass  # lines, of which the first is a list
            records = []
            for number, value in _lines(file, name):
                self._lines.append(number)
                records.append(self._checked(value, f"{name}:{number}"))
            return records

    def where(self, index: int) -> str:
        """Return the file and line of a record, or its place in the list."""
        return f"{self.path}:{self._lines[index]}" if self._lines else f"{self.path}[{index}]"

    def _checked(self, value: Any, where: str) -> Record | str:
        if isinstance(value, Exception):
            return str(value)
        try:
            record = read_record(value, where)
            for path in record[1]:
                self.folder.check(path, where)
        except ValueError as error:
            return str(error)
        return record

    @property
    def broken(self) -> list[BrokenSample]:
        """The records that are not of the right form."""
        return [
            BrokenSample(index, record)
            for index, record in enumerate(self._records)
            if isinstance(record, str)
        ]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Sample:
        name, paths, conversation = self._record(index)
        images = tuple(open_image(*self._image(path, index)) for path in paths)
        return Sample(name, images, (conversation,))

    def outline(self, index: int) -> Sample:
        """Return the sample's text and the sizes that its image files state; no pixels are read."""
        name, paths, conversation = self._record(index)
        sizes = tuple(image_size(*self._image(path, index)) for path in paths)
        return Sample(name, sizes, (conversation,))

    def _record(self, index: int) -> Record:
        record = self._records[index]
        if isinstance(record, str):
            raise ValueError(record)
        return record

    def _image(self, path: str, index: int) -> tuple[Path, str]:
        """The file of an image, and what errors call it."""
        where = self.where(index)
        file = self.folder.file(path, where)
        return file, f"{where}: image file {describe_payload(path) or file}"


class ImageFolder:
    """A folder that the paths of a data set are relative to, and should not leave.

    Args:
        path: The folder.
        allow_outside: Whether they may.
    """

    def __init__(self, path: str | Path, allow_outside: bool = False) -> None:
        self.path = Path(path)
        self.allow_outside = allow_outside
        self._real = self.path.resolve()

    def check(self, path: str, where: str) -> None:
        """Check a path by its text, and on the disk only where that seems to leave the folder.

        Raises:
            ValueError: It leaves the folder. The message begins with ``where``.
        """
        if path.startswith("/") or ".." in path:
            self.file(path, where)

    def file(self, path: str, where: str) -> Path:
        """Return the file at ``path``.

        Raises:
            ValueError: It is outside of the folder, also by a symbolic link.
        """
        file = self.path / path
        length = len(os.fsencode(file))
        if length >= MAX_PATH_LENGTH:
            raise ValueError(
                f"{where}: the path of an image must have fewer than {MAX_PATH_LENGTH} bytes with "
                f"its folder, got {length:,}"
            )
        try:
            inside = self.allow_outside or file.resolve().is_relative_to(self._real)
        except (OSError, RuntimeError) as error:  # links in a circle, or too long
            reason = getattr(error, "strerror", None) or "its links go in a circle"
            raise ValueError(f"{where}: image {excerpt(path)} cannot be found: {reason}") from None
        if not inside:
            raise ValueError(
                f"{where}: image {excerpt(path)} is outside of the data's folder {self.path}; "
                "allow_outside permits that"
            )
        return file


# ---------------------------------------------------------------------- records of a file

_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{},]', re.DOTALL)
_BLANK = re.compile(r"[ \t\r\n]*")
_OBJECT_NEXT = re.compile(r",[ \t\r\n]*(?=\{)")
_DECODER = json.JSONDecoder()

_FIRST_PIECE, _PIECE_GROWTH = 2**12, 8
"""Characters of a list that are decoded at first, and the growth where an element is longer."""

_LONGEST_WORD = len("-Infinity")


class _NoListError(ValueError):
    """A file that begins with a JSON list and continues behind it."""


def first_byte(file: BinaryIO) -> bytes:
    """Go to the first byte that is neither a byte-order mark nor blank, and return it.

    It is empty where the file holds nothing else.
    """
    file.seek(len(BYTE_ORDER_MARK) if file.read(3) == BYTE_ORDER_MARK else 0)
    while (byte := file.read(1)).isspace():
        pass
    file.seek(-len(byte), os.SEEK_CUR)
    return byte


def _lines(file: BinaryIO, name: str) -> Iterator[tuple[int, Any]]:
    """Parse every line that is not blank, by its number; an exception in the place of a bad one."""
    file.seek(0)
    for number in itertools.count(1):
        line = file.readline(MAX_RECORD_BYTES + 1)
        if not line:
            return
        where = f"{name}:{number}"
        if len(line) > MAX_RECORD_BYTES:
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_RECORD_BYTES)
            yield number, ValueError(f"{where} is longer than {MAX_RECORD_BYTES} bytes")
        elif line.removeprefix(BYTE_ORDER_MARK).strip():
            try:
                yield number, parse_json(line.rstrip(b"\r\n"), where)
            except ValueError as error:
                yield number, error


def _elements(text: str, name: str) -> Iterator[Any]:
    """Parse the elements of a JSON list one by one, so that a broken one spoils no other.

    In the place of a broken one there is an exception. It ends where its brackets say, or in front
    of the next record that is whole, whichever comes first.

    Raises:
        ValueError: The list has no end.
        _NoListError: Something stands behind its end.
    """
    start = _after_blank(text, text.index("[") + 1)
    record = -1  # where the next whole record starts, as far as it was searched for
    for place in itertools.count():
        if text[start : start + 1] == "]":
            break
        where = f"{name}[{place}]"
        decoded = _decode_element(text, start)
        if decoded is not None:
            element, end = decoded
        else:
            if record <= start:
                record = _next_record(text, start)
            boundary = _end_of_damaged(text, start, record)
            if boundary is None:
                raise ValueError(
                    f"data file {name} is a JSON list without an end; is it cut off? (in {where})"
                )
            end = boundary
            element = _parse_damaged(text[start:end], where)
        yield element
        start = end if text[end] == "]" else _after_blank(text, end + 1)
    if _after_blank(text, start + 1) < len(text):
        raise _NoListError


def _decode_element(text: str, start: int) -> tuple[Any, int] | None:
    """Decode the element at ``start``; None unless a comma or bracket stands behind it.

    Args:
        text: The list.
        start: Where the element starts.

    Returns:
        The element and the position of the comma or bracket.
    """
    length = _FIRST_PIECE
    while True:
        # Of a piece, since an error of the decoder counts the lines of all the text.
        piece = text[start : start + length]
        is_last = start + length >= len(text)
        try:
            element, end = _DECODER.raw_decode(piece)
        except RecursionError:
            return None
        except json.JSONDecodeError as error:
            is_cut = error.pos >= len(piece) - _LONGEST_WORD or error.msg.startswith("Unterminated")
            if is_last or not is_cut:
                return None
        except ValueError:  # an integer of thousands of digits
            return None
        else:
            end = _after_blank(piece, end)
            if end < len(piece):
                return (element, start + end) if piece[end] in ",]" else None
            if is_last:
                return None
        length *= _PIECE_GROWTH


def _next_record(text: str, start: int) -> int:
    """Find the next comma behind which a whole record starts; the length if there is none."""
    position = start
    while (comma := _OBJECT_NEXT.search(text, position)) is not None:
        decoded = _decode_element(text, comma.end())
        if decoded is None:
            position = comma.end()
        else:
            element, position = decoded
            if "messages" in element or "conversations" in element:
                return comma.start()
    return len(text)


def _end_of_damaged(text: str, start: int, record: int) -> int | None:
    """Find the comma or bracket behind a damaged element.

    Args:
        text: The list.
        start: Where the element starts.
        record: The comma in front of the next whole record, or the length of the text.

    Returns:
        Its position, or None where the list is cut off.
    """
    depth = 0
    for token in _TOKEN.finditer(text, start, record):
        symbol = token[0]
        if depth == 0 and symbol in ",]":
            return token.start()
        depth += (symbol in "[{") - (symbol in "]}")
    if record < len(text):
        return record
    last = len(text.rstrip(" \t\r\n")) - 1
    return last if text[last] == "]" and not _is_cut(text[start : last + 1]) else None


def _is_cut(text: str) -> bool:
    """Return whether JSON is well formed up to its end, and lacks what follows."""
    try:
        _DECODER.raw_decode(text)
    except json.JSONDecodeError as error:
        return error.pos >= len(text) or error.msg.startswith("Unterminated")
    except (ValueError, RecursionError):
        pass
    return False


def _parse_damaged(text: str, where: str) -> Any:
    """Parse an element that is no JSON, for the error that says so."""
    try:
        return parse_json(text.encode("utf-8", "surrogateescape"), where)
    except ValueError as error:
        return error


def _after_blank(text: str, start: int) -> int:
    blank = _BLANK.match(text, start)
    assert blank is not None
    return blank.end()
