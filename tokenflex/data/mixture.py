"""Several data sets as one, each drawn from as often as its weight says, whatever its size."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import torch

from tokenflex.data.faults import BrokenSample, broken_records, where_of
from tokenflex.data.order import EpochOrder, Order, StreamOrder
from tokenflex.data.samples import Sample, SampleDataset, size_of
from tokenflex.data.steps import outline_of

BLOCK = 1000  # samples within which the weights are kept


class _Places:
    """One index for the samples of several parts: the sized ones one after another, then the
    streams in turns, which have no end.

    Args:
        sizes: samples of each part, None for a stream.
    """

    def __init__(self, sizes: Sequence[int | None]) -> None:
        self._sized = [part for part, size in enumerate(sizes) if size is not None]
        self._streams = [part for part, size in enumerate(sizes) if size is None]
        self._starts = [0, *accumulate(size for size in sizes if size is not None)]
        self.size = None if self._streams else self._starts[-1]

    def index_of(self, part: int, inner: int) -> int:
        if part in self._sized:
            return self._starts[self._sized.index(part)] + inner
        return self._starts[-1] + inner * len(self._streams) + self._streams.index(part)

    def place_of(self, index: int) -> tuple[int, int]:
        """(part, index in it)."""
        if index < 0 or (self.size is not None and index >= self.size):
            last = "" if self.size is None else self.size - 1
            raise IndexError(f"index must be in 0..{last}, got {index}")
        if index >= self._starts[-1]:
            inner, turn = divmod(index - self._starts[-1], len(self._streams))
            return self._streams[turn], inner
        place = bisect_right(self._starts, index) - 1
        return self._sized[place], index - self._starts[place]


class Mixture:
    """Data sets under one index. With a stream among them it has no length.

    Args:
        parts: the data sets.
    """

    def __init__(self, parts: Sequence[SampleDataset]) -> None:
        self.parts = list(parts)
        self._places = _Places([size_of(part) for part in self.parts])

    @property
    def broken(self) -> list[BrokenSample]:
        """Those that the parts know of, by their index in the mixture."""
        return [
            BrokenSample(self._places.index_of(part, one.index), one.reason)
            for part, dataset in enumerate(self.parts)
            for one in broken_records(dataset)
        ]

    def __len__(self) -> int:
        if self._places.size is None:
            raise TypeError("a mixture with a stream in it has no length")
        return self._places.size

    def __getitem__(self, index: int) -> Sample:
        part, inner = self._places.place_of(index)
        return self.parts[part][inner]

    def where(self, index: int) -> str:
        """Return the part's name for the sample."""
        part, inner = self._places.place_of(index)
        return where_of(self.parts[part], inner)

    def outline(self, index: int) -> Sample:
        """The part's outline of its sample."""
        part, inner = self._places.place_of(index)
        return outline_of(self.parts[part], inner)


class MixtureOrder:
    """The order over a :class:`Mixture`: each part shuffled anew each of its own epochs.

    Of every :data:`BLOCK` samples each part has its share, in shuffled places, so any position is
    known without walking to it.

    Args:
        sizes: samples of each part, None for a stream.
        weights: how often each is drawn from, positive, in any scale.
        seed: another seed gives other orders.
        epochs: after how many of its own each part is exhausted, None for never; a stream bounds
            itself.

    Raises:
        ValueError: a weight is too small to get a sample in a block, or a part is empty.
    """

    def __init__(
        self,
        sizes: Sequence[int | None],
        weights: Sequence[float],
        seed: int,
        epochs: Sequence[int | None] | None = None,
    ) -> None:
        self.seed = seed
        self._orders: list[Order] = [
            StreamOrder() if size is None else EpochOrder(size, seed + part, bound)
            for part, (size, bound) in enumerate(
                zip(sizes, epochs or [None] * len(sizes), strict=True)
            )
        ]
        self._places = _Places(sizes)
        self._quotas = _quotas(weights)
        self._block = -1
        self._parts = torch.empty(0, dtype=torch.int64)
        ends = [self._end_of(part) for part in range(len(sizes))]
        self.end = min((end for end in ends if end is not None), default=None)

    def __getitem__(self, position: int) -> tuple[int, int]:
        """(epoch of its part, sample index) of the ``position``-th sample that training sees."""
        block, offset = divmod(position, BLOCK)
        parts = self._parts_of(block)
        part = int(parts[offset])
        earlier = block * self._quotas[part] + int((parts[:offset] == part).sum())
        epoch, index = self._orders[part][earlier]
        return epoch, self._places.index_of(part, index)

    def _parts_of(self, block: int) -> torch.Tensor:
        """int64 [BLOCK]: the part of each sample in a block."""
        if block != self._block:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + block)
            parts = torch.arange(len(self._quotas)).repeat_interleave(torch.tensor(self._quotas))
            self._parts = parts[torch.randperm(BLOCK, generator=generator)]
            self._block = block
        return self._parts

    def _end_of(self, part: int) -> int | None:
        """Where the mixture asks a part for more than it may give."""
        held = self._orders[part].end
        if held is None:
            return None
        block, left = divmod(held, self._quotas[part])
        return block * BLOCK + int((self._parts_of(block) == part).nonzero()[left])


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
