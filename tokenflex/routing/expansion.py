"""Prompts before the choice of counts: one placeholder per image, with any number of tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch

from tokenflex.counts import TokenCount, join_calls, tokens_of
from tokenflex.prompts import expand_placeholders, left_padded, runs_of, tokens_of_runs


@dataclass(frozen=True)
class Prompts:
    """A batch of prompts without padding, to be expanded at the chosen counts.

    Attributes:
        rows: int64 [length] each, on the host, one placeholder per image, or per run of an
            image's placeholders.
        tiles: Number of tiles of each image, in order of appearance over all rows.
        image_token_id: The placeholder.
        pad_token_id: The token of padding.
        device: Device of the expanded inputs.
    """

    rows: tuple[torch.Tensor, ...]
    tiles: tuple[int, ...]
    image_token_id: int
    pad_token_id: int
    device: torch.device

    @property
    def images_per_row(self) -> list[int]:
        """Number of images of each row."""
        return images_per_row(self.rows, self.tiles, self.image_token_id)

    def questions(self) -> list[torch.Tensor]:
        """Return each row's text tokens."""
        return [row[row != self.image_token_id] for row in self.rows]

    def images_of(self, row: int) -> range:
        """Return the indices of a row's images."""
        ends = [0, *accumulate(self.images_per_row)]
        return range(ends[row], ends[row + 1])

    def tiles_of(self, images: Sequence[int]) -> list[int]:
        """Return the indices of these images' tiles."""
        ends = [0, *accumulate(self.tiles)]
        return [tile for image in images for tile in range(ends[image], ends[image + 1])]

    def select(self, rows: Sequence[int]) -> Prompts:
        """Return some of the rows, with their images."""
        tiles = [self.tiles[image] for row in rows for image in self.images_of(row)]
        return replace(self, rows=tuple(self.rows[row] for row in rows), tiles=tuple(tiles))

    def expanded(self, counts: Sequence[TokenCount]) -> dict[str, Any]:
        """Return inputs of ``generate``, padded on the left.

        Args:
            counts: Count of each image, for each of its tiles.

        Returns:
            ``input_ids`` and ``attention_mask`` [B, L], and with images ``num_image_tokens``, a
            count per tile.
        """
        pairs = [*zip(counts, self.tiles, strict=True)]
        sizes = [tokens_of(count) * tiles for count, tiles in pairs]
        rows = []
        for row, ids in enumerate(self.rows):
            images = self.images_of(row)
            tiles_of_row = [self.tiles[image] for image in images]
            runs = tokens_of_runs(tiles_of_row, [sizes[image] for image in images])
            rows.append(expand_placeholders(ids, runs, self.image_token_id))
        ids, mask = left_padded(rows, self.pad_token_id)
        inputs: dict[str, Any] = {
            "input_ids": ids.to(self.device),
            "attention_mask": mask.to(self.device),
        }
        if self.tiles:
            inputs["num_image_tokens"] = [count for count, tiles in pairs for _ in range(tiles)]
        return inputs


def images_per_row(
    rows: Sequence[torch.Tensor], tiles: Sequence[int], image_token_id: int
) -> list[int]:
    """Return the number of images of each row.

    Args:
        rows: int64 [length] each.
        tiles: Number of tiles of each image, which knows its runs of placeholders.
        image_token_id: The placeholder.

    Raises:
        ValueError: The images of a row and its placeholders do not fit together.
    """
    ends = [*accumulate(map(runs_of, tiles))]
    per_row, placeholders, images = [], 0, 0
    for row in rows:
        placeholders += int((row == image_token_id).sum())
        last = images
        while last < len(ends) and ends[last] <= placeholders:
            last += 1
        if (ends[last - 1] if last else 0) != placeholders:
            raise ValueError(
                f"input_ids must hold one placeholder per run of an image's placeholders, got "
                f"{placeholders} up to row {len(per_row)} for images of "
                f"{[*map(runs_of, tiles)]} runs"
            )
        per_row.append(last - images)
        images = last
    return per_row


def read_prompts(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    image_token_id: int,
    pad_token_id: int | None,
    tiles_per_image: Sequence[int] | None,
    num_tiles: int,
) -> Prompts:
    """Return the prompts of a padded batch.

    Args:
        input_ids: int64 [B, L], one placeholder per image, or per run of an image's placeholders.
        attention_mask: [B, L], 0 on padding; None without padding.
        image_token_id: The placeholder.
        pad_token_id: The token of padding; None if the tokenizer has none.
        tiles_per_image: Number of tiles of each image; 1 each if None.
        num_tiles: Number of tiles of all images.

    Raises:
        ValueError: Placeholders, images and tiles do not fit together; the message holds the
            numbers.
    """
    ids = input_ids.cpu()
    real = torch.ones_like(ids) if attention_mask is None else attention_mask.cpu()
    rows = tuple(row[keep.bool()] for row, keep in zip(ids, real, strict=True))
    per_row = [int((row == image_token_id).sum()) for row in rows]
    if tiles_per_image is None:
        tiles = [1] * sum(per_row)
    else:
        tiles = list(join_calls(tiles_per_image, sum(per_row)))
    if sum(map(runs_of, tiles)) != sum(per_row) or sum(tiles) != num_tiles:
        raise ValueError(
            "input_ids must hold one placeholder per image where counts are to be chosen: got "
            f"{sum(per_row)} placeholders (per row {per_row}) for {len(tiles)} images of {tiles} "
            f"tiles, and {num_tiles} tiles of pixels"
        )
    pad = 0 if pad_token_id is None else pad_token_id
    return Prompts(rows, tuple(tiles), image_token_id, pad, input_ids.device)
