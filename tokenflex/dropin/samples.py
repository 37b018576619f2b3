"""Samples of a trainer or a data set, through a family's processor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenflex.data.samples import Conversation, Sample
from tokenflex.models.chat import IMAGE_MARK, parts_of

IMAGE = "image"


def prompts_of(sample: Sample) -> list[dict[str, Any]]:
    """Return a dict with ``messages`` for each answer of a sample: the conversation up to it.

    Conversations without images before an answer give no prompt for it.
    """
    prompts = []
    for conversation in sample.conversations:
        messages = _messages(conversation, sample.images)
        for i, message in enumerate(messages):
            prompt = {"messages": messages[:i]}
            if message["role"] == "assistant" and images_of_sample(prompt):
                prompts.append(prompt)
    return prompts


def _messages(conversation: Conversation, images: Sequence[Any]) -> list[dict[str, Any]]:
    """Return a conversation with its images inside, before its first question if it marks none."""
    rest = iter(images)
    are_marked = any(IMAGE_MARK in turn.text for turn in conversation.turns)
    messages = []
    for turn in conversation.turns:
        content: list[dict[str, Any]] = [
            {**part, IMAGE: next(rest)} if part["type"] == IMAGE else part
            for part in parts_of(turn.text)
        ]
        if turn.role == "user" and not are_marked:
            content = [*({"type": IMAGE, IMAGE: image} for image in rest), *content]
        messages.append({"role": turn.role, "content": content})
    return messages


def images_of_sample(sample: Mapping[str, Any]) -> int:
    """Return the number of images of a sample with ``messages``, or with ``text``."""
    if "messages" not in sample:
        return len(list(sample.get("images") or []))
    contents = [message.get("content") for message in sample["messages"]]
    parts = [part for parts in contents if isinstance(parts, (list, tuple)) for part in parts]
    return sum(isinstance(part, Mapping) and part.get("type") == IMAGE for part in parts)


def encode_samples(
    processor: Any,
    samples: Sequence[Mapping[str, Any]],
    *,
    flat_images: bool = False,
    chat_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Return the outputs of a processor for samples, stock or converted.

    Args:
        processor: The processor.
        samples: Dicts with ``messages``, a conversation as ``apply_chat_template`` takes it, images
            inside; or with ``text`` and ``images``, a prompt with placeholders and its images.
        flat_images: Whether the processor takes the images of several prompts as one flat list.
        chat_options: Options of ``apply_chat_template``, for samples with messages.
        **options: Options of the processor.

    Raises:
        ValueError: Samples are of both kinds or of none, or have a number of images that the
            processor does not take.
    """
    if all("messages" in sample for sample in samples):
        return processor.apply_chat_template(
            [sample["messages"] for sample in samples],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs=options,
            **(chat_options or {}),
        )
    if not all("text" in sample for sample in samples):
        raise ValueError(
            "samples must all have 'messages', or all have 'text', got keys "
            f"{[sorted(sample) for sample in samples]}"
        )
    pictures = [list(sample.get("images") or []) for sample in samples]
    numbers = [len(of_sample) for of_sample in pictures]
    if flat_images and {*numbers} != {1}:
        raise ValueError(f"samples of this family must have one image each, got {numbers}")
    flat = [picture for of_sample in pictures for picture in of_sample]
    return processor(
        images=(flat if flat_images else pictures) if flat else None,
        text=[sample["text"] for sample in samples],
        return_tensors="pt",
        **options,
    )
