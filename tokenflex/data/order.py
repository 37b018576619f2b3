"""The samples of each step: a pure function of the seed, so that a run can stop anywhere."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import Protocol, TypeVar

import torch

from tokenflex.data.samples import DataExhaustedError
from tokenflex.data.workers import map_in_order

T = TypeVar("T")


class Order(Protocol):
    """The sample at each position of training, known without walking to it.

    ``end`` is the first position without a sample; None where there is none, or where only reading
    can tell.
    """

    end: int | None

    def __getitem__(self, position: int) -> tuple[int, int]: ...


class EpochOrder:
    """A shuffled order over a data set, another one each epoch.

    Args:
        num_samples: size of the data set.
        seed: another seed gives other orders.
        epochs: passes after which the data is exhausted; None for no bound.

    Raises:
        ValueError: the data set is empty.
    """

    def __init__(self, num_samples: int, seed: int, epochs: int | None = None) -> None:
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1 to train on, got {num_samples}")
        self.num_samples = num_samples
        self.seed = seed
        self.end = None if epochs is None else epochs * num_samples
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def __getitem__(self, position: int) -> tuple[int, int]:
        """Return (epoch, sample index) of the ``position``-th sample that training sees.

        Raises:
            DataExhaustedError: ``position`` is beyond the last epoch.
        """
        if self.end is not None and position >= self.end:
            raise DataExhaustedError(
                f"{self.end // self.num_samples} epochs of {self.num_samples} samples hold no "
                f"sample {position}"
            )
        epoch, offset = divmod(position, self.num_samples)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._order = torch.randperm(self.num_samples, generator=generator)
            self._epoch = epoch
        return epoch, int(self._order[offset])


class StreamOrder:
    """The order of a stream, which shuffles itself: its samples as they come."""

    end: int | None = None

    def __getitem__(self, position: int) -> tuple[int, int]:
        """Return (0, ``position``): a stream's position keeps increasing across passes."""
        return 0, position


class StepSampler:
    """The (epoch, index) keys of each step's samples, over all ranks.

    Where the data runs out before the steps do, it ends with the last whole step and keeps the
    error in ``exhausted``: a loader takes keys ahead of the steps that use them.

    Args:
        order: the order of the samples.
        first_position: the position of the first sample.
        steps: number of steps.
        batch_size: samples a step.
    """

    def __init__(self, order: Order, *, first_position: int, steps: int, batch_size: int) -> None:
        self.order = order
        self.first_position = first_position
        self.steps = steps
        self.batch_size = batch_size
        self.exhausted: DataExhaustedError | None = None

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.steps):
            first = self.first_position + step * self.batch_size
            try:
                keys = [self.order[position] for position in range(first, first + self.batch_size)]
            except DataExhaustedError as error:
                self.exhausted = error
                return
            yield keys


def load_in_order(
    pack: Callable[[list[tuple[int, int]]], T],
    sampler: StepSampler | list[list[tuple[int, int]]],
    *,
    workers: int = 0,
) -> Generator[T, None, None]:
    """Draw, read, encode and pack in ``workers`` processes, in the sampler's order.

    Raises:
        DataExhaustedError: After the last whole step, where the sampler has no more.
        WorkerDiedError: A worker has ended.
        Exception: An error of ``pack``, in a worker or in this process.
    """
    yield from map_in_order(pack, sampler, workers=workers)
    if isinstance(sampler, StepSampler) and sampler.exhausted is not None:
        raise sampler.exhausted
