"""Prompts to pack: samples of text with one image each, as packing's peers need them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from tokenflex_kernels import PackPlan, plan_packing

IMAGE = 0  # peers look the placeholder up in the table too, so it must be one of its ids


@dataclass(frozen=True)
class Prompts:
    """Samples of text with an image in the middle."""

    samples: int
    text: int  # text tokens of each
    width: int  # features of a row
    vocabulary: int  # rows of the embedding table
    count: int | None = None  # vision tokens of each image; 64, 144, 256, 64, .. if None

    @property
    def name(self) -> str:
        count = "64/144/256" if self.count is None else self.count
        return f"{self.samples}x({self.text} text + {count} vision) D={self.width}"

    @property
    def counts(self) -> list[int]:
        if self.count is not None:
            return [self.count] * self.samples
        return [(64, 144, 256)[i % 3] for i in range(self.samples)]

    @property
    def tokens(self) -> int:
        return self.samples * self.text + sum(self.counts)

    def arguments(self, seed: int = 0) -> tuple[list[torch.Tensor], list[int]]:
        """Return the first arguments of ``plan_packing``."""
        generator = torch.Generator().manual_seed(seed)
        prompts = []
        for _ in range(self.samples):
            ids = torch.randint(1, self.vocabulary, (self.text + 1,), generator=generator)
            ids[self.text // 2] = IMAGE
            prompts.append(ids)
        return prompts, self.counts

    def packed(self, device: str, seed: int) -> Packed:
        plan = plan_packing(*self.arguments(seed), IMAGE)
        before = self.text // 2
        ones = [torch.ones(length, dtype=torch.bool) for length in plan.lengths]
        samples = plan.input_ids.split(plan.lengths)
        return Packed(
            plan=plan.to(device),
            rows=plan.vision_rows.long().to(device),
            mask=plan.input_ids == IMAGE,
            text_ids=plan.input_ids[plan.source >= 0].to(device),
            text_pieces=[before, self.text - before] * self.samples,
            padded_ids=pad_sequence(samples, batch_first=True, padding_value=1).to(device),
            padded_mask=pad_sequence(ones, batch_first=True).to(device),
        )


@dataclass(frozen=True)
class Packed:
    """Our plan, and the peers' equivalents of it."""

    plan: PackPlan
    rows: torch.Tensor  # int64 [vision], numbers of the vision rows
    mask: torch.Tensor  # bool [total] on the host, True on vision rows
    text_ids: torch.Tensor  # int64 [text], the ids of the text rows alone
    text_pieces: list[int]  # numbers of text rows before and after each image, on the host
    padded_ids: torch.Tensor  # int64 [samples, longest], the samples side by side
    padded_mask: torch.Tensor  # bool [samples, longest], False on padding
