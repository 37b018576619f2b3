"""Samples of a data set: images and what is said about them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from tokenflex.errors import ReportedError


@dataclass(frozen=True)
class Turn:
    """One message. The answers of the assistant are what training learns."""

    role: Literal["system", "user", "assistant"]
    text: str


@dataclass(frozen=True)
class Conversation:
    """Turns that see the sample's images and each other. ``kind`` groups accuracies in reports."""

    turns: tuple[Turn, ...]
    kind: str = ""


@dataclass(frozen=True)
class Sample:
    """Images and the conversations about them; conversations do not see each other.

    The turns of a conversation hold ``<image>`` (:data:`tokenflex.models.chat.IMAGE_MARK`) once per
    image, or not at all, in which case the images stand before its first user turn. Images of a
    sample are encoded once, however many conversations there are, and share the sample's
    vision-token count.

    Attributes:
        id: for messages.
        images: PIL images; in an outline, from which a sample's size follows, the (height, width)
            of each in pixels.
        conversations: what is said about them.
    """

    id: str
    images: tuple[Any, ...]
    conversations: tuple[Conversation, ...]

    @property
    def image_sizes(self) -> list[tuple[int, int]]:
        """(height, width) of each image in pixels."""
        return [
            image if isinstance(image, tuple) else (image.height, image.width)
            for image in self.images
        ]

    def outline(self) -> Sample:
        """Return the sample with the sizes of its images in their place."""
        return Sample(self.id, tuple(self.image_sizes), self.conversations)


class SampleDataset(Protocol):
    """A data set: any object with a length whose items are samples, the same at every reading.

    One with a method ``outline(index) -> Sample``, which gives the sizes of the images in their
    place and opens no pixels, spares every rank from reading the images of all others. A stream has
    no end, and ``len`` of it is a TypeError. A sample that cannot be read raises when it is read,
    and keeps its index. A data set may name those that it knows of beforehand in an attribute
    ``broken``, a list of :class:`tokenflex.data.faults.BrokenSample`, and a sample's place in its
    files by a method ``where(index) -> str``.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


class DataExhaustedError(ReportedError):
    """Training asks for more samples than the data may give. No sample is to blame."""


class StreamError(ReportedError):
    """A stream broke off. It is the same at the next attempt, or whole: no sample is left out."""


def size_of(dataset: SampleDataset) -> int | None:
    """Return how many samples there are; None for a stream, which does not know."""
    try:
        return len(dataset)
    except TypeError:
        return None
