"""Samples to one packed batch: counts drawn, pixels stacked, everything planned on the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch

from tokenflex.counts import Grid, TokenCount, TokenCounts, tokens_of
from tokenflex.data.encoding import ConversationEncoder
from tokenflex.data.rows import PackedRow, plan_row
from tokenflex.data.samples import Sample
from tokenflex.data.sequences import TokenSequence, prefix_and_branches, truncate
from tokenflex.models.vision import blank_tile


@dataclass(frozen=True)
class DrawnSample:
    """A sample at a token count: its key, and once it is fitted what of it is trained on.

    Attributes:
        index: in the data set.
        epoch: with the index the key that the count is drawn by.
        sample: with its pictures, or its outline while it is only planned.
        count: vision tokens of a tile; None until it is drawn.
        sequences: one a conversation, or their common prefix and their branches; None until
            :meth:`PackingCollator.fit`.
        tiles: of each image that a conversation shows.
        num_targets: answer tokens of a fitted sample.
        text_tokens: its text rows, those that conversations share once.
        shown_tiles: its tiles, as often as they are shown.
    """

    index: int
    epoch: int
    sample: Sample
    count: TokenCount | None = None
    sequences: list[TokenSequence] | None = None
    tiles: list[int] = field(default_factory=list)
    num_targets: int = 0
    text_tokens: int = 0
    shown_tiles: int = 0

    @property
    def tokens_per_tile(self) -> int:
        """Vision tokens of a tile."""
        assert self.count is not None
        return tokens_of(self.count)

    @property
    def num_tokens(self) -> int:
        """Rows of a fitted sample."""
        return self.num_tokens_at(self.tokens_per_tile)

    def num_tokens_at(self, tokens_per_tile: int) -> int:
        """Return the rows that a fitted sample takes at so many vision tokens a tile."""
        return self.text_tokens + tokens_per_tile * self.shown_tiles


@dataclass(frozen=True, kw_only=True)
class PackedBatch(PackedRow):
    """One forward pass of training or evaluation: a row and the images that it shows.

    Attributes:
        pixel_values: float32 [tiles, 3, height, width], or patches for a NaFlex encoder.
        grids: (height, width) of each tile in patches, where the encoder needs to be told.
        answers: for each conversation its ``kind`` and how many targets are its.
        sample_ids: for messages about this batch.
        teacher: the row of a teacher, over the same images at its own count, with the same targets;
            None where there is no teacher.
    """

    pixel_values: torch.Tensor
    grids: list[Grid] | None = None
    answers: list[tuple[str, int]] = field(default_factory=list)
    sample_ids: list[str] = field(default_factory=list)
    teacher: PackedRow | None = None

    @property
    def num_rows(self) -> int:
        """Rows of the language model that the forward pass computes."""
        return self.plan.num_tokens

    def model_inputs(self) -> dict[str, Any]:
        """Return the model's keyword arguments; logits come out at the target rows only."""
        images = {"pixel_values": self.pixel_values, "grids": self.grids}
        return {**super().model_inputs(), **images}

    def with_every_gradient(self, model: Any, count: TokenCount) -> PackedBatch:
        """Return a batch whose loss has a gradient, maybe zero, in all that images pass.

        One without tiles gets a blank one of ``count`` vision tokens, which no row shows. With it a
        bin of text alone has a gradient where text does not learn, and processes that gather shards
        together run the same modules.
        """
        if len(self.pixel_values):
            return self
        pixels, grids = blank_tile(model.model.vision_model, model.config.vision_config)
        pixels = pixels.to(self.plan.input_ids.device)
        return replace(self.with_unseen_tile(count), pixel_values=pixels, grids=grids)

    def without_targets(self) -> PackedBatch:
        """Return the same forward pass with nothing to learn."""
        teacher = None if self.teacher is None else self.teacher.without_targets()
        batch = super().without_targets()
        return replace(batch, answers=[], sample_ids=[], teacher=teacher)

    def with_unseen_tile(self, count: TokenCount) -> PackedBatch:
        """Return a batch without images for a call with one tile of ``count``, shown nowhere."""
        teacher = None if self.teacher is None else self.teacher.with_unseen_tile(count)
        return replace(super().with_unseen_tile(count), teacher=teacher)


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
            conversations are cut off at this count, so that both passes learn the same.
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
        self.image_token_id: int = processor.image_token_id
        self.encode = ConversationEncoder(
            processor.tokenizer, processor.image_prompt, processor.image_token
        )

    def __call__(self, drawn: Sequence[DrawnSample]) -> PackedBatch:
        """Pack one batch.

        Raises:
            ValueError: a sample cannot be encoded; the message names it.
        """
        fitted = [item if item.sequences is not None else self.fit(item) for item in drawn]
        data: dict[str, Any] = {"pixel_values": torch.zeros(0, 3, 1, 1)}
        tiles: list[int] = []
        if images := [image for item in fitted for image in item.sample.images[: len(item.tiles)]]:
            limits = [n for item in fitted for n in item.sample.max_tiles[: len(item.tiles)]]
            data, tiles = self.processor.process_images(images, max_tiles=limits)
        return self.pack(fitted, data, tiles)

    def pack(
        self, fitted: Sequence[DrawnSample], data: Mapping[str, Any], tiles: Sequence[int]
    ) -> PackedBatch:
        """Pack fitted samples with the encoder's inputs, and the tiles that each image became."""
        row = self._plan(fitted, tiles)
        teacher = None
        if self.teacher_count is not None:
            teacher = self._plan(
                [replace(item, count=self.teacher_count) for item in fitted], tiles
            )
            assert torch.equal(teacher.targets, row.targets)
        kinds = [talk.kind for item in fitted for talk in item.sample.conversations]
        return PackedBatch(
            **vars(row),
            pixel_values=data["pixel_values"],
            grids=data.get("grids"),
            answers=list(zip(kinds, row.targets_per_conversation, strict=True)),
            sample_ids=[item.sample.id for item in fitted],
            teacher=teacher,
        )

    def _plan(self, fitted: Sequence[DrawnSample], tiles: Sequence[int]) -> PackedRow:
        """Plan the row of fitted samples, whose images have become so many tiles each."""
        tiles_left = iter(tiles)
        num_image_tokens: list[TokenCount] = []
        tokens_per_image: list[int] = []
        samples: list[tuple[Sequence[TokenSequence], int]] = []
        for item in fitted:
            assert item.count is not None
            assert item.sequences is not None
            samples.append((item.sequences, len(tokens_per_image)))
            for number in islice(tiles_left, len(item.tiles)):
                num_image_tokens += [item.count] * number
                tokens_per_image.append(item.tokens_per_tile * number)
        row = plan_row(samples, tokens_per_image, self.image_token_id)
        return replace(row, num_image_tokens=num_image_tokens)

    def fit(self, drawn: DrawnSample) -> DrawnSample:
        """Return the sample with its count, and what is packed of it then: a pure function.

        Raises:
            ValueError: it cannot be encoded, or a conversation has nothing left to learn.
        """
        sample = drawn.sample
        try:
            return self.fit_sequences(drawn, *self.encoded(sample))
        except ValueError as error:
            raise ValueError(f"sample {sample.id}: {error}") from error

    def encoded(self, sample: Sample) -> tuple[list[TokenSequence], list[int]]:
        """Return a sample's conversations, and the tiles that each of its placeholders stands for.

        Pictures are not needed: an outline is enough.
        """
        tiles = self.processor.image_tokens(list(sample.image_sizes), 1, sample.max_tiles)
        return self.encode(sample.conversations, len(tiles)), tiles

    def fit_sequences(
        self, drawn: DrawnSample, sequences: Sequence[TokenSequence], tiles: Sequence[int]
    ) -> DrawnSample:
        """Do what :meth:`fit` does for encoded conversations and the tiles of each image."""
        count = drawn.count
        if count is None:
            count = self.counts.draw(drawn.index, drawn.epoch)
        image_token_id = self.image_token_id
        sequences = list(sequences)
        if self.max_length is not None:
            longest = tokens_of(count if self.teacher_count is None else self.teacher_count)
            tokens_per_image = [longest * number for number in tiles]
            sequences = [
                truncate(sequence, tokens_per_image, image_token_id, self.max_length)
                for sequence in sequences
            ]
        num_targets = sum(sequence.num_targets for sequence in sequences)
        tiles = list(tiles[: max((sequence.images.stop for sequence in sequences), default=0)])
        if self.share_prefix:
            sequences = prefix_and_branches(sequences, image_token_id)
        return replace(
            drawn,
            count=count,
            sequences=sequences,
            tiles=tiles,
            num_targets=num_targets,
            text_tokens=sum(sequence.num_tokens([0] * len(tiles)) for sequence in sequences),
            shown_tiles=sum(sum(tiles[sequence.images]) for sequence in sequences),
        )
