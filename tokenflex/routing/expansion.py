"""Prompts whose counts are not chosen yet: one placeholder an image, any number of tiles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from tokenflex.counts import TokenCount, join_calls, token_grid


@dataclass(frozen=True)
class Prompts:
    """A batch of prompts without padding, to be expanded at whatever counts are chosen.

    Attributes:
        rows: int64 [length] each, on the host, one placeholder per image.
        tiles: of each image, in order of appearance over all rows.
        image_token_id: the placeholder.
        pad_token_id: what stands in padding.
        device: where expanded inputs go.
    """

    rows: tuple[torch.Tensor, ...]
    tiles: tuple[int, ...]
    image_token_id: int
    pad_token_id: int
    device: torch.device

    @property
    def images_per_row(self) -> list[int]:
        return [int((row == self.image_token_id).sum()) for row in self.rows]

    def questions(self) -> list[torch.Tensor]:
        """Each row's text tokens."""
        return [row[row != self.image_token_id] for row in self.rows]

    def images_of(self, row: int) -> range:
        """The images of a row, as places among all."""
        ends = [0, *accumulate(self.images_per_row)]
        return range(ends[row], ends[row + 1])

    def tiles_of(self, images: Sequence[int]) -> list[int]:
        """The tiles of these images, as places among all."""
        ends = [0, *accumulate(self.tiles)]
        return [tile for image in images for tile in range(ends[image], ends[image + 1])]

    def select(self, rows: Sequence[int]) -> Prompts:
        """Some of the rows, with their images."""
        tiles = [self.tiles[image] for row in rows for image in self.images_of(row)]
        return Prompts(
            tuple(self.rows[row] for row in rows),
            tuple(tiles),
            self.image_token_id,
            self.pad_token_id,
            self.device,
        )

    def expanded(self, counts: Sequence[TokenCount]) -> dict[str, Any]:
        """What ``generate`` takes, padded on the left.

        Args:
            counts: of each image; each of its tiles gets as many vision tokens.

        Returns:
            ``input_ids`` and ``attention_mask`` [B, L], and with images ``num_image_tokens``, a
            count per tile.
        """
        sizes = [height * width for height, width in map(token_grid, counts)]
        repeats = iter([size * tiles for size, tiles in zip(sizes, self.tiles, strict=True)])
        rows = [self._expanded_row(row, repeats) for row in self.rows]
        length = max(map(len, rows))
        ids = torch.full((len(rows), length), self.pad_token_id)
        mask = torch.zeros(len(rows), length, dtype=torch.int64)
        for i, row in enumerate(rows):
            ids[i, length - len(row) :] = row
            mask[i, length - len(row) :] = 1
        inputs: dict[str, Any] = {
            "input_ids": ids.to(self.device),
            "attention_mask": mask.to(self.device),
        }
        if self.tiles:
            inputs["num_image_tokens"] = [
                count for count, tiles in zip(counts, self.tiles, strict=True) for _ in range(tiles)
            ]
        return inputs

    def _expanded_row(self, row: torch.Tensor, repeats: Iterator[int]) -> torch.Tensor:
        times = torch.ones_like(row)
        for place in (row == self.image_token_id).nonzero().flatten().tolist():
            times[place] = next(repeats)
        return row.repeat_interleave(times)


def read_prompts(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    image_token_id: int,
    pad_token_id: int | None,
    tiles_per_image: Sequence[int] | None,
    num_tiles: int,
) -> Prompts:
    """Prompts of a padded batch, once their placeholders fit the tiles that are given.

    Args:
        input_ids: int64 [B, L], one placeholder per image.
        attention_mask: [B, L], 0 on padding; None where there is none.
        image_token_id: the placeholder.
        pad_token_id: None if the tokenizer has none.
        tiles_per_image: one each if None.
        num_tiles: how many tiles there are.

    Raises:
        ValueError: placeholders, images and tiles do not fit together; the numbers are named.
    """
    ids = input_ids.cpu()
    real = torch.ones_like(ids) if attention_mask is None else attention_mask.cpu()
    rows = tuple(row[keep.bool()] for row, keep in zip(ids, real, strict=True))
    per_row = [int((row == image_token_id).sum()) for row in rows]
    if tiles_per_image is None:
        tiles = [1] * sum(per_row)
    else:
        tiles = list(join_calls(tiles_per_image, sum(per_row)))
    if len(tiles) != sum(per_row) or sum(tiles) != num_tiles:
        raise ValueError(
            "input_ids must hold one placeholder per image where counts are to be chosen: got "
            f"{sum(per_row)} placeholders (per row {per_row}) for {len(tiles)} images of {tiles} "
            f"tiles, and {num_tiles} tiles of pixels"
        )
    pad = 0 if pad_token_id is None else pad_token_id
    return Prompts(rows, tuple(tiles), image_token_id, pad, input_ids.device)
