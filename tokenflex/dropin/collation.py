"""Batches for fine-tuning: a count drawn for each sample, no loss on placeholders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tokenflex.counts import TokenCount, TokenCounts
from tokenflex.dropin.sampling import CountStream

IGNORE = -100


@dataclass
class ImageTextCollator:
    """Collator for ``transformers.Trainer``: samples to model inputs with labels.

    A sample is a dict with ``messages``, a conversation as ``apply_chat_template`` takes it, images
    inside; or with ``text`` and ``images``, a prompt with placeholders and a list of its images.
    Use ``remove_unused_columns=False`` with it.

    Args:
        processor: a converted one.
        counts: draws a count for each sample, which all of its images share; a TokenCounts draws
            from the keys "index" and "epoch" (0 if there is none) of a sample that has an index,
            the same for any worker, rank and resumed run; else one after another. None leaves the
            count to the processor.

    Returns of a call: what the processor returns, right-padded, and ``labels``: ``input_ids`` with
    -100 on padding and image placeholders.
    """

    processor: Any
    counts: TokenCounts | TokenCount | None = None
    _stream: CountStream | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if not hasattr(self.processor, "image_token_counts"):
            raise ValueError(
                "processor must be converted: give it to replace_projector with the model"
            )
        if isinstance(self.counts, TokenCounts):
            self._stream = CountStream(self.counts)

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> Any:
        """A batch.

        Raises:
            ValueError: samples of both kinds, or of none, or a number of images that the family's
                processor does not take.
        """
        options: dict[str, Any] = {"padding": True, "padding_side": "right"}
        if all("messages" in sample for sample in samples):
            conversations = [sample["messages"] for sample in samples]
            images = [_images_of(conversation) for conversation in conversations]
            options["num_image_tokens"] = self._counts(samples, images)
            batch = self.processor.apply_chat_template(
                conversations,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs=options,
            )
        elif all("text" in sample for sample in samples):
            images = [len(sample.get("images") or []) for sample in samples]
            options["num_image_tokens"] = self._counts(samples, images)
            batch = self.processor(
                images=self._nested_or_flat(samples) if any(images) else None,
                text=[sample["text"] for sample in samples],
                return_tensors="pt",
                **options,
            )
        else:
            raise ValueError(
                "samples must all have 'messages', or all have 'text', got keys "
                f"{[sorted(sample) for sample in samples]}"
            )
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORE)
        batch["labels"] = labels
        return mask_image_labels(batch, self.processor)

    def _counts(self, samples: Sequence[Mapping[str, Any]], images: list[int]) -> Any:
        """A count per image, or what the processor makes of its own default."""
        if self._stream is None:
            return self.counts
        return [
            count
            for sample, number in zip(samples, images, strict=True)
            for count in [self._draw(sample)] * number
        ]

    def _nested_or_flat(self, samples: Sequence[Mapping[str, Any]]) -> list[Any]:
        """The images of each sample, as the family's processor wants them."""
        images = [list(sample.get("images") or []) for sample in samples]
        family = self.processor._tokenflex_family
        if not family.flat_images:
            return images
        if any(len(of_sample) != 1 for of_sample in images):
            raise ValueError(
                f"samples of {family.model_type} must have one image each, got "
                f"{[len(of_sample) for of_sample in images]}"
            )
        return [image for (image,) in images]

    def _draw(self, sample: Mapping[str, Any]) -> TokenCount:
        assert self._stream is not None
        if "index" in sample:
            return self._stream.counts.draw(int(sample["index"]), int(sample.get("epoch", 0)))
        return self._stream.next()


@dataclass
class MaskImageLabels:
    """Another collator, with no loss on image placeholders; TRL's leaves them in the labels.

    Args:
        collator: samples -> a batch with ``input_ids`` and ``labels``.
        processor: a converted one.
    """

    collator: Callable[[Any], Any]
    processor: Any

    def __call__(self, samples: Any) -> Any:
        """The collator's batch, its labels -100 on placeholders."""
        return mask_image_labels(self.collator(samples), self.processor)


def mask_image_labels(batch: Any, processor: Any) -> Any:
    """Set ``labels`` to -100 where ``input_ids`` hold placeholders; returns ``batch``.

    A placeholder's embedding is an image's token: nothing predicts its id, and a loss on it would
    weigh samples by their counts.
    """
    token = processor.tokenizer.convert_tokens_to_ids(processor._tokenflex.image_token)
    batch["labels"] = torch.where(batch["input_ids"] == token, IGNORE, batch["labels"])
    return batch


def _images_of(conversation: Sequence[Mapping[str, Any]]) -> int:
    parts = [part for message in conversation for part in _parts(message)]
    return sum(isinstance(part, Mapping) and part.get("type") == "image" for part in parts)


def _parts(message: Mapping[str, Any]) -> Sequence[Any]:
    content = message.get("content")
    return content if isinstance(content, (list, tuple)) else []
