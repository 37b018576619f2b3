"""The counts that a request of vLLM asks for: per request, per image, and in OpenAI's words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from tokenflex.counts import AUTO, Grid, TokenCount, is_one_count, token_grid
from tokenflex.files import excerpt

Choice = Grid | Literal["auto"]
"""The grid of an image's vision tokens, or "auto" where it is to be chosen."""
DETAILS = ("low", "high", "auto")
"""OpenAI's words for the resolution of an image."""
DEFAULT = "default"
"""The wish of ``detail: auto``: the router's choice, or the request's without a router."""
PER_IMAGE = "num_image_tokens_per_image"
"""The key under which counts of single images reach the processor beside the request's."""


def request_counts(value: Any, images: int) -> list[Choice]:
    """Return the choice of each image of a request.

    Args:
        value: a count for all images, or a list with one per image. A count is an int (a perfect
            square), an (h, w) pair, or "auto". JSON writes pairs as lists: a list of two ints is a
            grid for all images, unless the request has two images.
        images: the number of the request's images.

    Raises:
        TypeError, ValueError: a count is not valid, or the list has another length.
    """
    if isinstance(value, list) and len(value) == 2 and images != 2 and is_one_count(tuple(value)):
        value = tuple(value)
    if not isinstance(value, list):
        return [_choice(value, "num_image_tokens")] * images
    if len(value) != images:
        raise ValueError(
            f"num_image_tokens must have one entry per image: got {len(value)} entries for "
            f"{images} images"
        )
    return [_choice(entry, f"num_image_tokens[{i}]") for i, entry in enumerate(value)]


def _choice(value: Any, name: str) -> Choice:
    if isinstance(value, str):
        if value != AUTO:
            raise ValueError(f"{name} must be a count or 'auto', got {excerpt(value)}")
        return AUTO
    return token_grid(value, name=name)


def image_wish(part: Mapping[str, Any], name: str) -> Any:
    """Return the count or the word that a part of a message gives to its image, None if none.

    Args:
        part: a part of type ``image_url``, whose ``image_url`` may have ``num_image_tokens`` or
            ``detail``.
        name: the part's name in errors.

    Raises:
        TypeError, ValueError: it has both, the word is unknown, or the count is not valid.
    """
    image = part.get("image_url")
    if not isinstance(image, Mapping):
        return None
    count, detail = image.get("num_image_tokens"), image.get("detail")
    if detail is not None and detail not in DETAILS:
        raise ValueError(
            f"{name}.detail must be one of {', '.join(DETAILS)}, got {excerpt(detail)}"
        )
    if count is None:
        return DEFAULT if detail == AUTO else detail
    if detail not in (None, AUTO):
        raise ValueError(
            f"{name} must have one of detail and num_image_tokens, got {detail!r} and "
            f"{excerpt(count)}"
        )
    return _choice(tuple(count) if isinstance(count, list) else count, f"{name}.num_image_tokens")


def image_wishes(messages: Sequence[Any]) -> list[Any]:
    """Return :func:`image_wish` of every image of a conversation, in order of appearance."""
    wishes = []
    for i, message in enumerate(messages):
        content = message.get("content") if isinstance(message, Mapping) else None
        for j, part in enumerate(content if isinstance(content, (list, tuple)) else ()):
            if isinstance(part, Mapping) and part.get("type") in ("image_url", "input_image"):
                wishes.append(image_wish(part, f"messages[{i}].content[{j}].image_url"))
            elif isinstance(part, Mapping) and part.get("type") == "image_pil":
                wishes.append(None)
    return wishes


def image_choices(
    request: Sequence[Choice],
    wishes: Sequence[Any] | None,
    known: Sequence[TokenCount],
    chooses: bool,
) -> list[Choice]:
    """Return the choice of each image from its own wish, or else from the request's.

    Args:
        request: the choices of the request.
        wishes: those of single images, see :func:`image_wish`; None if there are none.
        known: the counts that the model knows, rising; "low" is the first and "high" the last.
        chooses: whether a router can choose.

    Raises:
        TypeError, ValueError: there is another number of wishes, or one is not valid.
    """
    if wishes is None:
        return list(request)
    if len(wishes) != len(request):
        raise ValueError(
            f"{PER_IMAGE} must have one entry per image, got {len(wishes)} for {len(request)} "
            "images"
        )
    choices: list[Choice] = []
    for i, (wish, choice) in enumerate(zip(wishes, request, strict=True)):
        if wish in ("low", "high"):
            if not known:
                raise ValueError(
                    f"detail must be 'auto' for a model whose config does not name "
                    f"trained_num_image_tokens, got {wish!r}"
                )
            choices.append(token_grid(known[0 if wish == "low" else -1]))
        elif wish == DEFAULT:
            choices.append(AUTO if chooses else choice)
        elif wish is None:
            choices.append(choice)
        else:
            wish = tuple(wish) if isinstance(wish, list) else wish
            choices.append(_choice(wish, f"{PER_IMAGE}[{i}]"))
    return choices
