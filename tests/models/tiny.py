"""Random-weight models of a few thousand parameters, and pictures and prompts for them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    Qwen2Config,
    Siglip2VisionConfig,
    SiglipVisionConfig,
)

from tokenflex import TokenFlexConfig, TokenFlexForConditionalGeneration

IMAGE = 3  # "<image>" in the digits vocabulary
PAD = 0
VOCABULARY = 64
WIDTH = 32
PIXELS = 32
PATCH = 4

_VISION = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": PIXELS,
    "patch_size": PATCH,
}
_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,  # large enough that a leak between samples could not hide
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": True,
}


def check_same_pixels(
    processor: Any, pixels: torch.Tensor, other_processor: Any, other_pixels: torch.Tensor
) -> None:
    """The same pictures: bit by bit from one backend, and up to a grey level from two.

    A processor made with PIL's backend is loaded with torchvision's where that is installed, whose
    bicubic filter rounds a few pixels the other way.
    """
    backends = {processor.image_processor.backend, other_processor.image_processor.backend}
    if len(backends) == 1:
        assert torch.equal(pixels, other_pixels)
    else:
        grey_level = 2 / 255  # pixels are -1 to 1
        difference = (pixels - other_pixels).abs()
        assert float(difference.max()) < 1.01 * grey_level
        assert float(difference.mean()) < 0.01 * grey_level


def vision_config(kind: str = "siglip") -> Any:
    """ "siglip" has patches only, "clip" a class token before them, "siglip2" any shape."""
    if kind == "siglip2":
        fields = {key: value for key, value in _VISION.items() if key != "image_size"}
        return Siglip2VisionConfig(**fields, num_patches=64, vision_use_head=False)
    if kind == "siglip":
        return SiglipVisionConfig(**_VISION, vision_use_head=False)
    return CLIPVisionConfig(**_VISION, projection_dim=WIDTH)


def text_config(kind: str = "qwen2", **changes: Any) -> Any:
    """A "qwen2" or "llama" language model with two query heads a key head."""
    return {"qwen2": Qwen2Config, "llama": LlamaConfig}[kind](**{**_TEXT, **changes})


def tiny_config(text: str = "qwen2", vision: str = "siglip", **changes: Any) -> TokenFlexConfig:
    fields = {"image_token_id": IMAGE, "num_image_tokens": 16, **changes}
    return TokenFlexConfig(vision_config(vision), text_config(text), **fields)


def tiny_model(
    text: str = "qwen2", vision: str = "siglip", *, seed: int = 0, **changes: Any
) -> TokenFlexForConditionalGeneration:
    """The same weights at every call with the same arguments, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return TokenFlexForConditionalGeneration(tiny_config(text, vision, **changes)).eval()


def pixels(tiles: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tiles, 3, PIXELS, PIXELS, generator=generator)


def picture(seed: int = 0, size: tuple[int, int] = (PIXELS, PIXELS)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(noise)


class Prompt(NamedTuple):
    """Token ids with one placeholder an image, the images' vision tokens, and their pixels."""

    ids: list[int]
    counts: list[int]
    pixels: torch.Tensor

    def expanded(self) -> list[int]:
        counts = iter(self.counts)
        return [i for i in self.ids for _ in range(next(counts) if i == IMAGE else 1)]

    def inputs(self) -> dict[str, Any]:
        """Return inputs of the padded path for this prompt alone."""
        inputs: dict[str, Any] = {"input_ids": torch.tensor([self.expanded()])}
        if self.counts:
            inputs |= {"pixel_values": self.pixels, "num_image_tokens": self.counts}
        return inputs


def prompt(ids: list[int], counts: list[int], seed: int = 0) -> Prompt:
    return Prompt(ids, counts, pixels(len(counts), seed))


def prompts() -> list[Prompt]:
    """Different lengths and counts, one with two images, one without any."""
    return [
        prompt([5, 6, IMAGE, 7], [4], seed=1),
        prompt([8, IMAGE, 9, 10, IMAGE, 11, 12, 13, 14], [9, 16], seed=2),
        prompt([15, 16, 17, 18, 19], []),
        prompt([IMAGE, 20, 21], [16], seed=3),
    ]


def padded_batch(batch: list[Prompt]) -> dict[str, Any]:
    """The prompts as one left-padded batch."""
    rows = [one.expanded() for one in batch]
    length = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[PAD] * (length - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor(
            [[0] * (length - len(row)) + [1] * len(row) for row in rows]
        ),
        "pixel_values": torch.cat([one.pixels for one in batch]),
        "num_image_tokens": [count for one in batch for count in one.counts],
    }
