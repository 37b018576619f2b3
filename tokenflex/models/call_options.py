"""Options of one call of a processor: each goes to the part that takes it, or is refused.

transformers' processors ignore an option that nobody takes, so that a misspelt one has no effect.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from huggingface_hub.errors import StrictDataclassError
from transformers.processing_utils import AudioKwargs, ImagesKwargs, TextKwargs, VideosKwargs
from transformers.utils import TensorType

from tokenflex.counts import ImageTokenCounts

_OF_VIDEOS = ("max_frames", "fps", "budget")
_OWN = ("num_image_tokens", "max_tiles", *_OF_VIDEOS)
_FLAGS = ("return_mm_token_type_ids", "return_text_replacement_offsets")
_PARTS = {
    "text_kwargs": ("tokenizer", TextKwargs),
    "images_kwargs": ("image_processor", ImagesKwargs),
    "videos_kwargs": ("video_processor", VideosKwargs),
    "audio_kwargs": ("feature_extractor", AudioKwargs),
}
"""Group of options -> the part of a processor that takes them, and their names in transformers."""
_GROUPS = (*_PARTS, "common_kwargs")
_INTERNAL = {"padding_strategy", "truncation_strategy", "image_like_kwargs"}
"""Arguments of a part's methods that it computes itself."""
_REFUSED = {
    "audio": "the model reads text and images",
    "text_pair": "a prompt is one text",
    "text_target": "a prompt is one text",
    "text_pair_target": "a prompt is one text",
    "is_split_into_words": "a prompt is one text",
    "return_overflowing_tokens": "an image and its tokens must stay in one row",
    "sanitize_control_tokens": "placeholders written in texts are refused instead",
}


def known_options(processor: Any) -> dict[str, set[str]]:
    """Return the names of the options in each group, ``text_kwargs`` and so on.

    These are the names that transformers gives to all models, those that the processor or its part
    declares, and the arguments of the part's methods.
    """
    declared = processor.valid_processor_kwargs.__annotations__
    groups = {}
    for group, (part_name, common) in _PARTS.items():
        part = getattr(processor, part_name, None)
        declarations = (common, declared.get(group), getattr(part, "valid_kwargs", None))
        names = {n for options in declarations for n in getattr(options, "__annotations__", ())}
        for method in ("__call__", "_encode_plus", "_batch_encode_plus", "preprocess"):
            names.update(_arguments(getattr(type(part), method, None)))
        groups[group] = names - _INTERNAL
    groups["text_kwargs"].update(("split_special_tokens", *_FLAGS))
    groups["videos_kwargs"].update(_OF_VIDEOS)
    return groups


def _arguments(method: Any) -> list[str]:
    """Return the named arguments of a part's method, without ``self`` and what it processes."""
    if method is None:
        return []
    parameters = list(inspect.signature(method).parameters.values())[2:]
    return [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]


def check_known(name: str, known: set[str], owner: str) -> None:
    """Refuse an option that ``owner`` does not take.

    Raises:
        TypeError: ``name`` is not in ``known``; the message holds the nearest name that is.
    """
    if name not in known:
        nearest = difflib.get_close_matches(name, sorted(known), n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise TypeError(f"{name} is no argument of {owner}{hint}")


def check_names(
    processor: Any, options: Mapping[str, Any], more: Iterable[str] = ()
) -> dict[str, set[str]]:
    """Refuse options of our processor that no part of it takes; return :func:`known_options`.

    Args:
        processor: a :class:`tokenflex.TokenFlexProcessor`.
        options: arguments of a call beside images and text.
        more: further known names.

    Raises:
        TypeError: a name is unknown; the message holds the nearest known name.
        ValueError: the option asks for something that the model cannot do.
    """
    groups = known_options(processor)
    of_groups = set().union(*groups.values())
    for name, value in options.items():
        known = {*_OWN, *_GROUPS, *more, *of_groups}
        _check_option(name, value, known, "the processor or its tokenizer")
        if name not in _GROUPS or value is None:
            continue
        if not isinstance(value, Mapping):
            raise TypeError(f"{name} must be a dict, got {type(value).__name__}")
        for option, setting in value.items():
            _check_option(option, setting, groups.get(name, of_groups), name)
    return groups


def _check_option(name: str, value: Any, known: set[str], owner: str) -> None:
    check_known(name, known | _REFUSED.keys(), owner)
    if name in _REFUSED and value is not None and value is not False:
        raise ValueError(f"{name} cannot be given: {_REFUSED[name]}")


@dataclass(frozen=True)
class CallOptions:
    """Options of one call, sorted by the part that takes them.

    Attributes:
        num_image_tokens: None for the processor's own.
        max_tiles: None for the processor's own.
        max_frames: None for the processor's own.
        fps: None for the processor's own.
        budget: vision tokens of each video; None for the counts of ``num_image_tokens``.
        images_kwargs: for the image processor.
        text_kwargs: for the tokenizer.
        return_tensors: "pt", "np" or None.
        return_mm_token_type_ids: return which tokens are placeholders.
        return_text_replacement_offsets: return where images stand in the text.
    """

    num_image_tokens: ImageTokenCounts | Literal["auto"] | None
    max_tiles: int | None
    max_frames: int | None
    fps: float | None
    budget: int | None
    images_kwargs: dict[str, Any]
    text_kwargs: dict[str, Any]
    return_tensors: str | None
    return_mm_token_type_ids: bool
    return_text_replacement_offsets: bool


def sort_options(processor: Any, options: Mapping[str, Any]) -> CallOptions:
    """Sort the options of a call, by transformers' rules.

    An option comes from the call or from ``text_kwargs`` and the like, then from ``common_kwargs``,
    then from what the tokenizer was saved with. By default the batch is padded to its longest
    prompt, and tensors are returned.

    Raises:
        TypeError, ValueError: as :func:`check_names`; or an option is given twice, or is not valid.
    """
    known = check_names(processor, options)
    options = _spread_common(options)
    tokenizer = processor.tokenizer
    rest = {
        name: value
        for name, value in options.items()
        if name not in _OWN and name not in _REFUSED and not (name in _GROUPS and value is None)
    }
    if "videos_kwargs" in rest:
        group = rest["videos_kwargs"].items()
        rest["videos_kwargs"] = {name: value for name, value in group if name not in _OF_VIDEOS}
    # transformers merges the tokenizer's options that TextKwargs names, and no others.
    unnamed = known["text_kwargs"] - TextKwargs.__annotations__.keys()
    others = {name: rest.pop(name) for name in unnamed & rest.keys()}
    try:
        merged = processor._merge_kwargs(
            processor.valid_processor_kwargs, tokenizer_init_kwargs=tokenizer.init_kwargs, **rest
        )
    except StrictDataclassError as error:
        raise ValueError(" ".join(str(error).split())[:300]) from None
    text = {**merged["text_kwargs"], **others}
    images = dict(merged["images_kwargs"])
    flags = {name: bool(text.pop(name, merged.get(name, False))) for name in _FLAGS}
    for name in _REFUSED:
        text.pop(name, None)
    formats = [group.pop("return_tensors") for group in (text, images) if "return_tensors" in group]
    if formats and formats[0] != formats[-1]:
        raise ValueError(
            f"return_tensors must be the same for text and images, got {formats[0]!r} and "
            f"{formats[1]!r}"
        )
    return CallOptions(
        num_image_tokens=options.get("num_image_tokens"),
        max_tiles=options.get("max_tiles"),
        **options_of_videos(options),
        images_kwargs=images,
        text_kwargs={
            "padding": True,
            "padding_side": tokenizer.padding_side,
            "return_token_type_ids": False,
            **text,
        },
        return_tensors=_check_format(formats[0] if formats else "pt"),
        **flags,
    )


def options_of_videos(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return our options of videos, each given by name or in ``videos_kwargs``."""
    group = options.get("videos_kwargs") or {}
    for name in _OF_VIDEOS:
        if options.get(name) is not None and group.get(name) is not None:
            raise ValueError(f"{name} must be given once, got it in videos_kwargs as well")
    return {
        name: group.get(name) if options.get(name) is None else options[name] for name in _OF_VIDEOS
    }


def check_sampling_names(options: Mapping[str, Any]) -> None:
    """Refuse transformers' options of sampling in a call with videos, where they would do nothing.

    Raises:
        ValueError: one is given.
    """
    for given in (options, options.get("videos_kwargs") or {}):
        for name in ("num_frames", "do_sample_frames", "video_metadata"):
            if given.get(name) is not None:
                raise ValueError(f"{name} cannot be given: max_frames and fps choose the frames")


def _spread_common(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options with those in ``common_kwargs`` given by name, unless given elsewhere.

    transformers merges only ``return_tensors`` from there.
    """
    common = dict(options.get("common_kwargs") or {})
    groups = [options.get(name) or {} for name in _PARTS]
    kept = {name: common.pop(name) for name in ("return_tensors",) if name in common}
    for name in {*options, *(name for group in groups for name in group)}:
        common.pop(name, None)
    return {**options, "common_kwargs": kept, **common}


def _check_format(return_tensors: Any) -> str | None:
    if isinstance(return_tensors, TensorType):
        return_tensors = return_tensors.value
    if return_tensors not in ("pt", "np", None):
        raise ValueError(f"return_tensors must be 'pt', 'np' or None, got {return_tensors!r}")
    format_: str | None = return_tensors
    return format_
