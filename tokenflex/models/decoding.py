"""Generate from images: encoded once, in prompts read in chunks, with drafts, at chosen counts.

transformers' ``generate`` projects the images once, before the prompt is read, and repeats them for
beams. This adds what it leaves out:

* images that are encoded already, and counts that are chosen;
* a prompt read in chunks (``prefill_chunk_size``), which may end inside an image;
* a draft model (``assistant_model``) that sees the images too, through its own projector.
"""

from __future__ import annotations

import copy
import functools
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tokenflex.models.auto_counts import ChoosesCounts, asks_for_choice
from tokenflex.models.placeholders import ImageTokens, merge_images
from tokenflex.positions import shared_image_positions

_DRAFT = "draft_image"  # the draft's images among ``mm_encoder_outputs``, which it is handed too


class TokenFlexGeneration(ChoosesCounts, GenerationMixin):
    """``generate`` of :class:`tokenflex.TokenFlexForConditionalGeneration`."""

    if TYPE_CHECKING:
        config: Any
        model: Any
        get_image_features: Any
        get_input_embeddings: Any

    _suppressed_placeholder: int | None = None  # the id that we added to the generation config
    _former_placeholders: frozenset[int] = frozenset()

    def suppress_placeholder(self) -> None:
        """Add the placeholder to what the generation config suppresses, in place of a former one.

        The configuration may name another placeholder at any time, and the generation config may
        be replaced: by ``from_pretrained``, or by the caller. So this is called before answers and
        before files are written. What else is suppressed stays.
        """
        former, current = self._suppressed_placeholder, self.config.image_token_id
        suppressed = set(self.generation_config.suppress_tokens or ())
        if former is not None and former != current:
            suppressed.discard(former)
            self._former_placeholders |= {former}
        self.generation_config.suppress_tokens = sorted({*suppressed, current})
        self._suppressed_placeholder = current

    def adjust_generation_fn(self, *args: Any, **kwargs: Any) -> None:
        """transformers' own, which replaces the generation config by the saved one."""
        super().adjust_generation_fn(*args, **kwargs)
        self.suppress_placeholder()

    def _update_copy(self, generation_config: GenerationConfig) -> GenerationConfig:
        """Return the generation config of a call with the placeholder of today.

        Pipelines pass a copy of the model's, made when they were built. A list that is the
        caller's own is kept.
        """
        suppressed = generation_config.suppress_tokens
        if not suppressed:
            return generation_config  # None takes the model's list, an empty one is the caller's
        current = self.config.image_token_id
        placeholders = {*self._former_placeholders, current}
        models_own = set(self.generation_config.suppress_tokens or ())
        if set(suppressed) - placeholders == models_own - placeholders:
            updated = models_own
        elif self._former_placeholders.isdisjoint(suppressed):
            return generation_config
        else:
            updated = {*suppressed, current}
        generation_config = copy.deepcopy(generation_config)
        generation_config.suppress_tokens = sorted(updated)
        return generation_config

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' ``generate``, whose further arguments are those of :meth:`forward`.

        It never answers with the image placeholder that the config names, unless the call says
        ``suppress_tokens`` itself.
        With ``num_image_tokens="auto"`` each image's count is chosen (:meth:`choose_counts`), as
        ``penalty`` or ``budget`` say. The answer begins with the prompts as they were given, and an
        output object also holds ``num_image_tokens``, the count of each tile.

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
            return self._generate_with_choice(*args, **kwargs)
        self.suppress_placeholder()
        if kwargs.get("generation_config") is not None:
            kwargs["generation_config"] = self._update_copy(kwargs["generation_config"])
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

    # transformers reads from the signature which arguments generate takes.
    @functools.wraps(GenerationMixin.prepare_inputs_for_generation, assigned=())
    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        *args: Any,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """transformers' own, with images in a draft's first pass too, which has no cache yet."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids, *args, inputs_embeds=inputs_embeds, **kwargs
        )
        if kwargs.get("mm_encoder_outputs"):
            cache = kwargs.get(_cache_name(kwargs))
            if cache is None or not cache.get_seq_length():
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
        cache_name = _cache_name(model_kwargs)
        cache = model_kwargs.get(cache_name)
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
        attention_mask = model_kwargs["attention_mask"]
        if inputs_embeds is not None:  # always the whole prompt
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
        positions = model_kwargs["position_ids"].expand(batch, -1)
        if outputs.get("image") is not None:
            images = ImageTokens.from_outputs(outputs["image"], merged.shape[2])
            merged, rows = merge_images(merged, is_placeholder, images, name)
            if self.config.image_positions == "shared":
                shared = shared_image_positions(
                    positions[:, -new:].flatten(), rows, images.image_of_each(rows.device)
                )
                positions = torch.cat([positions[:, :-new], shared.view(batch, new)], 1)
                if attention_mask is None:  # or equal positions would be taken for new samples
                    attention_mask = positions.new_ones(batch, seen + new)

        compiles = self._valid_auto_compile_criteria(model_kwargs, generation_config)
        forward = self.__call__
        if compiles:
            forward = self.get_compiled_call(generation_config.compile_config)
        ids = is_placeholder.new_zeros(batch, new, dtype=torch.int64)  # their shape is what counts
        others = {"attention_mask", "position_ids", "inputs_embeds", "mm_encoder_outputs"}
        chunk_kwargs = {key: value for key, value in model_kwargs.items() if key not in others}
        size = generation_config.prefill_chunk_size
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
            inputs |= {"input_ids": None, "inputs_embeds": merged[:, start:end]}
            result = forward(**inputs, return_dict=True)
            chunk_kwargs[cache_name] = model_kwargs[cache_name] = getattr(result, cache_name)
        return result


def _cache_name(model_kwargs: dict[str, Any]) -> str:
    """Return the argument that holds the key-value cache: "cache" since transformers 5.24."""
    return "cache" if model_kwargs.get("cache") is not None else "past_key_values"


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
