"""Prompts with images that ``generate`` reads in chunks (``prefill_chunk_size``).

transformers cuts ids, and images by the placeholders in them: it leaves out a prompt of embeddings,
and positions that depend on where a whole image ends. Here the images are merged into the prompt
before it is cut, so that a chunk may end inside an image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, GenerationMixin

from tokenflex.models.placeholders import ImageTokens, merge_prompt


def new_prompt_ids(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    generation_config: GenerationConfig,
    seen: int,
) -> torch.Tensor:
    """Return the ids that the cache, which holds ``seen`` tokens, does not hold yet.

    The mask tells whether ``input_ids`` are a whole prompt or only its part after the cache, as in
    transformers.
    """
    length = getattr(generation_config, "_mask_length", -1)
    length = length if attention_mask is None else attention_mask.shape[1]
    return input_ids[:, seen:] if length == input_ids.shape[1] else input_ids


class ChunkedPrefill(GenerationMixin):
    """A mixin that reads prompts with images in chunks."""

    if TYPE_CHECKING:
        config: Any
        get_input_embeddings: Any

    def _prefill(
        self,
        input_ids: torch.Tensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        is_first_iteration: bool = True,
    ) -> Any:
        """Read the prompt as transformers does, in chunks where images are in it."""
        # The argument that holds the key-value cache: "cache" since transformers 5.24.
        cache_name = "cache" if model_kwargs.get("cache") is not None else "past_key_values"
        cache = model_kwargs.get(cache_name)
        seen = 0 if cache is None else int(cache.get_seq_length())
        outputs = model_kwargs.get("mm_encoder_outputs") or {}
        inputs_embeds = model_kwargs.get("inputs_embeds")
        size = generation_config.prefill_chunk_size
        has_images = inputs_embeds is not None or outputs
        if size is None or cache is None or not has_images or not (is_first_iteration or not seen):
            return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)

        attention_mask = model_kwargs["attention_mask"]
        if inputs_embeds is not None:  # always the whole prompt
            prompt = {"input_ids": None, "inputs_embeds": inputs_embeds[:, seen:]}
        else:
            new_ids = new_prompt_ids(input_ids, attention_mask, generation_config, seen)
            prompt = {"input_ids": new_ids.to(self.device), "inputs_embeds": None}
        images = None
        if outputs.get("image") is not None:
            width = self.config.text_config.hidden_size
            images = ImageTokens.from_outputs(outputs["image"], width)
        new = next(x.shape[1] for x in prompt.values() if x is not None)
        positions = model_kwargs["position_ids"]
        merged = merge_prompt(
            self.get_input_embeddings(),
            self.config,
            images,
            **prompt,
            attention_mask=attention_mask,
            position_ids=positions[:, -new:],
            seen=seen,
        )
        embeds, attention_mask = merged["inputs_embeds"], merged["attention_mask"]
        batch = len(embeds)
        parts = (positions[:, :-new], merged["position_ids"])
        positions = torch.cat([part.expand(batch, -1) for part in parts], 1)

        forward = self.__call__
        if self._valid_auto_compile_criteria(model_kwargs, generation_config):
            forward = self.get_compiled_call(generation_config.compile_config)
        ids = torch.zeros(batch, new, dtype=torch.int64, device=embeds.device)  # only their shape
        others = {"attention_mask", "position_ids", "inputs_embeds", "mm_encoder_outputs"}
        chunk_kwargs = {key: value for key, value in model_kwargs.items() if key not in others}
        for start in range(0, new, size):
            end = min(start + size, new)
            inputs = self.prepare_inputs_for_generation(
                ids[:, start:end],
                is_first_iteration=is_first_iteration,
                attention_mask=None if attention_mask is None else attention_mask[:, : seen + end],
                position_ids=positions[:, seen + start : seen + end],
                **chunk_kwargs,
            )
            if inputs.get("inputs_embeds") is not None:
                raise ValueError(
                    "prefill_chunk_size must be None for a prompt with learned embeddings before "
                    f"it, got {size}"
                )
            inputs |= {"input_ids": None, "inputs_embeds": embeds[:, start:end]}
            result = forward(**inputs, return_dict=True)
            chunk_kwargs[cache_name] = model_kwargs[cache_name] = getattr(result, cache_name)
        return result
