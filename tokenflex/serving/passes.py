"""Passes of the vision encoder over pictures of several requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from tokenflex.models.vision import EncodedImages


def encode_in_passes(
    images: Sequence[torch.Tensor],
    encode: Callable[[torch.Tensor, list[int]], EncodedImages],
    most_tiles: Callable[[torch.Tensor], int],
) -> list[EncodedImages]:
    """Encode images; those of one shape share passes.

    Args:
        images: the pixels of each, [tiles, ...].
        encode: called once per pass with pixels [tiles of the pass, ...] and the indices of its
            images, whose tiles follow each other; returns the features of all these tiles.
        most_tiles: the most tiles of a pass with such an image. An image of more has its own pass.

    Returns:
        The features of each image.
    """
    encoded: dict[int, EncodedImages] = {}
    for batch in _passes(images, most_tiles):
        features = encode(torch.cat([images[i] for i in batch]), batch)
        tiles = iter(range(len(features)))
        for i in batch:
            # A copy, as a view would keep the whole pass in memory.
            encoded[i] = features.select([next(tiles) for _ in images[i]])
    return [encoded[i] for i in range(len(images))]


def _passes(
    images: Sequence[torch.Tensor], most_tiles: Callable[[torch.Tensor], int]
) -> list[list[int]]:
    """Return the indices of the images of each pass."""
    passes: dict[torch.Size, list[list[int]]] = {}
    for i, pixels in enumerate(images):
        same_shape = passes.setdefault(pixels.shape[1:], [[]])
        tiles = sum(len(images[j]) for j in same_shape[-1]) + len(pixels)
        if same_shape[-1] and tiles > most_tiles(pixels):
            same_shape.append([])
        same_shape[-1].append(i)
    return [batch for batches in passes.values() for batch in batches]
