"""A checkpoint that answers conversations at one count: what every harness's adapter asks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tokenflex.counts import Grid, parse_count, token_grid
from tokenflex.evaluation.counts import label_of, selector_of
from tokenflex.evaluation.generation import generate_answers
from tokenflex.images import load_image
from tokenflex.models.chat import IMAGE_MARK, read_chat, without_placeholders
from tokenflex.models.loading import load_checkpoint
from tokenflex.models.vision import EncodedImages
from tokenflex.prompts import expand_placeholders
from tokenflex.routing.policies import policy_names
from tokenflex.routing.selector import resolve_count


@dataclass(frozen=True)
class Reply:
    """An answer and what it cost.

    Attributes:
        text: the answer.
        prompt_tokens: text and vision tokens that were read.
        vision_tokens: how many of them stand for images.
        new_tokens: of the answer, its end included.
    """

    text: str
    prompt_tokens: int
    vision_tokens: int
    new_tokens: int


class Assistant:
    """Loads a checkpoint and answers at ``tokens``, whatever is asked.

    Args:
        checkpoint: folder of a TokenFLEX (or released Ristretto) checkpoint.
        tokens: vision tokens of each tile: ``64``, ``"12x16"`` or ``"auto"``.
        max_tiles: images are cut into at most so many; the processor's own if None.
        device: where to run; a GPU if there is one.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the checkpoint or the count is not valid.
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
        self.count = resolve_count(parsed, checkpoint)
        self.max_tiles = max_tiles
        self.model, self.processor = load_checkpoint(checkpoint)
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model.to(device)

    @property
    def label(self) -> str:
        """How tables name the count."""
        return label_of(self.count)

    @torch.no_grad()
    def reply(self, conversations: Sequence[list[dict[str, Any]]], **options: Any) -> list[Reply]:
        """The answer to each conversation, in one batch.

        Args:
            conversations: lists of messages; their ``content`` is a string or a list of
                ``{"type": "text", "text": ...}`` and image parts, as the processor's chat template
                takes them (:func:`tokenflex.models.chat.read_chat`). A placeholder that a text
                spells out is dropped: it would stand for an image that is not there.
            **options: for ``generate``; greedy search where they say nothing else.

        Raises:
            TypeError: a message is no dict, or a content or text of another type.
            ValueError: a part is neither text nor image, or holds no image or several, or an image
                cannot be read.
        """
        split = [
            self._read(messages, f"conversations[{i}]") for i, messages in enumerate(conversations)
        ]
        images = [image for _, own in split for image in own]
        tiles: list[int] = []
        encoded, first = None, 0
        if images:
            data, tiles = self.processor.process_images(images, max_tiles=self.max_tiles)
            pixels = data["pixel_values"].to(self.model.device)
            encoded = self.model.encode_images(pixels, data.get("grids"))
        left = iter(tiles)
        prompts, vision_tokens, costs = [], [], []
        for messages, own in split:
            text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
            ids = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
            prompt = torch.tensor(ids, dtype=torch.int64)
            own_tiles = [next(left) for _ in own]
            last = first + sum(own_tiles)
            grids: list[Grid] = []
            projected: list[torch.Tensor] = []
            if encoded is not None and own:
                shown = encoded.select(range(first, last))
                grids = self._grids(shown, own_tiles, prompt)
                projected = self.model.get_image_features(
                    num_image_tokens=[
                        grid for grid, n in zip(grids, own_tiles, strict=True) for _ in range(n)
                    ],
                    encoded_images=shown,
                ).pooler_output
            first = last
            per_image = [n * h * w for n, (h, w) in zip(own_tiles, grids, strict=True)]
            image_token_id = self.processor.image_token_id
            prompts.append(expand_placeholders(prompt, per_image, image_token_id))
            vision_tokens.append(projected)
            costs.append(sum(per_image))
        answers = generate_answers(
            self.model, self.processor.tokenizer, prompts, vision_tokens, **options
        )
        return [
            Reply(answer.text, len(prompt), cost, answer.tokens)
            for answer, prompt, cost in zip(answers, prompts, costs, strict=True)
        ]

    def _grids(
        self, images: EncodedImages, tiles: Sequence[int], prompt: torch.Tensor
    ) -> list[Grid]:
        """The grid of each image of one prompt."""
        selector = selector_of(self.count)
        if selector is None:
            return [token_grid(self.count, name="tokens")] * len(tiles)
        (counts,) = selector.select(self.model, images, tiles, [prompt])
        return [token_grid(count, name=selector.label) for count in counts]

    def _read(self, messages: Any, name: str) -> tuple[list[dict[str, Any]], list[Image.Image]]:
        """Check a conversation; return its messages without images and placeholders, and images."""
        placeholders = [self.processor.image_token, IMAGE_MARK]
        chat = read_chat(_without_placeholders(messages, placeholders), name, placeholders)
        if chat.parts_without_image:
            raise ValueError(f"{chat.parts_without_image[0]} must hold an image, got none")
        return chat.messages, [load_image(image.source, image.name) for image in chat.images]


def _without_placeholders(messages: Any, placeholders: Sequence[str]) -> Any:
    """Remove placeholders from the texts of messages, whatever else they hold."""
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
