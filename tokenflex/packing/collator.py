"""The data collator that packs what another collator pads, and one for ready processor outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import ProcessorMixin

from tokenflex.dropin.collation import IGNORE, ImageTextCollator
from tokenflex.dropin.packing import is_per_token, pack_padded, packable_base

SAMPLES = "samples"
"""The key of a row's samples in an item of :class:`tokenflex.packing.PackedDataset`."""

_PADDING = {"attention_mask": 0, "labels": IGNORE}
"""Values that pad the columns of a sample's text; others are padded with 0."""


class PackingCollator:
    """Data collator that packs a trainer's samples into one row without padding.

    It wraps the collator that a trainer would have used: any that takes samples and returns a
    padded batch with ``input_ids``, ``attention_mask``, ``labels`` and the inputs of images. That
    one decides what is learned. The batch holds arguments of the model, those that
    :func:`tokenflex.packing.pack_inputs` returns. Train with ``remove_unused_columns=False``.

    Args:
        model: The model to train, prepared by :func:`tokenflex.packing.enable`; a converted one
            need not be, if its language model is among those tested. None of its weights are kept,
            so workers of a data loader may hold the collator.
        collator: Makes a padded batch; a processor, which stands for
            :class:`tokenflex.dropin.ImageTextCollator` with it; or :func:`join_outputs` for samples
            that are outputs of a processor.
        keep_placeholder_labels: Leave the labels of image placeholders as ``collator`` makes them,
            such as TRL's, which learns them. By default they are -100: nothing predicts the id of a
            placeholder, and a loss on it weighs samples by their images.

    Raises:
        ValueError: The model is not prepared, or cannot be packed, or must be compared first.

    Example:
        >>> packing.enable(model)
        >>> collator = packing.PackingCollator(model, processor)
        >>> args = TrainingArguments("runs", remove_unused_columns=False)
        >>> Trainer(model, args, train_dataset=dataset, data_collator=collator).train()
    """

    def __init__(
        self,
        model: Any,
        collator: Callable[[Any], Any],
        *,
        keep_placeholder_labels: bool = False,
    ) -> None:
        base = packable_base(model)
        if isinstance(collator, ProcessorMixin):
            collator = ImageTextCollator(collator, image_token_id=base.config.image_token_id)
        if not callable(collator):
            raise TypeError(
                f"collator must be a collator or a processor, got {type(collator).__name__}"
            )
        self.collator = collator
        self.keep_placeholder_labels = keep_placeholder_labels
        self._base = without_weights(base)

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any]:
        """Return the model's arguments for one row.

        Raises:
            ValueError: There is no sample, or the wrapped collator makes no padded batch of them.
        """
        flat: list[Any] = []
        for sample in samples:
            row = sample[SAMPLES] if isinstance(sample, Mapping) and SAMPLES in sample else [sample]
            # Copies: TRL's collator changes samples in place.
            flat += [dict(each) if isinstance(each, Mapping) else each for each in row]
        if not flat:
            raise ValueError("samples must hold at least one sample, got none")
        packed = pack_padded(self._base, self.collator(flat))
        if packed.get("labels") is not None and not self.keep_placeholder_labels:
            for name in ("image_token_id", "video_token_id"):
                token = getattr(self._base.config, name, None)
                if isinstance(token, int):
                    packed["labels"].masked_fill_(packed["input_ids"] == token, IGNORE)
        return _longest_first(packed)


def join_outputs(samples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Join outputs of a processor, one prompt each, to a right-padded batch.

    Args:
        samples: Each with ``input_ids`` [L] or [1, L] and image inputs, as the processor returns
            them with ``return_tensors="pt"``. Without ``labels``, all text is learned. Without an
            ``attention_mask``, all tokens are seen.

    Returns:
        ``input_ids``, ``attention_mask``, ``labels`` and the like [B, L]; inputs of images one
        sample after another, padded with zeros where samples have different numbers of tiles; lists
        joined.

    Raises:
        ValueError: A sample has no ``input_ids``.
    """
    if not all("input_ids" in sample for sample in samples):
        raise ValueError(
            f"samples must all have input_ids, got keys {[sorted(sample) for sample in samples]}"
        )
    rows = [_text_columns(sample) for sample in samples]
    length = max(len(row["input_ids"]) for row in rows)
    joined: dict[str, Any] = {
        name: torch.stack([_padded(row[name], length, _PADDING.get(name, 0)) for row in rows])
        for name in rows[0]
        if all(name in row for row in rows)
    }
    others = dict.fromkeys(n for sample in samples for n in sample if not is_per_token(n))
    for name in others:
        values = [sample[name] for sample in samples if sample.get(name) is not None]
        if all(isinstance(value, torch.Tensor) for value in values):
            joined[name] = _stacked(values)
        else:
            joined[name] = [item for value in values for item in value]
    return joined


def _padded(column: torch.Tensor, length: int, value: int) -> torch.Tensor:
    return F.pad(column, (0, length - len(column)), value=value)


def _text_columns(sample: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    columns = {
        name: torch.as_tensor(sample[name]).reshape(-1)
        for name in sample
        if is_per_token(name) and sample[name] is not None
    }
    ids = columns["input_ids"]
    columns.setdefault("attention_mask", torch.ones_like(ids))
    columns.setdefault("labels", ids.masked_fill(columns["attention_mask"] == 0, IGNORE))
    return columns


def _stacked(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """Concatenate tensors along their first axis, padded with zeros where others differ."""
    sizes = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
    padded = []
    for value in values:
        missing = [size - own for size, own in zip(sizes, value.shape[1:], strict=True)]
        padded.append(F.pad(value, [n for size in reversed(missing) for n in (0, size)]))
    return torch.cat(padded)


def without_weights(base: Any) -> Any:
    """Return a base model without modules, for what its class and config alone decide."""
    shell = object.__new__(type(base))
    nn.Module.__init__(shell)
    shell.config = base.config
    return shell


def _longest_first(packed: dict[str, Any]) -> dict[str, Any]:
    """Put the tensor with the longest first axis first.

    accelerate cuts all tensors of an IterableDataset's batch to the length of the first one.
    """
    lengths = {k: len(v) for k, v in packed.items() if isinstance(v, torch.Tensor) and v.ndim}
    first = max(lengths, key=lambda name: lengths[name])
    return {first: packed.pop(first), **packed}
