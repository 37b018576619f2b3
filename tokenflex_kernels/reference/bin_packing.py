"""What first-fit-decreasing means, in plain Python."""

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
