"""Rows: the sequences of several samples planned as one packed sequence, and what they teach."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import torch

from tokenflex.counts import TokenCount, tokens_of
from tokenflex.data.sequences import IGNORE, TokenSequence
from tokenflex.models.prefixes import SharedPrefixes, share_prefixes
from tokenflex_kernels import PackPlan, plan_packing

RowT = TypeVar("RowT", bound="PackedRow")


@dataclass(frozen=True, kw_only=True)
class PackedRow:
    """A packed row: its plan, its targets, its prefixes.

    Attributes:
        num_image_tokens: vision tokens of each tile, host ints or (height, width) pairs of them.
        plan: the packed row; its images are those of the samples, each of one tile or several.
        shared_prefixes: which of the plan's sequences go on from another; None where none does.
        target_rows: int64 [targets]; rows whose logits predict a target.
        targets: int64 [targets]; answer tokens.
        targets_per_conversation: in the order of the conversations.
    """

    num_image_tokens: list[TokenCount] = field(default_factory=list)
    plan: PackPlan
    shared_prefixes: SharedPrefixes | None = None
    target_rows: torch.Tensor
    targets: torch.Tensor
    targets_per_conversation: list[int] = field(default_factory=list)

    def to(self: RowT, device: torch.device | str, non_blocking: bool = True) -> RowT:
        """Return the row with its tensors on ``device``."""
        moved = {
            entry.name: value.to(device, non_blocking=non_blocking)
            for entry in fields(self)
            if hasattr(value := getattr(self, entry.name), "to")
        }
        return replace(self, **moved)

    def model_inputs(self) -> dict[str, Any]:
        """Return the model's keyword arguments; logits come out at the target rows only."""
        return {
            "num_image_tokens": self.num_image_tokens,
            "plan": self.plan,
            "shared_prefixes": self.shared_prefixes,
            "logits_to_keep": self.target_rows,
        }

    def without_targets(self: RowT) -> RowT:
        """Return the same row with nothing to learn."""
        none = self.targets[:0]
        return replace(self, target_rows=none, targets=none, targets_per_conversation=[])

    def with_unseen_tile(self: RowT, count: TokenCount) -> RowT:
        """Return a row without images for a call with one tile of ``count``, shown nowhere."""
        tokens = tokens_of(count)
        plan = replace(
            self.plan,
            token_counts=(tokens,),
            num_vision_tokens=tokens,
            image_index=(),
            shown_once=False,
        )
        return replace(self, num_image_tokens=[count], plan=plan)


def plan_row(
    samples: Iterable[tuple[Sequence[TokenSequence], int]],
    tokens_per_image: Sequence[int],
    image_token_id: int,
) -> PackedRow:
    """Plan the row of some samples.

    Args:
        samples: the sequences of each, and the place of its first image in ``tokens_per_image``.
        tokens_per_image: vision tokens of each image, all its tiles together. However many
            sequences show an image, its tokens are projected once.
        image_token_id: the placeholder.

    Raises:
        ValueError: as :func:`tokenflex_kernels.plan_packing`.
    """
    packed: list[TokenSequence] = []
    parents: list[int] = []
    image_index: list[int] = []
    for sequences, first_image in samples:
        first = len(packed)
        packed += sequences
        for sequence in sequences:
            parents.append(first if sequence.is_branch else -1)
            images = sequence.images
            image_index += range(first_image + images.start, first_image + images.stop)
    plan = plan_packing(
        [sequence.ids for sequence in packed],
        tokens_per_image,
        image_token_id,
        labels=[sequence.labels for sequence in packed],
        image_index=image_index,
    )
    prefixes = set(parents) - {-1}
    is_target = plan.labels != IGNORE
    targets_before = torch.cat([torch.zeros(1, dtype=torch.int64), is_target.cumsum(0)])
    targets = targets_before[plan.cu_seqlens.long()].diff().tolist()
    # Row t predicts the label of row t + 1; each sequence's first row carries no label.
    target_rows = is_target[1:].nonzero().squeeze(1)
    return PackedRow(
        plan=plan,
        shared_prefixes=share_prefixes(plan, parents) if prefixes else None,
        target_rows=target_rows,
        targets=plan.labels[target_rows + 1],
        targets_per_conversation=[
            number for sequence, number in enumerate(targets) if sequence not in prefixes
        ],
    )
