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

Videos go the same way, through ``get_video_features`` and ``num_video_tokens``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.generation import utils as generation_utils
from transformers.utils.generic import can_return_tuple

import tokenflex.routing.choice  # noqa: F401  # sets the hook that chooses counts
from tokenflex.counts import Grid, ImageTokenCounts, TokenCount
from tokenflex.dropin.families import family_of
from tokenflex.dropin.features import (
    CheckedOutputs,
    ImageOutputs,
    Patches,
    default_count,
    encode_patches,
    fitted_counts,
    image_features,
    image_input_names,
    project_shown,
    tokens_per_image,
    with_tokens,
)
from tokenflex.dropin.inputs import is_token_type
from tokenflex.dropin.language import merged_embeddings
from tokenflex.dropin.mrope import RopePositions, set_rope_positions
from tokenflex.dropin.packing import check_packing
from tokenflex.dropin.saved import mark_config
from tokenflex.dropin.variants import Variant, change_class, restore_class
from tokenflex.dropin.video_features import (
    VideoTokenCounts,
    video_features,
    video_input_names,
)
from tokenflex.models.auto_counts import ChoosesCounts, asks_for_choice
from tokenflex.models.cards import SavedWithCard
from tokenflex.models.generation import cache_of, repeated_images
from tokenflex.models.modeling import TokenFlexForConditionalGeneration
from tokenflex.models.placeholders import check_device, placeholder_rows
from tokenflex.models.prefill import new_prompt_ids
from tokenflex.projector import TokenAdaptiveProjector

_STOCK_PROJECTOR = "_tokenflex_stock_projector"  # holds a tuple, so that it is no submodule
_PREFIX_TYPES = ("paligemma",)
"""Families whose token types tell a prompt (0) from what is learned (1), not images from text."""


# ---- the base model


class ConvertedBase(Variant):
    """Changes of every base model's class."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        stock = cls._tokenflex_stock_class
        cls.get_image_features = _with_image_counts(stock)
        if hasattr(stock, "get_video_features"):
            cls.get_video_features = _with_video_counts(stock)


def _with_image_counts(stock: Any) -> Any:
    """Return the method of a converted base model in place of its ``get_image_features``."""
    names = image_input_names(stock)

    @can_return_tuple
    def get_image_features(
        self: Any, *args: Any, num_image_tokens: ImageTokenCounts | None = None, **kwargs: Any
    ) -> ImageOutputs:
        """Return the vision tokens of each image, at ``num_image_tokens``."""
        return image_features(self, _inputs(names, args, kwargs), num_image_tokens, kwargs)

    return _with_signature(get_image_features, stock.get_image_features, "num_image_tokens")


def _with_video_counts(stock: Any) -> Any:
    """Return the method of a converted base model in place of its ``get_video_features``."""
    names = video_input_names(stock)

    @can_return_tuple
    def get_video_features(
        self: Any, *args: Any, num_video_tokens: VideoTokenCounts | None = None, **kwargs: Any
    ) -> ImageOutputs:
        """Return the vision tokens of each frame, at ``num_video_tokens``."""
        if self._tokenflex_family.videos is None:
            raise self._tokenflex_family.videos_refused()
        return video_features(self, _inputs(names, args, kwargs), num_video_tokens, kwargs)

    return _with_signature(get_video_features, stock.get_video_features, "num_video_tokens")


def _inputs(names: list[str], args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    given = dict(zip(names, args, strict=False))
    return given | {name: value for name, value in kwargs.items() if name in names}


def _with_signature(method: Any, stock: Callable[..., Any], counts: str) -> Any:
    """Return ``method`` with the signature of the stock one and the argument ``counts``.

    generate passes on only the arguments that a signature names.
    """
    signature = inspect.signature(stock)
    parameters = [
        *(p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD),
        inspect.Parameter(counts, inspect.Parameter.KEYWORD_ONLY, default=None),
        inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD),
    ]
    method.__signature__ = signature.replace(parameters=parameters)
    return method


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
    """Encode the images and videos of a base model's forward, and check its arguments."""
    counts = kwargs.pop("num_image_tokens", None)
    video_counts = kwargs.pop("num_video_tokens", None)
    encoded_images = kwargs.pop("encoded_images", None)
    image_index = kwargs.pop("image_index", None)
    if args:
        positional = list(inspect.signature(type(base).forward).parameters)[1:]
        kwargs = {**dict(zip(positional, args, strict=False)), **kwargs}
    check_packing(base, kwargs)
    encoded = dict(kwargs.get("mm_encoder_outputs") or {})
    images = encoded.get("image")
    names = image_input_names(type(base)._tokenflex_stock_class)
    if image_index is not None and encoded_images is None and kwargs.get("pixel_values") is None:
        raise ValueError("image_index tells where images are shown: give the images with it")
    if encoded_images is not None:
        if images is not None or kwargs.get("pixel_values") is not None:
            raise ValueError(
                "give the images as one of pixel_values, encoded_images and mm_encoder_outputs"
            )
        images, counts = project_shown(base, encoded_images, counts, image_index)
        _add_what_tells_images(base, kwargs.get("input_ids"), images, kwargs)
    elif images is None and kwargs.get("pixel_values") is not None:
        image_inputs = {name: kwargs[name] for name in names if name in kwargs}
        if image_index is not None:
            patches = encode_patches(base, image_inputs)
            images, counts = project_shown(base, patches, counts, image_index)
            kwargs.pop("image_grid_thw", None)  # of each image once
            _add_what_tells_images(base, kwargs.get("input_ids"), images, kwargs)
        else:
            images = base.get_image_features(
                **image_inputs, num_image_tokens=counts, return_dict=True
            )
        kwargs["pixel_values"] = None
    videos = _encoded_videos(base, kwargs, encoded.get("video"), video_counts)
    if images is None and videos is None:
        return (), kwargs
    for kind, outputs in (("image", images), ("video", videos)):
        if outputs is not None:
            encoded[kind] = _ready_to_scatter(base, kwargs.get("input_ids"), kind, outputs)
    set_rope_positions(base, kwargs, {"num_image_tokens": counts, "num_video_tokens": video_counts})
    kwargs["mm_encoder_outputs"] = encoded
    return (), kwargs


def _encoded_videos(base: Any, kwargs: dict[str, Any], videos: Any, counts: Any) -> Any:
    """Return the outputs for the videos of a forward, whose pixels are taken out of ``kwargs``."""
    if videos is not None or kwargs.get("pixel_values_videos") is None:
        return videos
    family, stock = type(base)._tokenflex_family, type(base)._tokenflex_stock_class
    if family.videos is None:
        raise family.videos_refused()
    inputs = {name: kwargs[name] for name in video_input_names(stock) if name in kwargs}
    kwargs["pixel_values_videos"] = None
    return base.get_video_features(**inputs, num_video_tokens=counts, return_dict=True)


def _ready_to_scatter(base: Any, input_ids: Any, kind: str, outputs: Any) -> Any:
    """Check the outputs for images or videos, and bring them into the form of the stock model."""
    tokens = tokens_per_image(outputs)
    if tokens is None:
        return outputs
    # The chunks that transformers cuts a prompt into take no account of images.
    if input_ids is not None and not isinstance(outputs, CheckedOutputs):
        _check_counts(base, kind, input_ids, tokens)
    family = type(base)._tokenflex_family
    merge = family.merge if kind == "image" else family.merge_frames
    # A new object: the caller or beam search may use the given one again.
    ready = with_tokens(outputs, merge(tokens))
    if kind == "image" and family.more_outputs is not None:
        for name, value in family.more_outputs(base).items():
            ready[name] = value
    return ready


def _add_what_tells_images(
    base: Any, input_ids: torch.Tensor | None, images: ImageOutputs, kwargs: dict[str, Any]
) -> None:
    """Add what a family's own processor gives with images, and its model reads beside features.

    That is which tokens are an image's, and for positions with three axes that there are images.
    """
    if input_ids is None:
        return
    for name, types in token_types(base, input_ids).items():
        if kwargs.get(name) is None:
            kwargs[name] = types
    taken = inspect.signature(type(base)._tokenflex_stock_class.forward).parameters
    if "image_grid_thw" in taken and kwargs.get("image_grid_thw") is None:
        # Only their number is read: RopePositions has the sizes from the counts.
        kwargs["image_grid_thw"] = input_ids.new_ones(len(images.pooler_output), 3)


def token_types(
    base: Any, input_ids: torch.Tensor, is_learned: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Return the token types that the forward of a converted base model reads, by name.

    Args:
        base: The base model; only its class and config are used.
        input_ids: int64 [B, L], placeholders repeated.
        is_learned: bool [B, L], True at the tokens of answers, for families that read both ways in
            prompts; None for prompts alone.

    Returns:
        int64 [B, L] each: 1 at an image's tokens, or at answers for those families.
    """
    taken = inspect.signature(type(base)._tokenflex_stock_class.forward).parameters
    is_image = (input_ids == base.config.image_token_id).to(torch.int64)
    types = is_image
    if type(base)._tokenflex_family.model_type in _PREFIX_TYPES:
        types = torch.zeros_like(is_image) if is_learned is None else is_learned.to(torch.int64)
    named = dict.fromkeys(filter(is_token_type, taken), types)
    if "moe_mm_token_type_ids" in taken:  # experts for images also read the tokens around them
        names = ("image_start_token_id", "image_end_token_id")
        around = input_ids.new_tensor([getattr(base.config, name) for name in names])
        named["moe_mm_token_type_ids"] = is_image | torch.isin(input_ids, around).long()
    return named


def _check_counts(
    model: Any, kind: str, input_ids: torch.Tensor, tokens: Sequence[torch.Tensor]
) -> None:
    """Refuse vision tokens that do not fit the placeholders, image by image."""
    is_placeholder = input_ids == _placeholder_id(model, kind)
    placeholder_rows(is_placeholder, [len(image) for image in tokens])


def _placeholder_id(model: Any, kind: str) -> int:
    """Return the id of the placeholder of a model, or base model, for "image" or "video"."""
    of_frames = kind == "video" and not model._tokenflex_family.frames_share_placeholder
    token_id: int = model.config.video_token_id if of_frames else model.config.image_token_id
    return token_id


# ---- the whole model


class ConvertedModel(ChoosesCounts, SavedWithCard, Variant):
    """Changes of a whole model's class, for ``generate`` and ``from_pretrained``."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # Before transformers 5.21 some models with images say that they read text alone. Their
        # generate then reads the images with each prompt, and does not repeat them for beams.
        if "image" not in cls.input_modalities:
            cls.input_modalities = ("image", "text")

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        install(self, new_projector(config), keep_stock=False)

    @property
    def projector(self: Any) -> TokenAdaptiveProjector:
        """The projector."""
        projector: TokenAdaptiveProjector = self.base_model.get_submodule(
            self._tokenflex_family.projector
        )
        return projector

    @property
    def fitted_num_image_tokens(self: Any) -> list[TokenCount]:
        """The counts that the projector is fitted at by default, rising."""
        return fitted_counts(default_count(self.config))

    def encode_images(
        self: Any,
        pixel_values: torch.Tensor,
        grids: Grid | Sequence[Grid] | None = None,
        **image_inputs: Any,
    ) -> Patches:
        """Run the vision encoder, once for any number of counts.

        See :meth:`tokenflex.TokenFlexForConditionalGeneration.encode_images`.

        Args:
            pixel_values: As the family's processor returns them.
            grids: For TokenFLEX models; None.
            **image_inputs: What else its ``process_images`` returns, by name.

        Raises:
            TypeError: The family takes no input of a name; the message lists those that it takes.
            ValueError: ``grids`` are given, or inputs do not fit together.
        """
        base, family = self.base_model, self._tokenflex_family
        names = image_input_names(type(base)._tokenflex_stock_class)
        if grids is not None:
            raise ValueError(
                f"grids are for TokenFLEX models: {family.model_type} takes {', '.join(names)}"
            )
        for name in image_inputs:
            if name not in names:
                raise TypeError(
                    f"{name} is no image input of {family.model_type}, which takes "
                    f"{', '.join(names)}"
                )
        if not len(pixel_values):
            width = self.config.tokenflex["vision_width"]
            return Patches(pixel_values.new_zeros(0, width), ())
        check_device("pixel_values", pixel_values, base)
        return encode_patches(base, {"pixel_values": pixel_values, **image_inputs})

    def choose_counts(self, input_ids: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        """Return inputs of ``generate`` with every image's count chosen.

        The arguments are those of :func:`tokenflex.routing.choice.choose_counts`, and the family's
        further image inputs.
        """
        return super().choose_counts(input_ids, **self.ready_for_choice(kwargs))

    def ready_for_choice(self: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return arguments with images encoded, without what depends on the length of prompts."""
        if kwargs.get("pixel_values_videos") is not None:
            raise ValueError(
                "num_image_tokens must be counts beside videos: 'auto' is for images alone; give a "
                "video's frames as images, or its counts or budget to the processor"
            )
        names = image_input_names(type(self.base_model)._tokenflex_stock_class)
        images = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
        # Labels, which PaliGemma's processor writes, are of no use to generate.
        others = {*names, "labels"}
        left = {k: v for k, v in kwargs.items() if k not in others and not is_token_type(k)}
        if "pixel_values" in images:
            if left.get("encoded_images") is not None:
                raise ValueError("give the images as one of pixel_values and encoded_images")
            with torch.no_grad():
                left["encoded_images"] = self.encode_images(**images)
        return left

    def prefix_types(self, is_learned: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return inputs that tell prompts from answers, for models that read both ways in prompts.

        Args:
            is_learned: bool [B, L], True at the tokens of answers.
        """
        if self._tokenflex_family.model_type in _PREFIX_TYPES:
            return {"token_type_ids": is_learned.to(torch.int64)}
        return {}

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Generate as the stock model does, with what a TokenFLEX model takes.

        That is ``num_image_tokens``, "auto" with ``budget`` or ``penalty`` among them,
        ``encoded_images`` in place of pixels, and ``image_index``; see
        :meth:`tokenflex.TokenFlexForConditionalGeneration.generate`.
        """
        if asks_for_choice(kwargs):
            return self._generate_with_choice(*args, **self.ready_for_choice(kwargs))
        encoded = kwargs.pop("encoded_images", None)
        image_index = kwargs.pop("image_index", None)
        if encoded is None and image_index is None:
            return super().generate(*args, **kwargs)
        names = image_input_names(type(self.base_model)._tokenflex_stock_class)
        given = {name: kwargs.pop(name) for name in names if kwargs.get(name) is not None}
        if "pixel_values" in given or kwargs.get("mm_encoder_outputs") is not None:
            if encoded is not None or "pixel_values" not in given:
                raise ValueError(
                    "give the images as one of pixel_values, encoded_images and mm_encoder_outputs"
                )
        elif encoded is None:
            raise ValueError("image_index tells where images are shown: give the images with it")
        ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        with torch.no_grad():
            if encoded is None:
                encoded = self.encode_images(**given)
            images, counts = project_shown(
                self.base_model, encoded, kwargs.pop("num_image_tokens", None), image_index
            )
        kwargs |= {"mm_encoder_outputs": {"image": images}, "num_image_tokens": counts}
        _add_what_tells_images(self.base_model, ids, images, kwargs)
        return super().generate(*args, **kwargs)

    def _supports_mm_encoder_outputs(self) -> bool:
        # The base model does, also where the signature of the whole one names no such argument, as
        # PaddleOCR's before transformers 5.21.
        return True

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        counts = ("num_image_tokens", "num_video_tokens")
        others = {k: v for k, v in model_kwargs.items() if k not in counts}
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
        kinds = [k for k, v in mm_encoder_output.items() if tokens_per_image(v) is not None]
        if not kinds or input_ids is None or not input_ids.numel():
            return super()._expand_multimodal_outputs(
                input_ids, mm_encoder_output, expand_size, inputs_embeds
            )
        others = {kind: mm_encoder_output[kind] for kind in mm_encoder_output if kind not in kinds}
        expanded = super()._expand_multimodal_outputs(input_ids, others, expand_size, inputs_embeds)
        for kind in kinds:
            is_placeholder = input_ids == _placeholder_id(self, kind)
            expanded[kind] = _repeated(mm_encoder_output[kind], is_placeholder, expand_size)
        return expanded

    def _prefill(
        self: Any,
        input_ids: torch.Tensor,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        is_first_iteration: bool = True,
    ) -> Any:
        """Check the counts of each image before the prompt is cut into chunks."""
        outputs, cache = model_kwargs.get("mm_encoder_outputs") or {}, cache_of(model_kwargs)
        per_kind = {
            kind: tokens
            for kind, encoded in outputs.items()
            if (tokens := tokens_per_image(encoded)) is not None
        }
        chunk_size = generation_config.prefill_chunk_size
        is_cut = is_first_iteration and chunk_size is not None and cache is not None
        if is_cut and per_kind and input_ids.numel():
            if not hasattr(generation_utils, "_slice_mm_encoder_output"):
                raise ValueError(
                    "prefill_chunk_size must be None for prompts with images before transformers "
                    f"5.23, which leaves the images out, got {chunk_size}"
                )
            if "video" in per_kind and self._tokenflex_family.frames_share_placeholder:
                raise ValueError(
                    "prefill_chunk_size must be None for videos of "
                    f"{self._tokenflex_family.model_type}, which transformers leaves out of the "
                    f"chunks, got {chunk_size}"
                )
            mask, seen = model_kwargs.get("attention_mask"), cache.get_seq_length()
            new_ids = new_prompt_ids(input_ids, mask, generation_config, seen)
            checked = {}
            for kind, tokens in per_kind.items():
                _check_counts(self, kind, new_ids, tokens)
                checked[kind] = with_tokens(outputs[kind], tokens, CheckedOutputs)
            model_kwargs["mm_encoder_outputs"] = {**outputs, **checked}
        return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)

    def _get_name(self) -> str:
        # Trainer's label smoothing shifts the labels only for classes that it knows by name.
        return TokenFlexForConditionalGeneration.__name__


def _repeated(outputs: Any, is_placeholder: torch.Tensor, times: int) -> ImageOutputs:
    """Return the outputs of a batch each of whose prompts becomes several sequences."""
    tokens = list(outputs.pooler_output)
    order = repeated_images(is_placeholder, [len(image) for image in tokens], times)
    repeated = with_tokens(outputs, [tokens[image] for image in order])
    if (layers := repeated.deepstack_features) is not None:
        repeated.deepstack_features = [[layer[image] for image in order] for layer in layers]
    return repeated


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
    mark_config(model.config)
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
    for changed in (base, model, model.config):
        restore_class(changed)
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
