"""The classes of a converted model, and their installation in a live stock model.

Since transformers 5.18 a vision-language model reads images in one place: ``get_image_features`` of
its base model. Its forward scatters the ``pooler_output`` into the placeholders, and ``generate``
calls it once before the prompt. A conversion changes three things:

* The base model's class becomes a subclass whose ``get_image_features`` projects patch grids with
  the token-adaptive projector.
* A hook before the base model's forward encodes images with ``num_image_tokens``, and checks that
  placeholders and vision tokens match row by row. It is a hook, not a ``forward``, because
  accelerate and TRL replace ``forward`` on instances.
* The whole model's class becomes a subclass that accepts ``num_image_tokens`` in ``generate`` and
  builds the projector when a conversion is loaded.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.generation import utils as generation_utils
from transformers.utils.generic import can_return_tuple

from tokenflex.counts import ImageTokenCounts
from tokenflex.dropin.families import family_of
from tokenflex.dropin.features import (
    CheckedOutputs,
    ImageOutputs,
    default_count,
    image_features,
    image_input_names,
    tokens_per_image,
    with_tokens,
)
from tokenflex.dropin.language import merged_embeddings
from tokenflex.dropin.mrope import RopePositions, set_rope_positions
from tokenflex.dropin.packing import check_packing
from tokenflex.dropin.variants import Variant, change_class, restore_class
from tokenflex.models.generation import cache_of, repeated_images
from tokenflex.models.modeling import TokenFlexForConditionalGeneration
from tokenflex.models.placeholders import placeholder_rows
from tokenflex.models.prefill import new_prompt_ids
from tokenflex.projector import TokenAdaptiveProjector

_STOCK_PROJECTOR = "_tokenflex_stock_projector"  # holds a tuple, so that it is no submodule


# ---- the base model


class ConvertedBase(Variant):
    """Changes of every base model's class."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        stock = cls._tokenflex_stock_class
        # generate passes on only the arguments that a signature names, so each class has its own.
        cls.get_image_features = _with_counts(stock)
        if hasattr(stock, "get_video_features"):
            cls.get_video_features = _without_videos(stock)


def _with_counts(stock: Any) -> Any:
    """Return the method of a converted base model in place of its ``get_image_features``."""
    names = image_input_names(stock)

    @can_return_tuple
    def get_image_features(
        self: Any, *args: Any, num_image_tokens: ImageTokenCounts | None = None, **kwargs: Any
    ) -> ImageOutputs:
        """Return the vision tokens of each image, at ``num_image_tokens``."""
        image_inputs = dict(zip(names, args, strict=False))
        image_inputs |= {name: value for name, value in kwargs.items() if name in names}
        return image_features(self, image_inputs, num_image_tokens, kwargs)

    signature = inspect.signature(stock.get_image_features)
    parameters = [
        *(p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD),
        inspect.Parameter("num_image_tokens", inspect.Parameter.KEYWORD_ONLY, default=None),
        inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD),
    ]
    get_image_features.__signature__ = signature.replace(parameters=parameters)
    return get_image_features


def _without_videos(stock: Any) -> Any:
    @functools.wraps(stock.get_video_features)
    def get_video_features(self: Any, *args: Any, **kwargs: Any) -> None:
        raise self._tokenflex_family.videos_refused()

    return get_video_features


class _ScatteredTokens(Variant):
    _tokenflex_method = "inputs_merger"

    def inputs_merger(
        self: Any,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor,
        image_hidden_states: torch.Tensor,
    ) -> torch.Tensor:
        """Put vision tokens in place of the placeholders.

        A method of Idefics3 and SmolVLM up to transformers 5.20, where SmolVLM's own takes only
        counts that its patch size divides.
        """
        if input_ids is None:
            image_token_id = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
            mask = (inputs_embeds == self.get_input_embeddings()(image_token_id)).all(-1)
        else:
            mask = input_ids == self.config.image_token_id
        tokens = image_hidden_states.to(inputs_embeds)
        return inputs_embeds.masked_scatter(mask.unsqueeze(-1), tokens)


def _before_forward(base: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Encode the images of a base model's forward, and check its arguments."""
    family = type(base)._tokenflex_family
    counts = kwargs.pop("num_image_tokens", None)
    if args:
        positional = list(inspect.signature(type(base).forward).parameters)[1:]
        kwargs = {**dict(zip(positional, args, strict=False)), **kwargs}
    check_packing(family, kwargs)
    encoded = dict(kwargs.get("mm_encoder_outputs") or {})
    images = encoded.get("image")
    if images is None and kwargs.get("pixel_values") is not None:
        names = image_input_names(type(base)._tokenflex_stock_class)
        image_inputs = {name: kwargs[name] for name in names if name in kwargs}
        images = base.get_image_features(**image_inputs, num_image_tokens=counts, return_dict=True)
        kwargs["pixel_values"] = None
    if images is None:
        return (), kwargs
    tokens = tokens_per_image(images)
    if tokens is not None:
        # The chunks that transformers cuts a prompt into take no account of images.
        if kwargs.get("input_ids") is not None and not isinstance(images, CheckedOutputs):
            _check_counts(base, kwargs["input_ids"], tokens)
        # A new object: the caller or beam search may use the given one again.
        images = with_tokens(images, family.merge(tokens))
        more = {} if family.more_outputs is None else family.more_outputs(base)
        for name, value in more.items():
            images[name] = value
    set_rope_positions(base, kwargs, counts)
    kwargs["mm_encoder_outputs"] = {**encoded, "image": images}
    return (), kwargs


def _check_counts(model: Any, input_ids: torch.Tensor, tokens: Sequence[torch.Tensor]) -> None:
    """Refuse vision tokens that do not fit the placeholders, image by image."""
    placeholder_rows(input_ids == model.config.image_token_id, [len(image) for image in tokens])


# ---- the whole model


class ConvertedModel(Variant):
    """Changes of a whole model's class, for ``generate`` and ``from_pretrained``."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        install(self, new_projector(config), keep_stock=False)

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        others = {k: v for k, v in model_kwargs.items() if k != "num_image_tokens"}
        super()._validate_model_kwargs(others)

    @torch.no_grad()
    def merged_embeddings(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        num_image_tokens: ImageTokenCounts | None = None,
        attention_mask: torch.Tensor | None = None,
        **inputs: Any,
    ) -> torch.Tensor | list[torch.Tensor]:
        """Return the embeddings of prompts with their vision tokens in place, without gradients.

        See :meth:`tokenflex.TokenFlexForConditionalGeneration.merged_embeddings`. Other inputs are
        those that the family's processor returns.

        Raises:
            ValueError: The language side is no plain language model; the message has the reason.
        """
        inputs["pixel_values"] = pixel_values
        return merged_embeddings(self, input_ids, num_image_tokens, attention_mask, inputs)

    def _expand_multimodal_outputs(
        self: Any,
        input_ids: torch.Tensor | None,
        mm_encoder_output: dict[str, Any],
        expand_size: int = 1,
        inputs_embeds: torch.Tensor | None = None,
    ) -> dict[str, Any]:
        images = mm_encoder_output.get("image")
        tokens = tokens_per_image(images)
        if tokens is None or input_ids is None or not input_ids.numel():
            return super()._expand_multimodal_outputs(
                input_ids, mm_encoder_output, expand_size, inputs_embeds
            )
        sizes = [len(image) for image in tokens]
        order = repeated_images(input_ids == self.config.image_token_id, sizes, expand_size)
        repeated = with_tokens(images, [tokens[image] for image in order])
        if (layers := repeated.deepstack_features) is not None:
            repeated.deepstack_features = [[layer[image] for image in order] for layer in layers]
        return {**mm_encoder_output, "image": repeated}

    def _prefill(
        self: Any,
        input_ids: torch.Tensor,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        is_first_iteration: bool = True,
    ) -> Any:
        """Check the counts of each image before the prompt is cut into chunks."""
        outputs, cache = model_kwargs.get("mm_encoder_outputs") or {}, cache_of(model_kwargs)
        tokens = tokens_per_image(outputs.get("image"))
        chunk_size = generation_config.prefill_chunk_size
        is_cut = is_first_iteration and chunk_size is not None and cache is not None
        if is_cut and tokens is not None and input_ids.numel():
            if not hasattr(generation_utils, "_slice_mm_encoder_output"):
                raise ValueError(
                    "prefill_chunk_size must be None for prompts with images before transformers "
                    f"5.23, which leaves the images out, got {chunk_size}"
                )
            mask, seen = model_kwargs.get("attention_mask"), cache.get_seq_length()
            new_ids = new_prompt_ids(input_ids, mask, generation_config, seen)
            _check_counts(self, new_ids, tokens)
            checked = with_tokens(outputs["image"], tokens, CheckedOutputs)
            model_kwargs["mm_encoder_outputs"] = {**outputs, "image": checked}
        return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)

    def _get_name(self) -> str:
        # Trainer's label smoothing shifts the labels only for classes that it knows by name.
        return TokenFlexForConditionalGeneration.__name__


# ---- installation


def new_projector(config: Any) -> TokenAdaptiveProjector:
    """Return the projector that ``config.tokenflex`` describes, with PyTorch's initial weights."""
    options = config.tokenflex
    return TokenAdaptiveProjector(
        options["vision_width"],
        options["text_width"],
        hidden_width=options["hidden_width"],
        num_tokens=default_count(config),
        pooling=options["pooling"],
    )


def install(model: Any, projector: nn.Module, *, keep_stock: bool) -> None:
    """Put ``projector`` into a stock model whose config has ``tokenflex``, and change its classes.

    ``keep_stock`` keeps the stock projector outside the module tree, to restore or imitate it.
    """
    base, family = model.base_model, family_of(model.config)
    stock = base.get_submodule(family.stock_projector)
    if family.stand_in is not None:
        base.set_submodule(family.stock_projector, family.stand_in(base))
    base.set_submodule(family.projector, projector)
    change_class(base, family, ConvertedBase, RopePositions, _ScatteredTokens)
    base.register_forward_pre_hook(_before_forward, with_kwargs=True)
    if not isinstance(model, Variant):  # a loaded conversion is one from the start
        change_class(model, family, ConvertedModel)
    if keep_stock:
        setattr(model, _STOCK_PROJECTOR, (stock,))


def stock_projector_of(model: Any) -> nn.Module | None:
    """Return the stock projector that :func:`install` kept; None for a loaded conversion."""
    kept = getattr(model, _STOCK_PROJECTOR, None)
    return kept[0] if kept else None


def uninstall(model: Any) -> None:
    """Undo :func:`install`, which must have kept the stock projector."""
    base, family = model.base_model, type(model.base_model)._tokenflex_family
    if family.projector != family.stock_projector:
        delattr(base, family.projector)
    base.set_submodule(family.stock_projector, stock_projector_of(model))
    for key, hook in list(base._forward_pre_hooks.items()):
        if hook is _before_forward:
            del base._forward_pre_hooks[key]
            base._forward_pre_hooks_with_kwargs.pop(key, None)
    restore_class(base)
    restore_class(model)
    delattr(model, _STOCK_PROJECTOR)


@contextmanager
def as_stock(model: Any) -> Iterator[Any]:
    """Yield the stock base model within a ``with`` block, and convert it again afterwards."""
    base = model.base_model
    projector = base.get_submodule(type(base)._tokenflex_family.projector)
    uninstall(model)
    try:
        yield base
    finally:
        install(model, projector, keep_stock=True)
