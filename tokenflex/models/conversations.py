"""``apply_chat_template`` of the processor: conversations to prompts, or to model inputs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import chain, islice
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin
from transformers.utils.chat_template_utils import _get_template_variables

from tokenflex.models.call_options import check_names
from tokenflex.models.chat import (
    IMAGE_MARK,
    Chat,
    assistant_masks,
    image_pattern,
    is_batch,
    mark_videos,
    read_chat,
    render,
)

_MASK_NEEDS = {
    "return_offsets_mapping": "offset_mapping",
    "return_text_replacement_offsets": "text_replacement_offsets",
}
"""Options of a call that assistant masks need -> the names of their outputs."""


class ConversationProcessor(ProcessorMixin):
    """A processor that takes conversations with images, whatever its chat template takes."""

    if TYPE_CHECKING:
        image_token: str

        @property
        def image_prompt(self) -> str: ...

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        chat_template: str | None = None,
        tools: list[Any] | None = None,
        documents: list[dict[str, str]] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        return_assistant_tokens_mask: bool = False,
        tokenize: bool = False,
        return_tensors: str | None = "auto",
        return_dict: bool = False,
        load_audio_from_video: bool = False,
        processor_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the prompt of a conversation, or model inputs with ``tokenize=True``.

        The ``content`` of a message is a string, or a list of ``{"type": "text", "text": ...}`` and
        ``{"type": "image", "image": ...}`` parts (or ``url``, ``path``, ``base64``; OpenAI's
        ``image_url`` parts too). A template that iterates parts writes the images itself. Others
        get a string with :attr:`image_prompt` in place of images, so that the template of any
        language model serves. A video, ``{"type": "video", "video": ...}`` (or ``url``, ``path``,
        ``base64``), is to the template one image, in whose place the text has ``<video>``.

        Conversations in an inner list share their images, as prompts do: each shows the same ones,
        the same objects or paths, or only the first one holds them.

        A placeholder in the text of a part is refused. In a conversation whose contents are strings
        it marks an image that is given beside it, as ``images`` in ``processor_kwargs``; likewise
        ``<video>`` and ``videos``.

        Args:
            conversation: a list of messages, a list of those, or a list of lists of those.
            chat_template: in place of the processor's own, or the name of one of its templates.
            tools: for the template.
            documents: for the template.
            add_generation_prompt: end with the beginning of an answer.
            continue_final_message: leave the last message open.
            return_assistant_tokens_mask: return ``assistant_masks`` too, 1 for tokens in the
                template's ``{% generation %}`` blocks.
            tokenize: return model inputs, not text.
            return_tensors: as the processor takes it; its default with "auto".
            return_dict: with ``tokenize``, return all inputs, not ``input_ids`` alone.
            load_audio_from_video: must be False.
            processor_kwargs: for the processor, for example ``{"num_image_tokens": 64}``.
            **kwargs: variables of the template, and options of the processor.

        Raises:
            TypeError: a message is of the wrong type, or an argument is unknown.
            ValueError: a part is neither text nor image, an image is missing, a text holds a
                placeholder, or an argument would have no effect.
        """
        if load_audio_from_video:
            raise ValueError("load_audio_from_video must be False: the model reads text and images")
        if continue_final_message and add_generation_prompt:
            raise ValueError(
                "continue_final_message and add_generation_prompt exclude each other: one leaves "
                "the last message open, the other begins a new one"
            )
        template = template_source(self.chat_template, chat_template)
        if template is None:
            names = ", ".join(self.chat_template or {}) or "none"
            raise ValueError(
                f"chat_template must be given: the processor has no default one, only {names}"
            )
        variables, options = split_chat_options(template, kwargs, processor_kwargs)
        more = [*_get_template_variables(template), "images", "videos"]
        check_names(self, options, more=more)
        check_tokenized(options, tokenize)
        if return_assistant_tokens_mask:
            self._check_assistant_mask(template, tokenize and return_dict)
        foreign = [IMAGE_MARK] if self.image_token != IMAGE_MARK else []
        variables = {
            "image_token": self.image_token,
            **self.tokenizer.special_tokens_map,
            **variables,
        }
        chats, texts, spans = [], [], []
        groups = named_groups(conversation)
        named = [*chain(*groups)] if groups else named_conversations(conversation)
        start, _, end = self.image_prompt.partition(self.image_token)
        pattern = image_pattern(start, self.image_token, end)
        for messages, name in named:
            chat = read_chat(messages, name, [self.image_token], foreign, takes_videos=True)
            rendered = render(
                chat,
                template,
                placeholder=self.image_token,
                image_prompt=self.image_prompt,
                variables=variables,
                tools=tools,
                documents=documents,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                return_assistant_tokens_mask=return_assistant_tokens_mask,
            )
            text, answer_spans = mark_videos(rendered, chat.kinds, pattern)
            chats.append(chat)
            texts.append(text)
            spans.append(answer_spans)
        prompts: Any = texts
        if groups is not None:
            remaining = iter(texts)
            prompts = [[*islice(remaining, len(group))] for group in groups]
            chats = shared_chats(chats, [len(group) for group in groups])
        if not tokenize:
            return prompts if is_batch(conversation) else texts[0]
        options["images"] = images_of_chats(chats, options.get("images"))
        options["videos"] = videos_of_chats(chats, options.get("videos"))
        if return_tensors != "auto":
            options["return_tensors"] = return_tensors
        if "add_special_tokens" not in (options.get("text_kwargs") or {}):
            options.setdefault("add_special_tokens", False)  # the template writes them
        if return_assistant_tokens_mask:
            return self._with_assistant_masks(prompts, spans, options)
        inputs = self(text=prompts, **options)
        return inputs if return_dict else inputs["input_ids"]

    def _check_assistant_mask(self, template: str, returns_dict: bool) -> None:
        if not returns_dict:
            need = "tokenize=True and return_dict=True"
        elif not re.search(r"\{%-?\s*generation\b", template):
            need = "a chat template that puts answers in {% generation %} blocks"
        elif not self.tokenizer.is_fast:
            need = "a tokenizer of the tokenizers library"
        else:
            return
        raise ValueError(f"return_assistant_tokens_mask needs {need}")

    def _with_assistant_masks(
        self, prompts: Any, spans: list[list[tuple[int, int]]], options: dict[str, Any]
    ) -> BatchFeature:
        inputs = self(text=prompts, **{**options, **dict.fromkeys(_MASK_NEEDS, True)})
        offsets, ids = inputs["offset_mapping"], inputs["input_ids"]
        rows = offsets if isinstance(offsets, list) else offsets.tolist()
        masks: Any = assistant_masks(rows, spans, inputs["text_replacement_offsets"])
        if isinstance(ids, torch.Tensor):
            masks = torch.tensor(masks)
        elif isinstance(ids, np.ndarray):
            masks = np.array(masks)
        inputs["assistant_masks"] = masks
        for option, name in _MASK_NEEDS.items():
            if not options.get(option):
                del inputs[name]
        return inputs


def template_source(templates: Any, name: str | None) -> Any:
    """Return the source of the chat template that is named, or the default one; None without."""
    if not isinstance(templates, Mapping):
        templates = {"default": templates}
    return templates.get("default") if name is None else templates.get(name, name)


def check_tokenized(options: Mapping[str, Any], tokenize: bool) -> None:
    """Refuse options of the processor where a prompt is rendered alone."""
    if options and not tokenize:
        raise ValueError(
            f"{', '.join(sorted(options))} must be given with tokenize=True, or to the call that "
            "takes the text"
        )


def split_chat_options(
    chat_template: str | None, kwargs: Mapping[str, Any], processor_kwargs: Mapping[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the variables of a chat template among ``kwargs``, and options of the processor.

    Raises:
        ValueError: an option is given in ``kwargs`` and in ``processor_kwargs``.
    """
    names = _get_template_variables(chat_template)
    variables = {name: value for name, value in kwargs.items() if name in names}
    options = {name: value for name, value in kwargs.items() if name not in names}
    for name in processor_kwargs or {}:
        if name in options:
            raise ValueError(f"{name} must be given once, got it in processor_kwargs as well")
    return variables, {**options, **(processor_kwargs or {})}


def named_conversations(conversation: Sequence[Any]) -> list[tuple[Any, str]]:
    """Return each conversation of a batch, or the only one, and its name in errors."""
    if not is_batch(conversation):
        return [(conversation, "messages")]
    return [(messages, f"conversation[{i}]") for i, messages in enumerate(conversation)]


def named_groups(conversation: Sequence[Any]) -> list[list[tuple[Any, str]]] | None:
    """Return inner lists of conversations with their names; None where there are no such lists.

    Raises:
        ValueError: an inner list is empty, or is one conversation beside lists of those.
    """
    if not is_batch(conversation) or not any(group and is_batch(group) for group in conversation):
        return None
    for i, group in enumerate(conversation):
        if not is_batch(group):
            raise ValueError(
                f"conversation[{i}] must be a list of conversations as others are, got messages"
            )
    return [
        [(messages, f"conversation[{i}][{j}]") for j, messages in enumerate(group)]
        for i, group in enumerate(conversation)
    ]


def is_same_image(image: Any, other: Any) -> bool:
    """Return whether two images are one object, or the same path or bytes."""
    is_text = isinstance(image, (str, bytes, PathLike)) and isinstance(other, type(image))
    return image is other or (is_text and image == other)


def shared_chats(chats: Sequence[Chat], group_sizes: Sequence[int]) -> list[Chat]:
    """Return the conversation that holds the images of each group, its first.

    Raises:
        ValueError: another one of the group holds other images.
    """
    remaining = iter(chats)
    leaders = []
    for i, size in enumerate(group_sizes):
        leader, *others = islice(remaining, size)
        for j, chat in enumerate(others, 1):
            of_leader: list[Any] = [*leader.images, *leader.videos]
            of_chat: list[Any] = [*chat.images, *chat.videos]
            same = len(of_chat) == len(of_leader) and all(
                is_same_image(image.source, shown.source)
                for image, shown in zip(of_chat, of_leader, strict=True)
            )
            if of_chat and not same:
                raise ValueError(
                    f"conversation[{i}][{j}] must show the images of conversation[{i}][0], the "
                    "same objects or paths, got others"
                )
        leaders.append(leader)
    return leaders


def images_of_chats(chats: Sequence[Chat], beside: Any) -> Any:
    """Return the images of conversations, a list per conversation, or None without images.

    Args:
        chats: the conversations.
        beside: images that are given beside them, for image parts without one.

    Raises:
        ValueError: an image part has no image, or images are given both ways.
    """
    missing = [name for chat in chats for name in chat.parts_without_image]
    return _sources([chat.images for chat in chats], missing, beside, "image")


def videos_of_chats(chats: Sequence[Chat], beside: Any) -> Any:
    """Return the videos of conversations, as :func:`images_of_chats` their images.

    A conversation without videos has None, so that their mark is text in what its user wrote.
    """
    missing = [name for chat in chats for name in chat.parts_without_video]
    return _sources([chat.videos or None for chat in chats], missing, beside, "video")


def _sources(
    inside: Sequence[Sequence[Any] | None], missing: Sequence[str], beside: Any, kind: str
) -> Any:
    names = [source.name for of_chat in inside for source in of_chat or ()]
    if beside is None:
        if missing:
            article = "an" if kind == "image" else "a"
            raise ValueError(
                f"{missing[0]} is {article} {kind} part without {article} {kind}: it needs one of "
                f"{kind}, url, path and base64"
            )
        return inside if names else None
    if names:
        raise ValueError(
            f"{kind}s must be given in the messages or beside them, got both: {names[0]} holds one"
        )
    return beside
