"""High resolution: an image cut into tiles of the encoder's size, each encoded on its own.

The rule is that of the released model (and of InternVL before it): among all grids of at most
``max_tiles`` tiles the one closest to the image's shape.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from tokenflex.counts import Grid
from tokenflex.files import excerpt
from tokenflex.images import load_image
from tokenflex_kernels.checks import check_count

MAX_TILES = 1024  # every grid up to this number of tiles is compared for each image


def check_tile_limits(min_tiles: object, max_tiles: object) -> tuple[int, int]:
    """Return both limits as ints.

    Raises:
        TypeError, ValueError: not ints from 1 to 1024, or the lower above the upper.
    """
    low, high = check_count("min_tiles", min_tiles), check_count("max_tiles", max_tiles)
    if high > MAX_TILES:
        raise ValueError(f"max_tiles must be at most {MAX_TILES}, got {excerpt(high)}")
    if low > high:
        raise ValueError(f"min_tiles must not exceed max_tiles, got {low} and {high}")
    return low, high


def best_tile_grid(image_size: Grid, tile_size: Grid, max_tiles: int, min_tiles: int = 1) -> Grid:
    """Return the (rows, columns) of tiles whose shape is closest to the image's.

    Grids are compared by the difference of width / height. Of equally close grids (2 x 2 and 1 x 1)
    the larger is taken if the image has more than half its pixels.

    Args:
        image_size: (height, width) of the image in pixels.
        tile_size: (height, width) of a tile in pixels.
        max_tiles: rows * columns at most.
        min_tiles: rows * columns at least.
    """
    height, width = image_size
    tile_height, tile_width = tile_size
    grids = [
        (rows, columns)
        for rows in range(1, max_tiles + 1)
        for columns in range(1, max_tiles // rows + 1)
        if rows * columns >= min_tiles
    ]
    best, closest = (1, 1), float("inf")
    for rows, columns in sorted(grids, key=lambda grid: (grid[0] * grid[1], grid[1])):
        difference = abs(width / height - columns * tile_width / (rows * tile_height))
        pixels = rows * columns * tile_height * tile_width
        if difference < closest or (difference == closest and height * width > 0.5 * pixels):
            best, closest = (rows, columns), difference
    return best


def num_tiles(grid: Grid, use_thumbnail: bool) -> int:
    """Return the number of tiles of an image cut into ``grid``, with its thumbnail."""
    tiles = grid[0] * grid[1]
    return tiles + (use_thumbnail and tiles > 1)


def cut_tiles(
    image: Any, tile_size: Grid, grid: Grid, *, use_thumbnail: bool, resample: int
) -> list[Any]:
    """Resize an image to ``grid`` tiles and cut it row by row, as RGB.

    Args:
        image: an array of floats [3, height, width], whose tiles are such arrays; or whatever
            :func:`tokenflex.images.load_image` takes.
        tile_size: (height, width) of a tile in pixels.
        grid: (rows, columns).
        use_thumbnail: append the whole image at tile size, where there are several tiles.
        resample: PIL's filter.
    """
    filter_ = Image.Resampling(resample)
    if isinstance(image, np.ndarray) and image.dtype.kind == "f" and image.shape[0] == 3:
        channels = [Image.fromarray(channel.astype(np.float32)) for channel in image]
        cut = [
            _cut(channel, tile_size, grid, use_thumbnail=use_thumbnail, resample=filter_)
            for channel in channels
        ]
        return [
            np.stack([np.asarray(channel) for channel in tile]) for tile in zip(*cut, strict=True)
        ]
    picture = load_image(image)
    return _cut(picture, tile_size, grid, use_thumbnail=use_thumbnail, resample=filter_)


def _cut(
    picture: Image.Image,
    tile_size: Grid,
    grid: Grid,
    *,
    use_thumbnail: bool,
    resample: Image.Resampling,
) -> list[Image.Image]:
    (height, width), (rows, columns) = tile_size, grid
    resized = picture.resize((width * columns, height * rows), resample)
    tiles = [
        resized.crop((left, top, left + width, top + height))
        for top in range(0, height * rows, height)
        for left in range(0, width * columns, width)
    ]
    if num_tiles(grid, use_thumbnail) > len(tiles):
        tiles.append(picture.resize((width, height), resample))
    return tiles
