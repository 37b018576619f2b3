"""Samples of a data set: images and what is said about them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from tokenflex.errors import ReportedError
from tokenflex.models.chat import IMAGE_MARK
from tokenflex.models.video_inputs import VIDEO_MARK, image_limits

_MARK = re.compile(rf"{IMAGE_MARK}|<video:(\d{{1,9}})>")


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

    def show_frames(self, frames: Sequence[int]) -> Conversation:
        """Return the conversation with the number of frames in each of its ``<video>`` marks.

        Raises:
            ValueError: It holds more or fewer marks than there are videos.
        """
        marks = sum(turn.text.count(VIDEO_MARK) for turn in self.turns)
        if marks != len(frames):
            raise ValueError(f"turns hold {VIDEO_MARK} {marks} times for {len(frames)} videos")
        numbers = iter(frames)
        turns = (
            replace(turn, text=re.sub(VIDEO_MARK, lambda _: frames_mark(next(numbers)), turn.text))
            for turn in self.turns
        )
        return replace(self, turns=tuple(turns))


def frames_mark(num_frames: int) -> str:
    """Return the mark of a video in a turn once the number of its frames is known."""
    return f"<video:{num_frames}>"


def split_marks(text: str) -> tuple[list[str], list[int | None]]:
    """Split the text of a turn at the marks of images and videos.

    Returns:
        The texts between the marks, one more than there are marks; and for each mark None for an
        image, or the number of a video's frames.
    """
    texts, frames, last = [], [], 0
    for match in _MARK.finditer(text):
        texts.append(text[last : match.start()])
        frames.append(None if match[1] is None else int(match[1]))
        last = match.end()
    return [*texts, text[last:]], frames


def count_images(text: str) -> int:
    """Return the number of images and frames that the marks in a turn's text stand for."""
    return sum(1 if number is None else number for number in split_marks(text)[1])


@dataclass(frozen=True)
class Sample:
    """Images and the conversations about them; conversations do not see each other.

    The turns of a conversation hold ``<image>`` (:data:`tokenflex.models.chat.IMAGE_MARK`) once per
    image, or not at all, in which case the images stand before its first user turn. Images of a
    sample are encoded once, however many conversations there are, and share the sample's
    vision-token count.

    The frames of a video are images of one tile, which stand one after another at
    :func:`frames_mark`, for example ``<video:8>``. A chat template sees a video as one image.

    Attributes:
        id: Name of the sample in messages.
        images: PIL images; in an outline, from which a sample's size follows, the (height, width)
            of each in pixels.
        conversations: Conversations about the images.
    """

    id: str
    images: tuple[Any, ...]
    conversations: tuple[Conversation, ...]

    @property
    def image_sizes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of each image in pixels."""
        return tuple(
            image if isinstance(image, tuple) else (image.height, image.width)
            for image in self.images
        )

    @property
    def max_tiles(self) -> list[int | None]:
        """The most tiles of each image: 1 for the frame of a video, None for the processor's."""
        for conversation in self.conversations:
            marks = [n for turn in conversation.turns for n in split_marks(turn.text)[1]]
            if len(limits := image_limits(marks, None)) == len(self.images):
                return limits
        return [None] * len(self.images)

    def outline(self) -> Sample:
        """Return the sample with the sizes of its images in their place."""
        return Sample(self.id, self.image_sizes, self.conversations)


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
