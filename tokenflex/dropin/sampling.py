"""One count after another for training, where nothing says which sample of the data set it is."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tokenflex.counts import TokenCount, TokenCounts


@dataclass
class CountStream:
    """Draws from :class:`tokenflex.TokenCounts`, sample after sample.

    No two ranks draw the same row of counts, nor do two workers of a data loader, nor the same
    worker in two epochs (its seed is PyTorch's own, so ``torch.manual_seed`` repeats a run).

    Attributes:
        counts: what to draw from.
        drawn: draws so far in this process.
    """

    counts: TokenCounts
    drawn: int = 0

    def next(self) -> TokenCount:
        """The count of the next sample."""
        ranks, rank = 1, 0
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        worker = torch.utils.data.get_worker_info()
        index = self.drawn * ranks + rank
        self.drawn += 1
        return self.counts.draw(index, epoch=0 if worker is None else worker.seed)
