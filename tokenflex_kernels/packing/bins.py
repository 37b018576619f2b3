"""Fill bins with samples of different sizes: as few bins as fit, or bins of equal cost.

A bin is the work of one rank in one step. Where every sample has its own number of tokens per
image, bins of equal length are not bins of equal work: those that drew few tokens per image hold
more images, and the slowest rank sets the pace. `balance_bins` makes their costs equal.
"""

from __future__ import annotations

import gc
from itertools import pairwise
from numbers import Real

import numpy as np

from tokenflex_kernels.backend import extension, select_backend
from tokenflex_kernels.checks import check_int, check_ints
from tokenflex_kernels.packing import reference_bins as reference
from tokenflex_kernels.packing.plan import Ints
from tokenflex_kernels.packing.reference import MAX_INT32

_UNITS = 1024  # of cost to a row's; integers, so that equal costs are equal on every machine
_MAX_TILE_COST = 2**20
_MANY_RANKS = 2**16


def bin_pack(lengths: Ints, capacity: int) -> list[list[int]]:
    """Assign samples to as few bins as first-fit-decreasing finds: at most 11/9 of the best, + 1.

    The longest sample goes first (among equals the lower index), each into the first bin with room,
    so the result is a pure function of the arguments. O(n log n) in the compiled extension.

    Args:
        lengths: rows per sample, non-negative ints: a sequence, a numpy array or a CPU tensor.
        capacity: rows per bin, at least 1.

    Returns:
        For each bin its sample indices in the order they were placed, the longest first.

    Raises:
        ValueError: ``capacity`` is below 1, a length is negative or larger than ``capacity``.
        TypeError: an argument does not hold ints.
    """
    # A copy, so that nobody can change what was checked before the extension has read it.
    checked = check_ints("lengths", lengths).copy()
    capacity = check_int("capacity", capacity)
    if capacity < 1:
        raise ValueError(f"capacity must be at least 1, got {capacity}")
    _check_sizes("lengths", checked, "a capacity", capacity)

    if select_backend("bin_pack") == "reference":
        return reference.bin_pack(checked.tolist(), capacity)
    compiled = extension()
    assert compiled is not None
    return _as_lists(*compiled.bin_pack(checked, capacity))


def balance_bins(
    tokens: Ints,
    tiles: Ints,
    *,
    max_tokens: int,
    max_tiles: int,
    tile_cost: float,
    multiple_of: int = 1,
    exchange: bool = False,
) -> list[list[int]]:
    """Assign samples to bins of nearly equal cost, none beyond its tokens or its tiles.

    The cost of a bin is its tokens + ``tile_cost`` * its tiles. The costliest sample goes first
    (among equals the lower index), each into the cheapest bin with room for it. Packing starts with
    L bins, the fewest that could do if samples could be cut (or as many as there are samples of
    more than half a bin). It adds 1 % while a sample finds no room, or while the costliest bin is
    more than 2 % above the mean; of the latter it makes ten tries and keeps the best. The result is
    a pure function of the arguments.

    There are at most max(11/9 L + 1, F) bins, rounded up to ``multiple_of``, where F is what
    first-fit-decreasing by the larger share, of ``max_tokens`` or of ``max_tiles``, would need.
    Where only one of the two bounds is ever met, that is no more than 11/9 of the fewest, + 1; for
    two bounds at once no such proof is known. A try is O(n log n) in the compiled extension where
    the cheapest bins have room.

    Args:
        tokens: language-model rows per sample, vision and text, non-negative ints: a sequence, a
            numpy array or a CPU tensor.
        tiles: vision-encoder inputs per sample, likewise.
        max_tokens: rows that a bin may hold, in [1, 2^31).
        max_tiles: tiles that a bin may hold, in [0, 2^31).
        tile_cost: the cost of a tile in rows: the FLOPs of a tile through the vision encoder over
            those of a row through the language model. In [0, 2^20]; rounded to 1/1024, except for
            exchanges.
        multiple_of: the number of bins is a multiple of this: the ranks that share a step. At least
            1 and at most the number of samples, or 2^16 if they are fewer. It alone leaves bins
            empty, fewer than ``multiple_of``, where the samples are fewer than the bins.
        exchange: afterwards let the costliest bin swap a sample for one of another bin, or give it
            away, whichever helps most, until nothing helps or it is 0.2 % above the mean. With a
            handful of samples a bin the last ones do not fill the gaps. An exchange is O(samples of
            the bin x all samples); a step of 64 ranks and 8 samples each needs about 40.

    Returns:
        For each bin its sample indices, the costliest first. The bins come by falling cost, so that
        ``multiple_of`` neighbours make a step of equal ranks.

    Raises:
        ValueError: a number is outside the ranges above, a sample is larger than a bin, or
            ``tiles`` and ``tokens`` differ in length.
        TypeError: an argument does not hold ints, or ``tile_cost`` is not a number.
    """
    # Copies, so that nobody can change what was checked before the extension has read it.
    token_array = check_ints("tokens", tokens).copy()
    tile_array = check_ints("tiles", tiles).copy()
    if tile_array.size != token_array.size:
        raise ValueError(
            f"tiles must have one int per sample of tokens, {token_array.size}, "
            f"but has {tile_array.size}"
        )
    max_tokens = _check_bound("max_tokens", max_tokens, 1, MAX_INT32)
    max_tiles = _check_bound("max_tiles", max_tiles, 0, MAX_INT32)
    multiple_of = _check_bound("multiple_of", multiple_of, 1, max(token_array.size, _MANY_RANKS))
    if isinstance(tile_cost, bool) or not isinstance(tile_cost, Real):
        raise TypeError(f"tile_cost must be a number, got {tile_cost!r}")
    if not 0 <= tile_cost <= _MAX_TILE_COST:
        raise ValueError(f"tile_cost must be in [0, {_MAX_TILE_COST}], got {tile_cost}")
    _check_sizes("tokens", token_array, "max_tokens", max_tokens)
    _check_sizes("tiles", tile_array, "max_tiles", max_tiles)
    if token_array.size == 0:
        return []

    # Fewer never suffice, even if samples could be cut; two of more than half a bin share none.
    least = max(
        1,
        -(-int(token_array.sum()) // max_tokens),
        -(-int(tile_array.sum()) // max(max_tiles, 1)),
        np.count_nonzero(2 * token_array > max_tokens),
        np.count_nonzero(2 * tile_array > max_tiles),
    )
    prices = (_UNITS, round(_UNITS * float(tile_cost)))
    # Exchanges compare costs that are not rounded. None is made without costs.
    costs = token_array + float(tile_cost) * tile_array if exchange else np.empty(0)
    options = (max_tokens, max_tiles, *prices, least, multiple_of, costs)
    if select_backend("balance_bins") == "reference":
        return reference.balance_bins(token_array.tolist(), tile_array.tolist(), *options)
    compiled = extension()
    assert compiled is not None
    return _as_lists(*compiled.balance_bins(token_array, tile_array, *options))


def _as_lists(order: list[int], offsets: list[int]) -> list[list[int]]:
    """Return the bins, bin b being order[offsets[b] : offsets[b + 1]].

    The garbage collector is off meanwhile: many new lists would wake it again and again to look
    through every object of the process.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return [order[begin:end] for begin, end in pairwise(offsets)]
    finally:
        if was_enabled:
            gc.enable()


def _check_bound(name: str, value: object, least: int, most: int) -> int:
    bound = check_int(name, value)
    if not least <= bound <= most:
        raise ValueError(f"{name} must be in [{least}, {most}], got {bound}")
    return bound


def _check_sizes(name: str, sizes: np.ndarray, bound_name: str, bound: int) -> None:
    """Refuse the first sample that is negative or larger than a bin."""
    bad = np.flatnonzero((sizes < 0) | (sizes > bound))
    if bad.size:
        index, size = int(bad[0]), int(sizes[bad[0]])
        if size < 0:
            raise ValueError(f"{name}[{index}] must be at least 0, got {size}")
        raise ValueError(f"{name}[{index}] = {size} does not fit {bound_name} of {bound}")
