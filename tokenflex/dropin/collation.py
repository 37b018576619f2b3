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
    inside or beside it as ``images``; or with ``text`` and ``images``, a prompt with placeholders
    and a list of its images. Train with ``remove_unused_columns=False``.

    A batch holds the outputs of the processor, right-padded, and ``labels``: ``input_ids`` with
    -100 on padding and image placeholders.

    Args:
        processor: A converted processor, or a stock one.
        counts: One count for all images; or a :class:`tokenflex.TokenCounts`, which draws a count
            for each sample, shared by all of its images. A sample with an "index" gets the draw for
            it and its "epoch" (0 by default), which is the same for any worker, rank and resumed
            run; others get one draw after another. The default leaves the counts to the processor.
        assistant_only: Learn only what the chat template marks by ``{% generation %}``. For samples
            with ``messages``.
        image_token_id: ``model.config.image_token_id``, the placeholder of a stock processor's
            model. A converted processor knows it.

    Raises:
        ValueError: A stock processor has ``counts``, or no ``image_token_id``.
    """

    processor: Any
    counts: TokenCounts | TokenCount | None = None
    assistant_only: bool = False
    image_token_id: int | None = None
    _stream: CountStream | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if hasattr(self.processor, "image_token_counts"):
            self.image_token_id = image_token_id(self.processor)
        elif self.counts is not None:
            raise ValueError(
                "processor must be converted for counts: give it to replace_projector with the "
                f"model; got counts={self.counts!r} for a stock processor"
            )
        elif self.image_token_id is None:
            raise ValueError(
                "image_token_id must be given for a stock processor, or placeholders would be "
                "learned: model.config.image_token_id"
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
            conversations = [_with_images(sample) for sample in samples]
            images = [_count_images(conversation) for conversation in conversations]
            batch = self.processor.apply_chat_template(
                conversations,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs=self._options(samples, images),
                **({"return_assistant_tokens_mask": True} if self.assistant_only else {}),
            )
        elif all("text" in sample for sample in samples):
            pictures = [list(sample.get("images") or []) for sample in samples]
            images = [len(of_sample) for of_sample in pictures]
            family = getattr(self.processor, "_tokenflex_family", None)
            is_flat = family is not None and family.flat_images
            if family is not None and is_flat and {*images} != {1}:
                raise ValueError(
                    f"samples of {family.model_type} must have one image each, got {images}"
                )
            flat = [picture for of_sample in pictures for picture in of_sample]
            batch = self.processor(
                images=(flat if is_flat else pictures) if flat else None,
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
        if self.assistant_only:
            is_learned = batch.pop("assistant_masks", None)
            if is_learned is None:
                raise ValueError("samples must have 'messages' for assistant_only=True, got 'text'")
            batch["labels"].masked_fill_(is_learned == 0, IGNORE)
        assert self.image_token_id is not None
        return _without_labels_of(batch, self.image_token_id)

    def _options(self, samples: Sequence[Mapping[str, Any]], images: list[int]) -> dict[str, Any]:
        counts: Any = self.counts
        if self._stream is not None:
            counts = [
                count
                for sample, number in zip(samples, images, strict=True)
                for count in [self._stream.draw(sample)] * number
            ]
        options = {"padding": True, "padding_side": "right"}
        is_converted = hasattr(self.processor, "image_token_counts")
        return {**options, "num_image_tokens": counts} if is_converted else options


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
    return _without_labels_of(batch, image_token_id(processor))


def _without_labels_of(batch: Any, token_id: int) -> Any:
    batch["labels"] = batch["labels"].masked_fill(batch["input_ids"] == token_id, IGNORE)
    return batch


def _with_images(sample: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return a sample's conversation with the images beside it in their places.

    Those are the parts of type "image" without an image; where there are none, the images stand
    before the first user's text, as TRL puts them.
    """
    messages = list(sample["messages"])
    beside = list(sample.get("images") or [])
    if not beside:
        return messages
    places = sum(
        _is_image(part) and not _is_filled(part)
        for message in messages
        for part in _parts(message.get("content"))
    )
    if not places:
        first = next((i for i, m in enumerate(messages) if m.get("role") == "user"), None)
        if first is None:
            raise ValueError(
                "messages with images must have a message of the role 'user', got roles "
                f"{[message.get('role') for message in messages]}"
            )
        content = [*({"type": "image"} for _ in beside), *_parts(messages[first].get("content"))]
        messages[first] = {**messages[first], "content": content}
        places = len(beside)
    if places != len(beside):
        raise ValueError(
            f"images must hold one image for each of the {places} places in messages, got "
            f"{len(beside)}"
        )
    rest = iter(beside)
    return [
        {
            **message,
            "content": [
                {**part, "image": next(rest)} if _is_image(part) and not _is_filled(part) else part
                for part in _parts(message.get("content"))
            ],
        }
        for message in messages
    ]


def _parts(content: Any) -> list[Any]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content or [])


def _is_image(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "image"


def _is_filled(part: Mapping[str, Any]) -> bool:
    return any(part.get(name) is not None for name in ("image", "url", "path", "base64"))


def _count_images(conversation: Sequence[Mapping[str, Any]]) -> int:
    contents = [message.get("content") for message in conversation]
    parts = [part for parts in contents if isinstance(parts, (list, tuple)) for part in parts]
    return sum(_is_image(part) for part in parts)
