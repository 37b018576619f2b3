"""The digits task as a data set of samples, behind the same interface as a user's own data."""

from __future__ import annotations

import numpy as np
from PIL import Image

from tokenflex.data.samples import Conversation, Sample, Turn
from tokenflex.digits.canvas import SPLITS, draw_canvas, draw_question


class DigitsDataset:
    """Canvases with questions about them; each question is a conversation of its own.

    Args:
        split: "train", "validation" or "test"; their scans are disjoint.
        size: canvases in the data set.
        questions: per canvas.
        seed: another seed gives other canvases.

    Raises:
        ValueError: an unknown split, or a size or number of questions below 1.
    """

    def __init__(
        self, split: str = "train", *, size: int = 100_000, questions: int = 8, seed: int = 0
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        if size < 1 or questions < 1:
            raise ValueError(
                f"size and questions must be at least 1, got size={size}, questions={questions}"
            )
        self.split = split
        self.size = size
        self.questions = questions
        self.seed = seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.size:
            raise IndexError(f"index must be in 0..{self.size - 1}, got {index}")
        rng = np.random.default_rng((self.seed, list(SPLITS).index(self.split), index))
        canvas = draw_canvas(rng, self.split)
        conversations = []
        for _ in range(self.questions):
            kind, prompt, answer = draw_question(rng, canvas)
            turns = (Turn("user", prompt), Turn("assistant", answer))
            conversations.append(Conversation(turns, kind))
        image = Image.fromarray(canvas.pixels)
        return Sample(f"digits-{self.split}-{index}", (image,), tuple(conversations))
