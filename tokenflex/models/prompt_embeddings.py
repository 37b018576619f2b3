"""Embeddings of prompts with their images, as servers of a plain language model take them.

vLLM and others take the embeddings of one prompt, [L, D] without padding, as ``prompt_embeds``.
"""

from __future__ import annotations

import torch


def batch_of_prompts(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return ids [B, L] and the mask of the same shape, for a prompt [L] or a batch [B, L].

    Raises:
        TypeError: ``input_ids`` is not a tensor.
        ValueError: a shape is another.
    """
    if not isinstance(input_ids, torch.Tensor):
        raise TypeError(f"input_ids must be a tensor, got {type(input_ids).__name__}")
    if input_ids.ndim not in (1, 2):
        raise ValueError(f"input_ids must be [L] or [B, L], got shape {list(input_ids.shape)}")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must have the shape of input_ids, {list(input_ids.shape)}, got "
            f"{list(attention_mask.shape)}"
        )
    if input_ids.ndim == 2:
        return input_ids, attention_mask
    return input_ids[None], None if attention_mask is None else attention_mask[None]


def without_padding(
    embeds: torch.Tensor, attention_mask: torch.Tensor | None
) -> list[torch.Tensor]:
    """Return the rows [L_i, D] of each prompt of a batch [B, L, D] where the mask is not 0."""
    if attention_mask is None:
        return list(embeds)
    masks = attention_mask.to(embeds.device).bool()
    return [prompt[mask] for prompt, mask in zip(embeds, masks, strict=True)]
