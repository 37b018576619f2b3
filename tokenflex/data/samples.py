"""What a data set gives: images and what is said about them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from PIL import Image

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
    """

    id: str
    images: tuple[Image.Image, ...]
    conversations: tuple[Conversation, ...]


@dataclass(frozen=True)
class SampleOutline:
    """What a sample's size follows from: its conversations, (height, width) of each image."""

    id: str
    image_sizes: tuple[tuple[int, int], ...]
    conversations: tuple[Conversation, ...]


class SampleDataset(Protocol):
    """A data set: any object with a length whose items are samples, the same at every asking.

    One with a method ``outline(index) -> SampleOutline``, which opens no pixels, spares every rank
    from reading the images of all others. That of a stream has no end, and ``len`` is a TypeError.
    A sample that cannot be read raises when it is asked for, and keeps its index. A data set may
    name those that it knows of beforehand in an attribute ``broken``, a list of
    :class:`tokenflex.data.faults.BrokenSample`, and a sample's place in its files by a method
    ``where(index) -> str``.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


class DataExhaustedError(ReportedError):
    """Training asks for more samples than the data may give. No sample is to blame."""


class StreamError(ReportedError):
    """A stream broke off. It is the same at the next attempt, or whole: no sample is left out."""


def size_of(dataset: SampleDataset) -> int | None:
    """How many samples there are; None for a stream, which does not know."""
    try:
        return len(dataset)
    except TypeError:
        return None
