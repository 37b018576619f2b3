"""Canvases of coloured handwritten digits, and questions about them.

The digits are real scans (scikit-learn's ``load_digits``, from the UCI optical recognition set).
A canvas of 4 x 4 cells, of 8 x 8 pixels each, holds 3 to 9 digits. One is yellow, the others are
red, green or blue, with one colour more frequent. Larger canvases hold as many digits per cell.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cache, cached_property
from math import isqrt

import numpy as np
from numpy.typing import NDArray

CELLS = 4  # per side by default
CELL_PIXELS = 8
COLOURS = ("red", "green", "blue", "yellow")
YELLOW = 3
BLANK = -1
QUADRANTS = ("top-left", "top-right", "bottom-left", "bottom-right")
QUESTIONS = ("read", "colour", "odd", "majority", "where", "count")
# Odds of each question: reading a digit takes the most learning.
QUESTION_ODDS = (0.4, 0.15, 0.15, 0.1, 0.1, 0.1)
_UP_TO = (np.cumsum(QUESTION_ODDS) / sum(QUESTION_ODDS)).tolist()
# Scans of one split are never drawn for another.
SPLITS = {"train": (0, 1297), "validation": (1297, 1497), "test": (1497, 1797)}

_INK = np.array([[1.0, 0.25, 0.25], [0.25, 1.0, 0.25], [0.3, 0.4, 1.0], [1.0, 0.9, 0.1]])
_NOISE = 0.05
_DOMINANT_SHARE = 0.55
_ASK_FILLED_SHARE = 0.85  # of "read" and "colour" questions


@cache
def scans() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return all scans, float64 [scans, 8, 8] of 0 to 1, and the digit of each.

    Those of a split lie next to each other, see :data:`SPLITS`.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    return digits.images[order] / 16.0, digits.target[order]


@dataclass(frozen=True)
class Canvas:
    """A picture and the truth about it.

    Attributes:
        pixels: uint8 [side, side, 3], 8 pixels a cell.
        digits: int [cells^2], the digit of each cell, or BLANK.
        colours: int [cells^2], the colour of each cell's digit in COLOURS, or BLANK.
    """

    pixels: NDArray[np.uint8]
    digits: NDArray[np.int64]
    colours: NDArray[np.int64]

    @property
    def cells(self) -> int:
        """Cells per side."""
        return isqrt(len(self.digits))

    @cached_property
    def filled(self) -> NDArray[np.int64]:
        """Indices of the cells with a digit."""
        return np.flatnonzero(self.digits != BLANK)

    def answer(self, question: str, cell: int | None = None) -> str:
        """Return the right answer. "read" and "colour" need a ``cell``, from 0, row by row."""
        if question in ("read", "colour"):
            if cell is None:
                raise ValueError(
                    f"cell must be 0..{len(self.digits) - 1} for {question!r}, got None"
                )
            if self.digits[cell] == BLANK:
                return "blank"
            return str(self.digits[cell]) if question == "read" else COLOURS[self.colours[cell]]
        odd = int(np.flatnonzero(self.colours == YELLOW)[0])
        if question == "odd":
            return str(self.digits[odd])
        if question == "where":
            row, column = divmod(odd, self.cells)
            return QUADRANTS[2 * (row >= self.cells // 2) + (column >= self.cells // 2)]
        if question == "majority":
            plain = self.colours[(self.colours != BLANK) & (self.colours != YELLOW)]
            return COLOURS[int(np.bincount(plain, minlength=YELLOW).argmax())]
        if question == "count":
            return str(len(self.filled))
        raise ValueError(f"question must be one of {', '.join(QUESTIONS)}, got {question!r}")


def fewest_and_most(side: int) -> tuple[int, int]:
    """Return the bounds of a canvas's number of digits: 3 and 9 of 16 cells."""
    return 3 * side * side // 16, 9 * side * side // 16


def draw_canvas(rng: np.random.Generator, split: str, side: int = CELLS) -> Canvas:
    """Draw a random canvas of ``side`` x ``side`` cells with scans of a split in SPLITS."""
    _, labels = scans()
    cells = side * side
    fewest, most = fewest_and_most(side)
    filled = rng.permutation(cells)[: rng.integers(fewest, most + 1)]
    chosen = rng.integers(*SPLITS[split], size=len(filled))

    ink = np.concatenate([[YELLOW], _draw_colours(rng, len(filled) - 1)])
    digits, shown, colours = (np.full(cells, BLANK) for _ in range(3))
    digits[filled], shown[filled], colours[filled] = labels[chosen], chosen, ink
    return Canvas(draw_cells(rng, shown, colours), digits, colours)


def draw_cells(
    rng: np.random.Generator, shown: NDArray[np.int64], colours: NDArray[np.int64]
) -> NDArray[np.uint8]:
    """Draw a canvas, with noise.

    Args:
        rng: Draws the noise.
        shown: int [cells^2], the index in :func:`scans` of each cell's scan, or BLANK.
        colours: int [cells^2], the colour of each cell's scan in COLOURS, or BLANK.

    Returns:
        uint8 [side, side, 3], 8 pixels a cell.
    """
    side = isqrt(len(shown))
    filled = np.flatnonzero(shown != BLANK)
    tiles = np.zeros((len(shown), CELL_PIXELS, CELL_PIXELS, 3))
    tiles[filled] = scans()[0][shown[filled]][..., None] * _INK[colours[filled]][:, None, None, :]
    rows = tiles.reshape(side, side, CELL_PIXELS, CELL_PIXELS, 3).swapaxes(1, 2)
    image = rows.reshape(side * CELL_PIXELS, side * CELL_PIXELS, 3)
    noisy = image + _NOISE * rng.standard_normal(image.shape)
    return (noisy.clip(0, 1) * 255).round().astype(np.uint8)


def _draw_colours(rng: np.random.Generator, number: int) -> NDArray[np.int64]:
    """Draw red, green or blue for ``number`` digits, with one colour the most frequent."""
    while True:
        dominant = rng.integers(YELLOW)
        others = rng.integers(YELLOW, size=number)
        colours = np.where(rng.random(number) < _DOMINANT_SHARE, dominant, others)
        _, second, most = sorted(np.bincount(colours, minlength=YELLOW).tolist())
        if most > second:
            return colours


def draw_question(rng: np.random.Generator, canvas: Canvas) -> tuple[str, str, str]:
    """Draw a random question about ``canvas``: (kind, prompt, answer)."""
    kind = QUESTIONS[bisect_right(_UP_TO, rng.random())]
    if kind not in ("read", "colour"):
        return kind, kind, canvas.answer(kind)
    cells = canvas.filled if rng.random() < _ASK_FILLED_SHARE else range(len(canvas.digits))
    cell = int(cells[rng.integers(len(cells))])
    return kind, f"{kind} {cell_name(cell, canvas.cells)}", canvas.answer(kind, cell)


def cell_name(cell: int, side: int = CELLS) -> str:
    """Return the word for a cell, one token: "r1c1" is the top-left, "r4c4" the last of 16."""
    return f"r{cell // side + 1}c{cell % side + 1}"
