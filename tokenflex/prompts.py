"""Token ids of prompts: placeholders repeated, rows padded."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class ImageTiles(int):
    """The number of an image's tiles, and the text that stands for the image in a prompt.

    Where that text depends on the picture, as for families that mark rows and columns of tiles,
    processors return these in place of plain ints.

    Attributes:
        text: The text, with one placeholder for each run of placeholders.
        runs: Number of runs; all are of equally many tiles.
    """

    text: str
    runs: int

    def __new__(cls, tiles: int, text: str, runs: int) -> ImageTiles:
        number = super().__new__(cls, tiles)
        number.text, number.runs = text, runs
        return number

    def __reduce__(self) -> tuple[type[ImageTiles], tuple[int, str, int]]:
        return ImageTiles, (int(self), self.text, self.runs)


def runs_of(tiles: int) -> int:
    """Return the number of placeholders of an image of so many tiles, before they are repeated."""
    return tiles.runs if isinstance(tiles, ImageTiles) else 1


def tokens_of_runs(tiles: Sequence[int], tokens_per_image: Sequence[int]) -> list[int]:
    """Return the vision tokens of each run of placeholders, image after image.

    Args:
        tiles: Number of tiles of each image.
        tokens_per_image: Vision tokens of each image, all tiles together.
    """
    return [
        tokens // runs_of(number)
        for number, tokens in zip(tiles, tokens_per_image, strict=True)
        for _ in range(runs_of(number))
    ]


def expand_placeholders(
    ids: torch.Tensor, tokens_per_image: Sequence[int], image_token_id: int
) -> torch.Tensor:
    """Repeat each image's placeholder once per vision token.

    Args:
        ids: int64 [length], one placeholder per image, or per run of an image's placeholders.
        tokens_per_image: Vision tokens of each image, all tiles together; or of each run, see
            :func:`tokens_of_runs`.
        image_token_id: The placeholder.

    Raises:
        ValueError: The number of placeholders differs from the number of images.
    """
    is_image = ids == image_token_id
    if int(is_image.sum()) != len(tokens_per_image):
        raise ValueError(
            f"the prompt holds {int(is_image.sum())} placeholders for {len(tokens_per_image)} "
            "images"
        )
    repeats = torch.ones_like(ids)
    repeats[is_image] = torch.tensor(tokens_per_image, dtype=torch.int64)
    return ids.repeat_interleave(repeats)


def left_padded(rows: Sequence[torch.Tensor], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``input_ids`` and ``attention_mask``, int64 [B, L], of rows of unequal lengths."""
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), pad)
    mask = torch.zeros(len(rows), length, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, length - len(row) :] = row
        mask[i, length - len(row) :] = 1
    return ids, mask
