"""A file of records, and images that are files."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import Field

from tokenflex.data.faults import BrokenSample
from tokenflex.data.format import DataFormat, VideoOptions
from tokenflex.data.image_paths import ImageFolder
from tokenflex.data.json_records import NoListError, first_byte, list_elements, parsed_lines
from tokenflex.data.records import (
    MAX_RECORD_BYTES,
    Record,
    RecordDataset,
    read_record,
    source_of,
)
from tokenflex.files import describe_payload, parse_json
from tokenflex.images import open_image as open_image  # users import it from this module too
from tokenflex.terminal import watched
from tokenflex.videos import EACH_FRAME, FrameSampling

_NAMED_IN_ERRORS = 3


class MessagesDataset(RecordDataset):
    """Samples from a file of records, one a line (JSONL) or all in one JSON list.

    A record is ``{"images": ["a.png"], "messages": [{"role": "user", "content": "What is it?"},
    {"role": "assistant", "content": "A cat."}]}``. ``content`` is a string with ``<image>`` at the
    images, or without, in which case they stand before the first user turn; or it is a list of
    ``{"type": "image"}`` and ``{"type": "text", "text": ...}`` parts. A single image may also be
    given as ``image``. ``id`` and ``kind`` (a label to group accuracies by) are optional.

    A video stands at ``<video>`` and is a path under ``video`` or ``videos``, or a part
    ``{"type": "video"}``: of a GIF, a WebP, a folder of frames or a video file.

    In LLaVA's layout a record is ``{"image": "a.png", "conversations": [{"from": "human", "value":
    "<image>What is it?"}, {"from": "gpt", "value": "A cat."}]}``.

    The whole file is read and checked at once. A record that is not of this form keeps its index,
    is listed in :attr:`broken`, and raises when it is read. Images are opened when a sample is
    read.

    Args:
        path: The file, in UTF-8 with or without a byte-order mark.
        image_folder: Folder that image paths are relative to. The file's own folder if None.
        allow_outside: Read images whose path leaves that folder, by ``..``, from the root of the
            file system, or by a symbolic link. Otherwise such a record is broken.
        sampling: Chooses the frames of videos.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file holds no samples, or none that can be read; or it is a list that is cut
            off. The message names the first broken records.
    """

    def __init__(
        self,
        path: str | Path,
        image_folder: str | Path | None = None,
        *,
        allow_outside: bool = False,
        sampling: FrameSampling = EACH_FRAME,
    ) -> None:
        self.path = Path(path)
        self.sampling = sampling
        if not self.path.is_file():
            raise FileNotFoundError(f"data file {path} does not exist")
        self._folder = ImageFolder(
            self.path.parent if image_folder is None else image_folder, allow_outside
        )
        self._lines = array("Q")  # line number of each record; empty for a list
        self._records = self._read()  # for a broken record, the reason
        if not self._records:
            raise ValueError(f"data file {path} holds no samples, in a list or one a line")
        broken = self.broken
        if len(broken) == len(self._records):
            named = "; ".join(sample.reason for sample in broken[:_NAMED_IN_ERRORS])
            raise ValueError(
                f"data file {path} holds no samples that can be read, out of "
                f"{len(self._records)}: {named}"
            )

    def _read(self) -> list[Record | str]:
        name = str(self.path)
        with self.path.open("rb") as file:
            if first_byte(file) == b"[":
                # A byte that is not UTF-8 becomes half of a surrogate pair: its record is refused.
                text = file.read().decode("utf-8", "surrogateescape")
                try:
                    return [
                        self._checked(value, f"{name}[{i}]")
                        for i, value in enumerate(self._watched(list_elements(text, name)))
                    ]
                except NoListError:
                    pass  # lines, of which the first is a list
            records = []
            for number, value in self._watched(parsed_lines(file, name)):
                self._lines.append(number)
                records.append(self._checked(value, f"{name}:{number}"))
            return records

    def _watched(self, values: Iterator[Any]) -> Iterator[Any]:
        return watched(values, f"reading {self.path.name}", unit="record")

    def _checked(self, value: Any, where: str) -> Record | str:
        try:
            if isinstance(value, ValueError):
                raise value
            record = read_record(value, where)
            for item in record[1]:
                path, kind = source_of(item)
                self._folder.check(path, where, kind)
        except ValueError as error:
            return str(error)
        return record

    def where(self, index: int) -> str:
        """Return the file and line of a record, or its index in the list."""
        return f"{self.path}:{self._lines[index]}" if self._lines else f"{self.path}[{index}]"

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

    def _record(self, index: int) -> Record:
        record = self._records[index]
        if isinstance(record, str):
            raise ValueError(record)
        return record

    def _media_files(self, media: Sequence[Any], where: str) -> Iterator[tuple[Path, str]]:
        for item in media:
            path, kind = source_of(item)
            file = self._folder.file(path, where, kind)
            yield file, f"{where}: {kind} file {describe_payload(path) or file}"

    def _check_frame(self, path: Path, where: str) -> None:
        self._folder.file(str(path.absolute()), where)


# ---------------------------------------------------------------------- the formats


class MessagesOptions(VideoOptions):
    """Keys of ``name: messages`` and ``name: llava``."""

    image_folder: Path | None = None
    """Folder that image paths are relative to; that of the data file if None."""
    allow_outside: bool = Field(default=False, exclude=True)
    """Read images at paths outside of the folder too. It changes no sample that can be read."""


def layout_of(path: Path) -> str | None:
    """Return the key of a file's turns, "messages" or "conversations"; None for other files.

    A list, and a file whose first line has only ``conversations``, is in LLaVA's layout. A
    byte-order mark and blank lines may come first.
    """
    if not path.is_file():
        return None
    with path.open("rb") as file:
        first = first_byte(file)
        line = file.readline(MAX_RECORD_BYTES) if first == b"{" else b"{}"
    if first not in (b"[", b"{", b""):
        return None
    try:
        record = parse_json(line, "line")
    except ValueError:  # its reader says what is wrong
        record = {}
    is_llava = first == b"[" or ("messages" not in record and "conversations" in record)
    return "conversations" if is_llava else "messages"


def _open(options: MessagesOptions) -> MessagesDataset:
    assert options.path is not None  # checked by DataConfig
    return MessagesDataset(
        options.path,
        options.image_folder,
        allow_outside=options.allow_outside,
        sampling=options.sampling,
    )


_MESSAGES = DataFormat(
    name="messages",
    open=_open,
    options=MessagesOptions,
    recognises=lambda path: layout_of(path) == "messages",
    reads_whole_files=True,
)
_LLAVA = replace(
    _MESSAGES, name="llava", recognises=lambda path: layout_of(path) == "conversations"
)
FORMATS = (_MESSAGES, _LLAVA)
