"""Cutting a conversation to a length, never through an image."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tokenflex.data.encoding import IGNORE


def truncate(
    ids: torch.Tensor,
    labels: torch.Tensor,
    image_lengths: Sequence[int],
    image_token_id: int,
    max_length: int,
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The beginning of a conversation that fits, with whole images only.

    It ends before the first token or image that does not fit, and then after the last token that is
    still learned: a question whose answer is gone, and images that only such a question shows,
    would be rows and tiles that nothing is learned from.

    Args:
        ids: int64 [length], with one placeholder per image.
        labels: int64 [length], -100 where nothing is learned.
        image_lengths: rows that each image takes, all its tiles together.
        image_token_id: the placeholder.
        max_length: rows at most, text and vision.

    Returns:
        The ids and labels, and how many images are left, which are the first ones. A conversation
        that fits comes back as it is.

    Raises:
        ValueError: nothing that is learned would be left.
    """
    is_image = ids == image_token_id
    rows = torch.ones_like(ids)
    rows[is_image] = torch.tensor(image_lengths, dtype=torch.int64)
    ends = rows.cumsum(0)  # rows up to and with each token
    if len(ids) == 0 or int(ends[-1]) <= max_length:
        return ids, labels, len(image_lengths)
    learned = ((labels != IGNORE) & ~is_image & (ends <= max_length)).nonzero()
    # The very first row has none before it to be predicted from.
    if not len(learned) or int(learned[-1]) == 0:
        raise ValueError(
            f"max_length of {max_length} leaves nothing to learn of its {int(ends[-1])} rows"
        )
    kept = int(learned[-1]) + 1
    return ids[:kept], labels[:kept], int(is_image[:kept].sum())
