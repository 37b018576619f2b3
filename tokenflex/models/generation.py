"""``generate`` with images: encoded already, repeated with their prompts, and seen by drafts too.

transformers' ``generate`` projects the images once, before the prompt is read. Repeating prompts,
for beams and several returned sequences, must repeat the images of a prompt as a group: of a prompt
that shows A and B, two sequences show A, B, A, B. transformers does so since 5.19; 5.18 repeats
each image on its own, and 5.17 repeats tiles, but neither counts nor grids.
"""

from __future__ import annotations

import copy
import functools
import inspect
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.generation.utils import MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tokenflex.models.auto_counts import ChoosesCounts, asks_for_choice
from tokenflex.models.placeholders import embedded_placeholders, in_order
from tokenflex.models.prefill import ChunkedPrefill

_DRAFT = "draft_image"  # the draft's images among `mm_encoder_outputs`, which it is given too


def takes_cache(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Let a ``forward`` with ``past_key_values`` take it as ``cache``, its name since 5.24."""

    @functools.wraps(forward)
    def forward_with_cache(self: Any, *args: Any, cache: Any = None, **kwargs: Any) -> Any:
        if cache is not None:
            kwargs["past_key_values"] = cache
        return forward(self, *args, **kwargs)

    return forward_with_cache


def cache_name(language_model: Any) -> str:
    """Return the argument of a language model's forward that takes its cache.

    It is "cache" since transformers 5.24, which warns of the older "past_key_values".
    """
    parameters = inspect.signature(type(language_model).forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def cache_of(arguments: Mapping[str, Any]) -> Any:
    """Return the cache among the arguments of a forward, under either of its names."""
    cache = arguments.get("cache")
    return arguments.get("past_key_values") if cache is None else cache


def repeated_images(
    is_placeholder: torch.Tensor, token_counts: Sequence[int], times: int
) -> list[int]:
    """Return the order of a batch's images once each of its prompts is repeated.

    Args:
        is_placeholder: bool [B, L], True at the vision tokens of the prompts before repetition.
        token_counts: vision tokens of each image, in order of appearance.
        times: the number of sequences that each prompt becomes.

    Returns:
        Indices of images, ``times`` as many as there are images.
    """
    row_ends = list(accumulate(is_placeholder.sum(-1).tolist()))
    images_of: list[list[int]] = [[] for _ in row_ends]
    first = 0
    for image, count in enumerate(token_counts):
        # The model's forward refuses images that reach past the last placeholder.
        images_of[min(bisect_right(row_ends, first), len(row_ends) - 1)].append(image)
        first += count
    return [image for images in images_of for image in images * times]


def never_generate(generation_config: GenerationConfig, token_id: int) -> None:
    """Add ``token_id`` to what ``generation_config`` suppresses."""
    suppressed = generation_config.suppress_tokens or ()
    generation_config.suppress_tokens = sorted({*suppressed, token_id})


class TokenFlexGeneration(ChoosesCounts, ChunkedPrefill, GenerationMixin):
    """``generate`` of :class:`tokenflex.TokenFlexForConditionalGeneration`."""

    if TYPE_CHECKING:
        config: Any
        get_image_features: Any
        get_input_embeddings: Any

    _suppressed_placeholder: int | None = None  # the id that we added to the generation config
    _former_placeholders: frozenset[int] = frozenset()

    def suppress_placeholder(self) -> None:
        """Add the placeholder to what the generation config suppresses, in place of a former one.

        The model's config may name another placeholder at any time, and the generation config may
        be replaced by ``from_pretrained`` or by the caller. So this is called before answers and
        before files are written. Other suppressed tokens stay.
        """
        former, current = self._suppressed_placeholder, self.config.image_token_id
        if former is not None and former != current:
            suppressed = set(self.generation_config.suppress_tokens or ()) - {former}
            self.generation_config.suppress_tokens = sorted(suppressed)
            self._former_placeholders |= {former}
        never_generate(self.generation_config, current)
        self._suppressed_placeholder = current

    def adjust_generation_fn(self, *args: Any, **kwargs: Any) -> None:
        """Replace the generation config by the saved one, as transformers does."""
        super().adjust_generation_fn(*args, **kwargs)
        self.suppress_placeholder()

    def _with_placeholder(self, generation_config: GenerationConfig) -> GenerationConfig:
        """Return the generation config of a call with the current placeholder suppressed.

        A pipeline passes a copy of the model's, made when it was built. A list that the caller
        wrote is kept.
        """
        suppressed = generation_config.suppress_tokens
        if not suppressed:
            return generation_config  # None takes the model's list, an empty one is the caller's
        current = self.config.image_token_id
        placeholders = {*self._former_placeholders, current}
        models_list = set(self.generation_config.suppress_tokens or ())
        if set(suppressed) - placeholders == models_list - placeholders:
            updated = models_list
        elif self._former_placeholders.isdisjoint(suppressed):
            return generation_config
        else:
            updated = {*suppressed, current}
        generation_config = copy.deepcopy(generation_config)
        generation_config.suppress_tokens = sorted(updated)
        return generation_config

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as transformers does; further arguments are those of :meth:`forward`.

        It never answers with the image placeholder that the config names, unless the call gives
        ``suppress_tokens`` itself.
        With ``num_image_tokens="auto"`` each image's count is chosen (:meth:`choose_counts`), as
        ``penalty`` or ``budget`` say. The answer begins with the prompts as they were given, and an
        output object also holds ``num_image_tokens``, the count of each tile.

        Several prompts about one image need it once, with ``image_index``, which the processor
        returns for prompts in nested lists: ``processor(images=[a, b], text=[[q1, q2], [q3]])``.

        An ``assistant_model`` that is a TokenFLEX model sees the images as well, at the same
        counts: encoded by itself, or ``encoded_images``, which must then be of its own encoder.

        Example:
            >>> data, tiles = processor.process_images([picture])
            >>> images = model.encode_images(data["pixel_values"])
            >>> for count in (64, 144, 256):  # one pass of the encoder for three answers
            ...     inputs = processor.encode_text(question, tiles, num_image_tokens=count)
            ...     model.generate(**inputs, encoded_images=images)
        """
        if asks_for_choice(kwargs):
            return self._generate_with_choice(*args, **kwargs)
        self.suppress_placeholder()
        if kwargs.get("generation_config") is not None:
            kwargs["generation_config"] = self._with_placeholder(kwargs["generation_config"])
        draft = kwargs.get("assistant_model")
        if not isinstance(draft, TokenFlexGeneration):
            draft = None
        elif kwargs.get("inputs_embeds") is not None:
            raise ValueError(
                "an assistant_model has embeddings of its own: give input_ids, got inputs_embeds"
            )
        sources = [
            name
            for name in ("encoded_images", "pixel_values", "mm_encoder_outputs")
            if kwargs.get(name) is not None
        ]
        if len(sources) > 1 and ("encoded_images" in sources or draft is not None):
            raise ValueError(
                "give the images as one of pixel_values, encoded_images and mm_encoder_outputs, "
                f"got {' and '.join(sources)}"
            )
        if "encoded_images" in sources or (draft is not None and "pixel_values" in sources):
            kwargs["mm_encoder_outputs"] = self._project_images(draft, kwargs)
        elif "mm_encoder_outputs" in sources:
            if draft is not None:
                raise ValueError(
                    "an assistant_model projects images itself: give pixel_values or "
                    "encoded_images, got mm_encoder_outputs"
                )
            outputs = kwargs["mm_encoder_outputs"]
            if _DRAFT in outputs:  # this model is the draft of another
                outputs = {"image": outputs[_DRAFT]}
            kwargs["mm_encoder_outputs"] = {
                modality: _vision_tokens(output) for modality, output in outputs.items()
            }
            image_index = kwargs.pop("image_index", None)
            if image_index is not None:
                images = kwargs["mm_encoder_outputs"]["image"]
                images.pooler_output = in_order(images.pooler_output, image_index)
        elif not sources and kwargs.get("image_index") is not None:
            raise ValueError("image_index tells where images are shown: give the images with it")
        return super().generate(*args, **kwargs)

    @torch.no_grad()
    def _project_images(
        self, draft: TokenFlexGeneration | None, kwargs: dict[str, Any]
    ) -> dict[str, BaseModelOutputWithPooling | None]:
        """Take the images out of ``kwargs`` and project them, for the draft too if there is one."""
        names = ("pixel_values", "num_image_tokens", "grids", "encoded_images", "image_index")
        images = {name: kwargs.pop(name) for name in names if name in kwargs}
        outputs = {"image": _vision_tokens(self.get_image_features(**images, return_dict=True))}
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
        outputs[_DRAFT] = _vision_tokens(draft.get_image_features(**images, return_dict=True))
        return outputs

    def _get_candidate_generator(self, **kwargs: Any) -> Any:
        """Return what proposes tokens; a draft that is no TokenFLEX model is given no images."""
        draft = kwargs.get("assistant_model")
        if draft is not None and not isinstance(draft, TokenFlexGeneration):
            inputs = kwargs["model_kwargs"]
            # transformers 5.17 refuses them for a language model, later releases ignore them.
            kwargs["model_kwargs"] = {k: v for k, v in inputs.items() if k != "mm_encoder_outputs"}
        return super()._get_candidate_generator(**kwargs)

    def _maybe_initialize_input_ids_for_generation(
        self, inputs: Any, bos_token_id: Any, model_kwargs: dict[str, Any]
    ) -> torch.Tensor:
        """Return ids of no tokens for prompts of embeddings.

        transformers takes the size of the batch from the first tensor it finds.
        """
        embeds = model_kwargs.get("inputs_embeds")
        if embeds is not None:
            model_kwargs = {"inputs_embeds": embeds}
        ids: torch.Tensor = super()._maybe_initialize_input_ids_for_generation(
            inputs, bos_token_id, model_kwargs
        )
        return ids

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.Tensor | None, dict[str, Any]]:
        """Repeat prompts as transformers does, and the images of each as a group."""
        images = (model_kwargs.get("mm_encoder_outputs") or {}).get("image")
        if images is None and model_kwargs.get("pixel_values") is not None:
            # Only transformers 5.17 has not encoded them by now.
            names = ("pixel_values", "num_image_tokens", "grids", "image_index")
            images = self.get_image_features(
                **{name: model_kwargs.pop(name, None) for name in names}, return_dict=True
            )
            model_kwargs["mm_encoder_outputs"] = {"image": images}
        repeated = None
        if images is not None and input_ids is not None and expand_size > 1:
            tokens = list(images.pooler_output)
            is_placeholder = input_ids == self.config.image_token_id
            if not input_ids.numel():
                is_placeholder = embedded_placeholders(
                    model_kwargs["inputs_embeds"],
                    self.get_input_embeddings(),
                    self.config.image_token_id,
                    model_kwargs.get("attention_mask"),
                )
            order = repeated_images(is_placeholder, [len(image) for image in tokens], expand_size)
            repeated = BaseModelOutputWithPooling(pooler_output=[tokens[image] for image in order])
            del model_kwargs["mm_encoder_outputs"]
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        if repeated is not None:
            model_kwargs["mm_encoder_outputs"] = {"image": repeated}
        return input_ids, model_kwargs

    # transformers reads from the signature which arguments generate takes.
    @functools.wraps(GenerationMixin.prepare_inputs_for_generation, assigned=())
    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        *args: Any,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Prepare inputs as transformers does, with images where no prompt was read yet.

        That includes the first pass of a draft. transformers 5.17 keeps all but pixels after the
        prompt.
        """
        outputs = kwargs.get("mm_encoder_outputs")
        after_prompt = not kwargs.get("is_first_iteration") and kwargs.get("use_cache", True)
        if after_prompt and "mm_encoder_outputs" not in MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL:
            kwargs.pop("mm_encoder_outputs", None)
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids, *args, inputs_embeds=inputs_embeds, **kwargs
        )
        cache = cache_of(kwargs)
        if outputs and (cache is None or not cache.get_seq_length()):
            inputs["mm_encoder_outputs"] = outputs
        return inputs


def _vision_tokens(output: BaseModelOutputWithPooling | None) -> BaseModelOutputWithPooling | None:
    """Return the vision tokens alone, without a gradient, in a new object.

    Beam search repeats the images inside it, and a draft is given a deep copy.
    """
    if output is None:
        return None
    return BaseModelOutputWithPooling(
        pooler_output=[image.detach() for image in output.pooler_output]
    )
