"""Generate from images: encoded once, in prompts read in chunks, with drafts, at chosen counts.

transformers' ``generate`` projects the images once, before the prompt is read, and repeats them for
beams. This adds what it leaves out:

* images that are encoded already, and counts that are chosen;
* a prompt read in chunks (``prefill_chunk_size``), which may end inside an image;
* a draft model (``assistant_model``) that sees the images too, through its own projector.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tokenflex.models.placeholders import ImageTokens, merge_images
from tokenflex.positions import shared_image_positions
from tokenflex.selection.choice import asks_for_choice, generate_with_choice

_DRAFT = "draft_image"  # the draft's images among ``mm_encoder_outputs``, which it is handed too


@dataclass(frozen=True)
class _MergedPrompt:
    """A prompt with its images merged, of which chunks are read.

    Attributes:
        inputs_embeds: [B, L, D].
        seen: tokens in the cache before it.
    """

    inputs_embeds: torch.Tensor
    seen: int


class TokenFlexGeneration(GenerationMixin):
    """``generate`` of :class:`tokenflex.TokenFlexForConditionalGeneration`."""

    if TYPE_CHECKING:
        model: Any
        get_image_features: Any
        get_input_embeddings: Any

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' ``generate``, whose further arguments are those of :meth:`forward`.

        It never answers with the image placeholder, unless ``suppress_tokens`` says otherwise.
        With ``num_image_tokens="auto"`` each image's count is chosen, as ``penalty`` or ``budget``
        say: see :func:`tokenflex.selection.choice.generate_with_choice`.

        An ``assistant_model`` that is a TokenFLEX model sees the images as well, at the same
        counts: encoded by itself, or ``encoded_images``, which must then be of its own encoder.

        Example:
            >>> inputs = processor(images=picture, text=question)
            >>> images = model.encode_images(inputs["pixel_values"])
            >>> for count in (64, 144, 256):  # one pass of the encoder for three answers
            ...     inputs = processor(images=picture, text=question, num_image_tokens=count)
            ...     inputs.pop("pixel_values")
            ...     model.generate(**inputs, encoded_images=images)
        """
        if asks_for_choice(kwargs):
            return generate_with_choice(self, *args, **kwargs)
        generation_config = kwargs.get("generation_config") or self.generation_config
        if generation_config.suppress_tokens is None:
            kwargs.setdefault("suppress_tokens", [self.config.image_token_id])
        draft = kwargs.get("assistant_model")
        if not isinstance(draft, TokenFlexGeneration):
            draft = None
        elif kwargs.get("inputs_embeds") is not None:
            raise ValueError(
                "an assistant_model has embeddings of its own: give input_ids, got inputs_embeds"
            )
        outputs = kwargs.get("mm_encoder_outputs")
        if kwargs.get("encoded_images") is not None:
            for name in ("pixel_values", "mm_encoder_outputs"):
                if kwargs.get(name) is not None:
                    raise ValueError(f"encoded_images hold the images: give no {name} with them")
            kwargs["mm_encoder_outputs"] = self._project_images(draft, kwargs)
        elif draft is not None and kwargs.get("pixel_values") is not None:
            if outputs is not None:
                raise ValueError(
                    "give the images as one of pixel_values, encoded_images and mm_encoder_outputs"
                )
            kwargs["mm_encoder_outputs"] = self._project_images(draft, kwargs)
        elif outputs is not None:
            if draft is not None:
                raise ValueError(
                    "an assistant_model projects images itself: give pixel_values or "
                    "encoded_images, got mm_encoder_outputs"
                )
            if _DRAFT in outputs:  # this model is the draft of another
                outputs = {"image": outputs[_DRAFT]}
            kwargs["mm_encoder_outputs"] = {
                modality: _copied(output) for modality, output in outputs.items()
            }
        return super().generate(*args, **kwargs)

    @torch.no_grad()
    def _project_images(
        self, draft: TokenFlexGeneration | None, kwargs: dict[str, Any]
    ) -> dict[str, BaseModelOutputWithPooling]:
        """Take the images out of ``kwargs`` and project them, for the draft too if there is one."""
        names = ("pixel_values", "num_image_tokens", "grids", "encoded_images")
        images = {name: kwargs.pop(name) for name in names if name in kwargs}
        outputs = {"image": _copied(self.get_image_features(**images, return_dict=True))}
        if draft is None:
            return outputs
        if draft.config.image_token_id != self.config.image_token_id:
            raise ValueError(
                "assistant_model must have the model's image_token_id, "
                f"{self.config.image_token_id}, got {draft.config.image_token_id}"
            )
        for name in ("pixel_values", "encoded_images"):
            if images.get(name) is not None:
                images[name] = images[name].to(draft.device)
        encoded, width = images.get("encoded_images"), draft.config.vision_config.hidden_size
        if encoded is not None and encoded.features.shape[1] != width:
            raise ValueError(
                f"encoded_images must be of the assistant_model's own encoder, of width {width}, "
                f"got width {encoded.features.shape[1]}: give pixel_values instead"
            )
        outputs[_DRAFT] = _copied(draft.get_image_features(**images, return_dict=True))
        return outputs

    def _maybe_initialize_input_ids_for_generation(
        self, inputs: Any, bos_token_id: Any, model_kwargs: dict[str, Any]
    ) -> torch.Tensor:
        """No ids for each prompt of embeddings; transformers counts the first tensor it finds."""
        embeds = model_kwargs.get("inputs_embeds")
        if embeds is not None:
            model_kwargs = {"inputs_embeds": embeds}
        ids: torch.Tensor = super()._maybe_initialize_input_ids_for_generation(
            inputs, bos_token_id, model_kwargs
        )
        return ids

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        *args: Any,
        inputs_embeds: torch.Tensor | None = None,
        merged_prompt: _MergedPrompt | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """transformers' own, with a chunk of ``merged_prompt`` in place of its ids."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids, *args, inputs_embeds=inputs_embeds, **kwargs
        )
        cache = _cache_of(kwargs)
        seen = 0 if cache is None else int(cache.get_seq_length())
        if merged_prompt is not None:
            start = seen - merged_prompt.seen
            end = start + input_ids.shape[1]
            inputs["inputs_embeds"] = merged_prompt.inputs_embeds[:, start:end]
            inputs["input_ids"] = None
        elif not seen and kwargs.get("mm_encoder_outputs"):
            # transformers leaves the images out of a draft's first pass as of its later ones.
            inputs["mm_encoder_outputs"] = kwargs["mm_encoder_outputs"]
        return inputs

    def _prefill(
        self,
        input_ids: torch.Tensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        is_first_iteration: bool = True,
    ) -> Any:
        """Read the prompt; one that is read in chunks has its images merged before it is cut.

        transformers cuts ids, and images by the placeholders in them: it leaves out a prompt of
        embeddings, and positions that depend on where a whole image ends.
        """
        cache = _cache_of(model_kwargs)
        seen = 0 if cache is None else int(cache.get_seq_length())
        outputs = model_kwargs.get("mm_encoder_outputs") or {}
        inputs_embeds = model_kwargs.get("inputs_embeds")
        if (
            generation_config.prefill_chunk_size is None
            or cache is None
            or (inputs_embeds is None and not outputs)
            or not (is_first_iteration or seen == 0)
        ):
            return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)
        attention_mask = model_kwargs.get("attention_mask")
        if inputs_embeds is not None:  # always the whole prompt
            input_ids = input_ids.new_zeros(inputs_embeds.shape[:2])  # their number is what counts
            prompt = {"inputs_embeds": inputs_embeds[:, seen:], "input_ids": None}
        else:
            length = getattr(generation_config, "_mask_length", -1)
            length = length if attention_mask is None else attention_mask.shape[1]
            # As transformers tells a whole prompt from the new part of one.
            new_ids = input_ids[:, seen:] if length == input_ids.shape[1] else input_ids
            prompt = {"inputs_embeds": None, "input_ids": new_ids.to(self.device)}
        merged, is_placeholder, name = self.model.embed(
            **prompt, attention_mask=attention_mask, find_placeholders=True
        )
        batch, new = merged.shape[:2]
        whole = {
            "inputs_embeds": inputs_embeds,
            "mm_encoder_outputs": model_kwargs.pop("mm_encoder_outputs", None),
        }
        model_kwargs.pop("inputs_embeds", None)
        if outputs.get("image") is not None:
            images = ImageTokens.from_outputs(outputs["image"], merged.shape[2])
            merged, rows = merge_images(merged, is_placeholder, images, name)
            if self.config.image_positions == "shared":
                positions = model_kwargs["position_ids"].expand(batch, -1).clone()
                positions[:, -new:] = shared_image_positions(
                    positions[:, -new:].flatten(), rows, images.image_of_each(rows.device)
                ).view(batch, new)
                model_kwargs["position_ids"] = positions
                if attention_mask is None:  # or equal positions would be taken for new samples
                    model_kwargs["attention_mask"] = positions.new_ones(batch, seen + new)
        model_kwargs["merged_prompt"] = _MergedPrompt(merged, seen)
        result = super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)
        del model_kwargs["merged_prompt"]
        model_kwargs.update({name: value for name, value in whole.items() if value is not None})
        model_kwargs["attention_mask"] = attention_mask
        return result


def _cache_of(model_kwargs: dict[str, Any]) -> Any:
    """The key-value cache, under its name until transformers 5.23 or the one since."""
    cache = model_kwargs.get("cache")
    return model_kwargs.get("past_key_values") if cache is None else cache


def _copied(output: BaseModelOutputWithPooling | None) -> BaseModelOutputWithPooling | None:
    """The vision tokens alone, without a gradient, in an object that may be changed.

    Beam search repeats the images inside it, and a draft is handed a deep copy.
    """
    if output is None:
        return None
    return BaseModelOutputWithPooling(
        pooler_output=[image.detach() for image in output.pooler_output]
    )


def never_generate(generation_config: GenerationConfig, token_id: int) -> None:
    """Add ``token_id`` to what ``generation_config`` suppresses, for servers that read it."""
    suppressed = list(generation_config.suppress_tokens or [])
    generation_config.suppress_tokens = sorted({*suppressed, token_id})
