"""Shared prefixes: sequences of a packed row that go on where another one ends.

Several questions about one image need its vision tokens once. The sequence that holds them is the
prefix; each question is a branch, a sequence of its own that sees the prefix and then itself:

    sequence       0 (prefix)     1 (branch of 0)   2 (branch of 0)   3
    rows           0 1 2 3        4 5               6 7 8             9 10
    parents        -1             0                 0                 -1
    position_ids   0 1 2 3        4 5               4 5 6             0 1
    key_rows       0 1 2 3        0 1 2 3 4 5       0 1 2 3 6 7 8     9 10

Every row is what it would be if each question followed a prefix of its own: in a causal model a
prefix does not depend on what comes after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from tokenflex_kernels import PackPlan


@dataclass(frozen=True)
class SharedPrefixes:
    """Rows and positions of branches, for attention; made by :func:`share_prefixes`.

    Attributes:
        parents: for each sequence of the plan the prefix it goes on from, -1 for none.
        lengths: rows that each sequence sees, its prefix's and its own; host ints.
        max_length: the largest of them.
        position_ids: int64 [rows]; those of a branch continue its prefix's.
        key_rows: int64 [sum of lengths]; the rows that each sequence sees, sequence by sequence.
        cu_seqlens: int32 [sequences + 1]; where each sequence begins in ``key_rows``.
    """

    parents: tuple[int, ...]
    lengths: tuple[int, ...]
    max_length: int
    position_ids: torch.Tensor
    key_rows: torch.Tensor
    cu_seqlens: torch.Tensor

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> SharedPrefixes:
        """Return the same with its tensors on ``device``."""
        return replace(
            self,
            position_ids=self.position_ids.to(device, non_blocking=non_blocking),
            key_rows=self.key_rows.to(device, non_blocking=non_blocking),
            cu_seqlens=self.cu_seqlens.to(device, non_blocking=non_blocking),
        )


def share_prefixes(plan: PackPlan, parents: Sequence[int]) -> SharedPrefixes:
    """Make branches of some sequences of ``plan``.

    Args:
        plan: in CPU memory; its sequences are the prefixes, the branches, and any others.
        parents: for each sequence the index of its prefix, an earlier sequence that is no branch
            itself, or -1.

    Raises:
        ValueError: ``parents`` has another length than the plan, or names no such sequence.
    """
    parents = tuple(parents)
    if len(parents) != plan.num_samples:
        raise ValueError(
            f"parents must name one for each of the plan's {plan.num_samples} sequences, got "
            f"{len(parents)}"
        )
    for sequence, parent in enumerate(parents):
        if parent != -1 and not (0 <= parent < sequence and parents[parent] == -1):
            raise ValueError(
                f"parents[{sequence}] must be -1 or an earlier sequence that has no parent itself, "
                f"got {parent}"
            )
    lengths = torch.tensor(plan.lengths, dtype=torch.int64)
    first = lengths.cumsum(0) - lengths
    parent_of = torch.tensor(parents, dtype=torch.int64)
    # Empty branches attend to nothing; sequences without a parent attend only to themselves.
    before = torch.where((parent_of >= 0) & (lengths > 0), lengths[parent_of], 0)
    seen = before + lengths
    # Each sequence attends to two runs of rows: its prefix's and its own.
    run_starts = torch.stack([first[parent_of], first], 1).flatten()
    runs = torch.stack([before, lengths], 1).flatten()
    key_rows = (run_starts - runs.cumsum(0) + runs).repeat_interleave(runs)
    return SharedPrefixes(
        parents=parents,
        lengths=tuple(seen.tolist()),
        max_length=max(seen.tolist(), default=0),
        position_ids=plan.position_ids + before.repeat_interleave(lengths),
        key_rows=key_rows + torch.arange(len(key_rows)),
        cu_seqlens=torch.cat([seen.new_zeros(1), seen.cumsum(0)]).to(torch.int32),
    )
