"""Pages as data: what stands on them, and the answers to questions about them.

A page of text has a headline, lines of words and numbers, and a footnote. A table has rows of
numbers, a chart has bars or points with a letter below each. How they look is decided in
:mod:`tokenflex.reading.drawing`; no answer depends on it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

WORDS = (
    *("sun", "moon", "tree", "bird", "fish", "lamp"),
    *("door", "rain", "milk", "coat", "desk", "hill"),
)
NUMBERS = tuple(map(str, range(10, 30)))
"""Numbers in lines, tables and footnotes."""
LETTERS = tuple("ABCDEF")
"""Letters below the bars and points of charts."""
VALUES = tuple(map(str, range(1, 10)))
"""Values of charts, and answers to how many there are."""

TEXT_LAYOUTS = ("page", "wide", "tall")
LAYOUT_ODDS = {"page": 0.4, "wide": 0.12, "tall": 0.12, "table": 0.1, "chart": 0.16, "pair": 0.1}
LAYOUTS = (*LAYOUT_ODDS,)
"""Kinds of samples: a single page, or a pair of pages."""

# Of 10 pages of equal likelihood, those that a split may show, by their digest.
SPLITS = {"train": range(8), "validation": range(8, 9), "test": range(9, 10)}

MOST_LINES = {"page": 5, "wide": 3, "tall": 7}
MOST_WORDS = {"page": 3, "wide": 4, "tall": 3}
HALF_LINES = 4
"""Most lines in a half of a tall page."""
ASKED_LINES = 2
"""Lines of a tall page whose words are asked, from the first: all of them in its upper half."""
MOST_ROWS, MOST_COLUMNS = 4, 3
FEWEST_BARS, MOST_BARS = 3, 5
_NUMBER_SHARE = 0.25
_PRESENT = 0.75  # share of pages with a headline, and of those with a footnote

Question = tuple[str, str, str]
"""Kind, prompt and answer."""


@dataclass(frozen=True)
class TextPage:
    """Lines of words and numbers.

    Attributes:
        layout: "page" (square), "wide" (short and broad) or "tall" (of two halves).
        headline: The word above the lines; None without one.
        lines: The words and numbers of each line.
        footnote: The number in the footnote; None without one.
        upper: Lines in the upper half of a tall page; all of them on others.
    """

    layout: str
    headline: str | None
    lines: tuple[tuple[str, ...], ...]
    footnote: str | None
    upper: int

    @property
    def words(self) -> set[str]:
        """Words of the lines and the headline, without numbers."""
        return ({word for line in self.lines for word in line} | {self.headline or ""}) & {*WORDS}

    def draw_question(self, rng: np.random.Generator) -> Question:
        """Draw a random question."""
        prefix = "" if self.layout == "page" else f"{self.layout} "
        kind = choose(
            rng,
            {"word": 0.5, "lines": 0.1, "headline": 0.1, "footnote": 0.15, "present": 0.15},
        )
        if kind == "word":
            asked = self.lines[:ASKED_LINES] if self.layout == "tall" else self.lines
            line = int(rng.integers(len(asked)))
            word = int(rng.integers(len(asked[line])))
            return f"{prefix}word", f"word {word_name(line, word)}", asked[line][word]
        if kind == "lines":
            return f"{prefix}lines", "lines", str(len(self.lines))
        if kind == "headline":
            return f"{prefix}headline", "headline", self.headline or "none"
        if kind == "footnote":
            return f"{prefix}footnote", "footnote", self.footnote or "none"
        name, present = _draw_present(rng, self.words)
        return f"{prefix}present", f"present {name}", "yes" if present else "no"


@dataclass(frozen=True)
class Table:
    """A table of numbers: ``rows`` of equal length."""

    rows: tuple[tuple[str, ...], ...]

    def draw_question(self, rng: np.random.Generator) -> Question:
        """Draw a random question."""
        if rng.random() < 0.15:
            return "rows", "rows", str(len(self.rows))
        row, column = int(rng.integers(len(self.rows))), int(rng.integers(len(self.rows[0])))
        return "cell", f"cell {cell_name(row, column)}", self.rows[row][column]


@dataclass(frozen=True)
class Chart:
    """A chart of bars or of points on a line.

    Attributes:
        style: "bar" or "line".
        letters: The letter below each bar or point, all different.
        values: The value of each, 1 to 9; one is the highest.
    """

    style: str
    letters: tuple[str, ...]
    values: tuple[int, ...]

    @property
    def highest(self) -> str:
        """The letter of the highest value."""
        return self.letters[self.values.index(max(self.values))]

    def draw_question(self, rng: np.random.Generator) -> Question:
        """Draw a random question."""
        if rng.random() < 0.3:
            return "highest", "highest", self.highest
        bar = int(rng.integers(len(self.letters)))
        return "value", f"value {self.letters[bar]}", str(self.values[bar])


Page = TextPage | Table | Chart


def word_name(line: int, word: int) -> str:
    """Return the token of a word's place, from 0: "l5w3" is the third word of line 5."""
    return f"l{line + 1}w{word + 1}"


def cell_name(row: int, column: int) -> str:
    """Return the token of a table's cell, from 0: "r2c3" is in row 2 and column 3."""
    return f"r{row + 1}c{column + 1}"


def draw_page(rng: np.random.Generator, layout: str, split: str) -> Page:
    """Draw a random page that belongs to a split.

    What stands on a page decides its split, so two splits share none, whatever their seeds.

    Args:
        rng: Source of randomness.
        layout: A layout of :data:`LAYOUTS` but "pair".
        split: A split of :data:`SPLITS`.
    """
    while True:
        page = _draw_content(rng, layout)
        if split_of(page) == split:
            return page


def split_of(page: Page) -> str:
    """Return the split to which a page belongs."""
    remainder = hashlib.sha256(repr(page).encode()).digest()[0] % 10
    return next(split for split, remainders in SPLITS.items() if remainder in remainders)


def draw_pair(rng: np.random.Generator, split: str) -> tuple[TextPage, TextPage]:
    """Draw two pages of text, each with a word that the other one does not have."""
    while True:
        first, second = draw_page(rng, "page", split), draw_page(rng, "page", split)
        assert isinstance(first, TextPage)
        assert isinstance(second, TextPage)
        if first.words - second.words and second.words - first.words:
            return first, second


def draw_pair_question(rng: np.random.Generator, pages: Sequence[TextPage]) -> Question:
    """Draw the question which of two pages has a word that only one of them has."""
    side = int(rng.integers(2))
    only = sorted(pages[side].words - pages[1 - side].words)
    return "pair page", f"page {only[rng.integers(len(only))]}", ("first", "second")[side]


def all_words() -> list[str]:
    """Return every word of prompts and answers, which are tokens."""
    places = [
        *(word_name(i, j) for i in range(max(MOST_LINES.values())) for j in range(4)),
        *(cell_name(i, j) for i in range(MOST_ROWS) for j in range(MOST_COLUMNS)),
    ]
    of_text = ("word", "lines", "headline", "footnote", "present")
    of_figures = ("rows", "cell", "highest", "value", "page")
    answers = ("none", "yes", "no", "first", "second")
    return [*WORDS, *VALUES, *NUMBERS, *LETTERS, *of_text, *of_figures, *answers, *places]


def _draw_content(rng: np.random.Generator, layout: str) -> Page:
    if layout == "table":
        rows, columns = int(rng.integers(2, MOST_ROWS + 1)), int(rng.integers(2, MOST_COLUMNS + 1))
        numbers = rng.integers(len(NUMBERS), size=(rows, columns))
        return Table(tuple(tuple(NUMBERS[n] for n in row) for row in numbers.tolist()))
    if layout == "chart":
        number = int(rng.integers(FEWEST_BARS, MOST_BARS + 1))
        letters = tuple(LETTERS[i] for i in rng.permutation(len(LETTERS))[:number])
        while True:
            values = rng.integers(1, len(VALUES) + 1, size=number).tolist()
            if values.count(max(values)) == 1:
                return Chart(("bar", "line")[rng.integers(2)], letters, tuple(values))
    fewest, most = (4 if layout == "tall" else 2), MOST_LINES[layout]
    if layout == "wide":
        fewest = 1
    number = int(rng.integers(fewest, most + 1))
    lines = tuple(
        tuple(map(str, (_draw_word(rng) for _ in range(rng.integers(1, MOST_WORDS[layout] + 1)))))
        for _ in range(number)
    )
    headline = WORDS[rng.integers(len(WORDS))] if rng.random() < _PRESENT else None
    footnote = NUMBERS[rng.integers(len(NUMBERS))] if rng.random() < _PRESENT else None
    upper = number
    if layout == "tall":
        least, most = max(ASKED_LINES, number - HALF_LINES), min(HALF_LINES, number - 1)
        upper = int(rng.integers(least, most + 1))
    return TextPage(layout, headline, lines, footnote, upper)


def _draw_word(rng: np.random.Generator) -> str:
    texts = NUMBERS if rng.random() < _NUMBER_SHARE else WORDS
    return texts[rng.integers(len(texts))]


def _draw_present(rng: np.random.Generator, words: set[str]) -> tuple[str, bool]:
    """Draw a word, half the time one of ``words``, and return whether it is."""
    present = bool(words) and rng.random() < 0.5
    choices = sorted(words) if present else [word for word in WORDS if word not in words]
    return choices[rng.integers(len(choices))], present


def choose(rng: np.random.Generator, odds: Mapping[str, float]) -> str:
    """Draw a key of ``odds``."""
    bounds = np.cumsum([*odds.values()])
    return [*odds][int(np.searchsorted(bounds, rng.random() * bounds[-1], side="right"))]
