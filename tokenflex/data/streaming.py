"""A stream of rows that is read like a data set: by position, though only in one direction.

The order is the ``datasets`` library's: shards shuffled, then a shuffle buffer, anew each pass. It
follows from the seed alone, so every worker and every rank sees the same sample at a position. A
run that resumes walks to its position again; the rows on the way are read but not decoded.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from tokenflex.data.format import DataFormat, VideoOptions
from tokenflex.data.huggingface import HuggingFaceDataset, image_folders, load_rows
from tokenflex.data.samples import DataExhaustedError, StreamError
from tokenflex.videos import EACH_FRAME, FrameSampling

ROWS_READ = 16  # at a time
ROWS_KEPT = 1024  # initially; each step reads its rows twice, for the outline and the pixels


class StreamingDataset(HuggingFaceDataset):
    """An endless data set over the rows of ``load_dataset(..., streaming=True)``, pass after pass.

    ``dataset[position]`` is the sample at that position of the shuffled stream. Positions are
    meant to rise, as training reads them. A position before the rows that are still kept starts the
    stream anew, which is right but slow.

    Args:
        path: What ``load_dataset`` takes, or a folder that ``save_to_disk`` wrote.
        split: The split.
        shuffle_buffer: Rows among which the next one is drawn.
        epochs: Passes until the data is exhausted; None for no bound.
        allow_outside, sampling: As for :class:`tokenflex.data.huggingface.HuggingFaceDataset`.

    Raises:
        ValueError: The data set cannot be loaded, has other columns, or is empty.
    """

    def __init__(
        self,
        path: str,
        split: str = "train",
        *,
        shuffle_buffer: int,
        epochs: int | None = None,
        allow_outside: bool = False,
        sampling: FrameSampling = EACH_FRAME,
    ) -> None:
        self.path = path
        self.sampling = sampling
        self.epochs = epochs
        self.shuffle_buffer = shuffle_buffer
        self._folders = image_folders(path, allow_outside)
        self._rows = load_rows(path, split, streaming=True).with_format("arrow")
        self._length: int | None = None  # rows of a pass, once one is over
        self._rows_kept = ROWS_KEPT
        self.shuffle(0)
        try:
            self._row(0)
        except (StreamError, DataExhaustedError) as error:
            raise ValueError(str(error)) from error

    def shuffle(self, seed: int) -> None:
        """Take the order of ``seed``; another seed gives another order."""
        self._seed = seed
        self._stop()

    def __len__(self) -> int:
        raise TypeError(f"data set {self.path} is a stream and has no length")

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for a worker that is not forked; a walk cannot be pickled."""
        self._stop()
        return self.__dict__

    # ------------------------------------------------------------------ the walk

    def _row(self, position: int) -> dict[str, Any]:
        """Return the row as plain Python values; images are bytes or paths.

        Raises:
            DataExhaustedError: The stream has been passed ``epochs`` times.
            StreamError: Reading failed.
        """
        if self._walk is not None and self._process != os.getpid():
            self._stop()  # a forked worker would move the files of the process it comes from
        if self._kept and position < self._kept[0][0]:
            # The next step will go back as far.
            self._rows_kept = max(self._rows_kept, 2 * (self._next - position))
            self._stop()
        if self._walk is None:
            self._start(0 if self._length is None else position // self._length)
        while position >= self._next:
            self._advance(position)
        first, table = next(kept for kept in reversed(self._kept) if kept[0] <= position)
        return table.slice(position - first, 1).to_pylist()[0]

    def _stop(self) -> None:
        self._walk: Iterator[Any] | None = None
        self._kept: deque[tuple[int, Any]] = deque()  # (first position, table)
        self._next = 0

    def _start(self, epoch: int) -> None:
        """Begin a pass; all passes have the same rows."""
        if self.epochs is not None and epoch >= self.epochs:
            self._stop()
            raise DataExhaustedError(
                f"data set {self.path} ended after {self.epochs} epochs of {self._length} samples; "
                "allow more epochs, or fewer steps"
            )
        self._process, self._walk = os.getpid(), self._tables(epoch)
        self._pass_start = self._next = epoch * (self._length or 0)

    def _tables(self, epoch: int) -> Iterator[Any]:
        """Return the Arrow tables of a pass."""
        # A new object for each pass: the library keeps the epoch in memory that an object shares
        # with all forked workers, and reads it when the first row is asked for.
        # One shard at a time: several would be read by threads, which do not survive a fork.
        shuffled = self._rows.shuffle(
            seed=self._seed, buffer_size=self.shuffle_buffer, max_buffer_input_shards=1
        )
        shuffled.set_epoch(epoch)
        # Not `iter(rows)`, which in a loader's worker would give only a share of the rows.
        return shuffled.iter(batch_size=ROWS_READ)

    def _advance(self, position: int) -> None:
        """Read the next rows, or begin the pass that holds ``position``."""
        assert self._walk is not None
        try:
            table = next(self._walk, None)
        except Exception as error:  # of the files or the network, of any kind
            broken_at = self._next
            self._stop()  # the rest of a walk that failed would look like the end of a pass
            reason = " ".join(str(error).split())
            raise StreamError(
                f"data set {self.path} cannot be read at position {broken_at} of the stream: "
                f"{type(error).__name__}: {reason}"
            ) from error
        if table is not None:
            self._kept.append((self._next, table))
            self._next += len(table)
            while self._kept[0][0] + len(self._kept[0][1]) <= self._next - self._rows_kept:
                self._kept.popleft()
            return
        self._length = self._next - self._pass_start
        if not self._length:
            raise StreamError(f"data set {self.path} holds no samples")
        if position // self._length * self._length != self._next:
            self._kept.clear()  # whole passes are left out
        self._start(position // self._length)


class HuggingFaceOptions(VideoOptions):
    """Keys of ``name: huggingface``."""

    split: str = "train"
    """Split of the data set."""
    streaming: bool = False
    """Read rows as they come, without a copy of all of them."""
    shuffle_buffer: int = Field(default=1000, ge=1)
    """Rows of a stream among which the next one is drawn."""
    allow_outside: bool = Field(default=False, exclude=True)
    """Read images at paths outside of the folder too. It changes no sample that can be read."""

    def contradictions(self) -> Iterator[str]:
        default = HuggingFaceOptions.model_fields["shuffle_buffer"].default
        if self.shuffle_buffer != default and not self.streaming:
            yield f"shuffle_buffer needs streaming: true, got shuffle_buffer={self.shuffle_buffer}"


def _open(options: HuggingFaceOptions) -> HuggingFaceDataset | StreamingDataset:
    path, split, outside = str(options.path), options.split, options.allow_outside
    sampling = options.sampling
    if not options.streaming:
        return HuggingFaceDataset(path, split, allow_outside=outside, sampling=sampling)
    return StreamingDataset(
        path,
        split,
        shuffle_buffer=options.shuffle_buffer,
        epochs=options.epochs,
        allow_outside=outside,
        sampling=sampling,
    )


FORMATS = (
    DataFormat(name="huggingface", open=_open, options=HuggingFaceOptions, recognises=Path.is_dir),
)
