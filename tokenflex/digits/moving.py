"""Clips of a moving digit, and questions about it: where, which, how many.

A yellow digit moves in a straight line over a canvas of 4 x 4 cells with resting digits of other
colours, and turns into another digit now and then. Where it starts is seen in the first frame, and
where it ends in the last; how many digits it becomes only in all of them. What a tiny model learns
of this at each split of a total of vision tokens is measured in ``docs/results/video``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from tokenflex.counts import TokenCount
from tokenflex.data.format import DataFormat, FormatOptions, FreshParts
from tokenflex.data.samples import Conversation, Sample, Turn, frames_mark
from tokenflex.digits.canvas import CELL_PIXELS, CELLS, QUADRANTS, SPLITS, YELLOW, draw_cells, scans
from tokenflex.digits.encoder import warm_up_encoder
from tokenflex.digits.processor import word_processor
from tokenflex.models.processing import TokenFlexProcessor
from tokenflex.videos import FrameSampling

FRAMES = 16
"""Frames of a clip."""

MOST_DIGITS = 4
"""Most digits that the moving one becomes in a clip."""

QUESTIONS = ("start", "end", "first", "last", "many")
"""Kinds of questions: first and last quadrant, first and last digit, and how many it becomes."""

_RESTING = (1, 3)  # fewest and most resting digits


class MovingDataset:
    """Clips with a question of each kind about them. Each question is its own conversation.

    Args:
        split: "train", "validation" or "test"; their scans are disjoint.
        size: Clips in the data set.
        frames: Frames of a clip that are shown, evenly from the first to the last.
        seed: Another seed gives other clips.

    Raises:
        ValueError: The split is unknown, the size is below 1, or ``frames`` is not 1 to 16.
    """

    def __init__(
        self, split: str = "train", *, size: int = 100_000, frames: int = FRAMES, seed: int = 0
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        if size < 1 or not 1 <= frames <= FRAMES:
            raise ValueError(
                f"size must be at least 1 and frames 1 to {FRAMES}, got size={size}, "
                f"frames={frames}"
            )
        self.split, self.size, self.seed = split, size, seed
        self.sampling = FrameSampling(frames)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        frames, answers = self._draw(index)
        chosen = self.sampling.choose(FRAMES)
        images = tuple(Image.fromarray(frames[i]) for i in chosen)
        return Sample(self._name(index), images, _conversations(answers, len(chosen)))

    def outline(self, index: int) -> Sample:
        """Return the sample with the sizes of its frames in their place."""
        _, answers = self._draw(index, pixels=False)
        number = len(self.sampling.choose(FRAMES))
        sizes = ((CELLS * CELL_PIXELS,) * 2,) * number
        return Sample(self._name(index), sizes, _conversations(answers, number))

    def _name(self, index: int) -> str:
        return f"moving-{self.split}-{index}"

    def _draw(self, index: int, pixels: bool = True) -> tuple[NDArray[np.uint8], dict[str, str]]:
        """Return uint8 [frames, side, side, 3], none without ``pixels``, and an answer by kind."""
        if not 0 <= index < self.size:
            raise IndexError(f"index must be in 0..{self.size - 1}, got {index}")
        rng = np.random.default_rng((1, self.seed, list(SPLITS).index(self.split), index))
        start, end = rng.permutation(CELLS * CELLS)[:2]
        path = _line(int(start), int(end))
        shown = _turning(rng, self.split)
        answers = {
            "start": _quadrant(path[0]),
            "end": _quadrant(path[-1]),
            "first": _digit(shown[0]),
            "last": _digit(shown[-1]),
            "many": str(len({_digit(scan) for scan in shown})),
        }
        if not pixels:
            return np.zeros((0, 0, 0, 3), np.uint8), answers
        free = [cell for cell in range(CELLS * CELLS) if cell not in path]
        resting = rng.permutation(free)[: rng.integers(_RESTING[0], _RESTING[1] + 1)]
        scans_of_cells = np.full((FRAMES, CELLS * CELLS), -1)
        colours = np.full((FRAMES, CELLS * CELLS), -1)
        scans_of_cells[:, resting] = rng.integers(*SPLITS[self.split], size=len(resting))
        colours[:, resting] = rng.integers(YELLOW, size=len(resting))
        every = np.arange(FRAMES)
        scans_of_cells[every, path], colours[every, path] = shown, YELLOW
        return (
            np.stack(
                [draw_cells(rng, *cells) for cells in zip(scans_of_cells, colours, strict=True)]
            ),
            answers,
        )


def _line(start: int, end: int) -> list[int]:
    """Return the cell of each frame on a straight line between two cells."""
    ends = np.array([divmod(start, CELLS), divmod(end, CELLS)], np.float64)
    along = np.linspace(0, 1, FRAMES)[:, None]
    rows, columns = np.floor(ends[0] + along * (ends[1] - ends[0]) + 0.5).astype(int).T
    return (rows * CELLS + columns).tolist()


def _turning(rng: np.random.Generator, split: str) -> NDArray[np.int64]:
    """Return the scan of each frame: runs of at least two frames, each of another digit."""
    number = int(rng.integers(1, MOST_DIGITS + 1))
    digits = rng.permutation(10)[:number]
    _, labels = scans()
    first, last = SPLITS[split]
    runs = 2 + rng.multinomial(FRAMES - 2 * number, np.full(number, 1 / number))
    chosen = [rng.choice(np.flatnonzero(labels[first:last] == digit)) + first for digit in digits]
    return np.repeat(chosen, runs)


def _digit(scan: int) -> str:
    return str(scans()[1][scan])


def _quadrant(cell: int) -> str:
    row, column = divmod(cell, CELLS)
    return QUADRANTS[2 * (row >= CELLS // 2) + (column >= CELLS // 2)]


def _conversations(answers: dict[str, str], num_frames: int) -> tuple[Conversation, ...]:
    mark = frames_mark(num_frames)
    return tuple(
        Conversation((Turn("user", f"{mark} {kind}"), Turn("assistant", answer)), kind)
        for kind, answer in answers.items()
    )


def moving_processor(num_image_tokens: TokenCount = 16) -> TokenFlexProcessor:
    """Build a processor for these clips, without any saved file."""
    words = [*map(str, range(10)), *QUADRANTS, *QUESTIONS]
    return word_processor(words, CELLS * CELL_PIXELS, num_image_tokens)


class MovingOptions(FormatOptions):
    """Keys of ``name: moving``."""

    split: str = "train"
    """Split of the task: "train", "validation" or "test"."""
    size: int = Field(default=100_000, ge=1)
    """Number of clips."""
    frames: int = Field(default=FRAMES, ge=1, le=FRAMES)
    """Frames of a clip that are shown, evenly from the first to the last."""

    def contradictions(self) -> Iterator[str]:
        if self.split not in SPLITS:
            known = ", ".join(map(repr, SPLITS))
            yield f"split must be one of {known} with name: moving, got {self.split!r}"


def _open(options: MovingOptions) -> MovingDataset:
    return MovingDataset(options.split, size=options.size, frames=options.frames)


def _processor(num_image_tokens: TokenCount, image_size: int) -> Any:
    return moving_processor(num_image_tokens)


def _image_problem(options: MovingOptions, image_size: Any) -> str | None:
    pixels = CELLS * CELL_PIXELS
    if pixels == image_size:
        return None
    return (
        f"model.vision.config must have image_size {pixels} for the frames of name: moving, got "
        f"{image_size!r}"
    )


FORMATS = (
    DataFormat(
        name="moving",
        open=_open,
        options=MovingOptions,
        needs_path=False,
        fresh_parts=FreshParts(_processor, warm_up_encoder, _image_problem),
    ),
)
