"""Several data sets as one, each drawn from as often as its weight says, whatever its size."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch

from tokenflex.data.faults import BrokenSample, broken_records, where_of
from tokenflex.data.order import EpochOrder, Order, StreamOrder
from tokenflex.data.samples import Sample, SampleDataset, size_of
from tokenflex.data.steps import outline_of

BLOCK = 1000  # samples within which the weights are kept


class _Indices:
    """One index for the samples of several parts.

    The parts with a size come one after another, then the endless streams in turns.

    Args:
        sizes: Samples of each part, None for a stream.
    """

    def __init__(self, sizes: Sequence[int | None]) -> None:
        self._sized = [part for part, size in enumerate(sizes) if size is not None]
        self._streams = [part for part, size in enumerate(sizes) if size is None]
        self._starts = [0, *accumulate(size for size in sizes if size is not None)]
        self.size = None if self._streams else self._starts[-1]

    def join(self, part: int, inner: int) -> int:
        """Return the index of a part's sample."""
        if part in self._sized:
            return self._starts[self._sized.index(part)] + inner
        return self._starts[-1] + inner * len(self._streams) + self._streams.index(part)

    def split(self, index: int) -> tuple[int, int]:
        """Return (part, index in it)."""
        if index < 0 or (self.size is not None and index >= self.size):
            last = "" if self.size is None else self.size - 1
            raise IndexError(f"index must be in 0..{last}, got {index}")
        if index >= self._starts[-1]:
            inner, turn = divmod(index - self._starts[-1], len(self._streams))
            return self._streams[turn], inner
        number = bisect_right(self._starts, index) - 1
        return self._sized[number], index - self._starts[number]


class Mixture:
    """Data sets under one index. A mixture with a stream has no length.

    Args:
        parts: The data sets.
    """

    def __init__(self, parts: Sequence[SampleDataset]) -> None:
        self.parts = list(parts)
        self._sizes = [size_of(part) for part in self.parts]
        self._indices = _Indices(self._sizes)

    @property
    def broken(self) -> list[BrokenSample]:
        """The records that the parts know to be broken, by their index in the mixture."""
        return [
            BrokenSample(self._indices.join(part, sample.index), sample.reason)
            for part, dataset in enumerate(self.parts)
            for sample in broken_records(dataset)
        ]

    def __len__(self) -> int:
        if self._indices.size is None:
            raise TypeError("a mixture with a stream in it has no length")
        return self._indices.size

    def __getitem__(self, index: int) -> Sample:
        part, inner = self._indices.split(index)
        return self.parts[part][inner]

    def where(self, index: int) -> str:
        """Return the part's name for the sample."""
        part, inner = self._indices.split(index)
        return where_of(self.parts[part], inner)

    def outline(self, index: int) -> Sample:
        """Return the part's outline of its sample."""
        part, inner = self._indices.split(index)
        return outline_of(self.parts[part], inner)

    def order(
        self, weights: Sequence[float], seed: int, epochs: Sequence[int | None]
    ) -> MixtureOrder:
        """Return the order over this mixture; the arguments are those of :class:`MixtureOrder`."""
        for i, (part, size) in enumerate(zip(self.parts, self._sizes, strict=True)):
            if size is None:
                order_of(part, seed + i)  # a stream keeps its order itself
        return MixtureOrder(self._sizes, weights, seed, epochs)


class MixtureOrder:
    """The order over a :class:`Mixture`: each part is shuffled anew in each of its own epochs.

    Of every :data:`BLOCK` samples each part has its share, at shuffled positions, so the sample at
    any position is known without a walk to it.

    Args:
        sizes: Samples of each part, None for a stream.
        weights: How often each part is drawn from, positive, in any scale.
        seed: Another seed gives another order.
        epochs: Passes until each part is exhausted, None for no bound; a stream bounds itself.

    Raises:
        ValueError: A weight is too small to get a sample in a block, or a part is empty.
    """

    def __init__(
        self,
        sizes: Sequence[int | None],
        weights: Sequence[float],
        seed: int,
        epochs: Sequence[int | None] | None = None,
    ) -> None:
        self.seed = seed
        bounds = epochs or [None] * len(sizes)
        self._orders: list[Order] = [
            StreamOrder() if size is None else EpochOrder(size, seed + part, bound)
            for part, (size, bound) in enumerate(zip(sizes, bounds, strict=True))
        ]
        self._indices = _Indices(sizes)
        self._quotas = _quotas(weights)
        self._block = -1
        self._parts = torch.empty(0, dtype=torch.int64)
        ends = [self._end_of(part) for part in range(len(sizes))]
        self.end = min((end for end in ends if end is not None), default=None)

    def __getitem__(self, position: int) -> tuple[int, int]:
        """Return (epoch of its part, index) of the ``position``-th sample that training sees."""
        block, offset = divmod(position, BLOCK)
        parts = self._parts_of(block)
        part = int(parts[offset])
        earlier = block * self._quotas[part] + int((parts[:offset] == part).sum())
        epoch, index = self._orders[part][earlier]
        return epoch, self._indices.join(part, index)

    def _parts_of(self, block: int) -> torch.Tensor:
        """Return the part of each sample in a block, int64 [BLOCK]."""
        if block != self._block:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + block)
            parts = torch.arange(len(self._quotas)).repeat_interleave(torch.tensor(self._quotas))
            self._parts = parts[torch.randperm(BLOCK, generator=generator)]
            self._block = block
        return self._parts

    def _end_of(self, part: int) -> int | None:
        """Return the first position at which a part is exhausted; None if it never is."""
        size = self._orders[part].end
        if size is None:
            return None
        block, left = divmod(size, self._quotas[part])
        return block * BLOCK + int((self._parts_of(block) == part).nonzero()[left])


def order_of(dataset: Any, seed: int, epochs: int | None = None) -> Order:
    """Return the order of a data set that is not a mixture.

    Args:
        dataset: The data set. A stream shuffles itself: it is set to the order of ``seed``.
        seed: Another seed gives another order.
        epochs: Passes until the data is exhausted, None for no bound. A stream bounds itself.
    """
    size = size_of(dataset)
    if size is None:
        dataset.shuffle(seed)
        return StreamOrder()
    return EpochOrder(size, seed, epochs)


def _quotas(weights: Sequence[float]) -> list[int]:
    """Return each part's samples in a block: whole shares, the rest to the largest remainders."""
    shares = [weight / sum(weights) * BLOCK for weight in weights]
    quotas = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda part: quotas[part] - shares[part])
    for part in by_remainder[: BLOCK - sum(quotas)]:
        quotas[part] += 1
    if 0 in quotas:
        raise ValueError(
            f"weights must each be at least 1/{BLOCK} of their sum, got {tuple(weights)}"
        )
    return quotas
