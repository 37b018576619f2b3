"""A total of vision tokens spread over a prompt's images: each upgrade goes where it is worth most.

What an image is worth at a count comes from the router where there is one. Without one it is what
pooling keeps of the image's detail: the variance between its pooled patches, which a blank page
does not have and a page of print only has at a large count.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray

from tokenflex.counts import Grid
from tokenflex.models.vision import EncodedImages
from tokenflex_kernels import pool_norm
from tokenflex_kernels.checks import check_count


def spread(
    worth: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], budget: int, *, name: str
) -> list[int]:
    """Greedy on worth gained per token. Every image starts at its first, cheapest choice.

    Of all upgrades that still fit and gain anything, the one with the highest gain per token is
    made, of equal ones the first image's smallest; until there is none.

    Args:
        worth: of each image at each choice, in any unit.
        costs: vision tokens likewise, rising along an image's choices.
        budget: what the costs of all chosen must not exceed.
        name: of the prompt, for errors.

    Returns:
        The place of each image's choice.

    Raises:
        TypeError: ``budget`` is not an int.
        ValueError: even the cheapest choices exceed it; both numbers are named.
    """
    check_count("budget", budget)
    chosen = [0] * len(costs)
    left = budget - sum(cost[0] for cost in costs)
    if left < 0:
        raise ValueError(
            f"budget must be at least {budget - left}, the fewest vision tokens that the "
            f"{len(costs)} images of {name} can have, got {budget}"
        )
    while True:
        upgrades = [
            ((worth[i][now] - worth[i][j]) / (costs[i][j] - costs[i][now]), i, j)
            for i, now in enumerate(chosen)
            for j in range(now + 1, len(costs[i]))
            if costs[i][j] - costs[i][now] <= left and worth[i][j] > worth[i][now]
        ]
        if not upgrades:
            return chosen
        _, i, j = min(upgrades)  # the highest gain per token
        left -= costs[i][j] - costs[i][chosen[i]]
        chosen[i] = j


def detail_kept(
    encoded: EncodedImages, tiles_per_image: Sequence[int], grids: Sequence[Grid], pooling: str
) -> NDArray[np.float64]:
    """The worth of each image at each grid by its content alone, [images, grids].

    Patch features are normalised one by one, as the projector does; the variance between a tile's
    pooled ones, the mean over channels, is added up over the image's tiles.

    Args:
        encoded: the tiles, image after image.
        tiles_per_image: they add up to the tiles of ``encoded``.
        grids: of the counts to choose from.
        pooling: "adaptive" or "resize", as the model pools.
    """
    features = F.layer_norm(encoded.features.float(), encoded.features.shape[-1:])
    kept = []
    for height, width in grids:
        pooled = pool_norm(
            features, list(encoded.grids), [(height, width)] * len(encoded), mode=pooling
        )
        tokens = pooled.unflatten(0, (len(encoded), height * width))
        per_tile = tokens.var(dim=1, correction=0).mean(-1).double().cpu()
        kept.append([float(tiles.sum()) for tiles in per_tile.split(list(tiles_per_image))])
    return np.array(kept).T.reshape(len(tiles_per_image), len(grids))
