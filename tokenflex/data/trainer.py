"""A packing data collator for transformers' Trainer and TRL's SFTTrainer."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from tokenflex.counts import Grid, TokenCount, TokenCounts
from tokenflex.data.packing import DrawnSample, PackedBatch, PackingCollator
from tokenflex.data.trainer_records import Example, read_example
from tokenflex_kernels.checks import check_count


class DataCollatorWithPacking:
    """Data collator that packs the records of a data set into one batch without padding.

    Each sample is shown at its own vision-token count. The assistant's turns are learned, as in
    ``tokenflex train``. A batch holds arguments of
    :meth:`tokenflex.TokenFlexForConditionalGeneration.forward`, with ``labels``, whose loss Trainer
    weighs by tokens over accumulated batches, processes and micro-batches alike.

    A record is one of:

    - ``messages``, a conversation, or a list of conversations that do not see each other. Images
      stand in its parts, or beside it as ``images`` or ``image``. However many conversations show
      an image, it is encoded once, and they share its rows.
    - ``prompt`` and ``completion``, lists of messages or texts, of which the completion is learned.
    - ``text``, all of which is learned.
    - Outputs of the processor for one prompt: ``input_ids``, ``pixel_values`` and so on, with
      ``labels`` if not all text is learned. With ``num_image_tokens="auto"`` a count is drawn.
    - A :class:`tokenflex.data.samples.Sample`, as the data sets of ``tokenflex train`` hold.

    Train with ``remove_unused_columns=False``, or Trainer takes the records' columns away.

    A record's count is drawn by its ``index`` and ``epoch`` (0 by default): a pure function of
    (seed, epoch, index). Trainer tells a collator neither. For records without an ``index`` a
    checksum of the batch's texts and pixels stands for the epoch, and the place in the batch for
    the index, so that a batch is the same in every worker and resumed run, and samples that are
    shuffled into other batches draw anew.

    Args:
        processor: A :class:`tokenflex.TokenFlexProcessor`.
        counts: Draws the count of each sample; or one count for all. The default is the
            processor's own count.
        share_prefix: Let the conversations of a record share the rows that they have in common.
            Needs the model's own attention, which replaces "sdpa".
        max_length: Largest number of rows of a conversation, text and vision; longer ones are cut
            off. None for no bound.

    Raises:
        TypeError: The processor is of another model; converted ones have
            :class:`tokenflex.dropin.ImageTextCollator`.

    Example:
        >>> collator = DataCollatorWithPacking(processor, TokenCounts((64, 144, 256), (2, 3, 5)))
        >>> args = TrainingArguments("runs", remove_unused_columns=False)
        >>> Trainer(model, args, train_dataset=dataset, data_collator=collator).train()
    """

    def __init__(
        self,
        processor: Any,
        counts: TokenCounts | TokenCount | None = None,
        *,
        share_prefix: bool = True,
        max_length: int | None = None,
    ) -> None:
        if not hasattr(processor, "process_images"):
            raise TypeError(
                f"processor must be a TokenFlexProcessor, got {type(processor).__name__}; for a "
                "converted model there is tokenflex.dropin.ImageTextCollator"
            )
        if not isinstance(counts, TokenCounts):
            count = processor.num_image_tokens if counts is None else counts
            if isinstance(count, list):  # [4, 9] is two counts elsewhere, (4, 9) one grid
                raise TypeError(
                    f"counts must be TokenCounts, an int or a (height, width) pair, got {count!r}"
                )
            counts = TokenCounts((count,), (1.0,))
        if not isinstance(share_prefix, bool):
            raise TypeError(f"share_prefix must be a bool, got {share_prefix!r}")
        if max_length is not None:
            max_length = check_count("max_length", max_length)
        self.packer = PackingCollator(
            processor, counts, share_prefix=share_prefix, max_length=max_length
        )

    def __call__(self, records: Sequence[Any]) -> dict[str, Any]:
        """Return the model's arguments for one batch.

        Raises:
            TypeError, ValueError: A record cannot be read; the message names its place.
        """
        if isinstance(records, (str, bytes, Mapping)) or not isinstance(records, Iterable):
            raise TypeError(f"records must be a list of records, got {type(records).__name__}")
        examples = [read_example(record, i, self.packer) for i, record in enumerate(records)]
        if not examples:
            raise ValueError("records must hold at least one record, got none")
        if len({example.pixel_values is None for example in examples if example.tiles}) > 1:
            raise ValueError(
                "records of a batch must all hold images, or all pixel_values, got both"
            )
        keys = [example.key for example in examples]
        if None in keys and len(self.packer.counts.counts) > 1:
            checksum = _checksum(examples)
            keys = [key or (checksum, place) for place, key in enumerate(keys)]
        fitted = [
            self._fit(example, key or (0, 0)) for example, key in zip(examples, keys, strict=True)
        ]
        if any(example.pixel_values is not None for example in examples):
            batch = self._pack_pixels(examples, fitted)
        else:
            batch = self.packer(fitted)
        return model_inputs(batch)

    def _fit(self, example: Example, key: tuple[int, int]) -> DrawnSample:
        epoch, index = key
        drawn = DrawnSample(index, epoch, example.sample, example.count)
        try:
            return self.packer.fit_sequences(drawn, example.sequences, example.tiles)
        except ValueError as error:
            raise ValueError(f"{example.sample.id}: {error}") from error

    def _pack_pixels(
        self, examples: Sequence[Example], fitted: Sequence[DrawnSample]
    ) -> PackedBatch:
        """Pack samples whose images are processed already."""
        pixels: list[torch.Tensor] = []
        grids: list[Grid] = []
        have_grids = set()
        for place, (example, drawn) in enumerate(zip(examples, fitted, strict=True)):
            if example.pixel_values is not None and len(example.pixel_values):
                size = example.pixel_values.shape[1:]
                if pixels and size != pixels[0].shape[1:]:
                    raise ValueError(
                        f"records[{place}].pixel_values must have tiles of "
                        f"{list(pixels[0].shape[1:])} as others of the batch, got {list(size)}"
                    )
                have_grids.add(example.grids is not None)
                shown = sum(drawn.tiles)  # truncation may leave images out
                pixels.append(example.pixel_values[:shown])
                grids += (example.grids or [])[:shown]
        if len(have_grids) > 1:
            raise ValueError("records of a batch must all hold grids, or none of them, got both")
        if not pixels:
            return self.packer(fitted)
        data = {"pixel_values": torch.cat(pixels), "grids": grids or None}
        return self.packer.pack(fitted, data, [tiles for drawn in fitted for tiles in drawn.tiles])


def model_inputs(batch: PackedBatch) -> dict[str, Any]:
    """Return a packed batch as Trainer hands it to the model, with ``labels`` of the whole row.

    ``position_ids`` are the row's own: TRL counts tokens by them.
    """
    row = batch.plan if batch.shared_prefixes is None else batch.shared_prefixes
    inputs = {
        "labels": batch.plan.labels[None],
        "position_ids": row.position_ids[None],
        "target_rows": batch.target_rows[None],
        "plan": batch.plan,
        "shared_prefixes": batch.shared_prefixes,
        "num_image_tokens": batch.num_image_tokens,
        "grids": batch.grids,
        "pixel_values": batch.pixel_values,
        # Trainer has no use for them, and without them the projector writes into the packed row.
        "output_image_hidden_states": False,
    }
    if len(batch.pixel_values):
        # accelerate cuts all tensors of an IterableDataset's batch to the length of its first one.
        inputs = {"pixel_values": inputs.pop("pixel_values"), **inputs}
    return inputs


def _checksum(examples: Sequence[Example]) -> int:
    """Return a number that the texts and pixels of a batch determine, in their order."""
    value = 0
    for example in examples:
        for sequence in example.sequences:
            value = zlib.crc32(sequence.ids.data, value)
        for image in example.sample.images:
            value = zlib.crc32(image.tobytes(), value)
        if example.pixel_values is not None:
            value = zlib.crc32(example.pixel_values.view(torch.uint8).numpy().data, value)
    return value
