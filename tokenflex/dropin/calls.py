"""The running call of a converted processor: which counts it has, and which images it has seen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import BatchFeature

from tokenflex.counts import (
    AUTO,
    Grid,
    TokenCount,
    is_one_count,
    token_grid,
    token_grids,
    tokens_of,
)
from tokenflex.dropin.sampling import CountStream
from tokenflex.prompts import ImageTiles, runs_of


@dataclass
class ProcessorState:
    """State of a converted processor: its placeholder, and the counts of calls without counts."""

    image_token: str
    counts: TokenCount | CountStream


@dataclass
class Call:
    """A running call.

    Attributes:
        grids: The grid of all images or of each; None for one placeholder per run.
        tiles: Of each image that has been replaced by its text so far.
        replayed: The texts of images that were processed before, as the prompts show them.
        replayed_tiles: Their numbers of tiles.
        was_replayed: Whether the stock processor has taken them.
        clips: The grids of each clip's frames.
    """

    grids: Grid | list[Grid] | None
    tiles: list[ImageTiles] = field(default_factory=list)
    replayed: list[str] | None = None
    replayed_tiles: list[int] = field(default_factory=list)
    was_replayed: bool = False
    clips: list[list[Grid]] = field(default_factory=list)

    def grid(self, image: int) -> Grid:
        """Return the grid of an image, where grids are known."""
        assert self.grids is not None
        return self.grids[image] if isinstance(self.grids, list) else self.grids

    def tile_counts(self) -> list[TokenCount]:
        """Return the count of each tile."""
        return [
            as_count(self.grid(image))
            for image, tiles in enumerate(self.tiles)
            for _ in range(tiles)
        ]


# Of this thread or task alone: one processor may serve several at a time.
CALL: ContextVar[Call | None] = ContextVar("_CALL", default=None)


def image_token_id(processor: Any) -> int:
    """Return the id of a converted processor's placeholder."""
    token: int = processor.tokenizer.convert_tokens_to_ids(processor._tokenflex.image_token)
    return token


def frame_token(processor: Any) -> str:
    """Return a converted processor's placeholder of frames, of a family that takes videos."""
    family = processor._tokenflex_family
    has_own = family.videos is not None and not family.frames_share_placeholder
    token: str = processor.video_prompt if has_own else processor._tokenflex.image_token
    return token


def placeholder_ids(processor: Any) -> list[int]:
    """Return the ids of a converted processor's placeholders."""
    tokens = [processor._tokenflex.image_token]
    tokens += [frame_token(processor)] if processor._tokenflex_family.takes_videos else []
    return [processor.tokenizer.convert_tokens_to_ids(token) for token in dict.fromkeys(tokens)]


def as_count(grid: Grid) -> TokenCount:
    """Return the count of a grid; that of a square is an int."""
    height, width = grid
    return height * width if height == width else grid


def nested(images: Sequence[Any], per_prompt: Sequence[int]) -> list[list[Any]]:
    """Return images as a list per prompt."""
    rest = iter(images)
    return [[next(rest) for _ in range(number)] for number in per_prompt]


@contextmanager
def running(call: Call) -> Iterator[None]:
    """Make a call the running one within a ``with`` block."""
    outer = CALL.set(call)
    try:
        yield
    finally:
        CALL.reset(outer)


def check_entries(call: Call, images: int) -> None:
    """Refuse another number of counts than of images."""
    if isinstance(call.grids, list) and len(call.grids) != images:
        raise ValueError(
            f"num_image_tokens must have one entry per image: got {len(call.grids)} entries "
            f"for {images} images"
        )


def grids_of_call(state: ProcessorState, counts: Any, images: Any) -> Grid | list[Grid] | None:
    """Return the grid of all images of a call, or of each; None where they are chosen later."""
    if isinstance(counts, str) and counts == AUTO:
        return None
    if counts is None and isinstance(state.counts, CountStream):
        # One draw per prompt, for all of its images; per image where they come as one list.
        prompts = (
            images if isinstance(images, (list, tuple)) else [] if images is None else [images]
        )
        sizes = [len(prompt) if isinstance(prompt, (list, tuple)) else 1 for prompt in prompts]
        return [grid for size in sizes for grid in [token_grid(state.counts.next())] * size]
    counts = state.counts if counts is None else counts
    if is_one_count(counts):
        return token_grid(counts, name="num_image_tokens")
    has_length = getattr(counts, "ndim", 1) and hasattr(counts, "__len__")  # not a 0-d array
    return token_grids(counts, len(counts) if has_length else 0, name="num_image_tokens")


def placeholders_in(ids: Any, placeholder: int) -> int:
    """Return the number of placeholders among ids, a tensor or lists."""
    if isinstance(ids, torch.Tensor):
        return int((ids == placeholder).sum())
    return sum(list(row).count(placeholder) for row in ids)


def check_clips_there(
    inputs: BatchFeature, placeholder: int, clips: Sequence[Sequence[Grid]], end_tokens: int
) -> None:
    """Refuse outputs of a processor whose truncation cut the placeholders of clips."""
    if "input_ids" in inputs:
        sizes = [sum(height * width for height, width in clip) + end_tokens for clip in clips]
        _check_kept(placeholders_in(inputs["input_ids"], placeholder), sum(sizes))


def check_all_there(inputs: BatchFeature, placeholder: int) -> None:
    """Refuse outputs of a processor whose truncation cut placeholders."""
    if "input_ids" not in inputs:
        return
    counts = inputs["num_image_tokens"]
    if counts == AUTO:
        expected = sum(map(runs_of, inputs["tiles_per_image"]))
    else:
        expected = sum(map(tokens_of, counts))
    _check_kept(placeholders_in(inputs["input_ids"], placeholder), expected)


def _check_kept(kept: int, expected: int) -> None:
    if kept != expected:
        raise ValueError(f"truncation must not cut vision tokens: {kept} of {expected} are left")
