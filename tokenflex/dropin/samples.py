"""Samples of a trainer or a data set, through a family's processor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tokenflex.data.samples import (
    Conversation,
    Sample,
    SampleDataset,
    count_images,
    size_of,
    split_marks,
)
from tokenflex.dropin.families import Family

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


class PromptsOf(Sequence[dict[str, Any]]):
    """The first prompts of a data set, whose images are read when a prompt is.

    Args:
        dataset: The samples.
        most: The most prompts.
    """

    def __init__(self, dataset: SampleDataset, most: int) -> None:
        self._dataset = dataset
        outline = getattr(dataset, "outline", dataset.__getitem__)
        size = size_of(dataset)
        self._places: list[tuple[int, int]] = []  # the index of the sample, and the prompt's in it
        for index in range(most if size is None else size):
            number = len(prompts_of(outline(index)))
            self._places += [(index, i) for i in range(number)]
            if len(self._places) >= most:
                break
        del self._places[most:]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        index, number = self._places[place]
        return prompts_of(self._dataset[index])[number]


def _messages(conversation: Conversation, images: Sequence[Any]) -> list[dict[str, Any]]:
    """Return a conversation with its images inside, before its first question if it marks none."""
    rest = iter(images)
    are_marked = any(count_images(turn.text) for turn in conversation.turns)
    messages = []
    for turn in conversation.turns:
        content = _content(turn.text, rest)
        if turn.role == "user" and not are_marked:
            content = [*({"type": IMAGE, IMAGE: image} for image in rest), *content]
        messages.append({"role": turn.role, "content": content})
    return messages


def _content(text: str, images: Iterator[Any]) -> list[dict[str, Any]]:
    """Split a text at its marks; the frames of a video are images, one after another."""
    texts, frames = split_marks(text)
    content: list[dict[str, Any]] = []
    for piece, number in zip(texts, [0, *(1 if n is None else n for n in frames)], strict=True):
        content += [{"type": IMAGE, IMAGE: next(images)} for _ in range(number)]
        if piece:
            content.append({"type": "text", "text": piece})
    return content


def images_of_sample(sample: Mapping[str, Any]) -> int:
    """Return the number of images of a sample with ``messages``, or with ``text``."""
    return _number_of(IMAGE, sample)


def videos_of_sample(sample: Mapping[str, Any]) -> int:
    """Return the number of videos of a sample with ``messages``, or with ``text``."""
    return _number_of("video", sample)


def _number_of(kind: str, sample: Mapping[str, Any]) -> int:
    if "messages" not in sample:
        return len(list(sample.get(f"{kind}s") or []))
    contents = [message.get("content") for message in with_images(sample)]
    return sum(_is_of(kind, part) for content in contents for part in _parts(content))


def encode_samples(
    processor: Any,
    samples: Sequence[Mapping[str, Any]],
    *,
    family: Family | None = None,
    chat_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Return the outputs of a processor for samples, stock or converted.

    Args:
        processor: The processor.
        samples: Dicts with ``messages``, a conversation as ``apply_chat_template`` takes it, images
            inside or beside it as ``images``; or with ``text`` and ``images``, a prompt with
            placeholders and its images. Likewise ``videos``.
        family: The processor's family, if known: some take images in a way of their own.
        chat_options: Options of ``apply_chat_template``, for samples with messages.
        **options: Options of the processor.

    Raises:
        ValueError: Samples are of both kinds or of none, or have a number of images that the
            family's processor does not take.
    """
    if all("messages" in sample for sample in samples):
        if family is not None and family.flat_images:
            raise ValueError(
                f"samples of {family.model_type} must have 'text' and one image in 'images': in "
                "chats, transformers gives its processor images in a form that it refuses"
            )
        return processor.apply_chat_template(
            [with_images(sample) for sample in samples],
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
    is_flat = family is not None and family.flat_images
    if family is not None and is_flat and {*map(len, pictures)} != {1}:
        raise ValueError(
            f"samples of {family.model_type} must have one image each, got "
            f"{[len(of_sample) for of_sample in pictures]}"
        )
    videos = [list(sample.get("videos") or []) for sample in samples]
    if any(videos):
        options["videos"] = videos
    flat = [picture for of_sample in pictures for picture in of_sample]
    return processor(
        images=(flat if is_flat else pictures) if flat else None,
        text=[sample["text"] for sample in samples],
        return_tensors="pt",
        **options,
    )


def with_images(sample: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return a sample's conversation with the images and videos beside it in their places.

    Those are the parts of type "image" without an image; where there are none, the images stand
    before the first user's text, as TRL puts them. Likewise videos.
    """
    messages = list(sample["messages"])
    for kind in ("video", IMAGE):
        messages = _with_media(messages, kind, list(sample.get(f"{kind}s") or []))
    return messages


def _with_media(
    messages: list[Mapping[str, Any]], kind: str, beside: list[Any]
) -> list[Mapping[str, Any]]:
    if not beside:
        return messages
    places = sum(
        _is_of(kind, part) and not _is_filled(kind, part)
        for message in messages
        for part in _parts(message.get("content"))
    )
    if not places:
        first = next((i for i, m in enumerate(messages) if m.get("role") == "user"), None)
        if first is None:
            raise ValueError(
                f"messages with {kind}s must have a message of the role 'user', got roles "
                f"{[message.get('role') for message in messages]}"
            )
        content = [*({"type": kind} for _ in beside), *_parts(messages[first].get("content"))]
        messages[first] = {**messages[first], "content": content}
        places = len(beside)
    if places != len(beside):
        raise ValueError(
            f"{kind}s must hold one {kind} for each of the {places} places in messages, got "
            f"{len(beside)}"
        )
    rest = iter(beside)
    return [
        {
            **message,
            "content": [
                {**part, kind: next(rest)}
                if _is_of(kind, part) and not _is_filled(kind, part)
                else part
                for part in _parts(message.get("content"))
            ],
        }
        for message in messages
    ]


def _parts(content: Any) -> list[Any]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content or [])


def _is_of(kind: str, part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == kind


def _is_filled(kind: str, part: Mapping[str, Any]) -> bool:
    return any(part.get(name) is not None for name in (kind, "url", "path", "base64"))


def _count_images(conversation: Sequence[Mapping[str, Any]]) -> int:
    contents = [message.get("content") for message in conversation]
    parts = [part for parts in contents if isinstance(parts, (list, tuple)) for part in parts]
    return sum(_is_of(IMAGE, part) for part in parts)
