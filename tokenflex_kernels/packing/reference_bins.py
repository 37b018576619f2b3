"""The two ways of filling bins in plain Python."""

from __future__ import annotations

from operator import itemgetter
from typing import TypeAlias


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
    exchange: bool,
) -> list[list[int]]:
    """The costliest first (ties: the lower index first), each into the cheapest bin with room.

    Starts with ``least`` bins, rounded up to a multiple. Adds 1 % while a sample finds no room, or
    while the costliest bin is more than 2 % above the mean, of which ten tries are made and the
    best is kept. It ends at 11/9 ``least`` + 1 bins, and takes as many as first-fit-decreasing
    needs only where none of these would do. The bins come by falling cost.

    With ``exchange`` the costliest bin swaps a sample for one of another bin, or for nothing,
    whatever makes the costlier of the two cheapest, until nothing helps or it is 0.2 % above the
    mean.
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
    if not exchange:
        return best
    while (
        pair := _best_exchange(best, costs, (tokens, max_tokens), (tiles, max_tiles))
    ) is not None:
        (given, giver), (taken, taker) = pair
        giver.remove(given)
        taker.append(given)
        if taken is not None:
            taker.remove(taken)
            giver.append(taken)
    for members in best:
        members.sort(key=lambda index: (-costs[index], index))
    return sorted(best, key=lambda members: -_load(members, costs))


_Given: TypeAlias = "tuple[int, list[int]]"  # a sample and its bin
_Taken: TypeAlias = "tuple[int | None, list[int]]"


def _best_exchange(
    bins: list[list[int]], costs: list[int], *bounds: tuple[list[int], int]
) -> tuple[_Given, _Taken] | None:
    """Return the sample that the costliest bin gives and the one that it takes; None to stop."""
    costliest = max(bins, key=lambda members: _load(members, costs))
    best = _load(costliest, costs)
    if float(best) * len(bins) <= 1.002 * float(sum(costs)):
        return None
    samples = sorted(((index, members) for members in bins for index in members), key=itemgetter(0))
    sides: list[_Taken] = [*samples, *((None, members) for members in bins)]
    pair = None
    for given in sorted(costliest):
        for taken, members in sides:
            if members is costliest:
                continue
            left = [index for index in costliest if index != given]
            left += [] if taken is None else [taken]
            right = [index for index in members if index != taken] + [given]
            costlier = max(_load(left, costs), _load(right, costs))
            if costlier < best and all(
                max(_load(left, sizes), _load(right, sizes)) <= most for sizes, most in bounds
            ):
                best, pair = costlier, ((given, costliest), (taken, members))
    return pair


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
