"""Names of a processor's options, so that a misspelt one is refused: transformers drops it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from transformers.processing_utils import AudioKwargs, ImagesKwargs, TextKwargs, VideosKwargs

from tokenflex.models.call_options import check_known

_GROUPS = {
    "text_kwargs": ("tokenizer", TextKwargs),
    "images_kwargs": ("image_processor", ImagesKwargs),
    "videos_kwargs": ("video_processor", VideosKwargs),
    "audio_kwargs": ("feature_extractor", AudioKwargs),
}
_OF_ALL = ("common_kwargs", "return_metadata", "sanitize_control_tokens", "num_image_tokens")
_OF_TEXT = ("split_special_tokens", "return_mm_token_type_ids", "return_text_replacement_offsets")
_INPUTS = ("images", "text", "videos", "audio", "audios")


def check_option_names(
    processor: Any, options: Mapping[str, Any], more: Iterable[str] = ()
) -> None:
    """Refuse options that neither the stock processor nor one of its parts takes.

    Args:
        processor: of transformers.
        options: arguments of a call.
        more: further names that are known.

    Raises:
        TypeError: a name is unknown; the message holds the nearest known one.
    """
    if not options:
        return
    groups = {name: _known_in(processor, name) for name in _GROUPS}
    of_groups = set().union(*groups.values())
    own = set(processor.valid_processor_kwargs.__annotations__)
    for name, value in options.items():
        check_known(name, {*of_groups, *own, *groups, *_OF_ALL, *_INPUTS, *more}, "the processor")
        known = of_groups if name == "common_kwargs" else groups.get(name)
        # An image processor of one's own may not say what it takes.
        if known is None or not isinstance(value, Mapping):
            continue
        if name == "images_kwargs" and not hasattr(processor.image_processor, "valid_kwargs"):
            continue
        for option in value:
            check_known(option, known, name)


def _known_in(processor: Any, group: str) -> set[str]:
    """Return the names of the options of the tokenizer, the image processor, and so on."""
    part_name, common = _GROUPS[group]
    part = getattr(processor, part_name, None)
    of_processor = processor.valid_processor_kwargs.__annotations__.get(group)
    methods = ("__call__", "_encode_plus", "_batch_encode_plus", "preprocess")
    return {
        *common.__annotations__,
        *getattr(of_processor, "__annotations__", ()),
        *getattr(getattr(part, "valid_kwargs", None), "__annotations__", ()),
        *(name for method in methods for name in _arguments(getattr(type(part), method, None))),
        *(_OF_TEXT if group == "text_kwargs" else ()),
    }


def _arguments(method: Callable[..., Any] | None) -> list[str]:
    if method is None:
        return []
    parameters = list(inspect.signature(method).parameters.values())[1:]
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [parameter.name for parameter in parameters if parameter.kind not in kinds]
