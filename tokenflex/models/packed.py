"""The packed forward: every sample of a batch in one row without padding."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from tokenflex.models.attention import PACKED_ATTENTION
from tokenflex.models.attention_blocks import AttentionBlocks
from tokenflex.models.configuration import TokenFlexConfig
from tokenflex.models.placeholders import ImageTokens, UnprojectedImages, image_of_each
from tokenflex.models.prefixes import SharedPrefixes
from tokenflex.positions import shared_image_positions
from tokenflex.projector import is_hooked
from tokenflex_kernels import PackPlan, merge_vision, pack_embeddings


def pack_prompts(
    language_model: PreTrainedModel,
    config: TokenFlexConfig,
    plan: PackPlan,
    images: ImageTokens | UnprojectedImages | None,
    shared_prefixes: SharedPrefixes | None,
    position_ids: torch.Tensor | None = None,
) -> dict[str, Any]:
    """Return the inputs of the language model (without its head) for a packed row.

    Raises:
        ValueError: counts, prefixes or positions are not the plan's, or the language model's
            attention cannot take them.
    """
    attention = language_model.config._attn_implementation
    knows_samples = attention == PACKED_ATTENTION or attention.startswith("flash")
    if shared_prefixes is not None:
        _check_shared_prefixes(shared_prefixes, plan, attention)
    if position_ids is None:
        row = plan if shared_prefixes is None else shared_prefixes
        position_ids = row.position_ids[None]
    elif position_ids.shape != (1, plan.num_tokens):
        raise ValueError(
            f"position_ids must be [1, {plan.num_tokens}] as the plan's row, got "
            f"{list(position_ids.shape)}"
        )
    if config.image_positions == "shared" and images is not None and images.counts:
        if not knows_samples:
            raise ValueError(
                "image_positions='shared' packs with the language model's attention "
                f"{PACKED_ATTENTION!r} or flash: {attention!r} knows samples by their positions"
            )
        rows, shown = plan.vision_rows, image_of_each(images.counts, plan.vision_rows.device)
        if plan.image_index is not None:
            rows, order = rows.sort()
            shown = shown[plan.vision_tokens()[order]]
        position_ids = shared_image_positions(position_ids[0], rows, shown)[None]
    packed = _pack(language_model.get_input_embeddings(), plan, images)
    inputs: dict[str, Any] = {
        "inputs_embeds": packed[None],
        "position_ids": position_ids,
        "attention_mask": None,
        "use_cache": False,
    }
    if not knows_samples:
        return inputs  # sdpa, eager, flex: transformers masks by position_ids
    inputs |= {
        "cu_seq_lens_q": plan.cu_seqlens,
        "cu_seq_lens_k": plan.cu_seqlens,
        "max_length_q": plan.max_seqlen,
        "max_length_k": plan.max_seqlen,
    }
    if attention == PACKED_ATTENTION:
        parents = () if shared_prefixes is None else shared_prefixes.parents
        inputs["blocks"] = AttentionBlocks(plan.lengths, parents)
        # transformers leaves a mask of four dimensions alone; ours reads the boundaries.
        inputs["attention_mask"] = packed.new_empty(1, 1, 0, 0)
        if shared_prefixes is not None:
            inputs["shared_prefixes"] = shared_prefixes
    return inputs


def _pack(
    embedding: Any, plan: PackPlan, images: ImageTokens | UnprojectedImages | None
) -> torch.Tensor:
    """Return the embedded row, [total, D]."""
    table: torch.Tensor = embedding.weight
    is_plain = (
        type(embedding) is nn.Embedding
        and type(table) in (torch.Tensor, nn.Parameter)
        and not is_hooked(embedding)
    )
    if images is not None:
        _check_counts(plan, images.counts)
    if isinstance(images, UnprojectedImages):
        if is_plain:
            return images.projector.pack(images.features, images.pooling, table, plan)
        images = images.project()
    if images is None:
        vision = table.new_zeros(0, table.shape[1])
    else:
        vision = images.tokens.to(table.device, table.dtype)
    if is_plain:
        return pack_embeddings(table, vision, plan)
    # Scaled, adapted, sharded or hooked: more than its table.
    if plan.image_index is not None:
        vision = vision.index_select(0, plan.vision_tokens())
    return merge_vision(embedding(plan.input_ids), vision, plan.vision_rows)


def _check_counts(plan: PackPlan, counts: list[int]) -> None:
    """Refuse vision tokens of other images than the plan's, each of which may be several tiles."""
    fits = tuple(counts) == plan.token_counts
    if not fits and plan.image_index is not None and sum(counts) == plan.num_vision_tokens:
        fits = {0, *accumulate(counts)}.issuperset(accumulate(plan.token_counts))
    if not fits:
        raise ValueError(
            "num_image_tokens must be the counts that the plan was made for, "
            f"{plan.token_counts}, got {tuple(counts)}"
        )


def _check_shared_prefixes(shared: SharedPrefixes, plan: PackPlan, attention: str) -> None:
    if attention != PACKED_ATTENTION:
        raise ValueError(
            f"shared_prefixes need the language model's attention to be {PACKED_ATTENTION!r}, got "
            f"{attention!r}: give each sequence its own prefix instead"
        )
    if len(shared.parents) != plan.num_samples or len(shared.position_ids) != plan.num_tokens:
        raise ValueError(
            f"shared_prefixes must be of the plan, of {plan.num_samples} sequences and "
            f"{plan.num_tokens} rows, got {len(shared.parents)} and {len(shared.position_ids)}"
        )
