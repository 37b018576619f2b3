"""Greedy answers for a batch of prompts whose images are vision tokens already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling


@dataclass(frozen=True)
class GeneratedAnswer:
    """What the model said, and in how many tokens, the one that ends it included."""

    text: str
    tokens: int


def expand_placeholders(
    ids: torch.Tensor, tokens_per_image: Sequence[int], image_token_id: int
) -> torch.Tensor:
    """A prompt's ids with each image's placeholder repeated as often as it has vision tokens.

    Args:
        ids: int64 [length], one placeholder an image.
        tokens_per_image: of all tiles together.
        image_token_id: the placeholder.

    Raises:
        ValueError: there are not as many placeholders as images.
    """
    places = (ids == image_token_id).nonzero().squeeze(1)
    if len(places) != len(tokens_per_image):
        raise ValueError(
            f"the prompt holds {len(places)} placeholders for {len(tokens_per_image)} images"
        )
    repeats = torch.ones_like(ids)
    repeats[places] = torch.tensor(tokens_per_image, dtype=torch.int64)
    return ids.repeat_interleave(repeats)


def generate_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[torch.Tensor],
    vision_tokens: Sequence[Sequence[torch.Tensor]],
    **options: Any,
) -> list[GeneratedAnswer]:
    """The answer to each prompt, all in one left-padded batch.

    Args:
        model: a :class:`tokenflex.TokenFlexForConditionalGeneration` in evaluation mode.
        tokenizer: its processor's.
        prompts: int64 [length] each, see :func:`expand_placeholders`.
        vision_tokens: for each prompt the [count, D] vision tokens of its tiles.
        **options: for ``generate``; greedy search where they say nothing else.
    """
    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    length = max(map(len, prompts))
    ids = torch.full((len(prompts), length), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for place, prompt in enumerate(prompts):
        ids[place, length - len(prompt) :] = prompt
        mask[place, length - len(prompt) :] = 1
    tiles = [tile for images in vision_tokens for tile in images]
    output = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=tiles)}
        if tiles
        else None,
        eos_token_id=ends,
        pad_token_id=pad,
        **{"do_sample": False, "num_beams": 1, **options},
    )
    answers = output[:, length:]
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    stops = {ends} if isinstance(ends, int) else {*(ends or ())}
    return [
        GeneratedAnswer(text.strip(), _length_of(row, stops))
        for text, row in zip(texts, answers.tolist(), strict=True)
    ]


def _length_of(row: list[int], ends: set[int]) -> int:
    return next((place + 1 for place, token in enumerate(row) if token in ends), len(row))
