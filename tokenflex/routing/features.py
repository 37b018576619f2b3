"""Inputs of the router: statistics of an image's patches, and the mean embedding of a question.

Both are cheap beside the encoder and independent of the count. They end on the host in float32,
where counts are needed, with one transfer for a whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tokenflex.models.vision import EncodedImages


def image_statistics(encoded: EncodedImages, tiles_per_image: Sequence[int]) -> torch.Tensor:
    """Return mean and standard deviation of each image's patch features, over all its tiles.

    Args:
        encoded: The tiles, image after image.
        tiles_per_image: Number of tiles of each image, adding up to those of ``encoded``.

    Returns:
        float32 [images, 2 * C] on the host.
    """
    patches = iter([height * width for height, width in encoded.grids])
    rows = [sum(next(patches) for _ in range(tiles)) for tiles in tiles_per_image]
    statistics = [torch.zeros(0, 2 * encoded.features.shape[1], device=encoded.features.device)]
    for features in encoded.features.split(rows):
        std, mean = torch.std_mean(features.float(), dim=0, correction=0)
        statistics.append(torch.cat([mean, std])[None])
    return torch.cat(statistics).cpu()


def question_embeddings(embedding: Any, questions: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the mean input embedding of each question's tokens; zeros for an empty question.

    Args:
        embedding: The language model's embedding, from int64 ids to [..., D].
        questions: Text token ids, int64 [length] each.

    Returns:
        float32 [questions, D] on the host.
    """
    device = embedding.weight.device
    lengths = torch.tensor([len(ids) for ids in questions], dtype=torch.int64)
    owner = torch.repeat_interleave(torch.arange(len(questions)), lengths).to(device)
    ids = torch.cat([*questions, torch.zeros(0, dtype=torch.int64)]).to(device)
    words = embedding(ids).float()
    sums = words.new_zeros(len(questions), words.shape[-1]).index_add_(0, owner, words)
    return sums.cpu() / lengths.clamp(min=1)[:, None]
