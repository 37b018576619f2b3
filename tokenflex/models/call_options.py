"""Options of one call of the processor: each goes to the part that takes it, or is refused."""

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

_OWN = ("num_image_tokens", "max_tiles")
_FLAGS = ("return_mm_token_type_ids", "return_text_replacement_offsets")
_GROUPS = ("text_kwargs", "images_kwargs", "videos_kwargs", "audio_kwargs", "common_kwargs")
_REFUSED = {
    "videos": "give the frames of a video as images",
    "audio": "the model reads text and images",
    "text_pair": "a prompt is one text",
    "text_target": "a prompt is one text",
    "text_pair_target": "a prompt is one text",
    "is_split_into_words": "a prompt is one text",
    "return_overflowing_tokens": "an image and its tokens must stay in one row",
    "sanitize_control_tokens": "placeholders written in texts are refused instead",
}


@dataclass(frozen=True)
class CallOptions:
    """Options of one call, sorted by the part that takes them.

    Attributes:
        num_image_tokens: None for the processor's own.
        max_tiles: Likewise.
        images_kwargs: For the image processor.
        text_kwargs: For the tokenizer.
        return_tensors: "pt", "np" or None.
        return_mm_token_type_ids: Tell placeholders from text.
        return_text_replacement_offsets: Tell where images stand in the text.
    """

    num_image_tokens: ImageTokenCounts | Literal["auto"] | None
    max_tiles: int | None
    images_kwargs: dict[str, Any]
    text_kwargs: dict[str, Any]
    return_tensors: str | None
    return_mm_token_type_ids: bool
    return_text_replacement_offsets: bool


def check_names(processor: Any, options: Mapping[str, Any], more: Iterable[str] = ()) -> None:
    """Refuse options that nobody takes: transformers passes over them in silence.

    Args:
        processor: With a ``tokenizer`` and an ``image_processor``.
        options: Arguments of a call beside images and text.
        more: Further names that are known.

    Raises:
        TypeError: A name is unknown; the message holds the nearest known one.
        ValueError: The option asks for something that the model cannot do.
    """
    groups = _known_options(processor)
    own = [*_OWN, *_FLAGS, *_GROUPS, *more]
    known = {*own, *_REFUSED, *(name for group in groups.values() for name in group)}
    for name, value in options.items():
        _check_name(name, value, known, "the processor or its tokenizer")
        if name not in _GROUPS or value is None:
            continue
        if not isinstance(value, Mapping):
            raise TypeError(f"{name} must be a dict, got {type(value).__name__}")
        inside = set().union(*groups.values()) if name == "common_kwargs" else groups[name]
        for option, setting in value.items():
            _check_name(option, setting, inside | _REFUSED.keys(), name)


def check_known(name: str, known: set[str], owner: str) -> None:
    """Refuse an option that ``owner`` does not take.

    Raises:
        TypeError: ``name`` is not among ``known``; the message holds the nearest one that is.
    """
    if name not in known:
        nearest = difflib.get_close_matches(name, sorted(known), n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise TypeError(f"{name} is no argument of {owner}{hint}")


def _check_name(name: str, value: Any, known: set[str], owner: str) -> None:
    check_known(name, known, owner)
    if name in _REFUSED and value is not None and value is not False:
        raise ValueError(f"{name} cannot be given: {_REFUSED[name]}")


def _known_options(processor: Any) -> dict[str, set[str]]:
    """Return the names of the options in each group."""
    image_options = getattr(processor.image_processor, "valid_kwargs", None)
    tokenizer_call = inspect.signature(type(processor.tokenizer).__call__).parameters
    return {
        "text_kwargs": {
            *TextKwargs.__annotations__,
            *(n for n, p in tokenizer_call.items() if p.kind is not p.VAR_KEYWORD and n != "self"),
            "split_special_tokens",
        },
        "images_kwargs": {
            *ImagesKwargs.__annotations__,
            *getattr(image_options, "__annotations__", ()),
        },
        # There is nothing that they could act on; code for any model gives them all the same.
        "videos_kwargs": {*VideosKwargs.__annotations__},
        "audio_kwargs": {*AudioKwargs.__annotations__},
    }


def sort_options(processor: Any, options: Mapping[str, Any]) -> CallOptions:
    """Sort the options of a call, by transformers' rules.

    An option comes from the call or from ``text_kwargs`` and the like, from ``common_kwargs``, or
    from what the tokenizer was saved with, in this order. Otherwise the batch is padded to its
    longest prompt, and tensors are returned.

    Args:
        processor: A transformers processor.
        options: Arguments of a call beside images and text.

    Raises:
        TypeError, ValueError: As :func:`check_names`; or an option is given twice, or is not valid.
    """
    check_names(processor, options)
    options = _spread_common(options)
    tokenizer = processor.tokenizer
    rest = {
        name: value
        for name, value in options.items()
        if name not in _OWN and name not in _REFUSED and not (name in _GROUPS and value is None)
    }
    # Of the tokenizer's arguments transformers knows those in TextKwargs alone.
    more = _known_options(processor)["text_kwargs"] - TextKwargs.__annotations__.keys()
    others = {name: rest.pop(name) for name in more & rest.keys()}
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
    if any(one != formats[0] for one in formats):
        raise ValueError(
            f"return_tensors must be the same for text and images, got {formats[0]!r} and "
            f"{formats[1]!r}"
        )
    return CallOptions(
        num_image_tokens=options.get("num_image_tokens"),
        max_tiles=options.get("max_tiles"),
        images_kwargs=images,
        text_kwargs={
            "padding": True,
            "padding_side": tokenizer.padding_side,
            "return_token_type_ids": False,
            **text,
        },
        return_tensors=_checked_format(formats[0] if formats else "pt"),
        **flags,
    )


def _spread_common(options: Mapping[str, Any]) -> dict[str, Any]:
    """Give the options in ``common_kwargs`` by name, as transformers hands each to all parts.

    It knows what to do with ``return_tensors`` there. What is given elsewhere comes first.
    """
    common = dict(options.get("common_kwargs") or {})
    groups = [group for name in _GROUPS if name != "common_kwargs" if (group := options.get(name))]
    given = {*options, *(name for group in groups for name in group)}
    kept = {name: common.pop(name) for name in ("return_tensors",) if name in common}
    spread = {name: value for name, value in common.items() if name not in given}
    return {**options, "common_kwargs": kept, **spread}


def _checked_format(return_tensors: Any) -> str | None:
    if isinstance(return_tensors, TensorType):
        return_tensors = return_tensors.value
    if return_tensors not in ("pt", "np", None):
        raise ValueError(f"return_tensors must be 'pt', 'np' or None, got {return_tensors!r}")
    format_: str | None = return_tensors
    return format_
