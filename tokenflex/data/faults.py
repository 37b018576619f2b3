"""Samples that cannot be read: they are left out, with the reason, up to a limit."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from tokenflex.data.samples import DataExhaustedError, SampleDataset, StreamError
from tokenflex.errors import REASON_LENGTH
from tokenflex.files import printable

MAX_BROKEN_SAMPLES = 100
"""Default limit of samples that are left out."""

NO_SAMPLE_TO_BLAME = (DataExhaustedError, StreamError, MemoryError)
"""Errors that another sample would meet as well: no sample counts as broken for them."""


@dataclass(frozen=True)
class BrokenSample:
    """A sample that was left out, and why."""

    index: int
    reason: str


class BrokenSamplesError(ValueError):
    """More samples than allowed cannot be read; the message names one.

    Attributes:
        broken: All broken samples that are known.
    """

    def __init__(self, message: str, broken: Sequence[BrokenSample] = ()) -> None:
        super().__init__(message)
        self.broken = list(broken)


@contextmanager
def leaving_out(dataset: SampleDataset, index: int, broken: list[BrokenSample]) -> Iterator[None]:
    """Add a sample to ``broken`` if the block raises, since a strange record may raise anything.

    The errors in :data:`NO_SAMPLE_TO_BLAME` pass through.
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
    """Return the data set's name for a sample, such as its file and line; empty if it has none."""
    return printable(dataset.where(index), REASON_LENGTH) if hasattr(dataset, "where") else ""


def reason_of(error: Exception) -> str:
    """Describe an error on one short line.

    An error that readers do not raise on purpose is named by its type: it may be a fault of this
    package instead of the sample's.
    """
    text = str(error)
    if not isinstance(error, (ValueError, OSError)) or not text:
        text = f"{type(error).__name__}: {text}"
    return printable(text, REASON_LENGTH)


def broken_records(dataset: SampleDataset) -> list[BrokenSample]:
    """Return the records that ``dataset`` found broken when it was opened.

    Readers of whole files check every record then. Readers of tars, tables and streams check a
    record when its sample is read, and know of none before.
    """
    return list(getattr(dataset, "broken", ()))


def warn_of_broken(broken: Sequence[BrokenSample]) -> None:
    """Warn of each sample that is left out, with the reason."""
    for sample in broken:
        warnings.warn(f"left out: {sample.reason}", stacklevel=2)


def check_broken(broken: Sequence[BrokenSample], most: int | None) -> None:
    """Check that at most ``most`` samples are broken; None allows any number.

    Raises:
        BrokenSamplesError: More samples are broken.
    """
    if most is not None and len(broken) > most:
        raise BrokenSamplesError(
            f"{len(broken)} broken samples are more than max_broken_samples of {most}, the last "
            f"is: {broken[-1].reason}",
            broken,
        )
