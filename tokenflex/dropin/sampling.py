"""Draws of counts for training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tokenflex.counts import TokenCount, TokenCounts


@dataclass
class CountStream:
    """Draws from a :class:`tokenflex.TokenCounts`, sample after sample.

    Ranks, workers of a data loader and epochs draw different counts. A worker's seed is PyTorch's,
    so ``torch.manual_seed`` repeats a run.

    Attributes:
        counts: The distribution of counts.
        drawn: Number of draws in this process so far.
    """

    counts: TokenCounts
    drawn: int = 0

    def next(self) -> TokenCount:
        """Return the count of the next sample."""
        ranks, rank = 1, 0
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        worker = torch.utils.data.get_worker_info()
        index = self.drawn * ranks + rank
        self.drawn += 1
        return self.counts.draw(index, epoch=0 if worker is None else worker.seed)

    def draw(self, sample: Mapping[str, Any]) -> TokenCount:
        """Return the count of a sample by its "index" and "epoch", or the next without an index."""
        if "index" in sample:
            return self.counts.draw(int(sample["index"]), int(sample.get("epoch", 0)))
        return self.next()
