"""Values of a JSON file, one a line (JSONL) or all in one list. A damaged one spoils no other."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from tokenflex.data.records import MAX_RECORD_BYTES
from tokenflex.files import parse_json

BYTE_ORDER_MARK = b"\xef\xbb\xbf"

_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{},]', re.DOTALL)
_BLANK = re.compile(r"[ \t\r\n]*")
_OBJECT_NEXT = re.compile(r",[ \t\r\n]*(?=\{)")
_DECODER = json.JSONDecoder()

_FIRST_PIECE, _PIECE_GROWTH = 2**12, 8
"""Characters of a list that are decoded at first, and the growth where an element is longer."""

_LONGEST_WORD = len("-Infinity")


class NoListError(ValueError):
    """A file begins with a JSON list and continues behind it."""


def first_byte(file: BinaryIO) -> bytes:
    """Go to the first byte that is neither a byte-order mark nor blank, and return it.

    Return no byte if the file holds nothing else.
    """
    file.seek(len(BYTE_ORDER_MARK) if file.read(3) == BYTE_ORDER_MARK else 0)
    while (byte := file.read(1)).isspace():
        pass
    file.seek(-len(byte), os.SEEK_CUR)
    return byte


def parsed_lines(file: BinaryIO, name: str) -> Iterator[tuple[int, Any]]:
    """Yield the number and the value of every line that is not blank.

    The value of a damaged line is the ValueError that describes the damage.
    """
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
            yield number, _parsed(line.rstrip(b"\r\n"), where)


def _parsed(content: bytes, where: str) -> Any:
    """Parse JSON; return the error for content that is not JSON."""
    try:
        return parse_json(content, where)
    except ValueError as error:
        return error


def list_elements(text: str, name: str) -> Iterator[Any]:
    """Yield the elements of a JSON list one by one.

    A damaged element is the ValueError that describes the damage. It ends where its brackets close,
    or before the next whole record, whichever comes first.

    Raises:
        ValueError: The list has no end.
        NoListError: Something follows the end of the list.
    """
    start = _after_blank(text, text.index("[") + 1)
    record = -1  # start of the next whole record, once a damaged element was met
    for i in itertools.count():
        if text[start : start + 1] == "]":
            break
        decoded = _decode_element(text, start)
        if decoded is not None:
            element, end = decoded
        else:
            if record <= start:
                record = _next_record(text, start)
            boundary = _end_of_damaged(text, start, record)
            if boundary is None:
                raise ValueError(
                    f"data file {name} is a JSON list without an end; is it cut off? "
                    f"(in {name}[{i}])"
                )
            end = boundary
            element = _parsed(text[start:end].encode("utf-8", "surrogateescape"), f"{name}[{i}]")
        yield element
        start = end if text[end] == "]" else _after_blank(text, end + 1)
    if _after_blank(text, start + 1) < len(text):
        raise NoListError


def _decode_element(text: str, start: int) -> tuple[Any, int] | None:
    """Decode the element at ``start``.

    Returns:
        The element and the position of the comma or bracket behind it; None if the element is
        damaged, or something else follows it.
    """
    length = _FIRST_PIECE
    while True:
        # A piece, since an error of the decoder counts the lines of the whole text.
        piece = text[start : start + length]
        is_last = start + length >= len(text)
        try:
            element, end = _DECODER.raw_decode(piece)
        except json.JSONDecodeError as error:
            is_cut = error.pos >= len(piece) - _LONGEST_WORD or error.msg.startswith("Unterminated")
            if is_last or not is_cut:
                return None
        except (RecursionError, ValueError):  # nested too deeply, an integer of too many digits
            return None
        else:
            end = _after_blank(piece, end)
            if end < len(piece):
                return (element, start + end) if piece[end] in ",]" else None
            if is_last:
                return None
        length *= _PIECE_GROWTH


def _next_record(text: str, start: int) -> int:
    """Return the next comma that a whole record follows, or the text's length if none does."""
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
    """Return the position of the comma or bracket behind a damaged element.

    Args:
        text: The list.
        start: Start of the element.
        record: The comma before the next whole record, or the length of the text.

    Returns:
        The position, or None if the list is cut off.
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
    """Return whether JSON is well formed up to its end, and only lacks what should follow."""
    try:
        _DECODER.raw_decode(text)
    except json.JSONDecodeError as error:
        return error.pos >= len(text) or error.msg.startswith("Unterminated")
    except (ValueError, RecursionError):
        pass
    return False


def _after_blank(text: str, start: int) -> int:
    blank = _BLANK.match(text, start)
    assert blank is not None
    return blank.end()
