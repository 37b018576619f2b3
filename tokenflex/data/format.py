"""The declaration of a data format: its name, its keys in a configuration, its reader.

To add a format, write a module in ``tokenflex/data`` that defines ``FORMATS``, a tuple of
:class:`DataFormat`. :mod:`tokenflex.formats` finds it, and configurations learn its name and its
keys there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

from tokenflex.data.samples import SampleDataset
from tokenflex.videos import SHOWN_FRAMES, FrameSampling

_ENDINGS = "arrow parquet json jsonl csv tsv txt xml tar zip gz bz2 xz zst"
_ROW_FILES = frozenset(f".{ending}" for ending in _ENDINGS.split())


def row_files(path: Path) -> list[Path]:
    """Return the file at ``path``, or the files of rows in the folder."""
    if path.is_file():
        return [path]
    return [
        file
        for file in sorted(path.rglob("*"))
        # The ``datasets`` library leaves caches of its results beside the rows.
        if file.suffix in _ROW_FILES and not file.name.startswith(("cache-", "."))
        if file.is_file()
    ]


class FormatOptions(BaseModel):
    """Keys of a configuration that one format understands, with their types, defaults and bounds.

    A docstring below a key describes it. Formats may share a key if they define it alike.
    """

    model_config = ConfigDict(use_attribute_docstrings=True)

    path: Path | None = None
    """Path of the data; None for a format without one."""
    epochs: int | None = None
    """Most passes of training through the data; None for no bound."""

    def contradictions(self) -> Iterator[str]:
        """Yield what is wrong with values that are each allowed by themselves."""
        yield from ()


class VideoOptions(FormatOptions):
    """Keys of a format whose records may hold videos."""

    max_frames: int = Field(default=SHOWN_FRAMES, ge=1)
    """Most frames of a video that are shown, evenly from the first to the last."""
    fps: float | None = Field(default=None, gt=0)
    """Frames per second of a video that are shown; None for all, up to ``max_frames``."""

    @property
    def sampling(self) -> FrameSampling:
        """The rule that chooses the frames of a video."""
        return FrameSampling(self.max_frames, self.fps)


@dataclass(frozen=True)
class FreshParts:
    """Parts of a format for a model that is built from a configuration alone.

    Attributes:
        processor: Build a processor from ``num_image_tokens`` and the encoder's ``image_size``.
        warm_up: Train a vision encoder in place, instead of loading pretrained weights; called
            like :func:`tokenflex.digits.encoder.warm_up_encoder`.
        image_problem: Say why pictures of these options do not fit an ``image_size``; None if they
            do.
        takes_tiles: Pictures may be larger than ``image_size``, and cut into tiles.
    """

    processor: Callable[..., Any]
    warm_up: Callable[..., None]
    image_problem: Callable[[Any, Any], str | None]
    takes_tiles: bool = False


@dataclass(frozen=True)
class DataFormat:
    """A format of data that configurations can name.

    Attributes:
        name: The ``name`` in a configuration.
        open: Open the data set that an ``options`` object describes.
        options: The keys of a configuration that the format understands.
        needs_path: The data lies at a ``path``.
        recognises: Tell from what lies at an existing path that it is of this format.
        files: List the files at a path, for digests.
        reads_whole_files: The reader reads all of those files when it opens them.
        fresh_parts: Parts for a model without pretrained ones; None if the format has none.
    """

    name: str
    open: Callable[[Any], SampleDataset]
    options: type[FormatOptions] = FormatOptions
    needs_path: bool = True
    recognises: Callable[[Path], bool] = lambda path: False
    files: Callable[[Path], Iterable[Path]] = row_files
    reads_whole_files: bool = False
    fresh_parts: FreshParts | None = None

    @property
    def keys(self) -> dict[str, FieldInfo]:
        """The keys of a configuration that not every format has."""
        shared = FormatOptions.model_fields
        return {k: field for k, field in self.options.model_fields.items() if k not in shared}

    def options_of(self, config: Any) -> Any:
        """Return the values of this format's keys in a checked configuration."""
        keys = self.options.model_fields
        return self.options.model_construct(**{key: getattr(config, key) for key in keys})
