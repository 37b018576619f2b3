"""Samples that cannot be read: left out one by one, with the reason, up to a limit."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from tokenflex.data.samples import DataExhaustedError, SampleDataset, StreamError
from tokenflex.files import printable

REASON_LENGTH = 500
MAX_BROKEN_SAMPLES = 100
"""Samples that are left out at most, unless a caller says otherwise."""

NO_SAMPLE_TO_BLAME = (DataExhaustedError, StreamError, MemoryError)
"""Errors that another sample would meet as well: they are never taken for a broken sample."""


@dataclass(frozen=True)
class BrokenSample:
    """A sample that was left out, and why."""

    index: int
    reason: str


class BrokenSamplesError(ValueError):
    """More samples than allowed could not be read; the message names one.

    Attributes:
        broken: All of them, as far as they are known.
    """

    def __init__(self, message: str, broken: Sequence[BrokenSample] = ()) -> None:
        super().__init__(message)
        self.broken = list(broken)


@contextmanager
def leaving_out(dataset: SampleDataset, index: int, broken: list[BrokenSample]) -> Iterator[None]:
    """Add a data set's sample to ``broken`` where the block raises, whatever it raises.

    A strange record may bring any library to raise anything. The errors in
    :data:`NO_SAMPLE_TO_BLAME` pass through.
    """
    try:
        yield
    except NO_SAMPLE_TO_BLAME:
        raise
    except Exception as error:
        reason, where = reason_of(error), where_of(dataset, index)
        if where and where not in reason:
            reason = printable(f"{where}: {reason}", REASON_LENGTH)
        broken.append(BrokenSample(index, reason))


def where_of(dataset: SampleDataset, index: int) -> str:
    """Return what the data set calls a sample, for example its file and line; empty if nothing."""
    return printable(dataset.where(index), REASON_LENGTH) if hasattr(dataset, "where") else ""


def reason_of(error: Exception) -> str:
    """Describe an error on one short line.

    The type is named where it is not one that readers raise on purpose, because such an error may
    be a fault of this package instead of the sample's.
    """
    text = str(error)
    if not isinstance(error, (ValueError, OSError)) or not text:
        text = f"{type(error).__name__}: {text}"
    return printable(text, REASON_LENGTH)


def broken_records(dataset: SampleDataset) -> list[BrokenSample]:
    """Return the records that ``dataset`` found broken when it was opened.

    Readers of whole files look at every record. Those of tars, tables and streams look at a record
    when it is asked for, and know of none before.
    """
    return list(getattr(dataset, "broken", ()))


def warn_of_broken(broken: Sequence[BrokenSample]) -> None:
    """Warn of each sample that is left out, by name."""
    for one in broken:
        warnings.warn(f"left out: {one.reason}", stacklevel=2)


def check_broken(broken: Sequence[BrokenSample], most: int | None) -> None:
    """Check that no more samples are broken than allowed.

    Args:
        broken: The samples, each once.
        most: How many there may be; None for any number.

    Raises:
        BrokenSamplesError: There are more.
    """
    if most is not None and len(broken) > most:
        raise BrokenSamplesError(
            f"{len(broken)} broken samples are more than max_broken_samples of {most}, the last "
            f"is: {broken[-1].reason}",
            broken,
        )
