"""A stream of rows that is asked like a data set: by position, though it is read in one direction.

The order is the ``datasets`` library's: shards shuffled, then a shuffle buffer, anew each pass. It
follows from the seed alone, so every worker and every rank sees the same sample at a position, and
a run that resumes walks there again: rows are read on the way, never decoded.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from typing import Any

from tokenflex.data.huggingface import image_folders, load_rows, outline_of_row, sample_of
from tokenflex.data.samples import DataExhaustedError, Sample, StreamError

ROWS_READ = 16  # at a time
ROWS_KEPT = 1024  # at first: those of a step are asked for twice, for the outline and the pixels


class StreamingDataset:
    """An endless data set over the rows of ``load_dataset(..., streaming=True)``, pass after pass.

    ``dataset[position]`` is the sample that stands there in the shuffled stream. Positions are
    meant to be asked for in rising order, as training does; one that lies further back than the
    rows still kept starts the stream anew, which is right but slow.

    Args:
        path: what ``load_dataset`` takes, or a folder that ``save_to_disk`` wrote.
        split: which split of it.
        shuffle_buffer: rows among which the next one is drawn.
        epochs: after how many passes the data is exhausted; None for never.
        allow_outside: as :class:`tokenflex.data.huggingface.HuggingFaceDataset` takes it.

    Raises:
        ValueError: it cannot be loaded, has other columns, or is empty.
    """

    def __init__(
        self,
        path: str,
        split: str = "train",
        *,
        shuffle_buffer: int,
        epochs: int | None = None,
        allow_outside: bool = False,
    ) -> None:
        self.path = path
        self._folders = image_folders(path, allow_outside)
        self.epochs = epochs
        self.shuffle_buffer = shuffle_buffer
        self._rows = load_rows(path, split, streaming=True).with_format("arrow")
        self._length: int | None = None  # rows of a pass, once one is over
        self._rows_kept = ROWS_KEPT
        self.shuffle(0)
        try:
            self._row(0)
        except (StreamError, DataExhaustedError) as error:
            raise ValueError(str(error)) from error

    def shuffle(self, seed: int) -> None:
        """Take the order of ``seed``; another one gives another order."""
        # One shard at a time: several would be read by threads, which do not survive a fork.
        self._shuffled = self._rows.shuffle(
            seed=seed, buffer_size=self.shuffle_buffer, max_buffer_input_shards=1
        )
        self._stop()

    def __len__(self) -> int:
        raise TypeError(f"data set {self.path} is a stream and has no length")

    def __getitem__(self, position: int) -> Sample:
        return sample_of(self._row(position), self.where(position), self._folders)

    def where(self, position: int) -> str:
        """Return the data set and the row's position in the stream."""
        return f"{self.path}[{position}]"

    def outline(self, position: int) -> Sample:
        """The row's text and the sizes that its images' heads state."""
        return outline_of_row(self._row(position), self.where(position), self._folders)

    def __getstate__(self) -> dict[str, Any]:
        """What a worker gets where it is not forked: a walk does not travel."""
        self._stop()
        return self.__dict__

    # ------------------------------------------------------------------ the walk

    def _row(self, position: int) -> dict[str, Any]:
        """The row as plain Python values; images as bytes or paths.

        Raises:
            DataExhaustedError: the stream has been passed ``epochs`` times.
            StreamError: reading failed.
        """
        if self._walk is not None and self._process != os.getpid():
            self._stop()  # a forked worker would move the files of the process it comes from
        if self._kept and position < self._kept[0][0]:
            # The next step will ask for as many again.
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

    def _start(self, number: int) -> None:
        """Begin a pass; all passes have the same rows."""
        if self.epochs is not None and number >= self.epochs:
            self._stop()
            raise DataExhaustedError(
                f"data set {self.path} ended after {self.epochs} epochs of {self._length} samples; "
                "allow more epochs, or fewer steps"
            )
        self._process, self._walk = os.getpid(), self._tables(number)
        self._pass_start = self._next = number * (self._length or 0)

    def _tables(self, number: int) -> Iterator[Any]:
        """Arrow tables of a pass."""
        self._shuffled.set_epoch(number)
        # Not `iter(rows)`: in a loader's worker that would give a share of the rows only.
        return self._shuffled.iter(batch_size=ROWS_READ)

    def _advance(self, position: int) -> None:
        """Read the next rows, or go over to the pass that holds ``position``."""
        assert self._walk is not None
        try:
            table = next(self._walk, None)
        except Exception as error:  # whatever the files or the network make of it
            broken_at = self._next
            self._stop()  # what is left of a walk that failed would look like the end of a pass
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
