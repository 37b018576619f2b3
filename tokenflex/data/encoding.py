"""Encoding of conversations to token ids and labels: only the assistant's turns are learned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jinja2 import TemplateError

from tokenflex.data.samples import Conversation, split_marks
from tokenflex.data.sequences import IGNORE, TokenSequence
from tokenflex.models.chat import IMAGE_MARK, Chat, image_pattern, render

CACHED_CONVERSATIONS = 4096


class ConversationEncoder:
    """Encode conversations to ids and labels with a tokenizer's chat template.

    Args:
        tokenizer: A transformers tokenizer with a chat template.
        image_prompt: The text of an image in a prompt, with one placeholder in it.
        image_token: The placeholder; ``image_prompt`` itself if None.

    Raises:
        ValueError: The tokenizer has no chat template.
    """

    frames_are_parts = False
    """True if a chat template sees each frame of a video as an image, not the video as one."""

    def __init__(self, tokenizer: Any, image_prompt: str, image_token: str | None = None) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                "tokenizer must have a chat_template to render conversations with, got none"
            )
        self.tokenizer = tokenizer
        self.image_prompt = image_prompt
        self.image_token = image_prompt if image_token is None else image_token
        start, _, end = image_prompt.partition(self.image_token)
        self._image_pattern = image_pattern(start, self.image_token, end)
        # Questions repeat (the digits task has a few hundred with their answers). A plain dict, so
        # that a collator can travel to worker processes.
        self._cache: dict[tuple[Conversation, int], TokenSequence] = {}

    def __call__(
        self, conversations: Sequence[Conversation], num_images: int
    ) -> list[TokenSequence]:
        """Return the conversations about ``num_images`` images, with one placeholder per image.

        Labels are -100 outside the assistant's turns.

        Raises:
            ValueError: The template does not build a conversation turn by turn, or a text holds the
                placeholder.
        """
        keys = [(conversation, num_images) for conversation in conversations]
        if new := [key for key in dict.fromkeys(keys) if key not in self._cache]:
            if len(self._cache) + len(new) > CACHED_CONVERSATIONS:
                self._cache.clear()
                new = [*dict.fromkeys(keys)]
            encoded = self._encode([conversation for conversation, _ in new], num_images)
            self._cache |= zip(new, encoded, strict=True)
        return [self._cache[key] for key in keys]

    def check_placeholders(self, ids: Sequence[int], num_images: int) -> None:
        """Check that ``ids`` hold one placeholder for each image.

        Raises:
            ValueError: They hold more, or fewer.
        """
        placeholder = self.tokenizer.convert_tokens_to_ids(self.image_token)
        is_known = self.tokenizer.convert_ids_to_tokens(placeholder) == self.image_token
        if is_known and ids.count(placeholder) != num_images:
            raise ValueError(
                f"a conversation must hold one placeholder, {self.image_token}, for each of its "
                f"{num_images} images, got {ids.count(placeholder)}"
            )

    def prompt(self, conversation: Conversation, num_images: int) -> str:
        """Return the text that the assistant's next turn continues."""
        return self._render(*self._messages(conversation, num_images), ask=True)

    def _encode(
        self, conversations: Sequence[Conversation], num_images: int
    ) -> list[TokenSequence]:
        segments = [[*self._segments(talk, num_images)] for talk in conversations]
        texts = [text for of_talk in segments for text, _ in of_talk]
        # One call for all; the tokens of a text do not depend on the others.
        tokenized = self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        tokens_of_texts = iter(tokenized)
        sequences = []
        for of_talk in segments:
            ids: list[int] = []
            labels: list[int] = []
            for _, is_learned in of_talk:
                tokens = next(tokens_of_texts)
                ids += tokens
                labels += tokens if is_learned else [IGNORE] * len(tokens)
            if ids:  # a conversation without an answer has none
                self.check_placeholders(ids, num_images)
            arrays = np.array([ids, labels], np.int64)
            arrays.setflags(write=False)  # the cache hands the same arrays out again
            sequences.append(TokenSequence(arrays[0], arrays[1], slice(0, num_images)))
        return sequences

    def _segments(self, conversation: Conversation, num_images: int) -> Iterator[tuple[str, bool]]:
        """Yield the rendered text in pieces, each with whether it is learned."""
        messages, frames = self._messages(conversation, num_images)
        earlier = ""
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if not i:
                raise ValueError("a conversation must begin with a question, got an answer")
            asked = self._render(messages[:i], frames, ask=True)
            answered = self._render(messages[: i + 1], frames, ask=False)
            if not asked.startswith(earlier) or not answered.startswith(asked):
                raise ValueError(
                    "chat_template must build a conversation turn by turn, but it rewrites "
                    f"earlier text when turn {i} is added"
                )
            yield asked[len(earlier) :], False
            yield answered[len(asked) :], True
            earlier = answered

    def _messages(
        self, conversation: Conversation, num_images: int
    ) -> tuple[list[dict[str, Any]], list[int]]:
        """Return the turns as a chat template takes them, in parts if they have images.

        A video is a part of type image, too, or each of its frames is. The second list has the
        number of images that each part stands for.
        """
        for turn in conversation.turns:
            if self.image_token != IMAGE_MARK and self.image_token in turn.text:
                raise ValueError(
                    f"a text of the {turn.role} holds {self.image_token}, the processor's own "
                    f"placeholder; images stand at {IMAGE_MARK}"
                )
        texts = [turn.text for turn in conversation.turns]
        roles = [turn.role for turn in conversation.turns]
        split = [split_marks(text) for text in texts]
        if self.frames_are_parts:
            split = [_by_frame(*pieces) for pieces in split]
        if num_images and not any(frames for _, frames in split):
            if "user" not in roles:
                raise ValueError(f"{num_images} images need a user turn to stand in, got none")
            first = roles.index("user")
            split[first] = ([""] * num_images + split[first][0], [None] * num_images)
        messages = [
            {"role": role, "content": _parts(pieces) if len(pieces) > 1 else pieces[0]}
            for role, (pieces, _) in zip(roles, split, strict=True)
        ]
        return messages, [n or 1 for _, frames in split for n in frames]

    def _render(self, messages: list[dict[str, Any]], frames: Sequence[int], *, ask: bool) -> str:
        contents = [message["content"] for message in messages]
        num_parts = sum(
            content.count({"type": "image"}) for content in contents if isinstance(content, list)
        )
        try:
            text, _ = render(
                Chat(messages, parts_without_image=["image"] * num_parts),
                self.tokenizer.get_chat_template(),
                placeholder=self.image_token,
                image_prompt=self.image_prompt,
                variables={"image_token": self.image_token, **self.tokenizer.special_tokens_map},
                add_generation_prompt=ask,
            )
        except TemplateError as error:
            raise ValueError(f"chat_template cannot be rendered: {error}") from error
        # Some templates write no marks, and all write a video as one image.
        left = iter(frames)
        return self._image_pattern.sub(lambda _: self.image_prompt * next(left), text)


def _by_frame(
    texts: Sequence[str], frames: Sequence[int | None]
) -> tuple[list[str], list[int | None]]:
    """Return what :func:`split_marks` did, with a mark for each frame of a video."""
    apart = [texts[0]]
    for number, text in zip(frames, texts[1:], strict=True):
        apart += [""] * ((number or 1) - 1) + [text]
    return apart, [None] * (len(apart) - 1)


def _parts(texts: Sequence[str]) -> list[dict[str, str]]:
    """Return the content of a message with an image between each two texts."""
    parts: list[dict[str, str]] = []
    for i, text in enumerate(texts):
        parts += [{"type": "image"}] * (i > 0)
        parts += [{"type": "text", "text": text}] * bool(text)
    return parts
