"""The sequences of several samples in one packed row, and what of it is learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from tokenflex.data.encoding import IGNORE
from tokenflex.data.sharing import TokenSequence
from tokenflex.models.prefixes import SharedPrefixes, share_prefixes
from tokenflex_kernels import PackPlan, plan_packing


@dataclass(frozen=True)
class PackedRow:
    """What the model needs to know of one packed row.

    Attributes:
        plan: where every text token and vision token stands.
        vision_index: int64 [vision rows]; the projected vision token that stands there.
        shared_prefixes: which of the plan's sequences go on from another; None where none does.
        target_rows: int64 [targets]; rows whose logits predict a target.
        targets: int64 [targets]; answer tokens.
        targets_per_conversation: in the order in which conversations were added.
    """

    plan: PackPlan
    vision_index: torch.Tensor
    shared_prefixes: SharedPrefixes | None
    target_rows: torch.Tensor
    targets: torch.Tensor
    targets_per_conversation: list[int]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedRow:
        """The row with its tensors on ``device``."""
        shared = self.shared_prefixes
        return replace(
            self,
            plan=self.plan.to(device, non_blocking=non_blocking),
            vision_index=self.vision_index.to(device, non_blocking=non_blocking),
            shared_prefixes=None if shared is None else shared.to(device, non_blocking),
            target_rows=self.target_rows.to(device, non_blocking=non_blocking),
            targets=self.targets.to(device, non_blocking=non_blocking),
        )


class RowLayout:
    """Takes sequences sample by sample, then plans the row.

    Args:
        image_token_id: the placeholder's.
    """

    def __init__(self, image_token_id: int) -> None:
        self.image_token_id = image_token_id
        self._sequences: list[TokenSequence] = []
        self._parents: list[int] = []
        self._placeholder_counts: list[int] = []
        self._vision_rows = [torch.zeros(0, dtype=torch.int64)]

    def add(self, sequences: Sequence[TokenSequence], images: Sequence[torch.Tensor]) -> None:
        """Add a sample.

        Args:
            sequences: its conversations, or their common prefix and their branches.
            images: int64 [count] for each of its images; which projected vision tokens it shows.
        """
        first = len(self._sequences)
        for one in sequences:
            self._sequences.append(one)
            self._parents.append(first if one.is_branch else -1)
            # However many sequences show an image, its tokens are projected once.
            self._placeholder_counts += [len(shown) for shown in images[one.images]]
            self._vision_rows += images[one.images]

    def plan(self) -> PackedRow:
        """The row of all that was added.

        Raises:
            ValueError: as :func:`tokenflex_kernels.plan_packing`.
        """
        plan = plan_packing(
            [one.ids for one in self._sequences],
            self._placeholder_counts,
            self.image_token_id,
            labels=[one.labels for one in self._sequences],
        )
        prefixes = set(self._parents)
        is_target = plan.labels != IGNORE
        before = torch.cat([torch.zeros(1, dtype=torch.int64), is_target.cumsum(0)])
        targets = before[plan.cu_seqlens.long()].diff().tolist()
        # Row t predicts the label of row t + 1; each sequence's first row carries no label.
        target_rows = is_target[1:].nonzero().squeeze(1)
        return PackedRow(
            plan=plan,
            vision_index=torch.cat(self._vision_rows),
            shared_prefixes=share_prefixes(plan, self._parents) if prefixes - {-1} else None,
            target_rows=target_rows,
            targets=plan.labels[target_rows + 1],
            targets_per_conversation=[
                number for place, number in enumerate(targets) if place not in prefixes
            ],
        )
