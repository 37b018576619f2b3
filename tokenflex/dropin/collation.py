"""Collators for fine-tuning: a count per sample, and no loss on image placeholders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenflex.counts import TokenCount, TokenCounts
from tokenflex.dropin.calls import placeholder_ids
from tokenflex.dropin.samples import encode_samples, images_of_sample, videos_of_sample
from tokenflex.dropin.sampling import CountStream

IGNORE = -100


@dataclass
class ImageTextCollator:
    """Collator for ``transformers.Trainer`` that makes model inputs with labels from samples.

    A sample is a dict with ``messages``, a conversation as ``apply_chat_template`` takes it, images
    inside or beside it as ``images``; or with ``text`` and ``images``, a prompt with placeholders
    and a list of its images. Likewise ``videos``, for families that take them. Train with
    ``remove_unused_columns=False``.

    A batch holds the outputs of the processor, right-padded, and ``labels``: ``input_ids`` with
    -100 on padding and image placeholders.

    Args:
        processor: A converted processor, or a stock one.
        counts: One count for all images; or a :class:`tokenflex.TokenCounts`, which draws a count
            for each sample, shared by all of its images and frames. A sample with an "index" gets
            the draw for it and its "epoch" (0 by default), which is the same for any worker, rank
            and resumed run; others get one draw after another. The default leaves the counts to the
            processor.
        assistant_only: Learn only what the chat template marks by ``{% generation %}``. For samples
            with ``messages``.
        image_token_id: ``model.config.image_token_id``, the placeholder of a stock processor's
            model. A converted processor knows it.
        max_frames: Most frames of a video; the processor's 32 if None.
        fps: Frames per second of a video; all up to ``max_frames`` if None.
        budget: Vision tokens of each video, spread over its frames; ``counts`` are then those of
            images.

    Raises:
        ValueError: A stock processor has ``counts``, or no ``image_token_id``.
    """

    processor: Any
    counts: TokenCounts | TokenCount | None = None
    assistant_only: bool = False
    image_token_id: int | None = None
    max_frames: int | None = None
    fps: float | None = None
    budget: int | None = None
    _placeholders: list[int] = field(default_factory=list, init=False, repr=False)
    _stream: CountStream | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if hasattr(self.processor, "image_token_counts"):
            self._placeholders = placeholder_ids(self.processor)
            self.image_token_id = self._placeholders[0]
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
        else:
            self._placeholders = [self.image_token_id]
        if isinstance(self.counts, TokenCounts):
            self._stream = CountStream(self.counts)

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> Any:
        """Return the batch of some samples.

        Raises:
            ValueError: Samples are of both kinds or of none, or have a number of images that the
                family's processor does not take.
        """
        batch = encode_samples(
            self.processor,
            samples,
            family=getattr(self.processor, "_tokenflex_family", None),
            chat_options={"return_assistant_tokens_mask": True} if self.assistant_only else {},
            **self._options(samples),
        )
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORE)
        if self.assistant_only:
            is_learned = batch.pop("assistant_masks", None)
            if is_learned is None:
                raise ValueError("samples must have 'messages' for assistant_only=True, got 'text'")
            batch["labels"].masked_fill_(is_learned == 0, IGNORE)
        return _without_labels_of(batch, self._placeholders)

    def _options(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        options: dict[str, Any] = {"padding": True, "padding_side": "right"}
        videos = [videos_of_sample(sample) for sample in samples]
        if any(videos):
            given = {"max_frames": self.max_frames, "fps": self.fps, "budget": self.budget}
            options |= {name: value for name, value in given.items() if value is not None}
        if not hasattr(self.processor, "image_token_counts"):
            return options
        counts: Any = self.counts
        if self._stream is not None:
            with_frames = self.budget is None
            counts = [
                count
                for sample, of_sample in zip(samples, videos, strict=True)
                for count in [self._stream.draw(sample)]
                * (images_of_sample(sample) + of_sample * with_frames)
            ]
        return {**options, "num_image_tokens": counts}


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
    return _without_labels_of(batch, placeholder_ids(processor))


def _without_labels_of(batch: Any, placeholders: Sequence[int]) -> Any:
    for token_id in placeholders:
        batch["labels"] = batch["labels"].masked_fill(batch["input_ids"] == token_id, IGNORE)
    return batch
