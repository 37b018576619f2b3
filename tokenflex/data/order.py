"""Which samples make up which step: a pure function of the seed, so a run can stop anywhere."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset

from tokenflex.data.packing import DrawnSample, PackedBatch, PackingCollator
from tokenflex.data.samples import SampleDataset
from tokenflex.interruption import ignore_interrupts


class EpochOrder:
    """A shuffled order over a data set, another one each epoch.

    Args:
        num_samples: size of the data set.
        seed: another seed gives other orders.
    """

    def __init__(self, num_samples: int, seed: int) -> None:
        self.num_samples = num_samples
        self.seed = seed
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def __getitem__(self, position: int) -> tuple[int, int]:
        """(epoch, sample index) of the ``position``-th sample that training sees."""
        epoch, offset = divmod(position, self.num_samples)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._order = torch.randperm(self.num_samples, generator=generator)
            self._epoch = epoch
        return epoch, int(self._order[offset])


class StepSampler:
    """The (epoch, index) keys of each step's batch, this rank's share of them.

    Args:
        order: the order to walk through.
        first_position: where the walk begins.
        steps: how many steps to give.
        batch_size: samples a step, over all ranks.
        rank: this process.
        num_ranks: how many processes.
    """

    def __init__(
        self,
        order: EpochOrder,
        *,
        first_position: int,
        steps: int,
        batch_size: int,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        self.order = order
        self.first_position = first_position
        self.steps = steps
        self.batch_size = batch_size
        self.rank = rank
        self.num_ranks = num_ranks

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.steps):
            first = self.first_position + step * self.batch_size
            positions = range(first + self.rank, first + self.batch_size, self.num_ranks)
            yield [self.order[position] for position in positions]


class _Keys(Dataset[tuple[int, int]]):
    """The sampler's keys as they are; samples are read in :class:`_ReadAndPack`."""

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, int]:
        return key


class _ReadAndPack:
    """From a step's keys to its batch, or to the error that stopped it.

    A loader would wrap a worker's error in the text of its traceback; as a value it arrives whole.
    """

    def __init__(self, dataset: SampleDataset, collator: PackingCollator) -> None:
        self.dataset = dataset
        self.collator = collator

    def __call__(self, keys: list[tuple[int, int]]) -> PackedBatch | Exception:
        try:
            drawn = [DrawnSample(index, epoch, self.dataset[index]) for epoch, index in keys]
            return self.collator(drawn)
        except Exception as error:
            return error


def packed_batches(
    dataset: SampleDataset,
    collator: PackingCollator,
    sampler: StepSampler | list[list[tuple[int, int]]],
    *,
    workers: int = 0,
) -> Iterator[PackedBatch]:
    """Draw, read, encode and pack in ``workers`` processes, in the sampler's order.

    Raises:
        Exception: whatever reading or packing a sample raised, in a worker or here.
    """
    loader = DataLoader(
        _Keys(),
        batch_sampler=sampler,
        collate_fn=_ReadAndPack(dataset, collator),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        worker_init_fn=ignore_interrupts,
    )
    for batch in loader:
        if isinstance(batch, Exception):
            raise batch
        yield batch
