"""Several data sets as one, each drawn from as often as its weight says, whatever its size."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import torch

from tokenflex.data.order import EpochOrder
from tokenflex.data.samples import Sample, SampleDataset, SampleOutline
from tokenflex.data.steps import outline_of

BLOCK = 1000  # samples within which the weights are kept


class Mixture:
    """Data sets one after another under one index.

    Args:
        parts: the data sets.
    """

    def __init__(self, parts: Sequence[SampleDataset]) -> None:
        self.parts = list(parts)
        self._ends = list(accumulate(len(part) for part in self.parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Sample:
        part, inner = self._place(index)
        return part[inner]

    def outline(self, index: int) -> SampleOutline:
        """The part's outline of its sample."""
        return outline_of(*self._place(index))

    def _place(self, index: int) -> tuple[SampleDataset, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"index must be in 0..{len(self) - 1}, got {index}")
        place = bisect_right(self._ends, index)
        return self.parts[place], index - (self._ends[place - 1] if place else 0)


class MixtureOrder:
    """The order over a :class:`Mixture`: each part shuffled anew each of its own epochs.

    Of every :data:`BLOCK` samples each part has its share, in shuffled places, so any position is
    known without walking to it.

    Args:
        sizes: samples of each part.
        weights: how often each is drawn from, positive, in any scale.
        seed: another seed gives other orders.

    Raises:
        ValueError: a weight is too small to get a sample in a block.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        self.seed = seed
        self._orders = [EpochOrder(size, seed + place) for place, size in enumerate(sizes)]
        self._starts = [0, *accumulate(sizes)]
        self._quotas = _quotas(weights)
        self._block = -1
        self._parts = torch.empty(0, dtype=torch.int64)

    def __getitem__(self, position: int) -> tuple[int, int]:
        """(epoch of its part, sample index) of the ``position``-th sample that training sees."""
        block, offset = divmod(position, BLOCK)
        if block != self._block:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + block)
            parts = torch.arange(len(self._quotas)).repeat_interleave(torch.tensor(self._quotas))
            self._parts = parts[torch.randperm(BLOCK, generator=generator)]
            self._block = block
        part = int(self._parts[offset])
        earlier = block * self._quotas[part] + int((self._parts[:offset] == part).sum())
        epoch, index = self._orders[part][earlier]
        return epoch, self._starts[part] + index


def _quotas(weights: Sequence[float]) -> list[int]:
    """Samples of each part in a block: the whole shares, the rest to the largest remainders."""
    shares = [weight / sum(weights) * BLOCK for weight in weights]
    quotas = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda place: quotas[place] - shares[place])
    for place in by_remainder[: BLOCK - sum(quotas)]:
        quotas[place] += 1
    if 0 in quotas:
        raise ValueError(
            f"weights must each be at least 1/{BLOCK} of their sum, got {tuple(weights)}"
        )
    return quotas
