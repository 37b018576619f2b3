"""Find the image placeholders of a prompt, and replace them by vision tokens."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tokenflex.models.configuration import TokenFlexConfig
from tokenflex.positions import shared_image_positions
from tokenflex.projector import TokenAdaptiveProjector
from tokenflex_kernels import PoolPlan, merge_vision
from tokenflex_kernels.checks import check_ints
from tokenflex_kernels.tracing import is_exporting

T = TypeVar("T")


@dataclass(frozen=True)
class ImageTokens:
    """The vision tokens of images, one image after another.

    Attributes:
        tokens: [sum of counts, D].
        counts: vision tokens of each image; host ints.
    """

    tokens: torch.Tensor
    counts: list[int]

    @classmethod
    def from_outputs(cls, outputs: BaseModelOutputWithPooling, width: int) -> ImageTokens:
        """Read the outputs of ``get_image_features``. ``width`` is D, for no images."""
        per_image = list(outputs.pooler_output)
        tokens = torch.cat(per_image) if per_image else torch.zeros(0, width)
        return cls(tokens, [len(image) for image in per_image])

    def shown(self, image_index: Sequence[int] | torch.Tensor) -> ImageTokens:
        """Return the images in the order in which prompts show them, see :func:`in_order`."""
        per_image = in_order(self.tokens.split(self.counts), image_index)
        tokens = torch.cat(per_image) if per_image else self.tokens[:0]
        return ImageTokens(tokens, in_order(self.counts, image_index))


@dataclass(frozen=True)
class UnprojectedImages:
    """Images whose vision tokens :meth:`project` computes, or packing.

    Attributes:
        projector: makes the tokens.
        features: [sum of H*W, C], the patch features of one image after another.
        pooling: the images' patch grids and grids of tokens.
        counts: vision tokens of each image; host ints.
    """

    projector: TokenAdaptiveProjector
    features: torch.Tensor
    pooling: PoolPlan
    counts: list[int]

    def project(self) -> ImageTokens:
        """Return the vision tokens."""
        return ImageTokens(self.projector(self.features, plan=self.pooling), self.counts)


def image_of_each(counts: Sequence[int], device: torch.device) -> torch.Tensor:
    """Return the image of each vision token, int64 [sum of counts]."""
    sizes = torch.tensor(counts, dtype=torch.int64, device=device)
    images = torch.arange(len(counts), device=device)
    return images.repeat_interleave(sizes, output_size=sum(counts))


def in_order(images: Sequence[T], image_index: Sequence[int] | torch.Tensor) -> list[T]:
    """Return the images that ``image_index`` names, each as often as it does.

    Raises:
        TypeError: an index is no int.
        ValueError: there is no such image, or one that is never shown.
    """
    if isinstance(image_index, torch.Tensor):
        image_index = image_index.tolist()
    order = check_ints("image_index", image_index).tolist()
    if {*order} != {*range(len(images))}:
        raise ValueError(
            f"image_index must name each of the {len(images)} images (tiles) and no others, got "
            f"{order}"
        )
    return [images[image] for image in order]


def merge_prompt(
    embedding: nn.Module,
    config: TokenFlexConfig,
    images: ImageTokens | None,
    *,
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    seen: int,
) -> dict[str, Any]:
    """Return the inputs of the language model for a padded batch with its images.

    ``attention_mask`` [B, seen + L] and ``position_ids`` [B, L] or [1, L] may be None, and change
    only where all tokens of an image share a position. ``seen`` is the length of the cache.

    Raises:
        TypeError: ``input_ids`` are not integers.
        ValueError: placeholders and counts do not fit together, or not exactly one of
            ``input_ids`` and ``inputs_embeds`` is given.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give exactly one of input_ids, inputs_embeds and plan")
    name = "inputs_embeds" if input_ids is None else "input_ids"
    if input_ids is not None:
        if input_ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"input_ids must be int64 or int32, got {input_ids.dtype}")
        check_device(name, input_ids, embedding)
        inputs_embeds = embedding(input_ids)
    assert inputs_embeds is not None
    # A graph that torch.export traces without images cannot read the prompt.
    if images is not None or not (seen or is_exporting()):
        if input_ids is not None:
            is_placeholder = input_ids == config.image_token_id
        else:
            is_placeholder = embedded_placeholders(
                inputs_embeds, embedding, config.image_token_id, attention_mask
            )
        # Without images the prompt must hold no placeholder.
        rows = placeholder_rows(is_placeholder, [] if images is None else images.counts, name)
    if images is not None:
        inputs_embeds = merge_vision(inputs_embeds, images.tokens.to(inputs_embeds), rows)
        if config.image_positions == "shared":
            batch, length = inputs_embeds.shape[:2]
            if position_ids is None:
                position_ids = torch.arange(seen, seen + length, device=rows.device)
            if attention_mask is None:  # or transformers takes equal positions for new samples
                attention_mask = rows.new_ones(batch, seen + length)
            flat = position_ids.expand(batch, length).flatten()
            shared = shared_image_positions(flat, rows, image_of_each(images.counts, rows.device))
            position_ids = shared.view(batch, length)
    return {
        "inputs_embeds": inputs_embeds,
        "attention_mask": attention_mask,
        "position_ids": position_ids,
    }


def check_device(name: str, tensor: torch.Tensor, module: nn.Module) -> None:
    """Refuse an input on another device than the weights it meets first."""
    if hasattr(module, "_hf_hook"):
        return  # accelerate moves inputs, and may keep the weights elsewhere
    device = next(module.parameters()).device
    if tensor.device != device:
        raise ValueError(f"{name} must be on the model's device, {device}, got {tensor.device}")


def embedded_placeholders(
    inputs_embeds: torch.Tensor,
    embedding: nn.Module,
    image_token_id: int,
    attention_mask: Any,
) -> torch.Tensor:
    """Return where ``inputs_embeds`` hold the embedding of the placeholder: bool [B, L].

    Padding is left out, as its vectors may be anything. Zeros, which are also the embedding of a
    placeholder that was never trained, are common.
    """
    with torch.no_grad():
        token = torch.full((1,), image_token_id, dtype=torch.int64, device=inputs_embeds.device)
        placeholder = embedding(token).to(inputs_embeds)
        is_placeholder = (inputs_embeds == placeholder).all(-1)
    # A static cache has a dict of masks, which do not tell padding.
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
        seen = attention_mask[:, -inputs_embeds.shape[1] :].to(is_placeholder.device)
        is_placeholder = is_placeholder & seen.bool()
    return is_placeholder


def placeholder_rows(
    is_placeholder: torch.Tensor, counts: Sequence[int], name: str = "input_ids"
) -> torch.Tensor:
    """Return the rows of a flattened batch that hold placeholders, and check them.

    Equal totals alone would accept two images with swapped counts. So a run of placeholders must
    end where an image ends; it may hold several images, such as the tiles of one. The mask
    ``is_placeholder`` [B, L] or [L] is read back from the device, once a prompt.

    Raises:
        ValueError: a run of placeholders does not end where an image's vision tokens end; the
            message names row and image, placeholders and vision tokens.
    """
    rows = is_placeholder.reshape(-1).nonzero().squeeze(1)
    ends = [0, *accumulate(counts)]
    length = is_placeholder.shape[-1]
    # A run ends before a placeholder that is not the next token, or is the first of a row.
    starts_run = (rows[1:] != rows[:-1] + 1) | (rows[1:] % length == 0)
    run_ends = [*(starts_run.nonzero().squeeze(1) + 1).tolist(), *[len(rows)] * bool(len(rows))]
    boundaries = set(ends)
    problem = ""
    if wrong := [end for end in run_ends if end not in boundaries]:
        row, image = int(rows[wrong[0] - 1]) // length, bisect_right(ends, wrong[0]) - 1
        seen = wrong[0] - ends[image]
        if image < len(counts):
            problem = (
                f"row {row} of {name} ends a run of placeholders inside image {image}, after "
                f"{seen} of its {counts[image]} vision tokens"
            )
        else:
            problem = f"row {row} of {name} holds {seen} placeholders after the last image"
    elif len(rows) != ends[-1]:
        image = bisect_right(ends, len(rows)) - 1
        problem = f"no row of {name} holds image {image} of {counts[image]} vision tokens"
    if problem:
        raise ValueError(
            f"{problem}: {name} hold {len(rows)} image placeholders (per row "
            f"{is_placeholder.sum(-1).tolist()}), but num_image_tokens gives "
            f"{ends[-1]} vision tokens (per image {list(counts)})"
        )
    return rows


def check_placeholder(image_token_id: int, vocab_size: int) -> None:
    """Refuse a placeholder without a row in the embedding table.

    Raises:
        ValueError: the message names both numbers.
    """
    if not 0 <= image_token_id < vocab_size:
        raise ValueError(
            f"image_token_id must be from 0 to {vocab_size - 1}, a row of the embedding of "
            f"vocab_size {vocab_size}, got {image_token_id}: for a token that was added to the "
            "tokenizer, call resize_token_embeddings first; where a checkpoint names a wrong one, "
            "correct image_token_id in its config.json"
        )
