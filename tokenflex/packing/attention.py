"""Preparation of a model for packed rows: which models can take them, and their attention.

transformers keeps the samples of a packed row apart by their positions, with a mask of T x T
entries, and by ``cu_seq_lens_*`` under flash attention. :func:`enable` adds three hooks:

* one before the base model refuses rows whose samples would see each other;
* one before the language model lets the attention of tokenflex.models, which attends sample by
  sample and needs no mask of T x T, take the place of "sdpa" for packed rows;
* one before the vision encoder takes away the boundaries of the text. Before transformers 5.23
  Qwen-like models pass them on to its attention.

They are hooks, not a ``forward``, because accelerate and TRL replace ``forward`` on instances.
"""

from __future__ import annotations

import inspect
from itertools import pairwise
from typing import Any

from torch import nn

from tokenflex.dropin.families import family_of, supported_families, vision_encoder
from tokenflex.dropin.packing import BOUNDARIES, ENABLED, check_packing, has_tested_text
from tokenflex.dropin.variants import is_converted, unwrapped
from tokenflex.models.attention import PACKED_ATTENTION
from tokenflex.models.attention_blocks import AttentionBlocks
from tokenflex.models.configuration import TokenFlexConfig
from tokenflex.packing.verification import verify

_OUR_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
"""Kinds of layers that need no more than which tokens belong to a sample."""

_MASKED_LAYERS = {"indexed_attention"}
"""Kinds that choose the keys of a query by themselves, under transformers' mask."""

_MASKED = ("sdpa", "eager", "flex_attention", PACKED_ATTENTION)
"""Implementations for which transformers makes the mask of a packed row from its positions."""


def enable(model: Any, batch: Any = None) -> None:
    """Prepare a model for packed rows, in place.

    Packed rows then give each sample what it would get alone, whatever the attention
    implementation; rows whose samples would see each other raise a ValueError. "sdpa" of the
    language model is replaced by an attention that knows samples by ``cu_seq_lens_q`` and does for
    other batches exactly what "sdpa" does. "eager", "flex_attention" and flash attention stay.

    Args:
        model: A vision-language model of transformers, stock or converted, with or without PEFT.
        batch: A padded batch of two samples or more with ``labels``, to compare packed and
            unpacked rows by :func:`tokenflex.packing.verify`. It is required for a ``model_type``
            that is none of :func:`tokenflex.dropin.supported_families`, for a language model that
            none of them has in the tests, and for layers that choose keys by an index.

    Raises:
        ValueError: The model cannot keep packed samples apart, with the reason; or packed and
            unpacked rows of ``batch`` differ. The model is unchanged then.
    """
    whole = unwrapped(model)
    reason = why_not(whole)
    if reason:
        raise ValueError(f"{whole.config.model_type} cannot be packed: {reason}")
    model_type = whole.config.model_type
    base = whole.base_model
    unknown = ""
    if not is_converted(whole) and model_type not in supported_families():
        unknown = "it is not among tokenflex's families"
    elif not has_tested_text(base):
        text_type = base.get_decoder().config.model_type
        unknown = f"its language model {text_type!r} is not among those tested"
    elif _kinds(base) & _MASKED_LAYERS:
        unknown = "its layers choose keys"
    if batch is None and unknown:
        raise ValueError(
            f"batch must be given for a model of type {model_type!r}: whether its samples can be "
            f"packed is known only by comparison, for {unknown}"
        )
    if hasattr(base, ENABLED):
        disable(model)
    _install(base)
    if batch is not None:
        try:
            verify(model, batch)
        except Exception:  # packed rows may also fail in a model's own code
            disable(model)
            raise


def disable(model: Any) -> None:
    """Undo :func:`enable`, in place; a model that is not prepared stays as it is."""
    base = unwrapped(model).base_model
    if not hasattr(base, ENABLED):
        return
    for module, hook in _hooks(base):
        for key, registered in list(module._forward_pre_hooks.items()):
            if registered is hook:
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
    decoder = base.get_decoder()
    if decoder.config._attn_implementation == PACKED_ATTENTION:
        decoder.set_attn_implementation(getattr(base, ENABLED))
    delattr(base, ENABLED)


def is_enabled(model: Any) -> bool:
    """Return whether :func:`enable` has prepared the model."""
    return hasattr(unwrapped(model).base_model, ENABLED)


def why_not(model: Any) -> str:
    """Return the reason why a model cannot keep packed samples apart; "" if none is known."""
    whole = unwrapped(model)
    config = whole.config
    if config.model_type in supported_families() and family_of(config).no_packing:
        return family_of(config).no_packing
    if config.model_type == TokenFlexConfig.model_type:
        return "it is tokenflex's own, which tokenflex.DataCollatorWithPacking packs"
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder, whose samples are rows of the encoder"
    decoder = whole.base_model.get_decoder()
    text = decoder.config
    crossing = sorted(_kinds(whole.base_model) - _OUR_LAYERS - _MASKED_LAYERS)
    if crossing:
        return f"its layers of type {', '.join(crossing)} run across the boundaries of samples"
    if any(getattr(type(part), "_is_stateful", False) for part in (whole, decoder)):
        return "its layers keep a state that runs across the boundaries of samples"
    if not getattr(text, "is_causal", True) or getattr(text, "use_bidirectional_attention", False):
        return "its attention is bidirectional"
    if getattr(text, "cross_attention_layers", None):
        return "it reads images by cross attention, whose mask is one of rows"
    attention = str(text._attn_implementation)
    if attention not in _MASKED and "flash" not in attention:
        return (
            f"transformers makes no mask for its attention implementation {attention!r}: set "
            "'sdpa', 'eager', 'flex_attention' or one of flash attention"
        )
    return ""


def _kinds(base: Any) -> set[str]:
    """Return the kinds of layers of a base model's language model; none where all are alike."""
    return {*(getattr(base.get_decoder().config, "layer_types", None) or ())}


def _install(base: Any) -> None:
    decoder = base.get_decoder()
    before = decoder.config._attn_implementation
    # Ours has no dropout. Samples longer than a window need transformers' mask, so that a
    # comparison must see it, however short its samples are.
    takes_ours = (
        _kinds(base) <= _OUR_LAYERS
        and not getattr(decoder.config, "attention_dropout", 0)
        and (has_tested_text(base) or _window(decoder.config) == float("inf"))
    )
    if before == "sdpa" and takes_ours:
        decoder.set_attn_implementation(PACKED_ATTENTION)
    setattr(base, ENABLED, before)
    for module, hook in _hooks(base):
        module.register_forward_pre_hook(hook, with_kwargs=True)


def _hooks(base: Any) -> list[tuple[nn.Module, Any]]:
    hooks = [(base, _before_base), (base.get_decoder(), _before_language_model)]
    encoder = vision_encoder(base)
    return hooks if encoder is None else [*hooks, (encoder, _before_vision)]


def _before_base(base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    names = list(inspect.signature(type(base).forward).parameters)[1:]
    check_packing(None, {**dict(zip(names, args, strict=False)), **kwargs})


def _before_vision(
    _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {name: value for name, value in kwargs.items() if name not in BOUNDARIES}


def _before_language_model(
    decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    boundaries = kwargs.get("cu_seq_lens_q")
    if boundaries is None or decoder.config._attn_implementation != PACKED_ATTENTION:
        return None
    starts = boundaries.tolist()
    positions = kwargs["position_ids"]
    if starts[0] != 0 or starts[-1] != positions.shape[-1]:
        raise ValueError(
            f"cu_seq_lens_q must go from 0 to the row's {positions.shape[-1]} tokens, got "
            f"{starts[0]} to {starts[-1]}"
        )
    lengths = tuple(stop - start for start, stop in pairwise(starts))
    if max(lengths) > _window(decoder.config):
        # transformers' mask knows windows; without boundaries, our attention takes it.
        return args, {name: value for name, value in kwargs.items() if name not in BOUNDARIES}
    # transformers leaves a mask of four dimensions alone; ours reads the boundaries.
    blocks = {"blocks": AttentionBlocks(lengths), "attention_mask": positions.new_empty(1, 1, 0, 0)}
    return args, kwargs | blocks


def _window(config: Any) -> float:
    """Return the rows that a layer sees at most."""
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if "chunked_attention" in (kinds or ()):
        window = config.attention_chunk_size
    elif kinds is not None and "sliding_attention" not in kinds:
        window = None
    return float("inf") if window is None else float(window)
