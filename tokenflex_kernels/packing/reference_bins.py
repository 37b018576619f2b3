"""The two ways of filling bins in plain Python and numpy."""

from __future__ import annotations

import numpy as np


def bin_pack(lengths: list[int], capacity: int) -> list[list[int]]:
    """The longest first (ties: the lower index first), each into the first bin with room."""
    return _first_fit_decreasing(lengths, [0] * len(lengths), capacity, 0)


def _first_fit_decreasing(
    tokens: list[int], tiles: list[int], max_tokens: int, max_tiles: int
) -> list[list[int]]:
    """The largest share of a bin first, each into the first bin with room for both."""
    shares = [
        max(a * max(max_tiles, 1), b * max_tokens) for a, b in zip(tokens, tiles, strict=True)
    ]
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []
    for index in sorted(range(len(tokens)), key=lambda index: -shares[index]):
        for number in range(len(bins)):
            if tokens[index] <= room[number][0] and tiles[index] <= room[number][1]:
                break
        else:
            number = len(bins)
            bins.append([])
            room.append((max_tokens, max_tiles))
        bins[number].append(index)
        room[number] = room[number][0] - tokens[index], room[number][1] - tiles[index]
    return bins


def balance_bins(
    tokens: list[int],
    tiles: list[int],
    max_tokens: int,
    max_tiles: int,
    token_price: int,
    tile_price: int,
    least: int,
    multiple: int,
    exchange_costs: np.ndarray,
) -> list[list[int]]:
    """The costliest first (ties: the lower index first), each into the cheapest bin with room.

    Starts with ``least`` bins, rounded up to a multiple. Adds 1 % while a sample finds no room, or
    while the costliest bin is more than 2 % above the mean, of which ten tries are made and the
    best is kept. It ends at 11/9 ``least`` + 1 bins, and takes as many as first-fit-decreasing
    needs only where none of these would do. The bins come by falling cost.

    With ``exchange_costs``, float64 [samples], the costliest bin by these costs swaps a sample for
    one of another bin, or for nothing, whatever makes the costlier of the two cheapest, until
    nothing helps or it is 0.2 % above the mean.
    """
    costs = [token_price * a + tile_price * b for a, b in zip(tokens, tiles, strict=True)]
    order = sorted(range(len(tokens)), key=lambda index: -costs[index])

    def fit_into(num_bins: int) -> list[list[int]] | None:
        bins: list[list[int]] = [[] for _ in range(num_bins)]
        for index in order:
            fitting = [
                members
                for members in bins
                if _load(members, tokens) + tokens[index] <= max_tokens
                and _load(members, tiles) + tiles[index] <= max_tiles
            ]
            if not fitting:
                return None
            min(fitting, key=lambda members: _load(members, costs)).append(index)
        return bins

    most_bins = _next_multiple(min(11 * least // 9 + 1, len(tokens)), multiple)
    num_bins = _next_multiple(least, multiple)
    feasible: list[tuple[float, list[list[int]]]] = []
    while len(feasible) < 10:
        bins = fit_into(num_bins)
        if bins is not None:
            bins.sort(key=lambda members: -_load(members, costs))
            score = float(num_bins) * float(_load(bins[0], costs))  # max / mean, times the total
            feasible.append((score, bins))
        if num_bins == most_bins or any(s <= 1.02 * float(sum(costs)) for s, _ in feasible):
            break
        num_bins = _next_multiple(num_bins + max(1, num_bins // 100), multiple)
        num_bins = min(num_bins, most_bins)
    if feasible:
        best = min(feasible, key=lambda scored: scored[0])[1]
    else:
        tight = _first_fit_decreasing(tokens, tiles, max_tokens, max_tiles)
        num_bins = _next_multiple(len(tight), multiple)
        bins = fit_into(num_bins) if num_bins > most_bins else None
        best = bins or _spread(tight, costs, num_bins)
        best.sort(key=lambda members: -_load(members, costs))
    best = best[: _next_multiple(sum(map(bool, best)), multiple)]
    if not exchange_costs.size:
        return best
    sizes = np.stack([exchange_costs, np.array(tokens, float), np.array(tiles, float)])
    evened = _exchange(best, sizes, np.array([np.inf, max_tokens, max_tiles]))
    for members in evened:
        members.sort(key=lambda index: (-costs[index], index))
    return evened


def _exchange(bins: list[list[int]], sizes: np.ndarray, bounds: np.ndarray) -> list[list[int]]:
    """Exchange samples of the costliest bin as long as that helps; return bins by falling cost.

    Args:
        bins: sample indices per bin.
        sizes: float64 [3, samples]; the cost, tokens and tiles of each sample.
        bounds: float64 [3]; the most of each that a bin may hold.
    """
    num_samples = sizes.shape[1]
    # To give a sample away is to swap it for nothing: each bin holds one such nothing, at the end.
    sizes = np.concatenate([sizes, np.zeros((3, len(bins)))], axis=1)
    bin_of = np.empty(sizes.shape[1], dtype=np.int64)
    for bin_index, members in enumerate(bins):
        bin_of[members] = bin_index
    bin_of[num_samples:] = np.arange(len(bins))
    loads = np.stack([np.bincount(bin_of, size, minlength=len(bins)) for size in sizes])
    mean = loads[0].cumsum()[-1] / len(bins)
    bounds = bounds[:, None, None]
    while True:
        costliest = int(loads[0].argmax())
        if loads[0, costliest] <= 1.002 * mean:
            break
        givers = np.flatnonzero(bin_of[:num_samples] == costliest)
        moved = sizes[:, givers, None] - sizes[:, None, :]  # [3, givers, any]
        left, right = loads[:, costliest, None, None] - moved, loads[:, None, bin_of] + moved
        costlier = np.maximum(left[0], right[0])
        # Both bins' bounds: a swap may cost less and yet hold more tiles.
        is_beyond = ((left > bounds) | (right > bounds)).any(0)
        costlier[is_beyond | (bin_of == costliest)] = np.inf
        given, taken = divmod(int(costlier.argmin()), costlier.shape[1])
        # A gain must be more than a rounding error, so that the exchanges end.
        if costlier[given, taken] >= loads[0, costliest] - 1e-6 * mean:
            break
        other, difference = bin_of[taken], moved[:, given, taken]
        loads[:, costliest] -= difference
        loads[:, other] += difference
        bin_of[givers[given]] = other
        if taken < num_samples:
            bin_of[taken] = costliest
    evened = [np.flatnonzero(bin_of[:num_samples] == b).tolist() for b in range(len(bins))]
    return [evened[b] for b in np.argsort(-loads[0], kind="stable")]


def _spread(bins: list[list[int]], costs: list[int], num_bins: int) -> list[list[int]]:
    """``num_bins`` of fewer bins: the costliest of several samples gives its cheapest one."""
    bins = [sorted(members, key=lambda index: (-costs[index], index)) for members in bins]
    while len(bins) < num_bins:
        givers = [members for members in bins if len(members) > 1]
        bins.append(
            [max(givers, key=lambda members: _load(members, costs)).pop()] if givers else []
        )
    return bins


def _load(members: list[int], sizes: list[int]) -> int:
    return sum(sizes[index] for index in members)


def _next_multiple(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
