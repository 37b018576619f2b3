"""The seam on the model's side: what a converted model does differently from the stock one.

Since transformers 5.18 a vision-language model meets images in one place: its base model's
``get_image_features``, whose ``pooler_output`` the base model's forward scatters into the
placeholders, and which ``generate`` calls once before the prompt. So three things are enough:

* the base model's class is replaced by a subclass whose ``get_image_features`` takes patch grids
  through the token-adaptive projector (and, for Qwen, whose ``get_rope_index`` counts the tokens
  that are there);
* a hook before the base model's forward encodes images with ``num_image_tokens``, and checks that
  placeholders and vision tokens line up row by row. It is a hook, not a ``forward``, because
  accelerate and TRL replace ``forward`` on instances;
* the whole model's class is replaced by a subclass that lets ``num_image_tokens`` through
  ``generate``'s check of its arguments, checks a prompt that is read in chunks before it is cut,
  and builds the projector when a conversion is loaded.

The subclasses have the names and modules of the classes they stand for: transformers converts the
keys of a checkpoint for its own classes only, which it tells by those.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers.generation import utils as generation_utils
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple

from tokenflex.counts import Grid, ImageTokenCounts, TokenCount, token_grid, token_grids
from tokenflex.dropin.families import Deepstack, Family, PatchGrids, family_of
from tokenflex.dropin.variants import variant_of
from tokenflex.models.generation import cache_of, repeated_images
from tokenflex.models.modeling import TokenFlexForConditionalGeneration
from tokenflex.models.placeholders import placeholder_rows
from tokenflex.projector import TokenAdaptiveProjector
from tokenflex_kernels import pool_norm

_STOCK_PROJECTOR = "_tokenflex_stock_projector"  # a tuple, so that it is no submodule


@dataclass
class ImageOutputs(BaseModelOutputWithPooling):
    """The outputs of ``get_image_features`` of a converted model.

    Attributes:
        pooler_output: the vision tokens, a list with [N, D] for each input of the vision encoder.
        last_hidden_state: of the vision encoder, as from the stock model.
        hidden_states: likewise, where the stock model returns them.
        attentions: likewise.
        deepstack_features: the maps for the first layers of the language model, if there are any.
    """

    deepstack_features: Any = None


@dataclass
class _CheckedOutputs(ImageOutputs):
    """Images whose counts fit the whole prompt; a chunk of it may hold any part of them."""


def unwrapped(model: Any) -> Any:
    """The transformers model inside a PEFT or data-parallel wrapper, or the model itself."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_converted(model: Any) -> bool:
    """Whether a model, or base model, has a token-adaptive projector in place of its own."""
    return hasattr(type(getattr(model, "base_model", model)), "_tokenflex_family")


def default_count(config: Any) -> TokenCount:
    """The count a converted model uses when a call names none."""
    count = config.tokenflex["num_image_tokens"]
    return tuple(count) if isinstance(count, list) else count  # JSON has no tuples


def new_projector(config: Any) -> TokenAdaptiveProjector:
    """The projector that ``config.tokenflex`` describes, with PyTorch's initial weights."""
    options = config.tokenflex
    return TokenAdaptiveProjector(
        options["vision_width"],
        options["text_width"],
        hidden_width=options["hidden_width"],
        num_tokens=default_count(config),
        pooling=options["pooling"],
    )


def install(model: Any, projector: nn.Module, *, keep_stock: bool) -> None:
    """Put ``projector`` into a stock model and change its classes.

    Args:
        model: a stock model whose config has ``tokenflex``.
        projector: takes the stock projector's place.
        keep_stock: keep that one out of sight, for :func:`uninstall` and fitting.
    """
    base, family = model.base_model, family_of(model.config)
    stock = base.get_submodule(family.stock_projector)
    if family.stand_in is not None:
        base.set_submodule(family.stock_projector, family.stand_in(base))
    base.set_submodule(family.projector, projector)
    base_class: Any = type(base)
    base.__class__ = _base_variant(base_class, family)
    base.register_forward_pre_hook(_before_forward, with_kwargs=True)
    model_class: Any = type(model)
    if not hasattr(model_class, "_tokenflex_family"):  # a loaded conversion has it from the start
        model.__class__ = model_variant(model_class, family)
    if keep_stock:
        setattr(model, _STOCK_PROJECTOR, (stock,))


def stock_projector_of(model: Any) -> nn.Module | None:
    """The stock projector that a conversion in place put aside; None for one that was loaded."""
    kept = getattr(model, _STOCK_PROJECTOR, None)
    return kept[0] if kept else None


def uninstall(model: Any) -> None:
    """Undo :func:`install`; the stock projector must have been kept."""
    base, family = model.base_model, type(model.base_model)._tokenflex_family
    stock = stock_projector_of(model)
    assert stock is not None
    if family.projector != family.stock_projector:
        delattr(base, family.projector)
    base.set_submodule(family.stock_projector, stock)
    for key, hook in list(base._forward_pre_hooks.items()):
        if hook is _before_forward:
            del base._forward_pre_hooks[key]
            base._forward_pre_hooks_with_kwargs.pop(key, None)
    base.__class__ = type(base)._tokenflex_stock_class
    model.__class__ = type(model)._tokenflex_stock_class
    delattr(model, _STOCK_PROJECTOR)


@contextmanager
def as_stock(model: Any) -> Iterator[Any]:
    """The base model as it was before :func:`install`, for the time of a ``with`` block."""
    base = model.base_model
    variant, family = type(base), type(base)._tokenflex_family
    stock = stock_projector_of(model)
    assert stock is not None
    in_place = base.get_submodule(family.stock_projector)
    base.__class__ = variant._tokenflex_stock_class
    base.set_submodule(family.stock_projector, stock)
    try:
        yield base
    finally:
        base.set_submodule(family.stock_projector, in_place)
        base.__class__ = variant


# ---- patch grids to vision tokens


def flat_grids(patches: PatchGrids | Deepstack, merge: int = 1) -> tuple[torch.Tensor, list[Grid]]:
    """Patch grids as flat rows, and the size of each grid.

    Args:
        patches: [images, H, W, C], or one [H, W, C] per image.
        merge: m; m x m patches become one of m * m * C, side by side.

    Returns:
        [sum of H*W / m**2, m * m * C], and (H / m, W / m) per image.

    Raises:
        ValueError: m does not divide a grid.
    """
    if isinstance(patches, Deepstack):
        patches = patches.grids
    if merge > 1:
        if isinstance(patches, torch.Tensor):
            patches = _merged(patches, merge)
        else:
            patches = [_merged(grid, merge) for grid in patches]
    if isinstance(patches, torch.Tensor):
        images, height, width, channels = patches.shape
        return patches.reshape(-1, channels), [(height, width)] * images
    rows = torch.cat([grid.flatten(0, 1) for grid in patches])
    return rows, [(grid.shape[0], grid.shape[1]) for grid in patches]


def _merged(grid: torch.Tensor, merge: int) -> torch.Tensor:
    """[.., H, W, C] -> [.., H / m, W / m, m * m * C]."""
    height, width = grid.shape[-3:-1]
    if height % merge or width % merge:
        raise ValueError(
            f"patch_merge={merge} must divide every patch grid, got one of {height} x {width}"
        )
    cells = grid.unflatten(-2, (-1, merge)).unflatten(-4, (-1, merge))
    return cells.transpose(-4, -3).flatten(-3)


def encode(
    base: Any, image_inputs: dict[str, Any], counts: ImageTokenCounts | None
) -> ImageOutputs:
    """Images to vision tokens: ``pooler_output`` is a list with [N, D] for each encoder input."""
    family = type(base)._tokenflex_family
    patches = family.patch_grids(base, **image_inputs)
    layers = patches.layers if isinstance(patches, Deepstack) else None
    rows, in_grids = flat_grids(patches, base.config.tokenflex["patch_merge"])
    counts = default_count(base.config) if counts is None else counts
    out_grids = token_grids(counts, len(in_grids), name="num_image_tokens")
    sizes = [height * width for height, width in out_grids]
    # Through __call__, and looked up now: PEFT and FSDP wrap the module.
    projector = base.get_submodule(family.projector)
    tokens = projector(rows, out_grids, grids=in_grids)
    pooled = None if layers is None else [_pooled(layer, out_grids, sizes) for layer in layers]
    return ImageOutputs(pooler_output=list(tokens.split(sizes)), deepstack_features=pooled)


_ENCODERS = ("vision_tower", "vision_model", "visual")  # a base model has one of them
_ENCODER_OPTIONS = ("output_hidden_states", "output_attentions")


@contextmanager
def _encoder_outputs(base: Any, options: dict[str, bool]) -> Iterator[Any]:
    """Keep what the vision encoder returns to this thread in a ``with`` block.

    Args:
        base: the base model.
        options: what else the encoder is called with.

    Yields:
        An object with the fields of the encoder's output, once it has been called.
    """
    encoder = next((getattr(base, name) for name in _ENCODERS if hasattr(base, name)), None)
    outputs = SimpleNamespace()
    if options and encoder is None:
        raise ValueError(
            f"{', '.join(options)} must be False for {type(base)._tokenflex_family.model_type}: "
            f"its vision encoder is none of {', '.join(_ENCODERS)}"
        )
    if encoder is None or torch.compiler.is_compiling():  # a compiled forward needs tokens alone
        yield outputs
        return
    thread = threading.get_ident()

    def add_options(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return (args, {**kwargs, **options}) if threading.get_ident() == thread else None

    def keep(_: Any, args: Any, output: Any) -> None:
        if threading.get_ident() == thread and hasattr(output, "items"):
            vars(outputs).update(output.items())

    hooks = [
        encoder.register_forward_pre_hook(add_options, with_kwargs=True),
        encoder.register_forward_hook(keep),
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _pooled(
    maps: list[torch.Tensor], out_grids: list[Grid], sizes: list[int]
) -> list[torch.Tensor]:
    rows, in_grids = flat_grids(maps)
    return list(pool_norm(rows, in_grids, out_grids).split(sizes))


# ---- before the base model's forward


def _before_forward(base: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Encode images at their counts, and refuse what does not line up."""
    family = type(base)._tokenflex_family
    counts = kwargs.pop("num_image_tokens", None)
    if args:
        positional = list(inspect.signature(type(base).forward).parameters)[1:]
        kwargs = {**dict(zip(positional, args, strict=False)), **kwargs}
    _check_packing(family, kwargs)
    given = dict(kwargs.get("mm_encoder_outputs") or {})
    images = given.get("image")
    if images is None and kwargs.get("pixel_values") is not None:
        names = inspect.signature(type(base).get_image_features).parameters
        image_inputs = {name: kwargs[name] for name in names if name in kwargs}
        images = base.get_image_features(**image_inputs, num_image_tokens=counts, return_dict=True)
        kwargs["pixel_values"] = None
    if images is None:
        return (), kwargs
    tokens = images.pooler_output
    if isinstance(tokens, (list, tuple)):
        # transformers cuts the tokens of a prompt by its placeholders, whatever their image.
        if kwargs.get("input_ids") is not None and not isinstance(images, _CheckedOutputs):
            _check_counts(base, kwargs["input_ids"], tokens)
        # A new object: what beam search or the caller holds stays as it is.
        images = ImageOutputs(
            pooler_output=family.merge(list(tokens)),
            deepstack_features=getattr(images, "deepstack_features", None),
        )
    _set_rope_positions(base, kwargs, counts)
    kwargs["mm_encoder_outputs"] = {**given, "image": images}
    return (), kwargs


def _check_counts(model: Any, input_ids: torch.Tensor, tokens: Sequence[torch.Tensor]) -> None:
    """Refuse vision tokens that do not fit the placeholders, image by image."""
    sizes = [len(image) for image in tokens]
    placeholder_rows(input_ids == model.config.image_token_id, sizes)


def _check_packing(family: Family, kwargs: dict[str, Any]) -> None:
    """A packed row must be one the family keeps apart, and must not create a cache."""
    starts_again = _positions_start_again(kwargs)
    if kwargs.get("cu_seq_lens_q") is None and not starts_again:
        return
    if family.no_packing:
        raise ValueError(f"{family.model_type} cannot be packed: {family.no_packing}")
    if kwargs.get("use_cache") is not False or kwargs.get("attention_mask") is not None:
        raise ValueError(
            "packed rows need use_cache=False and no attention_mask, or samples would see each "
            f"other; got use_cache={kwargs.get('use_cache')} and attention_mask "
            f"{'None' if kwargs.get('attention_mask') is None else 'given'}"
        )
    if starts_again and len(kwargs["position_ids"]) == 3 and kwargs["position_ids"].ndim == 3:
        raise ValueError(
            "packed rows need position_ids [4, 1, total], text positions first, or samples would "
            f"see each other; got shape {tuple(kwargs['position_ids'].shape)}"
        )


def _positions_start_again(kwargs: dict[str, Any]) -> bool:
    """Whether a row holds several samples: positions that do not go up between two tokens."""
    positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
    past = cache_of(kwargs)
    if positions is None or (past is not None and past.get_seq_length()):
        return False
    if mask is not None and not (
        isinstance(mask, torch.Tensor) and mask.shape[1:] == positions.shape[-1:]
    ):
        return False  # one [.., L, L], or one per kind of layer, says itself what sees what
    # M-RoPE: row 0 of four is of text positions; of three, of frames, the same within an image.
    frames = positions.ndim == 3 and len(positions) == 3
    steps = (positions[0] if positions.ndim == 3 else positions).diff(dim=-1)
    starts = steps < (0 if frames else 1)
    if mask is not None:  # padding is no sample
        seen = mask.bool()
        starts = starts & seen[:, 1:] & seen[:, :-1]
    return bool(starts.any())


def _set_rope_positions(base: Any, kwargs: dict[str, Any], counts: Any) -> None:
    """M-RoPE positions, which the forward would derive from the patches that are not there."""
    past = cache_of(kwargs)
    if (
        not hasattr(base, "get_rope_index")
        or kwargs.get("position_ids") is not None
        or kwargs.get("input_ids") is None
        or kwargs.get("mm_token_type_ids") is None
        or (past is not None and past.get_seq_length())
    ):
        return
    names = inspect.signature(type(base).get_rope_index).parameters
    inputs = {name: kwargs[name] for name in names if name in kwargs}
    kwargs["position_ids"], base.rope_deltas = base.get_rope_index(
        **inputs, num_image_tokens=counts
    )


# ---- the classes


@functools.cache
def _base_variant(stock: Any, family: Family) -> Any:
    """A subclass of a base model's class that projects patch grids to any number of tokens."""
    signature = inspect.signature(stock.get_image_features)
    names = [name for name in signature.parameters if name not in ("self", "kwargs")]

    @can_return_tuple
    def get_image_features(
        self: Any, *args: Any, num_image_tokens: ImageTokenCounts | None = None, **kwargs: Any
    ) -> ImageOutputs:
        """Vision tokens of each image, at ``num_image_tokens``: one count, or one per input.

        ``last_hidden_state`` is the vision encoder's, and so are the hidden states and attentions
        that ``output_hidden_states`` and ``output_attentions`` ask for, as in the stock model.
        """
        image_inputs = dict(zip(names, args, strict=False))
        image_inputs |= {name: value for name, value in kwargs.items() if name in names}
        asked = {name: True for name in _ENCODER_OPTIONS if kwargs.get(name)}
        with _encoder_outputs(self, asked) as encoder_outputs:
            outputs = encode(self, image_inputs, num_image_tokens)
        others = ("last_hidden_state", "hidden_states", "attentions")
        # A new object, as the order of a tuple is that of the arguments.
        return ImageOutputs(
            pooler_output=outputs.pooler_output,
            deepstack_features=outputs.deepstack_features,
            **{name: getattr(encoder_outputs, name, None) for name in others},
        )

    # generate passes on the arguments that it finds in the signature.
    get_image_features.__signature__ = _with_count(signature)
    methods: dict[str, Any] = {"get_image_features": get_image_features}
    if hasattr(stock, "inputs_merger"):
        methods["inputs_merger"] = _scatter_tokens
    if hasattr(stock, "get_rope_index"):
        methods["get_rope_index"] = _rope_index(stock.get_rope_index)
    if hasattr(stock, "get_video_features"):
        methods["get_video_features"] = _no_videos(stock.get_video_features)
    return variant_of(stock, family, _base_variant, methods)


@functools.cache
def model_variant(stock: Any, family: Family) -> Any:
    """A subclass of a whole model's class, for ``generate`` and ``from_pretrained``."""

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        stock.__init__(self, config, *args, **kwargs)
        install(self, new_projector(config), keep_stock=False)

    def _validate_model_kwargs(self: Any, model_kwargs: dict[str, Any]) -> None:
        others = {k: v for k, v in model_kwargs.items() if k != "num_image_tokens"}
        stock._validate_model_kwargs(self, others)

    def _expand_multimodal_outputs(
        self: Any,
        input_ids: torch.Tensor | None,
        mm_encoder_output: dict[str, Any],
        expand_size: int = 1,
        inputs_embeds: torch.Tensor | None = None,
    ) -> dict[str, Any]:
        images = mm_encoder_output.get("image")
        tokens = None if images is None else images.pooler_output
        if not isinstance(tokens, (list, tuple)) or input_ids is None or not input_ids.numel():
            return stock._expand_multimodal_outputs(
                self, input_ids, mm_encoder_output, expand_size, inputs_embeds
            )
        sizes = [len(image) for image in tokens]
        order = repeated_images(input_ids == self.config.image_token_id, sizes, expand_size)
        layers = getattr(images, "deepstack_features", None)
        if layers is not None:
            layers = [[layer[image] for image in order] for layer in layers]
        repeated = ImageOutputs(
            pooler_output=[tokens[image] for image in order], deepstack_features=layers
        )
        return {**mm_encoder_output, "image": repeated}

    def _prefill(
        self: Any,
        input_ids: torch.Tensor,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        is_first_iteration: bool = True,
    ) -> Any:
        """Check the counts of each image before the prompt is cut into chunks."""
        outputs = model_kwargs.get("mm_encoder_outputs") or {}
        images, cache = outputs.get("image"), cache_of(model_kwargs)
        tokens = None if images is None else images.pooler_output
        if (
            is_first_iteration
            and generation_config.prefill_chunk_size is not None
            and isinstance(tokens, (list, tuple))
            and input_ids.numel()
            and cache is not None
        ):
            if not hasattr(generation_utils, "_slice_mm_encoder_output"):
                raise ValueError(
                    "prefill_chunk_size must be None for prompts with images before transformers "
                    f"5.23, which leaves the images out, got {generation_config.prefill_chunk_size}"
                )
            mask = model_kwargs.get("attention_mask")
            length = getattr(generation_config, "_mask_length", -1)
            length = length if mask is None else mask.shape[1]
            # transformers tells a whole prompt from the new part of one by the mask.
            seen = cache.get_seq_length() if length == input_ids.shape[1] else 0
            _check_counts(self, input_ids[:, seen:], tokens)
            checked = _CheckedOutputs(
                pooler_output=list(tokens),
                deepstack_features=getattr(images, "deepstack_features", None),
            )
            model_kwargs["mm_encoder_outputs"] = {**outputs, "image": checked}
        return stock._prefill(self, input_ids, generation_config, model_kwargs, is_first_iteration)

    def _get_name(self: Any) -> str:
        # Trainer shifts the labels, where it smooths them, of the classes that it knows by name.
        return TokenFlexForConditionalGeneration.__name__

    methods = {
        "__init__": __init__,
        "_validate_model_kwargs": _validate_model_kwargs,
        "_expand_multimodal_outputs": _expand_multimodal_outputs,
        "_prefill": _prefill,
        "_get_name": _get_name,
    }
    return variant_of(stock, family, model_variant, methods)


def _scatter_tokens(
    self: Any,
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor,
    image_hidden_states: torch.Tensor,
) -> torch.Tensor:
    """Put vision tokens in the placeholders' place.

    Idefics3 and SmolVLM do it themselves until transformers 5.20, and SmolVLM's way takes only
    counts that its patch size divides.
    """
    if input_ids is None:
        image_token_id = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        mask = (inputs_embeds == self.get_input_embeddings()(image_token_id)).all(-1)
    else:
        mask = input_ids == self.config.image_token_id
    return inputs_embeds.masked_scatter(mask.unsqueeze(-1), image_hidden_states.to(inputs_embeds))


def _with_count(signature: inspect.Signature) -> inspect.Signature:
    parameters = [
        parameter
        for parameter in signature.parameters.values()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    count = inspect.Parameter("num_image_tokens", inspect.Parameter.KEYWORD_ONLY, default=None)
    rest = inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)
    return signature.replace(parameters=[*parameters, count, rest])


def _no_videos(stock_method: Any) -> Any:
    @functools.wraps(stock_method)
    def get_video_features(self: Any, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            f"{self.config.model_type} with a token-adaptive projector takes images only so far; "
            "give the frames of a video as images"
        )

    return get_video_features


def _rope_index(stock_method: Any) -> Any:
    """M-RoPE positions of the tokens that are there: as of an image of that many cells."""

    @functools.wraps(stock_method)
    def get_rope_index(
        self: Any,
        input_ids: torch.Tensor,
        mm_token_type_ids: Any = None,
        image_grid_thw: torch.Tensor | None = None,
        num_image_tokens: Any = None,
        **kwargs: Any,
    ) -> Any:
        if image_grid_thw is not None and len(image_grid_thw):
            runs = _image_runs(mm_token_type_ids, kwargs.get("attention_mask"))
            grids = _grids_of_runs(runs, num_image_tokens, default_count(self.config))
            merge = self.config.vision_config.spatial_merge_size
            image_grid_thw = torch.tensor(
                [[1, height * merge, width * merge] for height, width in grids],
                dtype=image_grid_thw.dtype,
                device=image_grid_thw.device,
            )
        return stock_method(
            self,
            input_ids,
            mm_token_type_ids=mm_token_type_ids,
            image_grid_thw=image_grid_thw,
            **kwargs,
        )

    return get_rope_index


def _image_runs(mm_token_type_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> list[int]:
    """The lengths of the runs of image tokens, which are 1 among the token types."""
    runs = []
    for i, row in enumerate(mm_token_type_ids):
        seen = row if attention_mask is None else row[attention_mask[i].bool()]
        run = 0
        for token_type in [*seen.tolist(), 0]:
            if token_type == 1:
                run += 1
            elif run:
                runs.append(run)
                run = 0
    return runs


def _grids_of_runs(runs: list[int], counts: Any, default: TokenCount) -> list[Grid]:
    if counts is not None:
        grids = token_grids(counts, len(runs), name="num_image_tokens")
    else:
        height, width = token_grid(default)
        grids = [
            (height, width)
            if run == height * width
            else token_grid(run, name="a run of image placeholders without num_image_tokens")
            for run in runs
        ]
    for i, (run, (height, width)) in enumerate(zip(runs, grids, strict=True)):
        if run != height * width:
            raise ValueError(
                f"input_ids hold {run} placeholders for image {i}, but num_image_tokens gives it "
                f"{height} x {width} = {height * width} vision tokens"
            )
    return grids
