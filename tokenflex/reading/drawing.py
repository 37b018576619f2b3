"""Pages as pictures: text by Pillow, tables and charts by matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from tokenflex.reading.content import Chart, Page, Table, TextPage
from tokenflex.reading.fonts import font_of, font_path

PAGE_PIXELS = 96
"""Height and width of a page. A wide one is broader, a tall one is two of them."""
PAGE_SIZES = {
    "page": (PAGE_PIXELS, PAGE_PIXELS),
    "wide": (PAGE_PIXELS, 128),  # less than 1.5 x: a single tile, in which text is narrower
    "tall": (2 * PAGE_PIXELS, PAGE_PIXELS),
}
"""(height, width) of pages in pixels by layout; tables and charts are as "page"."""

HEADLINE, BODY, FOOTNOTE = (16,), (9, 11), (8,)
"""Sizes of type in pixels."""

_ROW = 12  # pixels of a line, as of the encoder's patches in configs/reading.yaml
_BASELINE = 9  # of a line, from its top
_MARGIN = 2  # left of a line; words begin at this and a multiple of a step
_STEP = {"page": 6, "tall": 6, "wide": 8}  # 8 pixels of a wide page are shown as 6
_SPACE = 3  # least pixels between words
_LARGEST_CHART = 10  # top of the vertical axis
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


def draw(rng: np.random.Generator, page: Page, fonts: Sequence[str]) -> Drawing:
    """Draw a page in one of the fonts, chosen at random, as are sizes, places and shades."""
    font = fonts[int(rng.integers(len(fonts)))]
    if isinstance(page, TextPage):
        image, boxes = _draw_text(rng, page, font)
    else:
        from matplotlib import style

        with style.context("default"):  # whatever the settings of the user
            if isinstance(page, Table):
                image, boxes = _draw_table(rng, page, font)
            else:
                image, boxes = _draw_chart(rng, page, font)
    return Drawing(image, tuple(boxes), font)


# ---- text


def _draw_text(
    rng: np.random.Generator, page: TextPage, font: str
) -> tuple[Image.Image, list[Box]]:
    height, width = PAGE_SIZES[page.layout]
    paper, ink = int(rng.integers(225, 256)), int(rng.integers(0, 70))
    image = Image.new("L", (width, height), paper)
    pen = _Pen(image, font, ink, _STEP[page.layout])
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
        baseline = height - _ROW + _BASELINE
        pen.write(("note", page.footnote), baseline, small, "footnote", int(rng.integers(5)))
    return image.convert("RGB"), pen.boxes


class _Pen:
    """Writes lines of words on an image, and notes where each word is."""

    def __init__(self, image: Image.Image, font: str, ink: int, step: int) -> None:
        self._draw = ImageDraw.Draw(image)
        self._font, self._ink, self._step = font, ink, step
        self._room = image.width - _MARGIN
        self.boxes: list[Box] = []

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
        font = font_of(self._font, size)
        steps = max(0, self._room - self._width(line, size)) // self._step
        left = _MARGIN + self._step * min(indent, steps)
        for column, word in enumerate(line):
            # "ls": left, on the baseline.
            self._draw.text((left, baseline), word, fill=self._ink, font=font, anchor="ls")
            x0, y0, x1, y1 = font.getbbox(word, anchor="ls")
            edges = (left + x0, baseline + y0, left + x1, baseline + y1)
            own_role = "note" if word == "note" else role
            place = (index, column) if role == "line" else (-1, -1)
            self.boxes.append(Box(word, edges, own_role, *place, size))
            left += self._advance(word, size)


# ---- tables and charts


class _Figure:
    """A matplotlib figure of a page's size without a window. Figures are drawn on many times."""

    def __init__(self, axes: tuple[float, float, float, float]) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        # At 72 dots per inch a point is a pixel.
        inches = PAGE_PIXELS / 72
        self.figure = Figure(figsize=(inches, inches), dpi=72)
        self.canvas = FigureCanvasAgg(self.figure)
        self.axes = self.figure.add_axes(axes)

    def picture(self, paper: int) -> Image.Image:
        self.figure.patch.set_facecolor((paper / 255,) * 3)
        self.canvas.draw()
        return Image.fromarray(np.asarray(self.canvas.buffer_rgba())[..., :3].copy())

    def edges(self, artist: Any) -> tuple[float, float, float, float]:
        """Return where an artist was drawn: (left, top, right, bottom) in pixels."""
        box = artist.get_window_extent(self.canvas.get_renderer())
        left, bottom, right, top = map(float, box.extents)
        return left, PAGE_PIXELS - top, right, PAGE_PIXELS - bottom


@lru_cache(maxsize=256)
def _table_figure(font: str, rows: int, columns: int) -> tuple[_Figure, Any]:
    from matplotlib.font_manager import FontProperties
    from matplotlib.transforms import Bbox

    figure = _Figure((0.05, 0.05, 0.9, 0.9))
    figure.axes.set_axis_off()
    table = figure.axes.table([[""] * columns] * rows, cellLoc="center", bbox=Bbox.unit())
    table.auto_set_font_size(False)
    for cell in table.get_celld().values():
        cell.set_text_props(fontproperties=FontProperties(fname=font_path(font)))
    return figure, table


def _draw_table(rng: np.random.Generator, table: Table, font: str) -> tuple[Image.Image, list[Box]]:
    rows, columns = len(table.rows), len(table.rows[0])
    figure, drawn = _table_figure(font, rows, columns)
    size, paper = int(rng.integers(9, 14)), int(rng.integers(225, 256))
    shades = [paper / 255, min(paper, int(rng.integers(200, 256))) / 255]
    for (row, column), cell in drawn.get_celld().items():
        cell.get_text().set_text(table.rows[row][column])
        cell.set_fontsize(size)
        cell.set_facecolor((shades[row % 2],) * 3)
        cell.set_linewidth(0.7)
    image = figure.picture(paper)
    boxes = [
        Box(
            table.rows[row][column],
            figure.edges(cell.get_text()),
            "cell",
            row,
            column,
            size,
        )
        for (row, column), cell in sorted(drawn.get_celld().items())
    ]
    return image, boxes


@lru_cache(maxsize=256)
def _chart_figure(font: str, style: str, number: int) -> tuple[_Figure, Any]:
    from matplotlib.font_manager import FontProperties

    figure = _Figure((0.13, 0.15, 0.83, 0.81))
    axes = figure.axes
    axes.set_xlim(-0.6, number - 0.4)
    axes.set_ylim(0, _LARGEST_CHART)
    axes.set_xticks(range(number), [""] * number)
    axes.set_yticks((0, 3, 6, 9))
    axes.tick_params(length=2, pad=1.5, width=0.6, labelsize=8)
    for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        label.set_fontproperties(FontProperties(fname=font_path(font), size=8))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis="y", linewidth=0.5, color="0.75")
    if style == "bar":
        return figure, axes.bar(range(number), [1] * number, width=0.7).patches
    return figure, axes.plot(range(number), [1] * number, "o-", markersize=5, linewidth=1)[0]


def _draw_chart(rng: np.random.Generator, chart: Chart, font: str) -> tuple[Image.Image, list[Box]]:
    number = len(chart.letters)
    figure, drawn = _chart_figure(font, chart.style, number)
    paper, colour = int(rng.integers(225, 256)), _COLOURS[rng.integers(len(_COLOURS))]
    axes = figure.axes
    axes.set_facecolor((paper / 255,) * 3)
    has_grid = bool(rng.integers(2))
    for tick in axes.yaxis.get_major_ticks():
        tick.gridline.set_visible(has_grid)
    axes.set_xticklabels(chart.letters)
    if chart.style == "bar":
        for bar, value in zip(drawn, chart.values, strict=True):
            bar.set_height(value)
            bar.set_facecolor(colour)
    else:
        drawn.set_ydata(chart.values)
        drawn.set_color(colour)
    image = figure.picture(paper)
    boxes = []
    for column, (letter, value) in enumerate(zip(chart.letters, chart.values, strict=True)):
        label = axes.get_xticklabels()[column]
        boxes.append(Box(letter, figure.edges(label), "letter", column=column, size=8))
        if chart.style == "bar":
            edges, role = figure.edges(drawn[column]), "bar"
        else:
            x, y = map(float, axes.transData.transform((column, value)))
            edges, role = (x - 3, PAGE_PIXELS - y - 3, x + 3, PAGE_PIXELS - y + 3), "point"
        boxes.append(Box(str(value), edges, role, column=column))
    return image, boxes
