"""Pictures of what each vision token sees: its window of patches, drawn on the enlarged picture."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from tokenflex.counts import Grid, TokenCount, token_grid
from tokenflex.serving.playground.subjects import Panel
from tokenflex_kernels.pool_norm.axis_weights import axis_map

SIDE = 480
"""Default length of the longer side of a drawn picture, in pixels."""
COLOURS = ((214, 39, 40), (31, 119, 180), (230, 126, 0), (106, 61, 154))
"""Colours of windows. Those of neighbours differ, in rows, in columns and across corners."""
PATCH_LINES = (128, 128, 128, 90)
TILE_LINES = (255, 255, 255, 255)
FILL = 44
"""Opacity of a window's fill, of 255: where windows overlap, the fill is denser."""
FONT_SIZE = 18
ROOM = 8
"""Pixels between a window's frame and the number of its token."""
GAP = 12
"""Pixels between panels."""


def windows(patches: int, tokens: int, pooling: str = "adaptive") -> list[tuple[int, int]]:
    """Return the (first, end) patches that each token of an axis averages.

    Args:
        patches: Patches along the axis.
        tokens: Vision tokens along the axis.
        pooling: "adaptive" or "resize". Windows may overlap where ``tokens`` does not divide
            ``patches``.
    """
    axis = axis_map(patches, tokens, pooling)
    return [
        (int(first), int(first + count))
        for first, count in zip(axis.first, axis.counts, strict=True)
    ]


def draw_panels(
    panels: Sequence[Panel], count: TokenCount, *, pooling: str = "adaptive", side: int = SIDE
) -> Image.Image:
    """Draw what the tokens of all tiles of a picture see.

    Args:
        panels: The picture as the encoder sees it: one panel, one more for a thumbnail, or one per
            tile.
        count: The count of each tile.
        pooling: The projector's pooling.
        side: Longer side of the first panel, in pixels. Several panels share its area.

    Returns:
        RGB, the panels side by side in rows.
    """
    columns = ceil(len(panels) ** 0.5)
    each = max(side // columns, 64)
    grid = token_grid(count)
    drawn = []
    first = 1
    for panel in panels:
        drawn.append(
            draw_cells(
                panel.picture,
                panel.patches,
                grid,
                tiles=panel.tiles,
                pooling=pooling,
                side=each,
                first_number=first,
            )
        )
        first += panel.tiles[0] * panel.tiles[1] * grid[0] * grid[1]
    return _side_by_side(drawn, columns)


def draw_cells(
    picture: Image.Image,
    patches: Grid,
    tokens: Grid,
    *,
    tiles: Grid = (1, 1),
    pooling: str = "adaptive",
    side: int = SIDE,
    first_number: int = 1,
) -> Image.Image:
    """Draw the window of each vision token on an enlarged picture.

    Thin grey lines are the patches. A coloured frame is the window of a token, with the number of
    the token where there is room. A tile has a white border.

    Args:
        picture: RGB.
        patches: (H, W) of the patch grid of each tile.
        tokens: (h, w) vision tokens of each tile.
        tiles: (rows, columns) of equal tiles that cover the picture.
        pooling: "adaptive" or "resize".
        side: Length of the longer side of the result, in pixels.
        first_number: Number of the first token.

    Returns:
        RGB of the shape of ``picture``, up to rounding.
    """
    scale = side / max(picture.size)
    size = (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
    # Single pixels of tiny pictures stay visible.
    smooth = Image.Resampling.LANCZOS if scale < 3 else Image.Resampling.NEAREST
    canvas = picture.convert("RGB").resize(size, smooth).convert("RGBA")
    rows = _Axis(size[1], tiles[0], patches[0], tokens[0], pooling)
    columns = _Axis(size[0], tiles[1], patches[1], tokens[1], pooling)

    lines = Image.new("RGBA", size)
    pen = ImageDraw.Draw(lines)
    if min(rows.patch, columns.patch) >= 4:  # closer lines would hide the picture
        for y in rows.patch_edges():
            pen.line([(0, y), (size[0], y)], fill=PATCH_LINES)
        for x in columns.patch_edges():
            pen.line([(x, 0), (x, size[1])], fill=PATCH_LINES)
    canvas.alpha_composite(lines)

    boxes = [
        (row, column, (left, top, right - 1, bottom - 1))
        for row, (top, bottom) in enumerate(rows.windows())
        for column, (left, right) in enumerate(columns.windows())
    ]
    step = min(rows.step, columns.step)
    for row, column, box in boxes:
        _tint(canvas, box, COLOURS[2 * (row % 2) + column % 2])
    pen = ImageDraw.Draw(canvas)
    for row, column, box in boxes:
        _frame(
            pen,
            box,
            COLOURS[2 * (row % 2) + column % 2],
            inset=1 + 2 * (row % 2 ^ column % 2),
            width=2 if step >= 24 else 1,
        )
    for y in rows.tile_edges():
        pen.line([(0, y), (size[0], y)], fill=TILE_LINES, width=4)
    for x in columns.tile_edges():
        pen.line([(x, 0), (x, size[1])], fill=TILE_LINES, width=4)
    height, width = tokens
    last = first_number + tiles[0] * tiles[1] * height * width - 1
    font = ImageFont.load_default(FONT_SIZE)
    if pen.textlength(str(last), font) + ROOM + 4 <= step:
        for row, column, box in boxes:
            tile = row // height * tiles[1] + column // width
            number = first_number + tile * height * width + row % height * width + column % width
            _write_number(pen, box, str(number), COLOURS[2 * (row % 2) + column % 2], font)
    return canvas.convert("RGB")


class _Axis:
    """One axis of a drawn picture: its tiles, patches and windows, in pixels."""

    def __init__(self, length: int, tiles: int, patches: int, tokens: int, pooling: str) -> None:
        self.tiles, self.patches = tiles, patches
        self.patch = length / (tiles * patches)
        self.step = length / (tiles * tokens)  # pixels from one token to the next
        self._windows = windows(patches, tokens, pooling)

    def _at(self, patch: int) -> int:
        return round(patch * self.patch)

    def patch_edges(self) -> list[int]:
        return [self._at(patch) for patch in range(1, self.tiles * self.patches)]

    def tile_edges(self) -> list[int]:
        return [self._at(tile * self.patches) for tile in range(1, self.tiles)]

    def windows(self) -> list[tuple[int, int]]:
        """Return the first pixel and the end of each token's window, tile after tile."""
        starts = range(0, self.tiles * self.patches, self.patches)
        return [
            (self._at(start + first), max(self._at(start + end), self._at(start + first) + 1))
            for start in starts
            for first, end in self._windows
        ]


Box = tuple[int, int, int, int]


def _tint(canvas: Image.Image, box: Box, colour: tuple[int, int, int]) -> None:
    left, top, right, bottom = box
    patch = Image.new("RGBA", (right - left + 1, bottom - top + 1), (*colour, FILL))
    canvas.alpha_composite(patch, (left, top))


def _frame(
    pen: ImageDraw.ImageDraw, box: Box, colour: tuple[int, int, int], *, inset: int, width: int
) -> None:
    """Draw a window's frame, inside of it: frames of neighbours do not cover each other."""
    left, top, right, bottom = box
    inset = min(inset, (right - left) // 4, (bottom - top) // 4)
    pen.rectangle((left + inset, top + inset, right - inset, bottom - inset), None, colour, width)


def _write_number(
    pen: ImageDraw.ImageDraw, box: Box, number: str, colour: tuple[int, int, int], font: Any
) -> None:
    at = (box[0] + ROOM, box[1] + ROOM - 2)
    left, top, right, bottom = pen.textbbox(at, number, font)
    pen.rounded_rectangle((left - 3, top - 2, right + 3, bottom + 2), 3, colour)
    pen.text(at, number, "white", font)


def _side_by_side(pictures: Sequence[Image.Image], columns: int) -> Image.Image:
    if len(pictures) == 1:
        return pictures[0]
    width = max(picture.width for picture in pictures)
    height = max(picture.height for picture in pictures)
    rows = ceil(len(pictures) / columns)
    sheet_size = columns * (width + GAP) - GAP, rows * (height + GAP) - GAP
    sheet = Image.new("RGB", sheet_size, "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * (width + GAP), i // columns * (height + GAP)))
    return sheet
