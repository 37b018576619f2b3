"""Find the image placeholders of a prompt, and put vision tokens in their place."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tokenflex_kernels import merge_vision


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
        """Those of ``get_image_features``; ``width`` is D, which an empty list does not say."""
        per_image = list(outputs.pooler_output)
        tokens = torch.cat(per_image) if per_image else torch.zeros(0, width)
        return cls(tokens, [len(image) for image in per_image])

    def image_of_each(self, device: torch.device) -> torch.Tensor:
        """int64 [sum of counts]: the image that each token belongs to."""
        sizes = torch.tensor(self.counts, dtype=torch.int64, device=device)
        images = torch.arange(len(self.counts), device=device)
        return images.repeat_interleave(sizes, output_size=sum(self.counts))


def merge_images(
    inputs_embeds: torch.Tensor, is_placeholder: torch.Tensor, images: ImageTokens, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Replace the placeholders of a padded batch by the vision tokens.

    Args:
        inputs_embeds: [B, L, D].
        is_placeholder: bool [B, L].
        images: as many vision tokens as there are placeholders.
        name: the argument that holds the placeholders, for the error.

    Returns:
        The merged embeddings [B, L, D], and the rows of the vision tokens in [B * L].

    Raises:
        ValueError: placeholders and counts do not fit together.
    """
    rows = placeholder_rows(is_placeholder, images.counts, name)
    return merge_vision(inputs_embeds, images.tokens.to(inputs_embeds), rows), rows


def embedded_placeholders(
    inputs_embeds: torch.Tensor,
    embedding: nn.Module,
    image_token_id: int,
    attention_mask: Any,
) -> torch.Tensor:
    """Return where ``inputs_embeds`` hold the embedding of the placeholder: bool [B, L].

    Padding is left out, as its vectors may be anything: those of a placeholder that was never
    trained, zeros, are common.
    """
    with torch.no_grad():
        token = torch.full((1,), image_token_id, dtype=torch.int64, device=inputs_embeds.device)
        placeholder = embedding(token).to(inputs_embeds)
        is_placeholder = (inputs_embeds == placeholder).all(-1)
    # A static cache brings masks of its own, a dict, which say nothing of padding here.
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
        seen = attention_mask[:, -inputs_embeds.shape[1] :].to(is_placeholder.device)
        is_placeholder = is_placeholder & seen.bool()
    return is_placeholder


def placeholder_rows(
    is_placeholder: torch.Tensor, counts: Sequence[int], name: str = "input_ids"
) -> torch.Tensor:
    """Return the rows of a flattened batch that hold placeholders, once they fit ``counts``.

    Totals alone would let two images of swapped counts through, so images must also end where runs
    of placeholders end; a run may hold several (the tiles of one). Reads the mask back from the
    device, once a prompt.

    Args:
        is_placeholder: bool [B, L] or [L].
        counts: vision tokens of each image.
        name: the argument that holds the placeholders, for the error.

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
    """Refuse a placeholder that the embedding table has no row for.

    Raises:
        ValueError: it has none; the message names both numbers.
    """
    if not 0 <= image_token_id < vocab_size:
        raise ValueError(
            f"image_token_id must be from 0 to {vocab_size - 1}, a row of the embedding of "
            f"vocab_size {vocab_size}, got {image_token_id}: for a token that was added to the "
            "tokenizer, call resize_token_embeddings first; where a checkpoint names a wrong one, "
            "correct image_token_id in its config.json"
        )
