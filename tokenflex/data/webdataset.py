"""WebDataset tars as a data set with an index: any sample at any time, read where it lies.

A sample is what a shard holds under one key, the member's path up to the first dot of its name:
``0001.json`` with ``0001.jpg``, or ``0001.0.jpg``, ``0001.1.jpg`` and so on for several images.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tokenflex.data.media import FILE_ENDINGS
from tokenflex.data.records import MAX_RECORD_BYTES, Record, read_record
from tokenflex.data.samples import Sample
from tokenflex.data.tars import members
from tokenflex.files import parse_json, printable
from tokenflex.images import image_size, open_image

IMAGE_ENDINGS = (
    *(
        "apng",
        "avif",
        "avifs",
        "bmp",
        "dib",
        "gif",
        "j2c",
        "j2k",
        "jfif",
        "jp2",
        "jpc",
        "jpe",
        "jpeg",
    ),
    *("jpf", "jpg", "jpx", "pbm", "pfm", "pgm", "png", "pnm", "ppm", "tif", "tiff", "webp"),
)
"""Of members in the formats that :data:`tokenflex.images.FORMATS` names."""

UNREAD_ENDINGS = frozenset({*FILE_ENDINGS, "pdf", "ps"} - {*IMAGE_ENDINGS})
"""Of members that a sample would lack without a word, were they passed over."""

TEXT_ENDINGS = frozenset(
    {
        *(
            "",
            "caption",
            "captions",
            "cfg",
            "cls",
            "cls2",
            "conf",
            "csv",
            "htm",
            "html",
            "id",
            "idx",
        ),
        *(
            "index",
            "info",
            "ini",
            "inx",
            "json",
            "json5",
            "jsonl",
            "key",
            "label",
            "labels",
            "lang",
        ),
        *("license", "log", "md", "md5", "meta", "metadata", "ndjson", "rst", "score", "sha1"),
        *("sha256", "srt", "tex", "text", "toml", "transcript", "tsv", "txt", "url", "vtt", "xml"),
        *("yaml", "yml"),
    }
)
"""Of members that say something of a sample and hold no picture: they are passed over."""

_NONE = (-1, 0)  # in place of a member that is not there
_UNREAD = (-2, 0)  # in place of a picture that is not read
_UNKNOWN = (-3, 0)  # in place of a member that may be one


class WebDataset:
    """Samples from uncompressed tars with a JSON record and images under each key.

    The record is one of ``MessagesDataset`` or one of LLaVA's, of at most
    :data:`tokenflex.data.records.MAX_RECORD_BYTES`. The images are those under its key, in the
    order of their names, numbers by value; where the record names images, there must be as many. A
    sample with a video or sound is broken, and so is one without images beside a member that may be
    one, since its ending is none of text (:data:`TEXT_ENDINGS`). Only the tars' headers are read at
    first; a record is read and checked when its sample is asked for.

    Args:
        path: a tar, a folder of tars, or a pattern of ``*``, ``?``, ``{a,b}`` and ``{000..127}``.

    Raises:
        FileNotFoundError: there is no tar.
        ValueError: a tar is cut off, damaged or compressed, or there are no samples in any.
    """

    def __init__(self, path: str | Path) -> None:
        self.shards = shards_of(path)
        indexed = [_index_of(shard) for shard in self.shards]
        self._keys = [key for one in indexed for key in one.keys]
        if not self._keys:
            raise ValueError(f"data set {path} holds no samples in {len(self.shards)} tars")
        # Arrays: lists of tuples would take some hundred bytes a sample, in every process.
        self._shard_starts = np.cumsum([0, *(len(one.keys) for one in indexed)])
        self._records = np.array([r for one in indexed for r in one.records], dtype=np.int64)
        images = [images for one in indexed for images in one.images]
        self._image_starts = np.cumsum([0, *(len(one) for one in images)])
        self._images = np.array([i for one in images for i in one], dtype=np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> Sample:
        (name, _, conversation), images = self._read(index, open_image)
        return Sample(name, tuple(images), (conversation,))

    def outline(self, index: int) -> Sample:
        """The record's text and the sizes that its images' heads state."""
        (name, _, conversation), sizes = self._read(index, image_size)
        return Sample(name, tuple(sizes), (conversation,))

    def where(self, index: int) -> str:
        """Return the shard and key of a sample."""
        return f"{self._shard_of(index)}: {self._key_of(index)}"

    def _shard_of(self, index: int) -> Path:
        return self.shards[int(np.searchsorted(self._shard_starts, index, side="right")) - 1]

    def _key_of(self, index: int) -> str:
        return printable(self._keys[index], 200)  # of a stranger's choice

    def _read(self, index: int, look: Any) -> tuple[Record, list[Any]]:
        """A sample's record, and what ``look`` returns for each of its images."""
        if not 0 <= index < len(self):
            raise IndexError(f"index must be in 0..{len(self) - 1}, got {index}")
        shard, key, where = self._shard_of(index), self._key_of(index), self.where(index)
        images = self._images[self._image_starts[index] : self._image_starts[index + 1]].tolist()
        offset, size = self._records[index].tolist()
        if offset < 0:
            raise ValueError(f"{where}: there is no {key}.json")
        if _UNREAD in map(tuple, images):
            raise ValueError(f"{where}: a video, sound or drawing is stored with it, and not read")
        if _UNKNOWN in map(tuple, images):
            raise ValueError(
                f"{where}: the record has no images, and a member of an ending that is not read is "
                "stored with it"
            )
        if size > MAX_RECORD_BYTES:
            raise ValueError(f"{where}: the record has {size} bytes, more than {MAX_RECORD_BYTES}")
        with shard.open("rb") as file:
            file.seek(offset)
            value = parse_json(file.read(size), f"{where}: the record")
            record = read_record(value, where, stored=images)
            return record, [
                look(io.BufferedReader(_Member(file, *member)), f"{where}: an image")
                for member in images
            ]


def shards_of(path: str | Path) -> list[Path]:
    """The tars that a path or pattern stands for, in the order of their names.

    Raises:
        FileNotFoundError: there is none.
    """
    if Path(path).is_dir():
        found = sorted(Path(path).glob("*.tar"))
    else:
        found = []
        for pattern in _braces_expanded(str(path)):
            matches = sorted(Path(match) for match in glob(pattern))
            if not matches:
                raise FileNotFoundError(f"data file {pattern} does not exist")
            found += matches
    if not found:
        raise FileNotFoundError(f"data folder {path} holds no file *.tar")
    return found


def _braces_expanded(pattern: str) -> Iterator[str]:
    """``{a,b}`` and ``{000..127}`` as in a shell; no braces within braces."""
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
    """Where a shard's samples lie: (offset, size) of the record and of each image."""

    keys: list[str] = field(default_factory=list)
    records: list[tuple[int, int]] = field(default_factory=list)
    images: list[list[tuple[int, int]]] = field(default_factory=list)


def _index_of(shard: Path) -> _ShardIndex:
    index = _ShardIndex()
    seen: set[str] = set()
    unknown: set[str] = set()  # keys of members of which nothing is known
    names: list[tuple[tuple[tuple[int, str], ...], tuple[int, int]]] = []  # of the sample's images

    def close_sample() -> None:
        index.images.append([place for _, place in sorted(names)])
        names.clear()

    for member in members(shard):
        name, place = member.name, (member.offset, member.size)
        folder, slash, base = name.rpartition("/")
        stem, _, ending = base.partition(".")
        key, ending = folder + slash + stem, ending.lower()
        last = ending.rpartition(".")[2]
        is_unread = last in UNREAD_ENDINGS
        is_image = last in IMAGE_ENDINGS or is_unread
        if not (is_image or ending == "json"):
            if last not in TEXT_ENDINGS:
                unknown.add(key)
            continue
        if not index.keys or index.keys[-1] != key:
            if key in seen:
                raise ValueError(f"data file {shard} holds key {printable(key, 200)} in two places")
            seen.add(key)
            if index.keys:
                close_sample()
            index.keys.append(key)
            index.records.append(_NONE)
        if is_image:
            names.append((_by_number(ending), _UNREAD if is_unread else place))
        elif index.records[-1] != _NONE:
            raise ValueError(f"data file {shard} holds {printable(name, 200)} twice")
        else:
            index.records[-1] = place
    if index.keys:
        close_sample()
    for key, images in zip(index.keys, index.images, strict=True):
        if key in unknown and not images:
            images.append(_UNKNOWN)
    return index


def _by_number(ending: str) -> tuple[tuple[int, str], ...]:
    """A key to sort names by, with 2 before 10."""
    parts = re.findall(r"\d+|\D+", ending)
    return tuple((int(part), "") if part.isdecimal() else (-1, part) for part in parts)


# ---------------------------------------------------------------------- reading


class _Member(io.RawIOBase):
    """A member of a tar as a file, so that an image's head can be read without the rest."""

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
