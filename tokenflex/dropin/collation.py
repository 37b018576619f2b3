"""Collators for fine-tuning: a count per sample, and no loss on image placeholders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenflex.counts import TokenCount, TokenCounts
from tokenflex.dropin.processor import image_token_id
from tokenflex.dropin.sampling import CountStream

IGNORE = -100


@dataclass
class ImageTextCollator:
    """Collator for ``transformers.Trainer`` that makes model inputs with labels from samples.

    A sample is a dict with ``messages``, a conversation as ``apply_chat_template`` takes it, images
    inside; or with ``text`` and ``images``, a prompt with placeholders and a list of its images.
    Train with ``remove_unused_columns=False``.

    A batch holds the outputs of the processor, right-padded, and ``labels``: ``input_ids`` with
    -100 on padding and image placeholders.

    Args:
        processor: A converted processor.
        counts: One count for all images; or a :class:`tokenflex.TokenCounts`, which draws a count
            for each sample, shared by all of its images. A sample with an "index" gets the draw for
            it and its "epoch" (0 by default), which is the same for any worker, rank and resumed
            run; others get one draw after another. The default leaves the counts to the processor.

    Raises:
        ValueError: The processor is not converted.
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
        """Return the batch of some samples.

        Raises:
            ValueError: Samples are of both kinds or of none, or have a number of images that the
                family's processor does not take.
        """
        if all("messages" in sample for sample in samples):
            conversations = [sample["messages"] for sample in samples]
            images = [_count_images(conversation) for conversation in conversations]
            batch = self.processor.apply_chat_template(
                conversations,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs=self._options(samples, images),
            )
        elif all("text" in sample for sample in samples):
            pictures = [list(sample.get("images") or []) for sample in samples]
            images = [len(of_sample) for of_sample in pictures]
            family = self.processor._tokenflex_family
            if family.flat_images and {*images} != {1}:
                raise ValueError(
                    f"samples of {family.model_type} must have one image each, got {images}"
                )
            flat = [picture for of_sample in pictures for picture in of_sample]
            batch = self.processor(
                images=(flat if family.flat_images else pictures) if flat else None,
                text=[sample["text"] for sample in samples],
                return_tensors="pt",
                **self._options(samples, images),
            )
        else:
            raise ValueError(
                "samples must all have 'messages', or all have 'text', got keys "
                f"{[sorted(sample) for sample in samples]}"
            )
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORE)
        return mask_image_labels(batch, self.processor)

    def _options(self, samples: Sequence[Mapping[str, Any]], images: list[int]) -> dict[str, Any]:
        counts: Any = self.counts
        if self._stream is not None:
            counts = [
                count
                for sample, number in zip(samples, images, strict=True)
                for count in [self._stream.draw(sample)] * number
            ]
        return {"padding": True, "padding_side": "right", "num_image_tokens": counts}


@dataclass
class MaskImageLabels:
    """Collator around another one that leaves image placeholders in the labels, such as TRL's.

    Args:
        collator: Makes a batch with ``input_ids`` and ``labels`` from samples.
        processor: A converted processor.
    """

    collator: Callable[[Any], Any]
    processor: Any

    def __call__(self, samples: Any) -> Any:
        """Return the collator's batch, with -100 as the labels of placeholders."""
        return mask_image_labels(self.collator(samples), self.processor)


def mask_image_labels(batch: Any, processor: Any) -> Any:
    """Set ``labels`` to -100 where ``input_ids`` hold placeholders, and return ``batch``.

    Nothing predicts the id of a placeholder, whose embedding is a vision token, and a loss on it
    would weigh samples by their counts.
    """
    is_placeholder = batch["input_ids"] == image_token_id(processor)
    batch["labels"] = batch["labels"].masked_fill(is_placeholder, IGNORE)
    return batch


def _count_images(conversation: Sequence[Mapping[str, Any]]) -> int:
    contents = [message.get("content") for message in conversation]
    parts = [part for parts in contents if isinstance(parts, (list, tuple)) for part in parts]
    return sum(isinstance(part, Mapping) and part.get("type") == "image" for part in parts)
