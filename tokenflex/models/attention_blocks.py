"""Blocks of a packed row for attention without a kernel for variable lengths, planned once a step.

A call of attention costs tens of microseconds however few rows it has, and gathering rows by their
sequences' lengths costs more than the attention of short ones. So a row is cut where sequences
begin, into runs of about :data:`ROWS` rows; each run attends to itself in one call, under a mask
that hides the other sequences, and no row is moved:

    sequence          0   1   2 (prefix)  3 (branch of 2)  4 (branch of 2)  5
    rows              30  40  250         20               70               120
    runs              70      250         90                                120
    keys of the run   70      250         250 + 90                          120

A short prefix and its branches stay together. A longer one is a run of its own, and its keys come
before those of its branches. So the scores that are computed in vain are at most ROWS for a row.
Where a run is one sequence, the mask is PyTorch's causal one.

A masked score counts exactly zero. But zero times NaN is NaN: a sequence with values that are not
finite spoils the others of its run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

ROWS = 96
"""Rows of a run of several sequences at most: more waste scores, fewer need more calls."""


class Run(NamedTuple):
    """Consecutive sequences of a row.

    Attributes:
        first, stop: the sequences, from ``first`` up to ``stop``.
        prefix: the sequence that all of them go on from and that is a run of its own; -1 for none.
    """

    first: int
    stop: int
    prefix: int = -1


@dataclass(frozen=True)
class AttentionBlocks:
    """The runs of a packed row. They are planned where they are first needed.

    Attributes:
        lengths: rows of each sequence.
        parents: for each sequence the prefix it goes on from, -1 for none; empty where none does.
    """

    lengths: tuple[int, ...]
    parents: tuple[int, ...] = ()

    @cached_property
    def runs(self) -> list[Run]:
        """The runs that have rows, in the order of the row."""
        parents = self.parents or (-1,) * len(self.lengths)
        return [run for run in _runs(self.lengths, parents) if self._rows(run)]

    @cached_property
    def sizes(self) -> list[int]:
        """Rows of each run."""
        return [self._rows(run) for run in self.runs]

    @cached_property
    def prefixes(self) -> list[int | None]:
        """For each run the run whose keys come before its own."""
        place = {run.first: index for index, run in enumerate(self.runs) if run.prefix == -1}
        return [place.get(run.prefix) for run in self.runs]

    def masks(self, like: torch.Tensor) -> list[torch.Tensor | None]:
        """Return each run's mask, what is added to scores; None where that is the causal mask.

        Args:
            like: a tensor of the masks' dtype and device.
        """
        key = like.dtype, like.device
        if key not in self._masks:
            self._masks[key] = [None if mask is None else mask.to(like) for mask in self._visible]
        return self._masks[key]

    @cached_property
    def _masks(self) -> dict[tuple[torch.dtype, torch.device], list[torch.Tensor | None]]:
        return {}

    @cached_property
    def _visible(self) -> list[torch.Tensor | None]:
        """Masks in float32 on the host."""
        return [self._mask(run) for run in self.runs]

    def _rows(self, run: Run) -> int:
        return sum(self.lengths[run.first : run.stop])

    def _mask(self, run: Run) -> torch.Tensor | None:
        if run.prefix == -1 and run.stop == run.first + 1:
            return None
        lengths = torch.tensor(self.lengths[run.first : run.stop])
        sequence = torch.arange(run.first, run.stop).repeat_interleave(lengths)
        visible = (sequence[:, None] == sequence).tril_()
        if run.prefix != -1:
            before = visible.new_ones(len(sequence), self.lengths[run.prefix])
            visible = torch.cat([before, visible], 1)
        elif self.parents:
            parents = torch.tensor(self.parents[run.first : run.stop]).repeat_interleave(lengths)
            visible |= parents[:, None] == sequence
        return torch.zeros(visible.shape).masked_fill_(~visible, float("-inf"))


def _runs(lengths: Sequence[int], parents: Sequence[int]) -> list[Run]:
    runs: list[Run] = []
    rows = 0  # of the last run
    is_open = False  # the last run may grow
    first = 0
    apart = _prefixes_apart(lengths, parents)
    while first < len(lengths):
        stop, prefix = first + 1, parents[first]
        if prefix == -1 and first not in apart:
            while stop < len(lengths) and parents[stop] == first:  # its branches stay with it
                stop += 1
        more = sum(lengths[first:stop])
        if is_open and runs[-1].prefix == prefix and rows + more <= ROWS and first not in apart:
            runs[-1] = runs[-1]._replace(stop=stop)
            rows += more
        else:
            runs.append(Run(first, stop, prefix))
            rows = more
            is_open = first not in apart
        first = stop
    return runs


def _prefixes_apart(lengths: Sequence[int], parents: Sequence[int]) -> set[int]:
    """Return the prefixes that are runs of their own.

    Those are the ones that are too long together with their branches, or have branches elsewhere
    than right behind them.
    """
    rows, last, apart = list(lengths), list(range(len(lengths))), set()
    for sequence, parent in enumerate(parents):
        if parent == -1:
            continue
        rows[parent] += lengths[sequence]
        if rows[parent] > ROWS or last[parent] != sequence - 1:
            apart.add(parent)
        last[parent] = sequence
    return apart
