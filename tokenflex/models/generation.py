"""The releases of transformers that are admitted differ in ``generate``: what makes them alike.

``generate`` repeats prompts, for beams and several returned sequences. The images of a prompt must
be repeated as a group: of a prompt that shows A and B, two sequences show A, B, A, B. transformers
does so since 5.19; 5.18 repeats each image on its own, and 5.17 repeats tiles, and neither counts
nor grids. Since 5.24 a cache is passed as ``cache``.
"""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from transformers.generation.utils import MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tokenflex.models.placeholders import embedded_placeholders


def takes_cache(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Let a ``forward`` with ``past_key_values`` take it as ``cache``, its name since 5.24."""

    @functools.wraps(forward)
    def forward_with_cache(self: Any, *args: Any, cache: Any = None, **kwargs: Any) -> Any:
        if cache is not None:
            kwargs["past_key_values"] = cache
        return forward(self, *args, **kwargs)

    return forward_with_cache


def cache_of(arguments: Mapping[str, Any]) -> Any:
    """Return the cache among the arguments of a forward, under either of its names."""
    cache = arguments.get("cache")
    return arguments.get("past_key_values") if cache is None else cache


def repeated_images(
    is_placeholder: torch.Tensor, token_counts: Sequence[int], times: int
) -> list[int]:
    """Return the order of a batch's images once each of its prompts is repeated.

    Args:
        is_placeholder: bool [B, L], where the prompts hold vision tokens, before they are repeated.
        token_counts: vision tokens of each image, in order of appearance.
        times: sequences that each prompt becomes.

    Returns:
        Indices of images, as many as ``times`` the images.
    """
    row_ends = list(accumulate(is_placeholder.sum(-1).tolist()))
    images_of: list[list[int]] = [[] for _ in row_ends]
    first = 0
    for image, count in enumerate(token_counts):
        # The model's forward refuses images that reach past the last placeholder.
        images_of[min(bisect_right(row_ends, first), len(row_ends) - 1)].append(image)
        first += count
    return [image for images in images_of for image in images * times]


class RepeatsImages:
    """A mixin, before ``GenerationMixin``, that repeats images with their prompts."""

    config: Any

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.Tensor | None, dict[str, Any]]:
        images = (model_kwargs.get("mm_encoder_outputs") or {}).get("image")
        if images is None and model_kwargs.get("pixel_values") is not None:
            # Only transformers 5.17 has not encoded them by now.
            names = ("pixel_values", "num_image_tokens", "grids")
            images = self.get_image_features(  # type: ignore[attr-defined]
                **{name: model_kwargs.pop(name, None) for name in names}
            )
            model_kwargs["mm_encoder_outputs"] = {"image": images}
        if images is not None and input_ids is not None and expand_size > 1:
            tokens = list(images.pooler_output)
            is_placeholder = self._placeholders_of_prompts(input_ids, model_kwargs)
            order = repeated_images(is_placeholder, [len(image) for image in tokens], expand_size)
            del model_kwargs["mm_encoder_outputs"]
            input_ids, model_kwargs = super()._expand_inputs_for_generation(  # type: ignore[misc]
                expand_size, is_encoder_decoder, input_ids, **model_kwargs
            )
            repeated = BaseModelOutputWithPooling(pooler_output=[tokens[image] for image in order])
            return input_ids, {**model_kwargs, "mm_encoder_outputs": {"image": repeated}}
        return super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )

    def _placeholders_of_prompts(
        self, input_ids: torch.Tensor, model_kwargs: Mapping[str, Any]
    ) -> torch.Tensor:
        if input_ids.numel():
            return input_ids == self.config.image_token_id
        return embedded_placeholders(
            model_kwargs["inputs_embeds"],
            self.get_input_embeddings(),  # type: ignore[attr-defined]
            self.config.image_token_id,
            model_kwargs.get("attention_mask"),
        )

    if "mm_encoder_outputs" not in MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL:

        def prepare_inputs_for_generation(
            self, *args: Any, is_first_iteration: bool | None = False, **kwargs: Any
        ) -> dict[str, Any]:
            """Leave images out after the prompt: transformers 5.17 does so with pixels alone."""
            if not is_first_iteration and kwargs.get("use_cache", True):
                kwargs.pop("mm_encoder_outputs", None)
            return super().prepare_inputs_for_generation(  # type: ignore[misc]
                *args, is_first_iteration=is_first_iteration, **kwargs
            )
