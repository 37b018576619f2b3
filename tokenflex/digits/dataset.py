"""The digits task as a data set of samples."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
from PIL import Image

from tokenflex.data.samples import Conversation, Sample, Turn
from tokenflex.digits.canvas import CELLS, SPLITS, draw_canvas, draw_question

RECENT = 1024  # samples that are kept


class DigitsDataset:
    """Canvases with questions about them. Each question is its own conversation.

    Args:
        split: "train", "validation" or "test"; their scans are disjoint.
        size: Canvases in the data set.
        questions: Questions per canvas.
        seed: Another seed gives other canvases.
        cells: Cells per side of a canvas.

    Raises:
        ValueError: The split is unknown, the size or number of questions is below 1, or ``cells``
            is not an even number from 4 on.
    """

    def __init__(
        self,
        split: str = "train",
        *,
        size: int = 100_000,
        questions: int = 8,
        seed: int = 0,
        cells: int = CELLS,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        if size < 1 or questions < 1:
            raise ValueError(
                f"size and questions must be at least 1, got size={size}, questions={questions}"
            )
        if cells < 4 or cells % 2:
            raise ValueError(f"cells must be an even number from 4 on, got {cells}")
        self.split = split
        self.size = size
        self.questions = questions
        self.seed = seed
        self.cells = cells
        # A step is planned from its samples and then reads them: each is drawn once, not twice.
        self._recent: OrderedDict[int, Sample] = OrderedDict()

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.size:
            raise IndexError(f"index must be in 0..{self.size - 1}, got {index}")
        if index not in self._recent:
            if len(self._recent) >= RECENT:
                self._recent.popitem(last=False)
            self._recent[index] = self._draw(index)
        return self._recent[index]

    def _draw(self, index: int) -> Sample:
        rng = np.random.default_rng((self.seed, list(SPLITS).index(self.split), index))
        canvas = draw_canvas(rng, self.split, self.cells)
        conversations = []
        for _ in range(self.questions):
            kind, prompt, answer = draw_question(rng, canvas)
            turns = (Turn("user", prompt), Turn("assistant", answer))
            conversations.append(Conversation(turns, kind))
        image = Image.fromarray(canvas.pixels)
        return Sample(f"digits-{self.split}-{index}", (image,), tuple(conversations))
