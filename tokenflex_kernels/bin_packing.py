"""Filling fixed-length bins with samples of different lengths."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tokenflex_kernels._backend import extension, select_backend
from tokenflex_kernels._checks import check_int, check_ints
from tokenflex_kernels.reference import bin_packing as reference


def bin_pack(lengths: Sequence[int] | np.ndarray | torch.Tensor, capacity: int) -> list[list[int]]:
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
    checked = check_ints("lengths", lengths)
    capacity = check_int("capacity", capacity)
    if capacity < 1:
        raise ValueError(f"capacity must be at least 1, got {capacity}")
    bad = np.flatnonzero((checked < 0) | (checked > capacity))
    if bad.size:
        index, length = int(bad[0]), int(checked[bad[0]])
        if length < 0:
            raise ValueError(f"lengths[{index}] must be at least 0, got {length}")
        raise ValueError(f"lengths[{index}] = {length} does not fit a capacity of {capacity}")

    if select_backend("bin_pack") == "reference":
        return reference.bin_pack(checked.tolist(), capacity)
    compiled = extension()
    assert compiled is not None
    bins: list[list[int]] = compiled.bin_pack(checked.ctypes.data, checked.size, capacity)
    return bins
