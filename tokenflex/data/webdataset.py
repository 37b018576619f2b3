"""WebDataset tars as a data set with an index: any sample is read where it lies in its tar.

A sample is what a shard holds under one key, the member's path up to the first dot of its name:
``0001.json`` with ``0001.jpg``, or ``0001.0.jpg``, ``0001.1.jpg`` and so on for several images.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tokenflex.data.format import DataFormat
from tokenflex.data.media import FILE_ENDINGS
from tokenflex.data.records import MAX_RECORD_BYTES, Record, RecordDataset, read_record
from tokenflex.data.tars import members
from tokenflex.files import parse_json, printable
from tokenflex.terminal import watched

_IMAGES = (
    "apng avif avifs bmp dib gif j2c j2k jfif jp2 jpc jpe jpeg jpf jpg jpx pbm pfm pgm png pnm ppm "
    "tif tiff webp"
)
IMAGE_ENDINGS = frozenset(_IMAGES.split())
"""Endings of members in the formats that :data:`tokenflex.images.FORMATS` names."""

UNREAD_ENDINGS = frozenset({*FILE_ENDINGS, "pdf", "ps"} - IMAGE_ENDINGS)
"""Endings of members that no reader opens and that a sample would silently lack."""

_TEXTS = (
    "caption captions cfg cls cls2 conf csv htm html id idx index info ini inx json json5 jsonl "
    "key label labels lang license log md md5 meta metadata ndjson rst score sha1 sha256 srt tex "
    "text toml transcript tsv txt url vtt xml yaml yml"
)
TEXT_ENDINGS = frozenset({"", *_TEXTS.split()})
"""Endings of members that describe a sample and hold no picture: they are passed over."""

# Values of an offset in the index.
_MISSING = -1  # a member that does not exist
_UNREAD = -2  # a video, sound or drawing
_UNKNOWN = -3  # a member that may be a picture


class WebDataset(RecordDataset):
    """Samples from uncompressed tars with a JSON record and images under each key.

    The record is one of ``MessagesDataset``, in either layout, of at most
    :data:`tokenflex.data.records.MAX_RECORD_BYTES`. The images are those under its key, in the
    order of their names, numbers by value. A record that names images must name as many. A sample
    with a video or sound is broken. So is one without images beside a member of an ending that is
    not in :data:`TEXT_ENDINGS`, which may be an image. Opening reads only the tars' headers; a
    record is read and checked when its sample is read.

    Args:
        path: A tar, a folder of tars, or a pattern of ``*``, ``?``, ``{a,b}`` and ``{000..127}``.

    Raises:
        FileNotFoundError: No tar exists there.
        ValueError: A tar is cut off, damaged or compressed, or no tar holds a sample.
    """

    def __init__(self, path: str | Path) -> None:
        self.shards = shards_of(path)
        shards = watched(self.shards, "indexing tars", len(self.shards), unit="tar")
        indexes = [_index_of(shard) for shard in shards]
        self._keys = [key for index in indexes for key in index.keys]
        if not self._keys:
            raise ValueError(f"data set {path} holds no samples in {len(self.shards)} tars")
        # Arrays: lists of tuples would take some hundred bytes a sample, in every process.
        self._shard_starts = np.cumsum([0, *(len(index.keys) for index in indexes)])
        self._records = np.array([r for index in indexes for r in index.records], dtype=np.int64)
        images = [members for index in indexes for members in index.images]
        self._image_starts = np.cumsum([0, *map(len, images)])
        flat = [member for sample in images for member in sample]
        self._images = np.array(flat, dtype=np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._keys)

    def where(self, index: int) -> str:
        """Return the shard and key of a sample."""
        return f"{self._shard_of(index)}: {self._key_of(index)}"

    def _shard_of(self, index: int) -> Path:
        return self.shards[int(np.searchsorted(self._shard_starts, index, side="right")) - 1]

    def _key_of(self, index: int) -> str:
        return printable(self._keys[index], 200)  # of a stranger's choice

    def _record(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"index must be in 0..{len(self) - 1}, got {index}")
        shard, where = self._shard_of(index), self.where(index)
        images = self._images[self._image_starts[index] : self._image_starts[index + 1]].tolist()
        offset, size = self._records[index].tolist()
        offsets = [start for start, _ in images]
        if offset == _MISSING:
            raise ValueError(f"{where}: there is no {self._key_of(index)}.json")
        if _UNREAD in offsets:
            raise ValueError(f"{where}: a video, sound or drawing is stored with it, and not read")
        if _UNKNOWN in offsets:
            raise ValueError(
                f"{where}: the record has no images, and a member of an ending that is not read is "
                "stored with it"
            )
        if size > MAX_RECORD_BYTES:
            raise ValueError(f"{where}: the record has {size} bytes, more than {MAX_RECORD_BYTES}")
        with shard.open("rb") as file:
            file.seek(offset)
            value = parse_json(file.read(size), f"{where}: the record")
        return read_record(value, where, stored=[(shard, *member) for member in images])

    def _media_files(self, media: Sequence[Any], where: str) -> Iterator[tuple[BinaryIO, str]]:
        for shard, offset, size in media:
            with shard.open("rb") as file:
                yield io.BufferedReader(_Member(file, offset, size)), f"{where}: an image"


def shards_of(path: str | Path) -> list[Path]:
    """Return the tars that a path or pattern stands for, in the order of their names.

    Raises:
        FileNotFoundError: No tar exists there.
    """
    if Path(path).is_dir():
        shards = sorted(Path(path).glob("*.tar"))
        if not shards:
            raise FileNotFoundError(f"data folder {path} holds no file *.tar")
        return shards
    shards = []
    for pattern in _braces_expanded(str(path)):
        matches = sorted(Path(match) for match in glob(pattern))
        if not matches:
            raise FileNotFoundError(f"data file {pattern} does not exist")
        shards += matches
    return shards


def _braces_expanded(pattern: str) -> Iterator[str]:
    """Expand ``{a,b}`` and ``{000..127}`` as in a shell, without braces within braces."""
    braces = re.search(r"\{([^{}]*)\}", pattern)
    if braces is None:
        yield pattern
        return
    span = re.fullmatch(r"(\d+)\.\.(\d+)", braces[1])
    if span is None:
        choices = braces[1].split(",")
    else:
        choices = [f"{n:0{len(span[1])}}" for n in range(int(span[1]), int(span[2]) + 1)]
    for choice in choices:
        yield from _braces_expanded(pattern[: braces.start()] + choice + pattern[braces.end() :])


# ---------------------------------------------------------------------- the index


@dataclass
class _ShardIndex:
    """The samples of a shard: their keys, and (offset, size) of the record and of each image."""

    keys: list[str] = field(default_factory=list)
    records: list[tuple[int, int]] = field(default_factory=list)
    images: list[list[tuple[int, int]]] = field(default_factory=list)


def _index_of(shard: Path) -> _ShardIndex:
    index = _ShardIndex()
    seen: set[str] = set()
    unknown: set[str] = set()  # keys of members that may be pictures
    images: list[list[tuple[Any, tuple[int, int]]]] = []  # of each sample: sort key and position
    for member in members(shard):
        folder, slash, base = member.name.rpartition("/")
        stem, _, ending = base.partition(".")
        key, ending = folder + slash + stem, ending.lower()
        last = ending.rpartition(".")[2]
        is_image = last in IMAGE_ENDINGS or last in UNREAD_ENDINGS
        if not is_image and ending != "json":
            if last not in TEXT_ENDINGS:
                unknown.add(key)
            continue
        if not index.keys or index.keys[-1] != key:
            if key in seen:
                raise ValueError(f"data file {shard} holds key {printable(key, 200)} in two places")
            seen.add(key)
            index.keys.append(key)
            index.records.append((_MISSING, 0))
            images.append([])
        if is_image:
            offset = _UNREAD if last in UNREAD_ENDINGS else member.offset
            images[-1].append((_by_number(ending), (offset, member.size)))
        elif index.records[-1][0] != _MISSING:
            raise ValueError(f"data file {shard} holds {printable(member.name, 200)} twice")
        else:
            index.records[-1] = (member.offset, member.size)
    index.images = [[position for _, position in sorted(sample)] for sample in images]
    for key, positions in zip(index.keys, index.images, strict=True):
        if key in unknown and not positions:
            positions.append((_UNKNOWN, 0))
    return index


def _by_number(ending: str) -> tuple[tuple[int, str], ...]:
    """Return a key to sort names by, with 2 before 10."""
    parts = re.findall(r"\d+|\D+", ending)
    return tuple((int(part), "") if part.isdecimal() else (-1, part) for part in parts)


# ---------------------------------------------------------------------- reading


class _Member(io.RawIOBase):
    """A member of a tar as a file, so that the head of an image is read without the rest."""

    def __init__(self, file: BinaryIO, offset: int, size: int) -> None:
        self._file, self._offset, self._size, self._position = file, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._offset + self._position)
        length = max(0, min(len(buffer), self._size - self._position))
        count = self._file.readinto(memoryview(buffer)[:length])  # type: ignore[attr-defined]
        self._position += count
        return count


FORMATS = (
    DataFormat(name="webdataset", open=lambda options: WebDataset(options.path), files=shards_of),
)
