"""A total of vision tokens spread over a prompt's images: each upgrade goes where it gains most.

With a router, the worth of an image at a count is the router's probability. Without one it is the
detail that pooling keeps: the variance between pooled patches, which is zero for a blank page and
high for a page of print at a large count only.
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
    """Choose a count for each image greedily, by the worth gained per token.

    Every image starts at its cheapest choice. The upgrade with the highest gain per token is made
    next, until no upgrade gains anything within the budget. Of equal upgrades, the first image's
    smallest one is made.

    Args:
        worth: Worth of each image at each choice, in any unit.
        costs: Vision tokens of each image at each choice, rising.
        budget: Bound of the total cost.
        name: Name of the prompt in errors.

    Returns:
        The index of each image's choice.

    Raises:
        TypeError: ``budget`` is not an int.
        ValueError: The cheapest choices exceed the budget; the message holds both numbers.
    """
    check_count("budget", budget)
    choice = [0] * len(costs)
    left = budget - sum(cost[0] for cost in costs)
    if left < 0:
        raise ValueError(
            f"budget must be at least {budget - left}, the fewest vision tokens that the "
            f"{len(costs)} images of {name} can have, got {budget}"
        )
    while True:
        upgrades = [
            ((worth[i][now] - worth[i][j]) / (costs[i][j] - costs[i][now]), i, j)
            for i, now in enumerate(choice)
            for j in range(now + 1, len(costs[i]))
            if costs[i][j] - costs[i][now] <= left and worth[i][j] > worth[i][now]
        ]
        if not upgrades:
            return choice
        _, i, j = min(upgrades)  # the highest gain per token
        left -= costs[i][j] - costs[i][choice[i]]
        choice[i] = j


def detail_kept(
    encoded: EncodedImages, tiles_per_image: Sequence[int], grids: Sequence[Grid], pooling: str
) -> NDArray[np.float64]:
    """Return the worth of each image at each grid by its content alone, [images, grids].

    Patch features are normalised as in the projector and pooled. The worth of an image is the sum
    over its tiles of the variance between pooled patches, averaged over channels.

    Args:
        encoded: The tiles, image after image.
        tiles_per_image: Number of tiles of each image, adding up to those of ``encoded``.
        grids: Grids of the counts to choose from.
        pooling: "adaptive" or "resize", as the model pools.
    """
    features = F.layer_norm(encoded.features.float(), encoded.features.shape[-1:])
    kept = []
    for grid in grids:
        pooled = pool_norm(features, list(encoded.grids), [grid] * len(encoded), mode=pooling)
        tokens = pooled.unflatten(0, (len(encoded), grid[0] * grid[1]))
        per_tile = tokens.var(dim=1, correction=0).mean(-1).double().cpu()
        kept.append([float(tiles.sum()) for tiles in per_tile.split(list(tiles_per_image))])
    return np.array(kept).T.reshape(len(tiles_per_image), len(grids))
