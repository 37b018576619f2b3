"""What the two ways of filling bins mean, in plain Python."""

from __future__ import annotations


def bin_pack(lengths: list[int], capacity: int) -> list[list[int]]:
    """The longest first (ties: the lower index first), each into the first bin with room."""
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        for place in range(len(bins)):
            if lengths[index] <= room[place]:
                break
        else:
            place = len(bins)
            bins.append([])
            room.append(capacity)
        bins[place].append(index)
        room[place] -= lengths[index]
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
) -> list[list[int]]:
    """The costliest first (ties: the lower index first), each into the cheapest bin with room.

    Starts with ``least`` bins, rounded up to a multiple. Adds 1 % while a sample finds no room, or
    while the costliest bin is more than 2 % above the mean, of which ten tries are made and the
    best is kept. The bins come by falling cost.
    """
    costs = [token_price * a + tile_price * b for a, b in zip(tokens, tiles, strict=True)]
    order = sorted(range(len(tokens)), key=lambda index: -costs[index])
    feasible: list[tuple[float, list[list[int]]]] = []
    num_bins = _next_multiple(least, multiple)
    while len(feasible) < 10:
        bins: list[list[int]] = [[] for _ in range(num_bins)]
        for index in order:
            fitting = [
                members
                for members in bins
                if _load(members, tokens) + tokens[index] <= max_tokens
                and _load(members, tiles) + tiles[index] <= max_tiles
            ]
            if not fitting:
                break
            min(fitting, key=lambda members: _load(members, costs)).append(index)
        else:
            bins.sort(key=lambda members: -_load(members, costs))
            score = float(num_bins) * float(_load(bins[0], costs))  # max / mean, times the total
            feasible.append((score, bins))
            if score <= 1.02 * float(sum(costs)):
                break
        num_bins = _next_multiple(num_bins + max(1, num_bins // 100), multiple)
    return min(feasible, key=lambda scored: scored[0])[1]


def _load(members: list[int], sizes: list[int]) -> int:
    return sum(sizes[index] for index in members)


def _next_multiple(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
