"""A checkpoint that answers conversations at one count, for the adapters of all harnesses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tokenflex.checkpoints import load_model
from tokenflex.counts import AUTO, Grid, parse_count, token_grid, tokens_of_images
from tokenflex.evaluation.counts import label_of, selector_of
from tokenflex.evaluation.generation import generate_answers
from tokenflex.hub import local_checkpoint
from tokenflex.images import load_image
from tokenflex.models.chat import IMAGE_MARK, read_chat, without_placeholders
from tokenflex.models.vision import on_device
from tokenflex.prompts import expand_placeholders, tokens_of_runs
from tokenflex.routing.policies import policy_names
from tokenflex.routing.selector import resolve_count


@dataclass(frozen=True)
class Reply:
    """An answer and its cost.

    Attributes:
        text: The answer.
        prompt_tokens: Text and vision tokens of the prompt.
        vision_tokens: Vision tokens among them.
        new_tokens: Tokens of the answer, including the one that ends it.
    """

    text: str
    prompt_tokens: int
    vision_tokens: int
    new_tokens: int


class Assistant:
    """A loaded checkpoint that answers every question at one count.

    Args:
        checkpoint: Folder of a TokenFLEX checkpoint, a released Ristretto or a conversion, or its
            ``org/name`` on the Hugging Face Hub.
        tokens: Vision tokens of each tile: ``64``, ``"12x16"`` or ``"auto"``.
        max_tiles: Most tiles of an image; the processor's default if None.
        device: A GPU by default, if there is one.

    Raises:
        FileNotFoundError: The folder does not exist.
        ValueError: The checkpoint or the count is not valid.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        tokens: int | str,
        *,
        max_tiles: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if tokens is None:
            raise ValueError("tokens must name a count such as 64, 12x16 or auto, got None")
        parsed = tokens if tokens in policy_names() else parse_count(tokens, name="tokens")
        checkpoint = local_checkpoint(checkpoint)
        self.count = resolve_count(parsed, checkpoint)
        self.max_tiles = max_tiles
        self.model, self.processor = load_model(checkpoint)
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model.to(device)

    @property
    def label(self) -> str:
        """The name of the count in tables."""
        return label_of(self.count)

    @torch.no_grad()
    def reply(self, conversations: Sequence[list[dict[str, Any]]], **options: Any) -> list[Reply]:
        """Answer conversations in one batch.

        Args:
            conversations: Lists of messages. Their ``content`` is a string or a list of
                ``{"type": "text", "text": ...}`` and image parts, as the processor's chat template
                takes them (:func:`tokenflex.models.chat.read_chat`). Placeholders in texts are
                removed.
            **options: For ``generate``; greedy search by default.

        Raises:
            TypeError: A message is no dict, or a content or text is of a wrong type.
            ValueError: A part is neither text nor image, or holds no image or several, or an image
                cannot be read.
        """
        chats = [
            self._read(messages, f"conversations[{i}]") for i, messages in enumerate(conversations)
        ]
        images = [images for _, images in chats]
        encoded: Any = None
        remaining_tiles: Iterator[int] = iter(())
        if any(images):
            data, all_tiles = self.processor.process_images(images, max_tiles=self.max_tiles)
            encoded = self.model.encode_images(**on_device(data, self.model.device))
            remaining_tiles = iter(all_tiles)
        prompts, costs = [], []
        tile_grids: list[Grid] = []
        for messages, chat_images in chats:
            text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
            tiles = [next(remaining_tiles) for _ in chat_images]
            prompt = self._encode(text, tiles)
            grids = self._grids(encoded, len(tile_grids), tiles, prompt)
            tokens = tokens_of_images(tiles, grids)
            tile_grids += [grid for n, grid in zip(tiles, grids, strict=True) for _ in range(n)]
            runs = tokens_of_runs(tiles, tokens)
            prompts.append(expand_placeholders(prompt, runs, self.model.config.image_token_id))
            costs.append(sum(tokens))
        inputs = {}
        if tile_grids:
            inputs = {"encoded_images": encoded, "num_image_tokens": tile_grids}
        answers = generate_answers(
            self.model, self.processor.tokenizer, prompts, **inputs, **options
        )
        return [
            Reply(answer.text, len(prompt), cost, answer.tokens)
            for answer, prompt, cost in zip(answers, prompts, costs, strict=True)
        ]

    def _encode(self, text: str, tiles: Sequence[int]) -> torch.Tensor:
        """Return the tokens of a prompt, with one placeholder per image or run, int64 [length]."""
        encoded = self.processor.encode_text(
            [text],
            tiles,
            num_image_tokens=AUTO if tiles else None,
            add_special_tokens=self.processor.adds_special_tokens(text),
        )
        ids: torch.Tensor = encoded["input_ids"][0].long()
        return ids

    def _grids(
        self, encoded: Any, first_tile: int, tiles: Sequence[int], prompt: torch.Tensor
    ) -> list[Grid]:
        """Return the grid of each image of one prompt, whose tiles begin at ``first_tile``."""
        selector = selector_of(self.count)
        if selector is None or not tiles:
            return [token_grid(self.count, name="tokens") for _ in tiles]
        images = encoded.select(range(first_tile, first_tile + sum(tiles)))
        (counts,) = selector.select(self.model, images, tiles, [prompt])
        return [token_grid(count, name=selector.label) for count in counts]

    def _read(self, messages: Any, name: str) -> tuple[list[dict[str, Any]], list[Image.Image]]:
        """Return the checked messages of a conversation without images, and its images."""
        placeholders = [self.processor.image_token, IMAGE_MARK]
        chat = read_chat(_without_placeholders(messages, placeholders), name, placeholders)
        if chat.parts_without_image:
            raise ValueError(f"{chat.parts_without_image[0]} must hold an image, got none")
        return chat.messages, [load_image(image.source, image.name) for image in chat.images]


def _without_placeholders(messages: Any, placeholders: Sequence[str]) -> Any:
    """Remove placeholders from the texts of messages, and leave everything else."""
    if isinstance(messages, str):
        return without_placeholders(messages, placeholders)
    if isinstance(messages, (list, tuple)):
        return [_without_placeholders(message, placeholders) for message in messages]
    if isinstance(messages, Mapping):
        return {
            key: _without_placeholders(value, placeholders) if key in ("content", "text") else value
            for key, value in messages.items()
        }
    return messages
