"""The language side of a converted model: where it is a plain language model, and its prompts."""

from __future__ import annotations

from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from tokenflex.counts import ImageTokenCounts
from tokenflex.dropin.families import family_of
from tokenflex.dropin.features import image_input_names
from tokenflex.models.placeholders import placeholder_rows
from tokenflex.models.prompt_embeddings import batch_of_prompts, without_padding
from tokenflex_kernels import merge_vision


def check_plain_language_model(model: Any) -> None:
    """Refuse a converted model whose language side is more than a causal model of transformers.

    Raises:
        ValueError: the message has the reason.
    """
    family, text_config = family_of(model.config), model.config.get_text_config()
    reason = family.no_prompt_embeds
    causal_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(text_config), None)
    if not reason and causal_class is None:
        reason = f"transformers has no causal language model of {text_config.model_type!r}"
    if reason:
        raise ValueError(
            f"the language model of {family.model_type} cannot be used without its vision model: "
            f"{reason}"
        )


def merged_embeddings(
    model: Any,
    input_ids: torch.Tensor,
    num_image_tokens: ImageTokenCounts | None,
    attention_mask: torch.Tensor | None,
    inputs: dict[str, Any],
) -> torch.Tensor | list[torch.Tensor]:
    """Return the embeddings of prompts for a converted model.

    Args:
        model: A converted model.
        input_ids: int64 [L] or [B, L].
        num_image_tokens: One count for all images, or one per input of the vision encoder.
        attention_mask: Of the same shape, 0 on padding.
        inputs: Other inputs; those that its ``get_image_features`` takes are used.

    Raises:
        ValueError: As :func:`check_plain_language_model`; placeholders and counts do not fit; or
            there are videos.
    """
    check_plain_language_model(model)
    if inputs.get("pixel_values_videos") is not None:
        raise ValueError(
            "pixel_values_videos must be None: embeddings are of prompts with images; give a "
            "video's frames as images"
        )
    base = model.base_model
    ids, mask = batch_of_prompts(input_ids, attention_mask)
    names = image_input_names(type(base)._tokenflex_stock_class)
    images = {name: inputs[name] for name in names if inputs.get(name) is not None}
    tokens: list[torch.Tensor] = []
    if "pixel_values" in images:
        outputs = base.get_image_features(
            **images, num_image_tokens=num_image_tokens, return_dict=True
        )
        tokens = list(outputs.pooler_output)
    is_placeholder = ids == model.config.image_token_id
    rows = placeholder_rows(is_placeholder, [len(image) for image in tokens])
    # Some models have no embedding of the placeholder.
    embeds = model.get_input_embeddings()(ids.masked_fill(is_placeholder, 0))
    if tokens:
        embeds = merge_vision(embeds, torch.cat(tokens).to(embeds), rows)
    prompts = without_padding(embeds, mask)
    return prompts if input_ids.ndim == 2 else prompts[0]
