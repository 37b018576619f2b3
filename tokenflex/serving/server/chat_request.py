"""The body of a chat completion, checked: OpenAI's fields, and the vision tokens of each image.

Every mistake of a caller becomes a :class:`RequestError` that names the argument, what came and
what was expected. Nothing here needs the model.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from tokenflex.counts import AUTO, TokenCount, token_grid
from tokenflex.files import check_utf8, excerpt, parse_json, printable

Wish: TypeAlias = "TokenCount | Literal['auto', 'low', 'high', 'default']"
"""The request's word about an image: a count, a policy, the fewest or most, or nothing."""

LARGEST_COUNT = 2**20
_DETAILS = ("low", "high", "auto")
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_TAKEN = {
    *("model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens"),
    *("temperature", "top_p", "stop", "seed", "n", "num_image_tokens", "budget"),
}
_WITHOUT_EFFECT = {
    *("user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier"),
    *("prompt_cache_key", "prompt_cache_retention"),
}
"""OpenAI's fields that do not change an answer: taken, and not used."""
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": ("auto", "none"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""OpenAI's fields that this server cannot honour -> the values that ask for nothing."""


class RequestError(Exception):
    """A request that is refused.

    Attributes:
        message: names the argument, what came and what was expected.
        status: of HTTP.
        param: the argument, where it is one.
        code: a word for programs.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        status: int = 400,
        code: str = "invalid_value",
    ) -> None:
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code

    def body(self) -> dict[str, Any]:
        """Return the error in OpenAI's form."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


@dataclass(frozen=True)
class Limits:
    """Bounds of a request.

    Attributes:
        max_body_bytes: of the JSON.
        max_values: ``{``, ``[`` and ``,`` of the JSON together, which bounds the objects that
            parsing makes. Data URLs have one.
        max_image_bytes: of a picture's file.
        max_images: pictures of a request.
        max_messages: messages of a request, and parts of a message.
        max_prompt_tokens: text and vision tokens of a prompt; None for the model's positions.
        max_tokens: of an answer.
        max_n: answers of a request.
        max_stops: stop strings.
        max_stop_characters: of a stop string.
        allow_urls: fetch pictures from http(s) URLs. The server then opens connections to
            addresses that its callers choose.
    """

    max_body_bytes: int = 64 * 2**20
    max_values: int = 200_000
    max_image_bytes: int = 20 * 2**20
    max_images: int = 16
    max_messages: int = 1000
    max_prompt_tokens: int | None = None
    max_tokens: int = 1024
    max_n: int = 8
    max_stops: int = 4
    max_stop_characters: int = 256
    allow_urls: bool = False


@dataclass(frozen=True)
class Sampling:
    """The way in which answers are written.

    Attributes:
        temperature: 0 for the likeliest token of each step.
        top_p: share of the probability that a token is drawn from.
        seed: None for another draw at each call.
        max_tokens: None for as many as the server and the model's positions allow.
        n: answers.
        stops: texts that end an answer, and are not part of it.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int | None = None
    n: int = 1
    stops: tuple[str, ...] = ()


@dataclass(frozen=True)
class ImagePart:
    """An image of a message.

    Attributes:
        url: a data URL, or one of http(s).
        name: its place in the request, for errors.
        wish: its vision tokens.
    """

    url: str
    name: str
    wish: Wish


@dataclass(frozen=True)
class ChatRequest:
    """A checked request.

    Attributes:
        model: None where the request names none.
        messages: with a content that is a string, or a list of ``{"type": "text", "text": ...}``
            and ``{"type": "image"}``.
        images: in order of appearance.
        budget: the most vision tokens of all images; None without a bound.
        sampling: the way in which answers are written.
        stream: send the answer in pieces.
        include_usage: end a stream with a chunk that holds the usage alone.
    """

    model: str | None
    messages: list[dict[str, Any]]
    images: list[ImagePart]
    budget: int | None
    sampling: Sampling
    stream: bool
    include_usage: bool


def parse_request(content: bytes, limits: Limits, defaults: Sampling) -> ChatRequest:
    """Parse and check the body of a chat completion.

    Args:
        content: JSON.
        limits: bounds.
        defaults: used where the request says nothing. A request with ``top_p`` or several answers
            and no temperature has temperature 1 in place of 0.

    Raises:
        RequestError: the body is not valid.
    """
    values = sum(content.count(mark) for mark in (b"{", b"[", b","))
    if values > limits.max_values:
        raise RequestError(
            f"the body must have at most {limits.max_values} of {{, [ and , together, got {values}",
            code="too_many_values",
        )
    try:
        body = parse_json(content, "the body")
    except ValueError as error:
        raise RequestError(str(error), code="invalid_json") from None
    if not isinstance(body, dict):
        raise RequestError(f"the body must be a JSON object, got {excerpt(body)}")
    _check_fields(body)
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise _wrong("model", "a string", model)
    stream = _bool(body, "stream")
    include_usage = _include_usage(body.get("stream_options"), stream)
    messages, images = _messages(body, limits)
    budget = body.get("budget")
    if budget is not None:
        budget = _int("budget", budget, 1, 2**31)
    sampling = _sampling(body, limits, defaults)
    images = _with_common_wish(body.get("num_image_tokens"), images)
    return ChatRequest(model, messages, images, budget, sampling, stream, include_usage)


def _check_fields(body: Mapping[str, Any]) -> None:
    known = {*_TAKEN, *_WITHOUT_EFFECT, *_NEUTRAL}
    for name, value in body.items():
        if name not in known:
            raise _unknown(name, "a chat completion", known)
        if name in _NEUTRAL and value is not None and value not in _NEUTRAL[name]:
            raise RequestError(
                f"{name} is not supported by this server: leave it out, got {excerpt(value)}",
                name,
                code="unsupported_parameter",
            )


def _unknown(name: str, owner: str, known: set[str], place: str = "") -> RequestError:
    nearest = difflib.get_close_matches(name[:80], sorted(known), n=2)
    hint = f"; did you mean {' or '.join(nearest)}?" if nearest else ""
    shown = f"{place}{printable(name, 80)}"
    return RequestError(f"{shown} is no argument of {owner}{hint}", shown, code="unknown_parameter")


def _wrong(name: str, expected: str, value: Any) -> RequestError:
    return RequestError(f"{name} must be {expected}, got {excerpt(value)}", name)


def _bool(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise _wrong(name, "true or false", value)
    return bool(value)


def _int(name: str, value: Any, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise _wrong(name, f"an integer from {least} to {most}", value)
    return value


def _number(body: Mapping[str, Any], name: str, least: float, most: float) -> float | None:
    value = body.get(name)
    if value is None:
        return None
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # The comparison is exact for integers of any size, which float() may refuse.
    if not is_number or not least <= value <= most or not math.isfinite(value):
        raise _wrong(name, f"a number from {least:g} to {most:g}", value)
    return float(value)


def _include_usage(options: Any, stream: bool) -> bool:
    if options is None:
        return False
    if not isinstance(options, dict):
        raise _wrong("stream_options", "an object", options)
    if not stream:
        raise RequestError("stream_options is for stream true", "stream_options")
    known = {"include_usage", "include_obfuscation"}
    for name in options:
        if name not in known:
            raise _unknown(name, "stream_options", known, "stream_options.")
    value = options.get("include_usage")
    if value is not None and not isinstance(value, bool):
        raise _wrong("stream_options.include_usage", "true or false", value)
    return bool(value)


# ---------------------------------------------------------------------- sampling


def _sampling(body: Mapping[str, Any], limits: Limits, defaults: Sampling) -> Sampling:
    n = 1 if body.get("n") is None else _int("n", body["n"], 1, limits.max_n)
    top_p = _number(body, "top_p", 0, 1)
    if top_p == 0:
        raise _wrong("top_p", "above 0 and at most 1", body["top_p"])
    temperature = _number(body, "temperature", 0, 2)
    if temperature is None:
        wants_draws = top_p is not None or n > 1
        temperature = defaults.temperature or (1.0 if wants_draws else 0.0)
    seed = body.get("seed")
    if seed is not None:
        seed = _int("seed", seed, -(2**63), 2**63 - 1)
    return Sampling(
        temperature=temperature,
        top_p=defaults.top_p if top_p is None else top_p,
        seed=seed,
        max_tokens=_max_tokens(body, limits.max_tokens),
        n=n,
        stops=_stops(body.get("stop"), limits),
    )


def _max_tokens(body: Mapping[str, Any], limit: int) -> int | None:
    names = ("max_tokens", "max_completion_tokens")
    given = {n: _int(n, body[n], 1, limit) for n in names if body.get(n) is not None}
    if len({*given.values()}) > 1:
        raise RequestError(
            "max_tokens and max_completion_tokens mean the same: give one, got "
            f"{given['max_tokens']} and {given['max_completion_tokens']}",
            "max_tokens",
        )
    return next(iter(given.values()), None)


def _stops(stop: Any, limits: Limits) -> tuple[str, ...]:
    if stop is None:
        return ()
    stops = [stop] if isinstance(stop, str) else stop
    expected = (
        f"a string or a list of at most {limits.max_stops} strings of 1 to "
        f"{limits.max_stop_characters} characters"
    )
    if not isinstance(stops, list) or len(stops) > limits.max_stops:
        raise _wrong("stop", expected, stop)
    for text in stops:
        if not isinstance(text, str) or not 0 < len(text) <= limits.max_stop_characters:
            raise _wrong("stop", expected, stop)
    return tuple(stops)


# ---------------------------------------------------------------------- messages


def _messages(
    body: Mapping[str, Any], limits: Limits
) -> tuple[list[dict[str, Any]], list[ImagePart]]:
    given = body.get("messages")
    if not isinstance(given, list) or not given:
        raise _wrong("messages", "a list of at least one message", given)
    if len(given) > limits.max_messages:
        raise RequestError(
            f"messages must be at most {limits.max_messages}, got {len(given)}", "messages"
        )
    messages: list[dict[str, Any]] = []
    images: list[ImagePart] = []
    for i, message in enumerate(given):
        name = f"messages[{i}]"
        if not isinstance(message, dict):
            raise _wrong(name, "an object with role and content", message)
        for key, value in message.items():
            if key not in ("role", "content", "name") and value not in (None, [], ""):
                raise _unknown(key, "a message", {"role", "content", "name"}, f"{name}.")
        role = message.get("role")
        if not isinstance(role, str) or role not in _ROLES:
            raise _wrong(f"{name}.role", f"one of {', '.join(_ROLES)}", role)
        content = _content(message.get("content"), f"{name}.content", limits, images)
        messages.append({"role": _ROLES[role], "content": content})
    return messages, images


def _content(content: Any, name: str, limits: Limits, images: list[ImagePart]) -> Any:
    if isinstance(content, str):
        return _text(content, name)
    if not isinstance(content, list) or not content:
        raise _wrong(name, "a string or a list of parts of type text and image_url", content)
    if len(content) > limits.max_messages:
        raise RequestError(
            f"{name} must have at most {limits.max_messages} parts, got {len(content)}", name
        )
    parts = []
    for i, part in enumerate(content):
        place = f"{name}[{i}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            _check_keys(part, {"type", "text"}, place)
            parts.append({"type": "text", "text": _text(part.get("text"), f"{place}.text")})
        elif kind == "image_url":
            _check_keys(part, {"type", "image_url"}, place)
            if len(images) == limits.max_images:
                raise RequestError(
                    f"a request may have at most {limits.max_images} images, got more: {place}",
                    "messages",
                    code="too_many_images",
                )
            images.append(_image(part.get("image_url"), f"{place}.image_url", limits))
            parts.append({"type": "image"})
        else:
            got = excerpt(part) if kind is None else f"type {excerpt(kind)}"
            raise RequestError(
                f"{place} must be a part of type text or image_url, got {got}", place
            )
    return parts


def _check_keys(part: Mapping[str, Any], known: set[str], place: str) -> None:
    for key, value in part.items():
        if key not in known and value is not None:
            raise _unknown(key, f"a part of type {part['type']}", known, f"{place}.")


def _text(text: Any, name: str) -> str:
    if not isinstance(text, str):
        raise _wrong(name, "a string", text)
    try:
        return check_utf8(text, name)
    except ValueError as error:
        raise RequestError(str(error), name) from None


def _image(image: Any, name: str, limits: Limits) -> ImagePart:
    if isinstance(image, str):
        image = {"url": image}
    if not isinstance(image, dict):
        raise _wrong(name, "an object with a url", image)
    known = {"url", "detail", "num_image_tokens"}
    for key in image:
        if key not in known:
            raise _unknown(key, "an image_url", known, f"{name}.")
    url = image.get("url")
    if not isinstance(url, str):
        raise _wrong(f"{name}.url", "a string", url)
    _check_url(url, f"{name}.url", limits)
    detail, count = image.get("detail"), image.get("num_image_tokens")
    if detail is not None and (not isinstance(detail, str) or detail not in _DETAILS):
        raise _wrong(f"{name}.detail", f"one of {', '.join(_DETAILS)}", detail)
    wish: Wish = "default"
    if detail in ("low", "high"):
        if count is not None:
            raise RequestError(
                f"{name} must have one of detail and num_image_tokens, got detail {detail!r} and "
                f"num_image_tokens {excerpt(count)}",
                f"{name}.detail",
            )
        wish = detail  # type: ignore[assignment]
    elif count is not None:
        wish = _count(count, f"{name}.num_image_tokens")
    return ImagePart(url, name, wish)


def _check_url(url: str, name: str, limits: Limits) -> None:
    # Exactly these prefixes: load_image takes any other text for a path.
    if url.startswith("data:"):
        size = 3 * len(url) // 4
        if size > limits.max_image_bytes:
            raise RequestError(
                f"{name} must be a picture of at most {limits.max_image_bytes} bytes, got about "
                f"{size}",
                name,
                code="image_too_large",
            )
    elif not (limits.allow_urls and url.startswith(("http://", "https://"))):
        others = " or one of http(s)" if limits.allow_urls else ""
        hint = ""
        if not limits.allow_urls and url.startswith(("http://", "https://")):
            hint = " (this server was started without --allow-urls)"
        raise RequestError(
            f"{name} must be a data URL, as data:image/png;base64,...{others}, got "
            f"{excerpt(url)}{hint}",
            name,
            code="invalid_image_url",
        )


# ---------------------------------------------------------------------- vision tokens


def _count(value: Any, name: str) -> TokenCount | Literal["auto"]:
    if value == AUTO:
        return AUTO
    count = tuple(value) if isinstance(value, list) else value
    sides = count if isinstance(count, tuple) else (count,)
    expected = 'an integer that is a perfect square, [height, width] or "auto"'
    if len(sides) > 2 or not sides or not all(_is_int(side) for side in sides):
        raise _wrong(name, expected, value)
    if max(sides) > LARGEST_COUNT:
        raise _wrong(name, f"at most {LARGEST_COUNT}", value)
    try:
        token_grid(count, name=name)
    except (TypeError, ValueError) as error:
        raise RequestError(str(error), name) from None
    return count


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _with_common_wish(value: Any, images: Sequence[ImagePart]) -> list[ImagePart]:
    """Give ``num_image_tokens`` of the request to the images that have no wish of their own.

    ``[h, w]`` is one grid for all images, except for two images: then it is a count for each.
    """
    name = "num_image_tokens"
    if value is None:
        return list(images)
    is_pair = isinstance(value, list) and len(value) == 2 and all(_is_int(n) for n in value)
    if not isinstance(value, list) or (is_pair and len(images) != 2):
        common = _count(value, name)
        return [
            replace(image, wish=common) if image.wish == "default" else image for image in images
        ]
    if len(value) != len(images):
        raise RequestError(
            f"{name} must have one entry per image: got {len(value)} entries for {len(images)} "
            "images",
            name,
        )
    for image in images:
        if image.wish != "default":
            raise RequestError(
                f"{name} gives each image its count, and {image.name} gives one as well: give one "
                "of both",
                name,
            )
    try:
        counts = [_count(entry, f"{name}[{i}]") for i, entry in enumerate(value)]
    except RequestError as error:
        if is_pair:
            error.message += (
                "; for two images a list of two integers is a count for each: a grid for both is "
                f"[{value}, {value}]"
            )
        raise
    return [replace(image, wish=count) for image, count in zip(images, counts, strict=True)]
