"""The reading task as a data format."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from tokenflex.counts import TokenCount
from tokenflex.data.format import DataFormat, FormatOptions, FreshParts
from tokenflex.digits.processor import word_processor
from tokenflex.models.processing import TokenFlexProcessor
from tokenflex.reading.content import LAYOUTS, SPLITS, all_words
from tokenflex.reading.dataset import ReadingDataset, check_layouts
from tokenflex.reading.drawing import PAGE_PIXELS
from tokenflex.reading.encoder import warm_up_encoder
from tokenflex.reading.fonts import FONTS, check_fonts


class ReadingOptions(FormatOptions):
    """Keys of ``name: reading``."""

    split: str = "train"
    """Split of the task: "train", "validation" or "test"."""
    size: int = Field(default=100_000, ge=1)
    """Number of samples."""
    questions: int = Field(default=8, ge=1)
    """Questions about each sample."""
    layouts: tuple[str, ...] = LAYOUTS
    """Layouts of the samples: "page", "wide", "tall", "table", "chart", "pair"."""
    fonts: tuple[str, ...] = FONTS
    """Fonts: names of those that matplotlib ships, or paths of font files."""

    placement: Literal["grid", "free"] = "grid"
    """Place of tables and charts: "grid", as lines of text, or "free", at any pixel."""

    def contradictions(self) -> Iterator[str]:
        if self.split not in SPLITS:
            known = ", ".join(map(repr, SPLITS))
            yield f"split must be one of {known} with name: reading, got {self.split!r}"
        for check, names in ((check_layouts, self.layouts), (check_fonts, self.fonts)):
            try:
                check(names)
            except ValueError as error:
                yield str(error)


def _open(options: ReadingOptions) -> ReadingDataset:
    return ReadingDataset(
        options.split,
        size=options.size,
        questions=options.questions,
        layouts=options.layouts,
        fonts=options.fonts,
        placement=options.placement,
    )


def reading_processor(num_image_tokens: TokenCount = 64) -> TokenFlexProcessor:
    """Build a processor for these pages, without any saved file."""
    return word_processor(all_words(), PAGE_PIXELS, num_image_tokens)


def _processor(num_image_tokens: TokenCount, image_size: int) -> Any:
    return reading_processor(num_image_tokens)


def _image_problem(options: ReadingOptions, image_size: Any) -> str | None:
    if image_size == PAGE_PIXELS:
        return None
    return (
        f"model.vision.config must have image_size {PAGE_PIXELS} for the pages of name: reading, "
        f"got {image_size!r}"
    )


FORMATS = (
    DataFormat(
        name="reading",
        open=_open,
        options=ReadingOptions,
        needs_path=False,
        fresh_parts=FreshParts(_processor, warm_up_encoder, _image_problem, takes_tiles=True),
    ),
)
