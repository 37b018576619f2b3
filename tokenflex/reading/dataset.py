"""The reading task as a data set of samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tokenflex.data.samples import Conversation, Sample, Turn
from tokenflex.reading.content import (
    LAYOUT_ODDS,
    LAYOUTS,
    SPLITS,
    Page,
    TextPage,
    choose,
    draw_page,
    draw_pair,
    draw_pair_question,
)
from tokenflex.reading.drawing import PLACEMENTS, draw, size_of_page
from tokenflex.reading.fonts import FONTS, check_fonts


class ReadingDataset:
    """Pages with questions about them. Each question is its own conversation.

    Args:
        split: "train", "validation" or "test"; no page is in two of them.
        size: Samples in the data set.
        questions: Questions per sample.
        layouts: Layouts of the samples, of :data:`tokenflex.reading.content.LAYOUT_ODDS`.
        fonts: Fonts as :func:`tokenflex.reading.fonts.font_path` takes them.
        placement: Where tables and charts stand: "grid", as lines do, or "free", at any pixel and
            in more sizes of type, which is harder.
        seed: Another seed gives other samples.

    Raises:
        ValueError: The split, a layout, a font or the placement is unknown, a layout is repeated,
            or a number is below 1.
    """

    def __init__(
        self,
        split: str = "train",
        *,
        size: int = 100_000,
        questions: int = 8,
        layouts: Sequence[str] = LAYOUTS,
        fonts: Sequence[str] = FONTS,
        placement: str = "grid",
        seed: int = 0,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        if size < 1 or questions < 1:
            raise ValueError(
                f"size and questions must be at least 1, got size={size}, questions={questions}"
            )
        check_layouts(layouts)
        check_fonts(fonts)
        if placement not in PLACEMENTS:
            raise ValueError(f"placement must be one of {', '.join(PLACEMENTS)}, got {placement!r}")
        self.placement = placement
        self.split, self.size, self.questions, self.seed = split, size, questions, seed
        self.layouts, self.fonts = tuple(layouts), tuple(fonts)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        rng, pages, conversations = self._draw(index)
        images = tuple(draw(rng, page, self.fonts, self.placement).image for page in pages)
        return Sample(self._name(index), images, conversations)

    def outline(self, index: int) -> Sample:
        """Return the sample with the sizes of its pages in their place."""
        _, pages, conversations = self._draw(index)
        return Sample(self._name(index), tuple(map(size_of_page, pages)), conversations)

    def pages(self, index: int) -> tuple[Page, ...]:
        """Return what stands on the pages of a sample."""
        return self._draw(index)[1]

    def _name(self, index: int) -> str:
        return f"reading-{self.split}-{index}"

    def _draw(
        self, index: int
    ) -> tuple[np.random.Generator, tuple[Page, ...], tuple[Conversation, ...]]:
        """Draw all of a sample but its pictures, which the returned generator draws next."""
        if not 0 <= index < self.size:
            raise IndexError(f"index must be in 0..{self.size - 1}, got {index}")
        rng = np.random.default_rng((2, self.seed, list(SPLITS).index(self.split), index))
        layout = choose(rng, {layout: LAYOUT_ODDS[layout] for layout in self.layouts})
        pages: tuple[Page, ...]
        if layout == "pair":
            pages = draw_pair(rng, self.split)
        else:
            pages = (draw_page(rng, layout, self.split),)
        conversations = []
        for _ in range(self.questions):
            if len(pages) == 2:
                both = tuple(page for page in pages if isinstance(page, TextPage))
                kind, prompt, answer = draw_pair_question(rng, both)
            else:
                kind, prompt, answer = pages[0].draw_question(rng)
            turns = (Turn("user", prompt), Turn("assistant", answer))
            conversations.append(Conversation(turns, kind))
        return rng, pages, tuple(conversations)


def check_layouts(layouts: Sequence[str]) -> None:
    """Raise ValueError unless there is at least one layout, all are known and none is repeated."""
    if not layouts or not {*layouts} <= {*LAYOUTS} or len({*layouts}) < len(layouts):
        raise ValueError(
            f"layouts must be one or more of {', '.join(LAYOUTS)}, each once, got {list(layouts)}"
        )
