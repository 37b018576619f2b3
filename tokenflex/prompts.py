"""Token ids of prompts: placeholders repeated, rows padded."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def expand_placeholders(
    ids: torch.Tensor, tokens_per_image: Sequence[int], image_token_id: int
) -> torch.Tensor:
    """Repeat each image's placeholder once per vision token.

    Args:
        ids: int64 [length], one placeholder per image.
        tokens_per_image: Vision tokens of each image, all tiles together.
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
