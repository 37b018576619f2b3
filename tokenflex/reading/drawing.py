"""Pages as pictures: text, tables and charts, drawn by Pillow in real fonts.

Words, numbers and letters stand on a grid of 12 pixels down and 6 across. Encoders with patches of
12 pixels see each glyph in few phases, and learn to read in minutes. Tables and charts can also be
drawn at any pixel, see :data:`PLACEMENTS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
from PIL import Image, ImageDraw

from tokenflex.reading.content import Chart, Page, Table, TextPage
from tokenflex.reading.fonts import font_of

PAGE_PIXELS = 96
"""Height and width of a page. A wide one is broader, a tall one is two of them."""
PAGE_SIZES = {
    "page": (PAGE_PIXELS, PAGE_PIXELS),
    "wide": (PAGE_PIXELS, 128),  # less than 1.5 x: a single tile, in which text is narrower
    "tall": (2 * PAGE_PIXELS, PAGE_PIXELS),
}
"""(height, width) of pages in pixels by layout; tables and charts are as "page"."""

PLACEMENTS = ("grid", "free")
"""Places of tables and charts: on the grid of the lines of text in the type of lines, or at any
pixel, in type of 9 to 13 pixels in tables."""

HEADLINE, BODY, FOOTNOTE, FREE_CELL = (16,), (9, 11), (8,), tuple(range(9, 14))
"""Sizes of type in pixels. Cells of tables are in BODY on the grid, else in FREE_CELL."""
AXIS_ZERO, AXIS_UNIT = 82, 8
"""Pixels from the top of a chart to its value 0, and of a unit."""

_ROW = 12  # pixels of a line, as of the encoder's patches in configs/reading.yaml
_BASELINE = 9  # of a line, from its top
_MARGIN = 2  # left of a line; words begin at this and a multiple of a step
_STEP = {"page": 6, "tall": 6, "wide": 8}  # 8 pixels of a wide page are shown as 6
_SPACE = 3  # least pixels between words
_CELL_HEIGHT, _CELL_WIDTHS = 2 * _ROW, (30, 42)  # of tables on the grid
_FREE_CELL_PIXELS, _FREE_TABLE = (16, 24), 88  # least (height, width) of cells, most of tables
_AXIS_LEFT = _ROW - 1  # of charts; its labels are to the left
_TICKS, _TICK_SIZE = (0, 3, 6, 9), 8
_BAR = 10  # pixels of a bar's width, on the grid
_POINT = 2.5  # radius in pixels
_SMOOTH = 4  # subpixels along a side of the pixels of lines and points
_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#8c564b", "#444444")


@dataclass(frozen=True)
class Box:
    """A word, number, letter, bar or point of a picture, and where it is.

    Attributes:
        text: The text; the value of a bar or point.
        edges: (left, top, right, bottom) in pixels.
        role: "headline", "line", "note" (the word before the footnote's number), "footnote",
            "cell", "letter", "bar" or "point".
        line: Index of the line or the table's row; -1 elsewhere.
        column: Index of the word in its line, of the table's column, or of the bar; -1 elsewhere.
        size: Size of type in pixels; 0 of bars and points.
    """

    text: str
    edges: tuple[float, float, float, float]
    role: str
    line: int = -1
    column: int = -1
    size: int = 0


@dataclass(frozen=True)
class Drawing:
    """A picture of a page.

    Attributes:
        image: The picture, RGB.
        boxes: What it shows.
        font: Name of its font.
    """

    image: Image.Image
    boxes: tuple[Box, ...]
    font: str


def size_of_page(page: Page) -> tuple[int, int]:
    """Return the (height, width) of a page's picture in pixels."""
    return PAGE_SIZES[page.layout if isinstance(page, TextPage) else "page"]


def draw(
    rng: np.random.Generator, page: Page, fonts: Sequence[str], placement: str = "grid"
) -> Drawing:
    """Draw a page in one of the fonts, chosen at random, as are sizes, places and shades.

    Args:
        rng: Source of randomness.
        page: What stands on the page.
        fonts: Fonts as :func:`tokenflex.reading.fonts.font_path` takes them.
        placement: One of :data:`PLACEMENTS`, for tables and charts.
    """
    font = fonts[int(rng.integers(len(fonts)))]
    paper, ink = int(rng.integers(225, 256)), int(rng.integers(0, 70))
    height, width = size_of_page(page)
    if isinstance(page, TextPage):
        pen = _Pen(Image.new("L", (width, height), paper), font, ink, _STEP[page.layout])
        _draw_text(rng, page, pen)
        return Drawing(pen.image.convert("RGB"), tuple(pen.boxes), font)
    pen = _Pen(Image.new("RGB", (width, height), (paper,) * 3), font, (ink,) * 3)
    if isinstance(page, Table):
        _draw_table(rng, page, pen, placement)
    else:
        _draw_chart(rng, page, pen, placement)
    return Drawing(pen.image, tuple(pen.boxes), font)


# ---- text


def _draw_text(rng: np.random.Generator, page: TextPage, pen: _Pen) -> None:
    large, body, small = (sizes[rng.integers(len(sizes))] for sizes in (HEADLINE, BODY, FOOTNOTE))
    row = int(rng.integers(2))
    if page.headline is not None:
        pen.write((page.headline,), 2 * _ROW - 6, large, "headline", int(rng.integers(5)))
        row = 2
    body = pen.fitting(body, page.lines)
    indent = int(rng.integers(2))
    for index, line in enumerate(page.lines):
        if page.layout == "tall" and index == page.upper:
            row = PAGE_PIXELS // _ROW + int(rng.integers(1, 3))
        pen.write(line, row * _ROW + _BASELINE, body, "line", indent, index)
        row += 1
    if page.footnote is not None:
        baseline = pen.image.height - _ROW + _BASELINE
        pen.write(("note", page.footnote), baseline, small, "footnote", int(rng.integers(5)))


class _Pen:
    """Writes words on an image, and notes where each of them is.

    Args:
        image: The image.
        font: Name of the font.
        ink: Colour of the words, of the image's mode.
        step: Pixels of which the places of a line's words are multiples.
    """

    def __init__(
        self, image: Image.Image, font: str, ink: int | tuple[int, ...], step: int = 1
    ) -> None:
        self.image, self.lines, self.ink = image, ImageDraw.Draw(image), ink
        self._font, self._step = font, step
        self._room = image.width - _MARGIN
        self.boxes: list[Box] = []

    def put(
        self,
        word: str,
        at: tuple[float, float],
        size: int,
        anchor: str = "ls",
        role: str = "",
        place: tuple[int, int] = (-1, -1),
    ) -> None:
        """Write a word.

        Args:
            word: The word.
            at: (x, y) of the anchor in pixels.
            size: Size of type in pixels.
            anchor: Anchor as of Pillow: "ls" is left, on the baseline.
            role: Role of the word's box; without one, no box is noted.
            place: (line, column) of the box.
        """
        font = font_of(self._font, size)
        self.lines.text(at, word, fill=self.ink, font=font, anchor=anchor)
        if role:
            x0, y0, x1, y1 = font.getbbox(word, anchor=anchor)
            edges = (at[0] + x0, at[1] + y0, at[0] + x1, at[1] + y1)
            self.boxes.append(Box(word, edges, role, *place, size))

    def fitting(self, size: int, lines: Sequence[Sequence[str]]) -> int:
        """Return the size, or the smallest one of lines if they are too wide at this size."""
        fits = max(self._width(line, size) for line in lines) <= self._room
        return size if fits else BODY[0]

    def _width(self, line: Sequence[str], size: int) -> int:
        """Return the pixels from the beginning of a line to the end of its last word."""
        before = sum(self._advance(word, size) for word in line[:-1])
        return before + ceil(font_of(self._font, size).getlength(line[-1]))

    def _advance(self, word: str, size: int) -> int:
        """Return the pixels from the beginning of a word to that of the next one."""
        length = font_of(self._font, size).getlength(word)
        return self._step * ceil((length + _SPACE) / self._step)

    def write(
        self, line: Sequence[str], baseline: int, size: int, role: str, indent: int, index: int = -1
    ) -> None:
        """Write a line of words.

        Args:
            line: The words.
            baseline: Where they stand, in pixels from the top.
            size: Size of type in pixels.
            role: Role of the words' boxes.
            indent: Steps before the line, as far as they fit.
            index: Index of the line in the page; -1 for headline and footnote.
        """
        steps = max(0, self._room - self._width(line, size)) // self._step
        left = _MARGIN + self._step * min(indent, steps)
        for column, word in enumerate(line):
            own_role = "note" if word == "note" else role
            place = (index, column) if role == "line" else (-1, -1)
            self.put(word, (left, baseline), size, "ls", own_role, place)
            left += self._advance(word, size)


# ---- tables and charts


def _draw_table(rng: np.random.Generator, table: Table, pen: _Pen, placement: str) -> None:
    rows, columns = len(table.rows), len(table.rows[0])
    sizes: tuple[int, ...]
    if placement == "grid":
        widths = [width for width in _CELL_WIDTHS if width * columns <= PAGE_PIXELS]
        height, width = _CELL_HEIGHT, widths[rng.integers(len(widths))]
        top = _ROW * int(rng.integers((PAGE_PIXELS - height * rows) // _ROW + 1))
        step = _STEP["page"]
        left = step * int(rng.integers((PAGE_PIXELS - width * columns) // step + 1))
        sizes, anchor = BODY, "ls"
        # A number begins and stands where a word of a line can.
        inner = (_MARGIN + step * ((width - 18) // 12), _ROW + _BASELINE)
    else:
        least_height, least_width = _FREE_CELL_PIXELS
        height = int(rng.integers(least_height, _FREE_TABLE // rows + 1))
        width = int(rng.integers(least_width, _FREE_TABLE // columns + 1))
        top = int(rng.integers(PAGE_PIXELS - height * rows))
        left = int(rng.integers(PAGE_PIXELS - width * columns))
        sizes, anchor, inner = FREE_CELL, "mm", (width // 2, height // 2 + 1)
    size, paper = sizes[rng.integers(len(sizes))], pen.image.getpixel((0, 0))
    assert isinstance(paper, tuple)
    shade = min(paper[0], int(rng.integers(200, 256)))
    right, bottom = left + width * columns, top + height * rows
    for row in range(1, rows, 2):
        edges = (left, top + row * height, right - 1, top + (row + 1) * height - 1)
        pen.lines.rectangle(edges, fill=(shade,) * 3)
    for row in range(rows + 1):
        y = min(top + row * height, PAGE_PIXELS - 1)
        pen.lines.line((left, y, right, y), fill=pen.ink)
    for column in range(columns + 1):
        x = min(left + column * width, PAGE_PIXELS - 1)
        pen.lines.line((x, top, x, bottom), fill=pen.ink)
    for row, numbers in enumerate(table.rows):
        for column, number in enumerate(numbers):
            at = (left + column * width + inner[0], top + row * height + inner[1])
            pen.put(number, at, size, anchor, "cell", (row, column))


def _draw_chart(rng: np.random.Generator, chart: Chart, pen: _Pen, placement: str) -> None:
    number = len(chart.letters)
    if placement == "grid":  # each bar or point, and its letter, in the middle of a patch
        last = PAGE_PIXELS // _ROW - 1
        step = int(rng.integers(1, (last - 1) // (number - 1) + 1)) if number < 5 else 1
        first = int(rng.integers(1, last - step * (number - 1) + 1))
        middles = [_ROW * (first + step * i) + _ROW // 2 for i in range(number)]
        half = _BAR // 2
    else:
        room = PAGE_PIXELS - _ROW
        middles = [_ROW + round(room * (i + 0.5) / number) for i in range(number)]
        half = round(0.35 * room / number)
    colour = _COLOURS[rng.integers(len(_COLOURS))]
    heights = [AXIS_ZERO - AXIS_UNIT * value for value in chart.values]
    has_grid = bool(rng.integers(2))
    for tick in _TICKS:
        y = AXIS_ZERO - AXIS_UNIT * tick
        if has_grid and tick:
            pen.lines.line((_AXIS_LEFT, y, PAGE_PIXELS, y), fill=(190,) * 3)
        pen.lines.line((_AXIS_LEFT - 2, y, _AXIS_LEFT, y), fill=pen.ink)
        pen.put(str(tick), (_AXIS_LEFT - 3, y), _TICK_SIZE, "rm")
    shapes: list[tuple[float, float, float, float]]
    marks = list(zip(middles, heights, strict=True))
    if chart.style == "bar":
        shapes = [(x - half, y, x + half - 1, AXIS_ZERO) for x, y in marks]
        for shape in shapes:
            pen.lines.rectangle(shape, fill=colour)
        role = "bar"
    else:
        shapes = _draw_points(pen.image, marks, colour)
        role = "point"
    pen.lines.line((_AXIS_LEFT, AXIS_ZERO, PAGE_PIXELS, AXIS_ZERO), fill=pen.ink)
    pen.lines.line((_AXIS_LEFT, 0, _AXIS_LEFT, AXIS_ZERO), fill=pen.ink)
    for column, (letter, value) in enumerate(zip(chart.letters, chart.values, strict=True)):
        at = (middles[column], PAGE_PIXELS - _ROW + _BASELINE)
        pen.put(letter, at, _TICK_SIZE, "ms", "letter", (-1, column))
        pen.boxes.append(Box(str(value), shapes[column], role, column=column))


def _draw_points(
    image: Image.Image, points: Sequence[tuple[int, int]], colour: str
) -> list[tuple[float, float, float, float]]:
    """Draw points and the lines between them, smoothly; return the points' edges."""
    mask = Image.new("L", (image.width * _SMOOTH, image.height * _SMOOTH))
    pen = ImageDraw.Draw(mask)
    shapes = [(x - _POINT, y - _POINT, x + _POINT, y + _POINT) for x, y in points]
    pen.line([(x * _SMOOTH, y * _SMOOTH) for x, y in points], fill=255, width=_SMOOTH)
    for shape in shapes:
        pen.ellipse([edge * _SMOOTH for edge in shape], fill=255)
    image.paste(colour, mask=mask.reduce(_SMOOTH))
    return shapes
