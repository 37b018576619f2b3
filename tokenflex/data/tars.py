"""The headers of an uncompressed tar from a stranger, read in linear time and bounded memory.

``tarfile`` decodes each block. The walk from block to block is our own, because ``tarfile`` follows
headers that name other headers by recursion, reads a header's claimed size into memory, and takes a
negative size for granted.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tokenflex.files import excerpt

MAX_HEADER_BYTES = 2**16
"""Bytes of a header for a long name (GNU) or for extended attributes (PAX) at most."""

MAX_HEADERS = 8
"""Such headers in front of a member at most."""

_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL, _SOLARIS = b"L", b"K", b"x", b"g", b"X"
_EXTENSIONS = (_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL, _SOLARIS)
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_WITHOUT_CONTENT = (
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.DIRTYPE,
    tarfile.FIFOTYPE,
)


@dataclass(frozen=True)
class Member:
    """A file in a tar: its name, and where its content lies in bytes."""

    name: str
    offset: int
    size: int


def members(path: Path) -> Iterator[Member]:
    """Read the headers of a tar, one after another.

    Raises:
        ValueError: The tar is cut off, damaged or compressed, has a member of negative size or one
            that goes beyond its end, a sparse one, or too many or too long headers for one member.
    """
    with path.open("rb") as file:
        yield from _members(file, path, os.fstat(file.fileno()).st_size)


def _members(file: BinaryIO, path: Path, length: int) -> Iterator[Member]:
    offset = headers = 0
    override: dict[str, str] = {}  # what headers say of the next member
    while True:
        file.seek(offset)
        block = file.read(tarfile.BLOCKSIZE)
        if block == bytes(tarfile.BLOCKSIZE):
            break
        header = _header(block, path, offset)
        content = offset + tarfile.BLOCKSIZE
        size = header.size
        if "size" in override and header.type not in _EXTENSIONS:
            size = _number(override["size"], path, offset)
        if header.type == tarfile.GNUTYPE_SPARSE or any("GNU.sparse" in key for key in override):
            raise ValueError(f"data file {path} has a sparse member (at byte {offset})")
        if header.type in _WITHOUT_CONTENT:
            size = 0
        if size < 0:
            raise ValueError(f"data file {path} has a member of size {size} (at byte {offset})")
        if content + size > length:
            raise ValueError(
                f"data file {path} has a member of {excerpt(size, 30)} bytes that goes beyond its "
                f"end (at byte {offset}); is it cut off?"
            )
        if header.type in _EXTENSIONS:
            headers += 1
            if headers > MAX_HEADERS or size > MAX_HEADER_BYTES:
                raise ValueError(
                    f"data file {path} has a member with more than {MAX_HEADERS} headers, or one "
                    f"of more than {MAX_HEADER_BYTES} bytes (at byte {offset})"
                )
            _apply(header.type, file.read(size), override, path, offset)
        else:
            if header.type in _FILES:
                yield Member(override.get("path", header.name), content, size)
            headers, override = 0, {}
        offset = content + -(size // -tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    if override:
        raise ValueError(f"data file {path} ends with a header of no member (at byte {offset})")
    if any(file.read(tarfile.RECORDSIZE)):
        raise ValueError(f"data file {path} goes on after its end mark; are these several tars?")


def _header(block: bytes, path: Path, offset: int) -> tarfile.TarInfo:
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError, OverflowError) as error:
        if len(block) < tarfile.BLOCKSIZE:
            problem = f"has no end mark; is it cut off? (at byte {offset})"
        elif offset:
            problem = f"has a damaged header (at byte {offset})"
        else:
            problem = f"cannot be read as an uncompressed tar: {error}"
        raise ValueError(f"data file {path} {problem}") from error


def _apply(kind: bytes, content: bytes, override: dict[str, str], path: Path, offset: int) -> None:
    """Note what a header says of the member behind it."""
    if kind == _LONG_NAME:
        override["path"] = _text(content.partition(b"\0")[0])
    elif kind != _LONG_LINK:
        attributes = dict(_attributes(content, path, offset))
        if kind != _PAX_GLOBAL:
            override |= attributes
        elif attributes.keys() & {"path", "size"}:
            raise ValueError(
                f"data file {path} states a name or size for all members (at byte {offset})"
            )


def _attributes(content: bytes, path: Path, offset: int) -> Iterator[tuple[str, str]]:
    """Parse the lines ``LENGTH KEY=VALUE`` of a PAX header."""
    while content.strip(b"\0"):
        digits = content[:8].partition(b" ")[0]
        length = int(digits) if digits.isdigit() else 0
        line = content[len(digits) + 1 : length]
        key, equals, value = line.partition(b"=")
        if not equals or len(content) < length or not line.endswith(b"\n"):
            raise ValueError(f"data file {path} has a damaged PAX header (at byte {offset})")
        yield _text(key), _text(value[:-1])
        content = content[length:]


def _text(content: bytes) -> str:
    return content.decode("utf-8", "surrogateescape")


def _number(text: str, path: Path, offset: int) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 20:
        raise ValueError(
            f"data file {path} has a member of size {excerpt(text, 30)} (at byte {offset})"
        )
    return int(text)
