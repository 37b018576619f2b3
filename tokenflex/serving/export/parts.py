"""The parts of a model that become graphs, as modules of tensors alone.

The encoder runs once for an image. Each count has a projector of its own, a small graph, so that a
second count of the same image costs no second pass of the encoder. The language model reads
embeddings, and returns its keys and values for the next call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from tokenflex.counts import Grid, TokenCount, token_grid
from tokenflex.dropin.families import family_of
from tokenflex.dropin.features import merge_patches
from tokenflex.dropin.variants import is_converted
from tokenflex.models.generation import cache_name
from tokenflex.models.vision import encode_tiles, takes_patches

Shape = tuple["int | str", ...]
"""Sizes of a tensor; a name stands for a size that every call may choose."""
EXAMPLES = {1: (1, 7), 2: (5, 3), 3: (6, 0), 5: (4, 4)}
"""Batch size -> new tokens and tokens in the cache, of example inputs of the language model."""


@dataclass(frozen=True)
class Part:
    """A module that is exported as one graph.

    Attributes:
        name: of its file, without a suffix.
        module: takes and returns tensors by position.
        inputs: name -> shape of each input, in the order of the arguments.
        outputs: likewise of each output.
        example: batch size -> random inputs.
        count: vision tokens of a projector.
    """

    name: str
    module: nn.Module
    inputs: dict[str, Shape]
    outputs: dict[str, Shape]
    example: Callable[[int], tuple[torch.Tensor, ...]] = field(repr=False)
    count: TokenCount | None = None


def count_name(count: TokenCount) -> str:
    """Return a count as the command line takes it: 64, or 12x16 for a grid."""
    return str(count) if isinstance(count, int) else f"{count[0]}x{count[1]}"


# ---- vision


class Encoder(nn.Module):
    """Pixels of tiles [B, 3, height, width] to patch features [B, H*W, C] for the projector."""

    def __init__(self, model: Any, size: Grid) -> None:
        super().__init__()
        self.vision_model, self.config = model.model.vision_model, model.config.vision_config
        patch = self.config.patch_size
        patch_height, patch_width = (patch, patch) if isinstance(patch, int) else patch
        self.grid = size[0] // patch_height, size[1] // patch_width

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the patch features."""
        return encode_tiles(self.vision_model, self.config, pixel_values, [self.grid], {})[0]


class ConvertedEncoder(nn.Module):
    """The same of a converted stock model, by the function of its family."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.base = model.base_model
        self.family = family_of(model.config)
        self.merge = model.config.tokenflex["patch_merge"]

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the patch features."""
        patches = self.family.patch_grids(self.base, pixel_values=pixel_values)
        if not isinstance(patches, torch.Tensor):
            raise ValueError("its patch grids differ from image to image")
        patches = merge_patches(patches, self.merge)
        self.grid: Grid = patches.shape[1], patches.shape[2]
        return patches.flatten(1, 2)


class Projector(nn.Module):
    """Patch features [B, H*W, C] to vision tokens [B, count, D]."""

    def __init__(self, projector: nn.Module, count: TokenCount, grid: Grid) -> None:
        super().__init__()
        self.projector, self.count, self.grid = projector, count, grid

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return the vision tokens."""
        tokens: torch.Tensor = self.projector(features, self.count, self.grid)
        return tokens


def vision_parts(model: Any, size: Grid, counts: Sequence[TokenCount]) -> list[Part]:
    """Return the encoder, and a projector for each count.

    Args:
        model: in float32.
        size: (height, width) of a tile in pixels.
        counts: valid ones.

    Raises:
        ValueError: the encoder needs more than pixels of one size, or a count has more tokens along
            a side than an image has patches; the message names both.
    """
    height, width = size
    encoder = ConvertedEncoder(model) if is_converted(model) else Encoder(model, size)
    features = _first_features(model, encoder, size)
    rows, channels = features.shape[1:]
    projector = (
        model.base_model.get_submodule(family_of(model.config).projector)
        if is_converted(model)
        else model.model.projector
    )

    def pixels(batch: int) -> tuple[torch.Tensor]:
        return (torch.randn(batch, 3, height, width),)

    parts = [
        Part(
            "encoder",
            encoder,
            {"pixel_values": ("batch", 3, height, width)},
            {"features": ("batch", rows, channels)},
            pixels,
        )
    ]
    for count in counts:
        tokens = _check_within(count, encoder.grid)
        parts.append(
            Part(
                f"projector-{count_name(count)}",
                Projector(projector, count, encoder.grid),
                {"features": ("batch", rows, channels)},
                {"vision_tokens": ("batch", tokens, projector.text_width)},
                lambda batch: (torch.randn(batch, rows, channels),),
                count,
            )
        )
    return parts


def _first_features(model: Any, encoder: nn.Module, size: Grid) -> torch.Tensor:
    """Return the features of two blank tiles, or say why the encoder cannot be a graph."""
    reason = ""
    if not is_converted(model) and takes_patches(model.model.vision_model):
        reason = "it takes patches, and their number per side as values (NaFlex)"
    try:
        if not reason:
            features: torch.Tensor = encoder(torch.zeros(2, 3, *size))
            return features
    except (IndexError, TypeError, ValueError, RuntimeError) as error:  # it needs other inputs
        reason = str(error).partition("\n")[0]
    raise ValueError(
        f"the vision encoder of {model.config.model_type} cannot be a graph of pixels of one size: "
        f"{reason}"
    )


def _check_within(count: TokenCount, grid: Grid) -> int:
    """Return the number of tokens of ``count``, which must be no finer than the patches."""
    height, width = token_grid(count, name="counts")
    if height > grid[0] or width > grid[1]:
        raise ValueError(
            f"counts must be at most {grid[0]}x{grid[1]}, the patches of an image, got "
            f"{count_name(count)}"
        )
    return height * width


# ---- language


class Embedding(nn.Module):
    """Token ids [B, L] to embeddings [B, L, D]."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings."""
        embeds: torch.Tensor = self.embedding(input_ids)
        return embeds


class Language(nn.Module):
    """Embeddings and the keys and values of former tokens to logits and all keys and values."""

    def __init__(self, language_model: Any) -> None:
        super().__init__()
        self.language_model = language_model
        self.cache_name = cache_name(language_model)

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        *past: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """Return logits [B, L, V], then a key and a value [B, heads, P + L, width] per layer."""
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=True,
            **{self.cache_name: _cache_of(past)},
        )
        layers = outputs.past_key_values.layers
        return outputs.logits, *(
            tensor for layer in layers for tensor in (layer.keys, layer.values)
        )


def _cache_of(past: Sequence[torch.Tensor]) -> DynamicCache:
    """Return a cache that holds a key and a value per layer.

    Filled directly: a new cache would concatenate them to an empty tensor of another rank, which
    not every runtime can.
    """
    cache = DynamicCache()
    for keys, values in zip(past[::2], past[1::2], strict=True):
        layer = DynamicLayer()
        layer.dtype, layer.device = keys.dtype, keys.device
        layer.keys, layer.values, layer.is_initialized = keys, values, True
        cache.layers.append(layer)
    return cache


def language_parts(language_model: Any) -> list[Part]:
    """Return the embedding of tokens and the language model.

    Args:
        language_model: a causal language model of transformers, in float32.

    Raises:
        ValueError: its cache holds more than keys and values.
    """
    embedding = language_model.get_input_embeddings()
    vocabulary, width = embedding.weight.shape
    caches = _cache_shapes(language_model, torch.zeros(1, 2, width))

    def ids(batch: int) -> tuple[torch.Tensor]:
        return (torch.randint(vocabulary, (batch, EXAMPLES[batch][0])),)

    def prompt(batch: int) -> tuple[torch.Tensor, ...]:
        length, past = EXAMPLES[batch]
        mask = torch.ones(batch, past + length, dtype=torch.int64)
        mask[1:, :2] = 0  # left padding
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, past:].contiguous()
        embeds = embedding(torch.randint(vocabulary, (batch, length))).detach()
        states = [torch.randn(batch, heads, past, size) for heads, size in caches]
        return embeds, mask, positions, *states

    past_names, present_names = (
        [f"{when}_{kind}_{i}" for i in range(len(caches) // 2) for kind in ("key", "value")]
        for when in ("past", "present")
    )
    return [
        Part(
            "embedding",
            Embedding(embedding),
            {"input_ids": ("batch", "length")},
            {"inputs_embeds": ("batch", "length", width)},
            ids,
        ),
        Part(
            "language",
            Language(language_model),
            {
                "inputs_embeds": ("batch", "length", width),
                "attention_mask": ("batch", "total"),
                "position_ids": ("batch", "length"),
                **{
                    name: ("batch", heads, "past", size)
                    for name, (heads, size) in zip(past_names, caches, strict=True)
                },
            },
            {
                "logits": ("batch", "length", language_model.config.vocab_size),
                **{
                    name: ("batch", heads, "total", size)
                    for name, (heads, size) in zip(present_names, caches, strict=True)
                },
            },
            prompt,
        ),
    ]


def _cache_shapes(language_model: Any, embeds: torch.Tensor) -> list[tuple[int, int]]:
    """Return (heads, width) of the key and of the value of each layer."""
    cache = DynamicCache(config=language_model.config)
    language_model(inputs_embeds=embeds, use_cache=True, **{cache_name(language_model): cache})
    shapes = []
    for layer in cache.layers:
        if not isinstance(layer, DynamicLayer):
            raise ValueError(
                f"the language model {language_model.config.model_type} cannot be a graph: its "
                f"cache has a {type(layer).__name__}, which is more than keys and values"
            )
        shapes += [(tensor.shape[1], tensor.shape[3]) for tensor in (layer.keys, layer.values)]
    return shapes
