"""Batches of a converted stock model: samples through its family's processor, packed or padded.

Conversations are encoded as evaluation encodes them, so that training learns what evaluation asks:
the ids are those of the processor's ``apply_chat_template``, and what is learned is what the
assistant says. Sizes of images are enough to plan a step, for a blank image of the same size has
the same tiles and text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from tokenflex.counts import TokenCount, TokenCounts, tokens_of
from tokenflex.data.packing import DrawnSample, PackingCollator
from tokenflex.data.rows import PackedRow
from tokenflex.data.samples import Conversation, Sample, Turn
from tokenflex.data.sequences import IGNORE, TokenSequence
from tokenflex.dropin.model import token_types
from tokenflex.dropin.packing import pack_padded
from tokenflex.dropin.processor import image_token_id
from tokenflex.evaluation.encoding import QuestionEncoder
from tokenflex.prompts import expand_placeholders, runs_of

_SIZES_KEPT = 4096
_BLANK_SIDE = 32


@dataclass(frozen=True, kw_only=True)
class ConvertedBatch:
    """One forward pass of a converted model: a packed row, or padded ones.

    Attributes:
        inputs: Keyword arguments of the model, without labels.
        target_rows: int64 [targets]; rows of all of ``input_ids``, flattened, whose logits predict
            a target.
        targets: int64 [targets]; answer tokens.
        answers: For each conversation its ``kind`` and how many targets are its.
        sample_ids: For messages about this batch.
        blank: Inputs of a blank image, where ``inputs`` have none.
        teacher: None: a converted model is no teacher.
    """

    inputs: dict[str, Any]
    target_rows: torch.Tensor
    targets: torch.Tensor
    answers: list[tuple[str, int]] = field(default_factory=list)
    sample_ids: list[str] = field(default_factory=list)
    blank: dict[str, Any] | None = None
    teacher: PackedRow | None = None

    @property
    def num_rows(self) -> int:
        """Rows of the language model that the forward pass computes, padding included."""
        rows: int = self.inputs["input_ids"].numel()
        return rows

    def to(self, device: torch.device | str) -> ConvertedBatch:
        """Return the batch with its tensors on ``device``."""
        return replace(
            self,
            inputs=_moved(self.inputs, device),
            target_rows=self.target_rows.to(device),
            targets=self.targets.to(device),
            blank=None if self.blank is None else _moved(self.blank, device),
        )

    def model_inputs(self) -> dict[str, Any]:
        """Return the arguments of :class:`tokenflex.training.conversions.ConvertedStep`."""
        return {"inputs": self.inputs, "target_rows": self.target_rows, "blank": self.blank}

    def without_targets(self) -> ConvertedBatch:
        """Return the same forward pass with nothing to learn."""
        none = self.targets[:0]
        return replace(self, target_rows=none, targets=none, answers=[], sample_ids=[])

    def with_every_gradient(self, model: Any, count: TokenCount) -> ConvertedBatch:
        """Return the batch, whose collator gave it a blank image if it had none."""
        return self


def _moved(inputs: dict[str, Any], device: torch.device | str) -> dict[str, Any]:
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in inputs.items()
    }


class ConvertedCollator(PackingCollator):
    """Makes batches of samples for a converted model, each at its own count. Runs in workers.

    Args:
        processor: The converted processor.
        counts: Draws the count of each sample that comes without one.
        base: The converted base model; its class and config are used, none of its weights.
        packs: Make one row without padding; else a row for each conversation, padded on the right.
        max_length: Rows of a conversation at most, text and vision; None for no bound.
    """

    def __init__(
        self,
        processor: Any,
        counts: TokenCounts,
        *,
        base: Any,
        packs: bool,
        max_length: int | None = None,
    ) -> None:
        self.processor = processor
        self.counts = counts
        self.share_prefix = False
        self.max_length = max_length
        self.teacher_count = None
        self.image_token_id = image_token_id(processor)
        self.base = base
        self.packs = packs
        self._questions = QuestionEncoder(processor)
        self._tiles: dict[tuple[tuple[int, int], ...], list[Any]] = {}
        self._blank: dict[str, Any] | None = None

    def encoded(self, sample: Sample) -> tuple[list[TokenSequence], list[int]]:
        """Return a sample's conversations, and the tiles that each run of placeholders stands for.

        Raises:
            ValueError: The processor or the chat template does not take the sample.
        """
        tiles = self._tiles_of(sample.image_sizes)
        runs = [number // runs_of(number) for number in tiles for _ in range(runs_of(number))]
        sequences = [self._questions.sequence(talk, tiles) for talk in sample.conversations]
        if not any(sequence.num_targets for sequence in sequences):
            raise ValueError("it holds no answer to learn")
        images = slice(0, len(runs))
        return [replace(sequence, images=images) for sequence in sequences], runs

    def fit(self, drawn: DrawnSample) -> DrawnSample:
        """Return the sample with its count, and what of it is learned then.

        Raises:
            ValueError: It cannot be encoded, a conversation has nothing left to learn, or images
                that ``max_length`` cuts off change the tiles of those before them.
        """
        fitted = super().fit(drawn)
        sizes = drawn.sample.image_sizes
        kept = sizes[: self._images_shown(fitted)]
        before, after = self._tiles_of(sizes), self._tiles_of(kept)
        if [*map(_key_of, before[: len(kept)])] != [*map(_key_of, after)]:
            raise ValueError(
                f"sample {drawn.sample.id}: max_length of {self.max_length} leaves {len(kept)} of "
                f"its {len(sizes)} images, which its processor cuts into other tiles then"
            )
        return fitted

    def _images_shown(self, fitted: DrawnSample) -> int:
        """Return the number of images that the conversations of a fitted sample show."""
        left, images = len(fitted.tiles), 0
        for number in self._tiles_of(fitted.sample.image_sizes):
            if left <= 0:
                break
            left, images = left - runs_of(number), images + 1
        return images

    def _tiles_of(self, sizes: tuple[tuple[int, int], ...]) -> list[Any]:
        """Return the tiles of each image of a sample, by a blank image of each one's size."""
        if not sizes:
            return []
        if sizes not in self._tiles:
            if len(self._tiles) >= _SIZES_KEPT:
                self._tiles.clear()
            blank = [Image.new("RGB", (width, height)) for height, width in sizes]
            self._tiles[sizes] = self.processor.process_images([blank])[1]
        return self._tiles[sizes]

    def __call__(self, drawn: Sequence[DrawnSample]) -> ConvertedBatch:  # type: ignore[override]
        """Make one batch.

        Raises:
            ValueError: A sample cannot be encoded; the message names it.
        """
        fitted = [item if item.sequences is not None else self.fit(item) for item in drawn]
        data: dict[str, Any] = {}
        tiles: list[Any] = []
        images = [[*item.sample.images[: self._images_shown(item)]] for item in fitted]
        if any(images):
            data, tiles = self.processor.process_images(images)
        rows: list[tuple[np.ndarray, np.ndarray]] = []
        kinds: list[str] = []
        shown: list[int] = []
        counts: list[TokenCount] = []
        rest = iter(tiles)
        for item, of_sample in zip(fitted, images, strict=True):
            assert item.count is not None
            assert item.sequences is not None
            read = [next(rest) for _ in of_sample]
            planned = self._tiles_of(item.sample.image_sizes[: len(read)])
            if [*map(int, read)] != [*map(int, planned)]:
                raise ValueError(
                    f"sample {item.sample.id}: its images were planned as {planned} tiles, by "
                    f"their sizes, but the processor makes {read}"
                )
            first = len(counts)
            counts += [item.count] * sum(read)
            for talk, sequence in zip(item.sample.conversations, item.sequences, strict=True):
                if not sequence.ids.size:  # a conversation without an answer
                    continue
                kinds.append(talk.kind)
                rows.append(self._expanded(sequence, item))
                shown += range(first, first + sum(item.tiles[sequence.images]))
        return self._batch(rows, data, counts, shown, kinds, [item.sample.id for item in fitted])

    def _expanded(self, sequence: TokenSequence, item: DrawnSample) -> tuple[Any, Any]:
        """Return ids and labels of a sequence with its placeholders repeated."""
        is_image = sequence.ids == self.image_token_id
        repeats = np.ones_like(sequence.ids)
        repeats[is_image] = [item.tokens_per_tile * n for n in item.tiles[sequence.images]]
        labels = np.where(is_image, IGNORE, sequence.labels)
        return sequence.ids.repeat(repeats), labels.repeat(repeats)

    def _batch(
        self,
        rows: Sequence[tuple[np.ndarray, np.ndarray]],
        data: dict[str, Any],
        counts: list[TokenCount],
        shown: list[int],
        kinds: Sequence[str],
        sample_ids: list[str],
    ) -> ConvertedBatch:
        shape = len(rows), max((len(ids) for ids, _ in rows), default=0)
        pad = self.processor.tokenizer.pad_token_id
        padded = np.full(shape, 0 if pad is None else pad, np.int64)
        labels, mask = np.full(shape, IGNORE, np.int64), np.zeros(shape, np.int64)
        for i, (row_ids, row_labels) in enumerate(rows):
            end = len(row_ids)
            padded[i, :end], labels[i, :end], mask[i, :end] = row_ids, row_labels, 1
        labels[:, :1] = IGNORE  # nothing predicts the first token
        inputs: dict[str, Any] = {
            "input_ids": torch.from_numpy(padded),
            "attention_mask": torch.from_numpy(mask),
            "labels": torch.from_numpy(labels),
        }
        inputs |= token_types(self.base, inputs["input_ids"], inputs["labels"] != IGNORE)
        if self.packs:
            inputs = self._packed(inputs, data, [counts[tile] for tile in shown])
        flat = inputs.pop("labels").flatten()
        inputs["use_cache"] = False
        target_rows = (flat[1:] != IGNORE).nonzero().squeeze(1)
        blank = None
        if shown:
            inputs |= {**data, "num_image_tokens": counts}
            if shown != [*range(len(counts))]:  # an image in several conversations
                inputs["image_index"] = shown
        else:
            blank = self._blank_image()
        targets = (labels != IGNORE).sum(1).tolist()
        return ConvertedBatch(
            inputs=inputs,
            target_rows=target_rows,
            targets=flat[target_rows + 1],
            answers=list(zip(kinds, targets, strict=True)),
            sample_ids=sample_ids,
            blank=blank,
        )

    def _packed(
        self, inputs: dict[str, Any], data: dict[str, Any], counts: list[TokenCount]
    ) -> dict[str, Any]:
        """Return the padded inputs as one row, whose positions are those of the images shown."""
        shown: dict[str, Any] = {}
        if counts:
            shown["num_image_tokens"] = counts
            if "image_grid_thw" in data:  # only their number is read
                shown["image_grid_thw"] = torch.ones(len(counts), 3, dtype=torch.int64)
        packed = pack_padded(self.base, {**inputs, **shown})
        return {name: value for name, value in packed.items() if name not in shown}

    def _blank_image(self) -> dict[str, Any]:
        """Return the model's inputs of a blank image at the smallest count."""
        if self._blank is None:
            picture = Image.new("RGB", (_BLANK_SIDE, _BLANK_SIDE))
            data, tiles = self.processor.process_images([[picture]])
            count = min(self.counts.counts, key=tokens_of)
            self._blank = {**data, "num_image_tokens": [count] * sum(map(int, tiles))}
        return self._blank


def check_conversations(processor: Any) -> None:
    """Compare an encoded conversation with what the processor makes of the same text.

    Raises:
        ValueError: There is no chat template, or the processor writes more than the template into
            prompts, as PaliGemma's, so that training would learn other prompts than users give.
    """
    _, tiles = processor.process_images([[Image.new("RGB", (_BLANK_SIDE, _BLANK_SIDE))]])
    talk = Conversation((Turn("user", "what is this"), Turn("assistant", "a cat")))
    ids = QuestionEncoder(processor).sequence(talk, tiles).ids
    contents = (
        [{"type": "image"}, {"type": "text", "text": talk.turns[0].text}],
        [{"type": "text", "text": talk.turns[1].text}],
    )
    messages = [
        {"role": turn.role, "content": content}
        for turn, content in zip(talk.turns, contents, strict=True)
    ]
    text = processor.apply_chat_template(messages)
    adds = processor.adds_special_tokens(text)
    expected = processor.encode_text(text, tiles, num_image_tokens=1, add_special_tokens=adds)
    runs = [number // runs_of(number) for number in tiles for _ in range(runs_of(number))]
    expanded = expand_placeholders(torch.from_numpy(ids), runs, image_token_id(processor))
    if not torch.equal(expanded, expected["input_ids"].flatten()):
        model_type = type(processor)._tokenflex_family.model_type
        raise ValueError(
            f"conversations of {model_type} are not what its chat template writes, but have more "
            "tokens of the processor's own: fine-tune it with transformers' Trainer"
        )


def _key_of(tiles: int) -> tuple[int, str, int]:
    return int(tiles), getattr(tiles, "text", ""), runs_of(tiles)
