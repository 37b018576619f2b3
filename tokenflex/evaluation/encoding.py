"""Encoding of questions with their answers, by the conventions of the processor's own prompts."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from tokenflex.data.encoding import ConversationEncoder
from tokenflex.data.samples import Conversation
from tokenflex.data.sequences import IGNORE, TokenSequence
from tokenflex.prompts import ImageTiles


class QuestionEncoder(ConversationEncoder):
    """Encode conversations about images whose tiles are known.

    The images of a converted stock model have texts of their own (:class:`ImageTiles`), and its
    tokenizer may add special tokens to a prompt. Its chat template sees each frame of a video as an
    image, with the tags that it writes around one.

    Args:
        processor: A :class:`tokenflex.TokenFlexProcessor` or a converted one.

    Raises:
        ValueError: There is no chat template.
    """

    def __init__(self, processor: Any) -> None:
        tokenizer = processor.tokenizer
        if not getattr(tokenizer, "chat_template", None):
            tokenizer = copy.copy(tokenizer)
            tokenizer.chat_template = processor.chat_template
        # A prompt may hold another text than the placeholder, which the image's text replaces.
        prompt, token = processor.image_prompt, processor.image_token
        super().__init__(tokenizer, prompt, token if token in prompt else prompt)
        self.frames_are_parts = not hasattr(processor, "show_frames")
        self._adds_special_tokens = processor.adds_special_tokens
        self._image_mark = re.compile(re.escape(self.image_token))

    def prompt_ids(self, conversation: Conversation, tiles: Sequence[int]) -> torch.Tensor:
        """Return the tokens that the assistant's next turn continues, int64 [length].

        Args:
            conversation: Its turns so far.
            tiles: Number of tiles of each image.

        Returns:
            Tokens with one placeholder per image, or per run of an image's placeholders.

        Raises:
            ValueError: The conversation cannot be rendered, or its text holds the placeholder.
        """
        prompt = self.prompt(conversation, len(tiles))
        (ids,) = self._tokens([prompt], tiles)
        return torch.tensor(ids, dtype=torch.int64)

    def sequence(self, conversation: Conversation, tiles: Sequence[int]) -> TokenSequence:
        """Return a conversation with its answers, with placeholders as :meth:`prompt_ids` has them.

        Raises:
            ValueError: As :meth:`__call__`.
        """
        have_texts = any(isinstance(number, ImageTiles) for number in tiles)
        if not have_texts and not self._adds_special_tokens(""):  # a TokenFLEX processor
            (sequence,) = self([conversation], len(tiles))
            return sequence
        segments = [*self._segments(conversation, len(tiles))]
        are_learned = [is_learned for _, is_learned in segments]
        texts = self._with_image_texts([text for text, _ in segments], tiles)
        if getattr(self.tokenizer, "is_fast", False):
            ids, labels = self._encoded_whole(texts, are_learned)
        else:
            tokens = self._tokenized(texts)
            ids = [token for of_segment in tokens for token in of_segment]
            labels = [
                token if is_learned else IGNORE
                for of_segment, is_learned in zip(tokens, are_learned, strict=True)
                for token in of_segment
            ]
        if not have_texts and ids:
            self.check_placeholders(ids, len(tiles))
        arrays = np.array([ids, labels], np.int64)
        return TokenSequence(arrays[0], arrays[1], slice(0, len(tiles)))

    def _encoded_whole(
        self, texts: Sequence[str], are_learned: Sequence[bool]
    ) -> tuple[list[int], list[int]]:
        """Return ids and labels of a text in pieces, whose tokens are those of the whole text.

        A token is learned if a part of it is, as with transformers' mask of the assistant's tokens.
        """
        if not texts:
            return [], []
        whole = "".join(texts)
        encoded = self.tokenizer(
            whole,
            add_special_tokens=self._adds_special_tokens(whole),
            return_offsets_mapping=True,
        )
        ids = encoded["input_ids"]
        ends = [*accumulate(map(len, texts))]
        spans = [
            (end - len(text), end)
            for text, end, is_learned in zip(texts, ends, are_learned, strict=True)
            if is_learned
        ]
        labels = [
            token if any(first < stop and last > start for start, stop in spans) else IGNORE
            for token, (first, last) in zip(ids, encoded["offset_mapping"], strict=True)
        ]
        return ids, labels

    def _tokens(self, texts: Sequence[str], tiles: Sequence[int]) -> list[list[int]]:
        """Return the tokens of a conversation's texts, with the text of each image in its place."""
        tokens = self._tokenized(self._with_image_texts(texts, tiles))
        if tokens and not any(isinstance(number, ImageTiles) for number in tiles):
            self.check_placeholders([token for ids in tokens for token in ids], len(tiles))
        return tokens

    def _tokenized(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each of a conversation's texts."""
        adds = [i == 0 and self._adds_special_tokens(text) for i, text in enumerate(texts)]
        return [
            self.tokenizer(text, add_special_tokens=added)["input_ids"]
            for text, added in zip(texts, adds, strict=True)
        ]

    def _with_image_texts(self, texts: Sequence[str], tiles: Sequence[int]) -> list[str]:
        """Return a conversation's texts with the text of each image in its place.

        Raises:
            ValueError: They hold more or fewer placeholders than there are images.
        """
        image_texts = [number.text for number in tiles if isinstance(number, ImageTiles)]
        if image_texts:
            found = sum(len(self._image_mark.findall(text)) for text in texts)
            if texts and found != len(image_texts):
                raise ValueError(
                    f"a conversation must hold one placeholder, {self.image_token}, for each of "
                    f"its {len(image_texts)} images, got {found}"
                )
            rest = iter(image_texts)
            return [self._image_mark.sub(lambda _: next(rest), text) for text in texts]
        return [*texts]
