"""Inputs of a converted processor: options, images and conversations of a call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any

from tokenflex.models.call_options import check_known, known_options
from tokenflex.models.chat import IMAGE_MARK, Chat, is_batch, read_chat
from tokenflex.models.conversations import (
    images_of_chats,
    named_conversations,
    videos_of_chats,
)
from tokenflex.models.image_inputs import name_images, read_images
from tokenflex.models.video_inputs import name_videos

_FURTHER_OPTIONS = {
    *("common_kwargs", "return_metadata", "sanitize_control_tokens", "num_image_tokens"),
    *("images", "text", "videos", "audio", "audios"),
}


def is_token_type(name: str) -> bool:
    """Return whether a model's input of this name tells the kind of each token.

    Families call it ``token_type_ids``, ``mm_token_type_ids`` or ``moe_mm_token_type_ids``.
    """
    return name.endswith("token_type_ids")


def check_option_names(processor: Any, options: dict[str, Any], more: Iterable[str] = ()) -> None:
    """Refuse options that neither the stock processor nor a part of it takes, nor ``more`` names.

    transformers would ignore them.
    """
    if not options:
        return
    groups = known_options(processor)
    of_groups = set().union(*groups.values())
    declared = processor.valid_processor_kwargs.__annotations__
    known = {*of_groups, *groups, *declared, *_FURTHER_OPTIONS, *more}
    if not hasattr(processor.image_processor, "valid_kwargs"):
        del groups["images_kwargs"]  # a custom image processor may not declare what it takes
    for name, value in options.items():
        check_known(name, known, "the processor")
        in_group = of_groups if name == "common_kwargs" else groups.get(name)
        if in_group is not None and isinstance(value, Mapping):
            for option in value:
                check_known(option, in_group, name)


def arguments_by_name(
    method: Callable[..., Any], args: Iterable[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the arguments of a call of a method that takes ``**kwargs``, by name."""
    arguments = inspect.signature(method).bind_partial(*args, **kwargs).arguments
    others = arguments.pop("kwargs", {})
    return {**arguments, **others}


def read_conversation(
    processor: Any, conversation: Any, options: dict[str, Any], tokenize: bool
) -> Any:
    """Check a conversation, or a batch of them, and read its images if it will be tokenized.

    Videos stay as they are given; those that ``options`` hold are taken out and put into the parts.
    """
    takes_videos = processor._tokenflex_family.takes_videos
    # The texts that stand for an image in the prompts of a family.
    names = ("image_token", "boi_token")
    tokens = [processor._tokenflex.image_token, *(getattr(processor, n, None) for n in names)]
    placeholders = [token for token in dict.fromkeys(tokens) if token]
    foreign = [] if IMAGE_MARK in placeholders else [IMAGE_MARK]
    foreign += [processor.video_prompt] if takes_videos else []
    named = named_conversations(conversation)
    chats = [
        read_chat(messages, name, placeholders, foreign, takes_videos=takes_videos)
        for messages, name in named
    ]
    if tokenize:
        _add_videos(chats, options)
    conversations = []
    for chat in chats:
        if tokenize and chat.images:
            images_of_chats([chat], options.get("images"))
            chat.images[:] = images_of_call(processor, chat.images, options)
        conversations.append(_with_sources(chat, tokenize))
    return conversations if is_batch(conversation) else conversations[0]


def _add_videos(chats: list[Chat], options: dict[str, Any]) -> None:
    """Add videos that are given beside conversations to those whose parts hold none."""
    beside = options.pop("videos", None)
    videos_of_chats(chats, beside)
    if beside is not None:
        videos = iter(name_videos(beside)[0])
        for chat in chats:
            chat.videos += islice(videos, len(chat.parts_without_video))
    if any("video" in chat.kinds for chat in chats):
        # Without these, transformers would choose frames again.
        for name in ("fps", "num_frames", "do_sample_frames"):
            options.setdefault(name, None)


def _with_sources(chat: Chat, tokenize: bool) -> list[dict[str, Any]]:
    """Return the messages with what their parts show, if they will be tokenized."""
    kinds = iter(chat.kinds)
    images, videos = iter(chat.images), iter(chat.videos)
    messages = []
    for message in chat.messages:
        content = message.get("content")
        if isinstance(content, list):
            parts = []
            for part in content:
                if part["type"] == "image":
                    kind = next(kinds)
                    source = next(images if kind == "image" else videos, None)
                    part = {"type": kind} | ({kind: source} if tokenize and source else {})
                parts.append(part)
            message = {**message, "content": parts}
        messages.append(message)
    return messages


def images_of_call(processor: Any, images: Any, options: dict[str, Any]) -> Any:
    """Read the images of a call, nested as they are given."""
    named, per_prompt = name_images(images)
    groups = (options.get("common_kwargs"), options.get("images_kwargs"), options)
    merged = {name: value for group in groups for name, value in (group or {}).items()}
    read = read_images(named, processor.image_processor, merged)
    if per_prompt is not None:
        rest = iter(read)
        return [[next(rest) for _ in range(number)] for number in per_prompt]
    return read if isinstance(images, (list, tuple)) or len(read) != 1 else read[0]


def without_layout(options: dict[str, Any]) -> dict[str, Any]:
    """Return options without the layout of arrays, which have been read."""
    return {
        name: without_layout(value) if name in ("images_kwargs", "common_kwargs") else value
        for name, value in options.items()
        if name != "input_data_format"
    }
