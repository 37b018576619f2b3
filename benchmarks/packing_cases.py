"""Batches to pack, and what other models do instead of packing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from tokenflex_kernels import PackPlan, merge_vision, pack_embeddings, plan_packing

IMAGE = 0  # peers look the placeholder up in the table too, so it must be one of its ids


@dataclass(frozen=True)
class Case:
    """``samples`` prompts of ``text`` tokens and one image each, of 64, 144, 256, 64, .. tokens
    (or all of ``count``), ``width`` wide, over a table of ``vocabulary`` rows."""

    samples: int
    text: int
    width: int
    vocabulary: int
    count: int | None = None

    @property
    def name(self) -> str:
        count = "64/144/256" if self.count is None else self.count
        return f"{self.samples}x({self.text} text + {count} vision) D={self.width}"

    def prompts(self, seed: int = 0) -> tuple[list[torch.Tensor], list[int]]:
        """The arguments of ``plan_packing``: the image stands in the middle of its text."""
        generator = torch.Generator().manual_seed(seed)
        prompts = []
        for _ in range(self.samples):
            ids = torch.randint(1, self.vocabulary, (self.text + 1,), generator=generator)
            ids[self.text // 2] = IMAGE
            prompts.append(ids)
        counts = [(64, 144, 256)[i % 3] for i in range(self.samples)]
        return prompts, counts if self.count is None else [self.count] * self.samples

    def batch(
        self, dtype: torch.dtype, device: str, seed: int = 0, table: torch.Tensor | None = None
    ) -> Batch:
        """A batch of random numbers, over ``table`` or one of its own."""
        plan = plan_packing(*self.prompts(seed), IMAGE).to(device)
        generator = torch.Generator(device).manual_seed(seed)

        def rows(number: int) -> torch.Tensor:
            return torch.randn(number, self.width, generator=generator, device=device, dtype=dtype)

        return Batch(
            table=rows(self.vocabulary) if table is None else table,
            vision=rows(plan.vision_rows.shape[0]),
            grad=rows(plan.num_tokens),
            plan=plan,
        )


@dataclass
class Batch:
    """What one call needs; ``grad`` [total, D] is the gradient that comes back."""

    table: torch.Tensor
    vision: torch.Tensor
    grad: torch.Tensor
    plan: PackPlan


def ours(batch: Batch) -> torch.Tensor:
    return pack_embeddings(batch.table, batch.vision, batch.plan)


def masked_scatter(batch: Batch) -> torch.Tensor:
    """As most Hugging Face models have it: look up every row, then overwrite by a mask."""
    embeds = F.embedding(batch.plan.input_ids, batch.table)
    mask = (batch.plan.input_ids == IMAGE).unsqueeze(1).expand_as(embeds)
    return embeds.masked_scatter(mask, batch.vision)


def index_put(batch: Batch) -> torch.Tensor:
    """The same by row number, known beforehand; in place, so without the mask's second copy."""
    embeds = F.embedding(batch.plan.input_ids, batch.table)
    if embeds.requires_grad:
        return embeds.index_put((batch.plan.vision_rows.long(),), batch.vision)
    return embeds.index_put_((batch.plan.vision_rows.long(),), batch.vision)


PACKERS: dict[str, Callable[[Batch], torch.Tensor]] = {
    "pack_embeddings": ours,
    "embedding + masked_scatter": masked_scatter,
    "embedding + index_put": index_put,
}


def ours_sparse(batch: Batch) -> torch.Tensor:
    return pack_embeddings(batch.table, batch.vision, batch.plan, sparse_grad=True)


def index_put_sparse(batch: Batch) -> torch.Tensor:
    """Its table gradient has a row for every row of the batch, not yet added up."""
    embeds = F.embedding(batch.plan.input_ids, batch.table, sparse=True)
    return embeds.index_put((batch.plan.vision_rows.long(),), batch.vision)


# Those whose table gradient is sparse.
SPARSE_PACKERS: dict[str, Callable[[Batch], torch.Tensor]] = {
    "pack_embeddings, sparse_grad": ours_sparse,
    "embedding(sparse) + index_put": index_put_sparse,
}


def merge_ours(batch: Batch) -> torch.Tensor:
    return merge_vision(batch.grad, batch.vision, batch.plan.vision_rows)


def merge_masked_scatter(batch: Batch) -> torch.Tensor:
    mask = (batch.plan.input_ids == IMAGE).unsqueeze(1).expand_as(batch.grad)
    return batch.grad.masked_scatter(mask, batch.vision)


MERGERS: dict[str, Callable[[Batch], torch.Tensor]] = {
    "merge_vision": merge_ours,
    "masked_scatter": merge_masked_scatter,
}


def forward_backward(pack: Callable[[Batch], torch.Tensor], batch: Batch) -> list[torch.Tensor]:
    """Gradients of whichever of table and vision rows require one."""
    leaves = [leaf for leaf in (batch.table, batch.vision) if leaf.requires_grad]
    return list(torch.autograd.grad(pack(batch), leaves, batch.grad))
