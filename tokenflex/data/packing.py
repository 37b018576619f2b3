"""Samples to one packed batch: counts drawn, pixels stacked, everything planned on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from tokenflex.counts import Grid, TokenCount, TokenCounts, tokens_of
from tokenflex.data.encoding import ConversationEncoder
from tokenflex.data.layout import PackedRow, RowLayout
from tokenflex.data.samples import Conversation, Sample, SampleOutline
from tokenflex.data.sharing import (
    EncodedConversation,
    TokenSequence,
    prefix_and_branches,
    whole_conversations,
)
from tokenflex.data.truncation import truncate
from tokenflex.models.prefixes import SharedPrefixes
from tokenflex_kernels import PackPlan


@dataclass(frozen=True)
class FittedSample:
    """What of a sample is trained on.

    Attributes:
        sequences: one a conversation, or their common prefix and their branches.
        tiles: of each image that a conversation shows.
    """

    sequences: list[TokenSequence]
    tiles: list[int]


@dataclass(frozen=True)
class DrawnSample:
    """A sample with what its count is drawn from, or the ``count`` that it was given.

    ``fitted`` is what :meth:`PackingCollator.fit` gave at that count, where it is known already.
    """

    index: int
    epoch: int
    sample: Sample
    count: TokenCount | None = None
    fitted: FittedSample | None = None


@dataclass(frozen=True)
class TeacherView:
    """The samples of a batch at a teacher's count: a row of its own over the batch's pixels.

    Attributes:
        num_image_tokens: vision tokens of each tile of the batch.
        row: has the batch's targets, in their order.
    """

    num_image_tokens: list[TokenCount]
    row: PackedRow

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TeacherView:
        """The view with its tensors on ``device``."""
        return replace(self, row=self.row.to(device, non_blocking))

    def model_inputs(self) -> dict[str, Any]:
        """The model's ``teacher``."""
        return {
            "num_image_tokens": self.num_image_tokens,
            "plan": self.row.plan,
            "vision_index": self.row.vision_index,
            "shared_prefixes": self.row.shared_prefixes,
            "logits_to_keep": self.row.target_rows,
        }


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
        teacher: what a teacher is shown; None where there is none.
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
    teacher: TeacherView | None = None

    def to(self, device: torch.device | str) -> PackedBatch:
        """The batch with its tensors on ``device``."""
        moved: dict[str, Any] = {
            f.name: getattr(self, f.name).to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(
                getattr(self, f.name), (torch.Tensor, PackPlan, SharedPrefixes, TeacherView)
            )
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
        max_length: rows of a conversation at most, text and vision; longer ones are cut off. None
            for no bound.
        teacher_count: the count that a teacher sees every sample at; None for no teacher. Then
            conversations are cut off at this count, that both passes learn the same.
    """

    def __init__(
        self,
        processor: Any,
        counts: TokenCounts,
        *,
        share_prefix: bool = False,
        max_length: int | None = None,
        teacher_count: TokenCount | None = None,
    ) -> None:
        self.processor = processor
        self.counts = counts
        self.share_prefix = share_prefix
        self.max_length = max_length
        self.teacher_count = teacher_count
        self.encode = ConversationEncoder(
            processor.tokenizer, processor.image_prompt, processor.image_token
        )

    def __call__(self, drawn: Sequence[DrawnSample]) -> PackedBatch:
        """One batch.

        Raises:
            ValueError: a sample cannot be encoded; the message names it.
        """
        counts = [
            self.counts.draw(item.index, item.epoch) if item.count is None else item.count
            for item in drawn
        ]
        fitted = [
            item.fitted or self.fit(_outline_of(item.sample), count)
            for item, count in zip(drawn, counts, strict=True)
        ]
        data, tiles = self._encoder_inputs(
            [
                image
                for item, one in zip(drawn, fitted, strict=True)
                for image in item.sample.images[: len(one.tiles)]
            ]
        )
        tile_counts, row = self._lay_out(fitted, tiles, counts)
        teacher = None
        if self.teacher_count is not None:
            same = [self.teacher_count] * len(counts)
            teacher = TeacherView(*self._lay_out(fitted, tiles, same))
            assert torch.equal(teacher.row.targets, row.targets)
        kinds = [one.kind for item in drawn for one in item.sample.conversations]
        return PackedBatch(
            pixel_values=data["pixel_values"],
            num_image_tokens=tile_counts,
            grids=data.get("grids"),
            plan=row.plan,
            vision_index=row.vision_index,
            target_rows=row.target_rows,
            targets=row.targets,
            shared_prefixes=row.shared_prefixes,
            answers=list(zip(kinds, row.targets_per_conversation, strict=True)),
            sample_ids=[item.sample.id for item in drawn],
            teacher=teacher,
        )

    def _lay_out(
        self, fitted: Sequence[FittedSample], tiles: Sequence[int], counts: Sequence[TokenCount]
    ) -> tuple[list[TokenCount], PackedRow]:
        """The count of each tile, and the row of the samples at these counts.

        Args:
            fitted: the samples.
            tiles: of each image of theirs.
            counts: of each sample.
        """
        tiles_left = iter(tiles)
        tile_counts: list[TokenCount] = []
        layout = RowLayout(self.processor.image_token_id)
        vision_tokens = 0
        for count, one in zip(counts, fitted, strict=True):
            sample_tiles = [next(tiles_left) for _ in one.tiles]
            tile_counts += [count] * sum(sample_tiles)
            image_counts = [tokens_of(count) * number for number in sample_tiles]
            shown = torch.arange(vision_tokens, vision_tokens + sum(image_counts))
            vision_tokens += len(shown)
            layout.add(one.sequences, shown.split(image_counts))
        return tile_counts, layout.plan()

    def fit(self, outline: SampleOutline, count: TokenCount) -> FittedSample:
        """What is packed of a sample at ``count`` tokens a tile: a pure function of the two.

        Raises:
            ValueError: it cannot be encoded, or a conversation has nothing left to learn.
        """
        tiles = self.processor.image_tokens(list(outline.image_sizes), 1)
        longest = count if self.teacher_count is None else self.teacher_count
        lengths = [tokens_of(longest) * one for one in tiles]
        image_token_id = self.processor.image_token_id
        encoded: list[EncodedConversation] = []
        for conversation in outline.conversations:
            ids, labels = self.encode_sample(outline.id, conversation, len(tiles))
            images = len(tiles)
            if self.max_length is not None:
                try:
                    ids, labels, images = truncate(
                        ids, labels, lengths, image_token_id, self.max_length
                    )
                except ValueError as error:
                    raise ValueError(f"sample {outline.id}: {error}") from error
            encoded.append((ids, labels, images))
        shown = max((images for *_, images in encoded), default=0)
        if self.share_prefix:
            sequences = prefix_and_branches(encoded, image_token_id)
        else:
            sequences = whole_conversations(encoded)
        return FittedSample(sequences, tiles[:shown])

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


def _outline_of(sample: Sample) -> SampleOutline:
    sizes = tuple((image.height, image.width) for image in sample.images)
    return SampleOutline(sample.id, sizes, sample.conversations)
