"""A step's samples dealt into bins of equal cost: first one by one, then by exchanges.

`tokenflex_kernels.balance_bins` deals samples, the costliest first, each to the cheapest bin. With
a handful of samples a bin the last ones no longer fill the gaps. So the costliest bin then swaps a
sample for one of another bin, or gives it away, whatever helps most, until nothing does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tokenflex_kernels import balance_bins

ENOUGH = 1.002  # the costliest bin over the mean


def deal(
    tokens: Sequence[int],
    tiles: Sequence[int],
    *,
    max_tokens: int,
    max_tiles: int,
    tile_cost: float,
    num_ranks: int,
) -> list[list[int]]:
    """Sample indices per bin, by falling cost; the number of bins is a multiple of the ranks'.

    Args:
        tokens: language-model rows per sample.
        tiles: vision-encoder inputs per sample.
        max_tokens, max_tiles: what a bin may hold.
        tile_cost: the cost of a tile in units of a row's.
        num_ranks: processes that share the step.

    Raises:
        ValueError: as :func:`tokenflex_kernels.balance_bins`.
    """
    bounds: dict[str, Any] = {
        "max_tokens": max_tokens,
        "max_tiles": max_tiles,
        "tile_cost": tile_cost,
    }
    dealt = balance_bins(tokens, tiles, **bounds, multiple_of=num_ranks)
    return even_out(dealt, tokens, tiles, **bounds)


def even_out(
    bins: Sequence[Sequence[int]],
    tokens: Sequence[int],
    tiles: Sequence[int],
    *,
    max_tokens: int,
    max_tiles: int,
    tile_cost: float,
) -> list[list[int]]:
    """Exchange samples until no single exchange makes the costliest bin cheaper.

    Each takes O(samples of the costliest bin x all samples); a step of 64 ranks and 8 samples each
    needs about 40, which take milliseconds. Stops early once the costliest bin is 0.2 % above the
    mean.

    Args:
        bins: sample indices per bin, within both bounds.
        tokens: language-model rows per sample.
        tiles: vision-encoder inputs per sample.
        max_tokens, max_tiles: what a bin may hold.
        tile_cost: the cost of a tile in units of a row's.

    Returns:
        As many bins, within the bounds, by falling cost (among equals in the order given); the
        costliest costs no more than before.
    """
    if not bins:
        return []
    rows = np.asarray(tokens, dtype=np.float64)
    inputs = np.asarray(tiles, dtype=np.float64)
    # To give a sample away is to swap it for nothing: each bin holds one such nothing, at the end.
    sizes = np.stack([rows + tile_cost * inputs, rows, inputs])
    sizes = np.concatenate([sizes, np.zeros((3, len(bins)))], axis=1)
    place = np.empty(sizes.shape[1], dtype=np.int64)
    for bin_index, members in enumerate(bins):
        place[list(members)] = bin_index
    place[len(rows) :] = np.arange(len(bins))
    held = [np.bincount(place, size, minlength=len(bins)) for size in sizes]
    sums = np.stack(held).astype(np.float64)
    bounds = np.array([np.inf, max_tokens, max_tiles])[:, None, None]
    mean = sums[0].mean()
    while True:
        costliest = int(sums[0].argmax())
        if sums[0, costliest] <= ENOUGH * mean:
            break
        own = np.flatnonzero(place[: len(rows)] == costliest)
        moved = sizes[:, own, None] - sizes[:, None, :]  # [3, own, any]: what the bin would lose
        here, there = sums[:, costliest, None, None] - moved, sums[:, None, place] + moved
        worse = np.maximum(here[0], there[0])
        # Another bin's bounds, and its own: a swap may cost less and yet hold more tiles.
        worse[((here > bounds) | (there > bounds)).any(0) | (place == costliest)] = np.inf
        given, taken = divmod(int(worse.argmin()), worse.shape[1])
        # Not by a rounding error: the costs fall with every exchange, so that it ends.
        if worse[given, taken] >= sums[0, costliest] - 1e-6 * mean:
            break
        other, difference = place[taken], moved[:, given, taken]
        sums[:, costliest] -= difference
        sums[:, other] += difference
        place[own[given]] = other
        if taken < len(rows):
            place[taken] = costliest
    evened = [np.flatnonzero(place[: len(rows)] == b).tolist() for b in range(len(bins))]
    return [evened[b] for b in np.argsort(-sums[0], kind="stable")]
