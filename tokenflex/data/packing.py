"""Samples to one packed batch: counts drawn, pixels stacked, everything planned on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from tokenflex.counts import Grid, TokenCount, TokenCounts, tokens_of
from tokenflex.data.encoding import IGNORE, ConversationEncoder
from tokenflex.data.samples import Conversation, Sample
from tokenflex.data.sharing import TokenSequence, prefix_and_branches, whole_conversations
from tokenflex.models.prefixes import SharedPrefixes, share_prefixes
from tokenflex_kernels import PackPlan, plan_packing


@dataclass(frozen=True)
class DrawnSample:
    """A sample with what its count is drawn from, or the ``count`` that it was given."""

    index: int
    epoch: int
    sample: Sample
    count: TokenCount | None = None


@dataclass(frozen=True)
class PackedBatch:
    """One forward pass of training or evaluation.

    Attributes:
        pixel_values: float32 [tiles, 3, height, width], or patches for a NaFlex encoder.
        num_image_tokens: vision tokens of each tile, host ints or (height, width) pairs of them.
        grids: (height, width) of each tile in patches, where the encoder needs to be told.
        plan: where every text token and vision token stands in the packed row.
        vision_index: int64 [vision rows]; the projected vision token that stands there.
        target_rows: int64 [targets]; packed rows whose logits predict a target.
        targets: int64 [targets]; answer tokens.
        shared_prefixes: which of the plan's sequences go on from another; None where none does.
        answers: for each conversation its ``kind`` and how many targets are its.
        sample_ids: for messages about this batch.
    """

    pixel_values: torch.Tensor
    num_image_tokens: list[TokenCount]
    plan: PackPlan
    vision_index: torch.Tensor
    target_rows: torch.Tensor
    targets: torch.Tensor
    shared_prefixes: SharedPrefixes | None = None
    grids: list[Grid] | None = None
    answers: list[tuple[str, int]] = field(default_factory=list)
    sample_ids: list[str] = field(default_factory=list)

    def to(self, device: torch.device | str) -> PackedBatch:
        """The batch with its tensors on ``device``."""
        moved: dict[str, Any] = {
            f.name: getattr(self, f.name).to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(getattr(self, f.name), (torch.Tensor, PackPlan, SharedPrefixes))
        }
        return replace(self, **moved)

    def model_inputs(self) -> dict[str, Any]:
        """Keyword arguments for the model: logits come out at the target rows only."""
        return {
            "pixel_values": self.pixel_values,
            "num_image_tokens": self.num_image_tokens,
            "grids": self.grids,
            "plan": self.plan,
            "vision_index": self.vision_index,
            "shared_prefixes": self.shared_prefixes,
            "logits_to_keep": self.target_rows,
        }


class PackingCollator:
    """Packs samples without padding, each at its own count. Runs in data-loader workers.

    Args:
        processor: a :class:`tokenflex.TokenFlexProcessor`.
        counts: draws the count of each sample that comes without one.
        share_prefix: let the conversations of a sample share the rows they have in common, images
            above all. For models whose ``takes_shared_prefixes`` says so.
    """

    def __init__(self, processor: Any, counts: TokenCounts, *, share_prefix: bool = False) -> None:
        self.processor = processor
        self.counts = counts
        self.share_prefix = share_prefix
        self.encode = ConversationEncoder(processor.tokenizer, processor.image_prompt)

    def __call__(self, drawn: Sequence[DrawnSample]) -> PackedBatch:
        """One batch.

        Raises:
            ValueError: a sample cannot be encoded; the message names it.
        """
        data, tiles = self._encoder_inputs([image for one in drawn for image in one.sample.images])
        tiles_left = iter(tiles)
        tile_counts: list[TokenCount] = []
        sequences: list[TokenSequence] = []
        parents: list[int] = []
        placeholder_counts: list[int] = []
        vision_rows = [torch.zeros(0, dtype=torch.int64)]
        vision_tokens = 0
        for item in drawn:
            sample = item.sample
            count = item.count
            if count is None:
                count = self.counts.draw(item.index, item.epoch)
            sample_tiles = [next(tiles_left) for _ in sample.images]
            tile_counts += [count] * sum(sample_tiles)
            # Every conversation shows the same projected rows: encoded once, wherever they stand.
            image_counts = [tokens_of(count) * tiles for tiles in sample_tiles]
            shown = torch.arange(vision_tokens, vision_tokens + sum(image_counts))
            shown_by_image = shown.split(image_counts)
            vision_tokens += len(shown)
            first = len(sequences)
            for one in self.sequences_of(sample.id, sample.conversations, len(sample.images)):
                sequences.append(one)
                parents.append(first if one.is_branch else -1)
                placeholder_counts += image_counts[one.images]
                vision_rows += shown_by_image[one.images]
        plan = plan_packing(
            [one.ids for one in sequences],
            placeholder_counts,
            self.processor.image_token_id,
            labels=[one.labels for one in sequences],
        )
        prefixes = set(parents)
        targets_of = _targets_per_sequence(plan)
        answers = [targets for i, targets in enumerate(targets_of) if i not in prefixes]
        kinds = [one.kind for item in drawn for one in item.sample.conversations]
        # Row t predicts the label of row t + 1; each sequence's first row carries no label.
        target_rows = (plan.labels[1:] != IGNORE).nonzero().squeeze(1)
        return PackedBatch(
            pixel_values=data["pixel_values"],
            num_image_tokens=tile_counts,
            grids=data.get("grids"),
            plan=plan,
            vision_index=torch.cat(vision_rows),
            target_rows=target_rows,
            targets=plan.labels[target_rows + 1],
            shared_prefixes=share_prefixes(plan, parents) if prefixes - {-1} else None,
            answers=list(zip(kinds, answers, strict=True)),
            sample_ids=[item.sample.id for item in drawn],
        )

    def sequences_of(
        self, sample_id: str, conversations: Sequence[Conversation], num_images: int
    ) -> list[TokenSequence]:
        """What is packed for a sample: a sequence a conversation, or their prefix and branches."""
        encoded = [self.encode_sample(sample_id, one, num_images) for one in conversations]
        if self.share_prefix:
            return prefix_and_branches(encoded, num_images, self.processor.image_token_id)
        return whole_conversations(encoded, num_images)

    def encode_sample(
        self, sample_id: str, conversation: Conversation, num_images: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """ids and labels of one conversation, with an error that names the sample."""
        try:
            return self.encode(conversation, num_images)
        except ValueError as error:
            raise ValueError(f"sample {sample_id}: {error}") from error

    def _encoder_inputs(self, images: list[Any]) -> tuple[dict[str, Any], list[int]]:
        if images:
            return self.processor.process_images(images)
        return {"pixel_values": torch.zeros(0, 3, 1, 1)}, []


def _targets_per_sequence(plan: PackPlan) -> list[int]:
    before = torch.cat([torch.zeros(1, dtype=torch.int64), (plan.labels != IGNORE).cumsum(0)])
    return before[plan.cu_seqlens.long()].diff().tolist()
