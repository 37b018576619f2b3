"""Headers of an uncompressed tar from a stranger, read in linear time and bounded memory.

``tarfile`` decodes each block. The walk from block to block is not ``tarfile``'s, which follows
headers that name other headers by recursion, reads a header's claimed size into memory, and trusts
a negative size.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenflex.files import excerpt

MAX_HEADER_BYTES = 2**16
"""Largest header for a long name (GNU) or for extended attributes (PAX)."""

MAX_HEADERS = 8
"""Most of such headers before a member."""

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
    """A file in a tar: its name, and the offset and size of its content in bytes."""

    name: str
    offset: int
    size: int


def members(path: Path) -> Iterator[Member]:
    """Yield the files of a tar from their headers, one after another.

    Raises:
        ValueError: The tar is cut off, damaged or compressed; or a member has a negative size, goes
            beyond the tar's end, is sparse, or has too many or too long headers.
    """
    offset = headers = 0
    override: dict[str, str] = {}  # attributes of the next member

    def fault(problem: str) -> ValueError:
        return ValueError(f"data file {path} has {problem} (at byte {offset})")

    with path.open("rb") as file:
        length = os.fstat(file.fileno()).st_size
        while True:
            file.seek(offset)
            block = file.read(tarfile.BLOCKSIZE)
            if block == bytes(tarfile.BLOCKSIZE):
                break
            header = _header(block, path, offset)
            content, size = offset + tarfile.BLOCKSIZE, header.size
            if "size" in override and header.type not in _EXTENSIONS:
                text = override["size"]
                if not text.isascii() or not text.isdigit() or len(text) > 20:
                    raise fault(f"a member of size {excerpt(text, 30)}")
                size = int(text)
            if header.type == tarfile.GNUTYPE_SPARSE or any("GNU.sparse" in k for k in override):
                raise fault("a sparse member")
            if header.type in _WITHOUT_CONTENT:
                size = 0
            if size < 0:
                raise fault(f"a member of size {size}")
            if content + size > length:
                raise ValueError(
                    f"data file {path} has a member of {excerpt(size, 30)} bytes that goes beyond "
                    f"its end (at byte {offset}); is it cut off?"
                )
            if header.type in _EXTENSIONS:
                headers += 1
                if headers > MAX_HEADERS or size > MAX_HEADER_BYTES:
                    raise fault(
                        f"a member with more than {MAX_HEADERS} headers, or one of more than "
                        f"{MAX_HEADER_BYTES} bytes"
                    )
                try:
                    override |= _attributes(header.type, file.read(size))
                except ValueError as error:
                    raise fault(str(error)) from None
            else:
                if header.type in _FILES:
                    yield Member(override.get("path", header.name), content, size)
                headers, override = 0, {}
            offset = content + -(size // -tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        if override:
            raise ValueError(f"data file {path} ends with a header of no member (at byte {offset})")
        if any(file.read(tarfile.RECORDSIZE)):
            raise ValueError(
                f"data file {path} goes on after its end mark; are these several tars?"
            )


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


def _attributes(kind: bytes, content: bytes) -> dict[str, str]:
    """Return the attributes of the next member in a header's content."""
    if kind == _LONG_NAME:
        return {"path": _text(content.partition(b"\0")[0])}
    if kind == _LONG_LINK:
        return {}
    attributes = dict(_pax_lines(content))
    if kind != _PAX_GLOBAL:
        return attributes
    if attributes.keys() & {"path", "size"}:
        raise ValueError("a name or size for all members")
    return {}


def _pax_lines(content: bytes) -> Iterator[tuple[str, str]]:
    """Parse the lines ``LENGTH KEY=VALUE`` of a PAX header."""
    while content.strip(b"\0"):
        digits = content[:8].partition(b" ")[0]
        length = int(digits) if digits.isdigit() else 0
        line = content[len(digits) + 1 : length]
        key, equals, value = line.partition(b"=")
        if not equals or len(content) < length or not line.endswith(b"\n"):
            raise ValueError("a damaged PAX header")
        yield _text(key), _text(value[:-1])
        content = content[length:]


def _text(content: bytes) -> str:
    return content.decode("utf-8", "surrogateescape")
