"""Saved random models for servers: a head_dim of 32, which vLLM's attention on a CPU needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.models.tiny import IMAGE, WIDTH, text_config, vision_config
from tokenflex import TokenFlexConfig, TokenFlexForConditionalGeneration, TokenFlexProcessor
from tokenflex.digits.processor import digits_processor
from tokenflex.routing.router import Router
from tokenflex.routing.storage import save_router

COUNTS = (4, 9, 16)
TEXT_WIDTH = 64


def save_checkpoint(
    folder: Path,
    *,
    max_tiles: int = 1,
    marks: tuple[str, str] = ("", ""),
    router: bool = True,
    vision: str = "siglip",
    **changes: Any,
) -> Path:
    """Save a model, its processor and a router whose choices follow picture and question."""
    text = text_config(
        hidden_size=TEXT_WIDTH,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        vocab_size=72,
    )
    fields = {"image_token_id": IMAGE, "num_image_tokens": 16, **changes}
    config = TokenFlexConfig(vision_config(vision), text, **fields)
    processor = digits_processor(num_image_tokens=16)
    processor.tokenizer.add_tokens([mark for mark in marks if mark], special_tokens=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = TokenFlexForConditionalGeneration(config).eval()
        made = Router(COUNTS, WIDTH, TEXT_WIDTH)
        for layer, scale in ((made.image, 1), (made.question, 300), (made.right, 10)):
            layer.weight.data *= scale  # embeddings are small, and questions should decide
        if model.model.projector.position is not None:  # zeros, which add nothing
            nn.init.normal_(model.model.projector.position.weight)
    model.save_pretrained(folder)
    TokenFlexProcessor(
        processor.image_processor,
        processor.tokenizer,
        num_image_tokens=16,
        image_start=marks[0],
        image_end=marks[1],
        max_tiles=max_tiles,
        use_thumbnail=max_tiles > 1,
    ).save_pretrained(folder)
    if router:
        save_router(made, folder, {})
    return folder
