"""One record of a conversation with pictures, in the layout of TRL or of LLaVA, checked.

Every reader comes here, so that a record means the same in a JSONL file, a JSON list, a tar and a
table. What is not of a known form is refused: a picture under a key that nothing reads would
otherwise be trained on as text alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

from tokenflex.data.samples import IMAGE_MARK, Conversation, Turn
from tokenflex.files import excerpt

Record: TypeAlias = "tuple[str, list[Any], Conversation]"
"""Its id, its pictures, and what is said about them."""

MAX_RECORD_BYTES = 64 * 2**20
"""Bytes of a record's JSON at most."""

MAX_PATH_LENGTH = 4096

ROLES = ("system", "user", "assistant")
LLAVA_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}

PICTURE_KEYS = ("images", "image", "image_paths", "image_path")
"""Keys of a record's pictures: the plural ones hold a list, the others a list or one alone."""

UNREAD_KEYS = frozenset(
    f"{name}{ending}"
    for name in ("audio", "frame", "img", "media", "photo", "picture", "video")
    for ending in ("", "s", "_path", "_paths", "_file", "_files", "_url", "_urls", "_bytes")
) | {"image_url", "image_urls", "image_file", "image_files", "image_bytes", "pixel_values"}
"""Keys of what no reader opens."""

PLACEHOLDERS = (
    "<IMG_CONTEXT>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|audio_pad|>",
    "<|image|>",
    "<image_soft_token>",
    "<audio_soft_token>",
)
"""Placeholders of other models' processors. Only ``<image>`` stands for a picture here."""

_FILE = re.compile(
    r"\.(avif|bmp|gif|hei[cf]|jp2|jpe?g|png|ppm|svg|tiff?|webp"
    r"|avi|flv|m4v|mkv|mov|mp4|mpe?g|webm|wmv|aac|flac|m4a|mp3|ogg|opus|wav)([?#].*)?$",
    re.IGNORECASE | re.DOTALL,
)
_FILE_KEYS = {"base64", "bytes", "path", "url"}


def read_record(value: Any, where: str, stored: Sequence[Any] | None = None) -> Record:
    """Check a record and return its id, its pictures and its conversation.

    Args:
        value: A record with ``messages`` (TRL's layout) or ``conversations`` (LLaVA's).
        where: What errors call it, and its id where it has none: file and line, or key.
        stored: The pictures, where they are stored beside the record. Those that it names are then
            only counted. If None, the record's paths are the pictures.

    Raises:
        ValueError: It is not of this form. The message begins with ``where`` and quotes no more
            than a few words.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(value).__name__}")
    turns, of_parts = _turns(value, where)
    pictures = _pictures(value, where)
    if of_parts and pictures and not _are_same(pictures, of_parts):
        raise ValueError(
            f"{where}: parts of the messages name {len(of_parts)} pictures, and the record others"
        )
    pictures = pictures or of_parts
    if stored is None:
        check_paths(pictures, where)
    elif pictures and len(pictures) != len(stored):
        raise ValueError(
            f"{where}: the record names {len(pictures)} images, {len(stored)} are stored with it"
        )
    else:
        pictures = list(stored)
    if not pictures:
        _check_text_only(value, where)
    _check_turns(turns, len(pictures), where)
    name, kind = (_label(value.get(key), key, where) for key in ("id", "kind"))
    return name or where, pictures, Conversation(turns, kind=kind)


def _label(value: Any, key: str, where: str) -> str:
    """A text or number that a record is called by; empty if it has none."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"{where}: {key} must be a text or a number, got {excerpt(value)}")
    return _checked_text(str(value), f"{where}: {key}")


def _checked_text(text: str, where: str) -> str:
    """``text``, which must be one that can be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} holds half of a surrogate pair at character {error.start}, which is no text"
        ) from None
    return text


# ---------------------------------------------------------------------- pictures


def _pictures(record: dict[str, Any], where: str) -> list[Any]:
    """Return what the record names under one of :data:`PICTURE_KEYS`."""
    _refuse_unread(record, where)
    named = {key: record[key] for key in PICTURE_KEYS if not _is_empty(record.get(key))}
    if not named:
        return []
    lists = []
    for key, value in named.items():
        if key.endswith("s") and not isinstance(value, list):
            raise ValueError(f"{where}: {key} must be a list of paths, got {excerpt(value)}")
        lists.append(value if isinstance(value, list) else [value])
    if not all(_are_same(one, lists[0]) for one in lists[1:]):
        raise ValueError(f"{where}: {' and '.join(named)} name different images")
    return lists[0]


def _are_same(paths: list[Any], others: list[Any]) -> bool:
    """Compare paths; anything else, however deep, is not compared."""
    return all(isinstance(path, str) for path in (*paths, *others)) and paths == others


def _refuse_unread(
    fields: dict[str, Any], where: str, allowed: Sequence[str] = PICTURE_KEYS
) -> None:
    """Refuse pictures, videos and sounds under a key that is not one of ``allowed``."""
    for key, value in fields.items():
        if key in allowed or _is_empty(value):
            continue
        is_number = isinstance(value, (bool, int, float))  # of frames, for example
        if key.lower() in PICTURE_KEYS or (key.lower() in UNREAD_KEYS and not is_number):
            raise ValueError(
                f"{where}: {excerpt(key)} is not read; images belong under one of "
                f"{', '.join(PICTURE_KEYS)} of the record, got {excerpt(value)}"
            )


def _check_text_only(record: dict[str, Any], where: str) -> None:
    """Refuse a record without images that holds what looks like a picture's file elsewhere."""
    for key, value in record.items():
        if key not in ("id", "kind", "messages", "conversations") and _is_file(value):
            raise ValueError(
                f"{where}: {excerpt(key)} looks like a file of pictures or sound, which is not "
                f"read; images belong under one of {', '.join(PICTURE_KEYS)}"
            )


def _is_file(value: Any) -> bool:
    if isinstance(value, list) and value:
        value = value[0]
    if isinstance(value, dict):
        return any(not _is_empty(value.get(key)) for key in _FILE_KEYS)
    return isinstance(value, str) and (
        value.startswith(("data:image/", "data:video/", "data:audio/"))
        or _FILE.search(value[-256:]) is not None
    )


def _is_empty(value: Any) -> bool:
    """Tables fill the fields that a row lacks with nothing."""
    return value is None or value in ("", b"") or (isinstance(value, (list, dict)) and not value)


def check_paths(paths: Sequence[Any], where: str) -> None:
    """Check that the pictures of a record are paths, and no URLs.

    Raises:
        ValueError: One is not. The message begins with ``where``.
    """
    for path in paths:
        if not isinstance(path, str) or not path:
            raise ValueError(f"{where}: images must be paths, got {excerpt(path)}")
        if "://" in path[:32] or path.startswith("data:"):
            raise ValueError(
                f"{where}: images must be files, which are not fetched, got {excerpt(path, 40)}"
            )
        if len(path) > MAX_PATH_LENGTH or "\0" in path:
            raise ValueError(f"{where}: images must be paths, got {excerpt(path)}")
        _checked_text(path, f"{where}: the path of an image")


# ---------------------------------------------------------------------- turns


def _turns(record: dict[str, Any], where: str) -> tuple[tuple[Turn, ...], list[Any]]:
    """The turns, and the pictures that their parts name."""
    key = "conversations" if record.get("messages") is None else "messages"
    turns = record.get(key)
    if not isinstance(turns, list) or not turns:
        wanted = "messages must be a list with at least one"
        if key == "conversations":
            wanted = "conversations must be a list of turns where there are no messages"
        raise ValueError(f"{where}: {wanted}, got {excerpt(turns)}")
    read = _message if key == "messages" else _llava_turn
    pictures: list[Any] = []
    parsed = tuple(read(turn, f"{where}: {key}[{i}]", pictures) for i, turn in enumerate(turns))
    marks = sum(turn.text.count(IMAGE_MARK) for turn in parsed)
    if pictures and len(pictures) != marks:
        raise ValueError(
            f"{where}: {len(pictures)} parts of the messages name a picture, for {marks} images"
        )
    return parsed, pictures


def _message(message: Any, where: str, pictures: list[Any]) -> Turn:
    role = message.get("role") if isinstance(message, dict) else None
    if not isinstance(role, str) or role not in ROLES:
        got = excerpt(role if isinstance(message, dict) else message)
        raise ValueError(f"{where} must have a role out of {', '.join(ROLES)}, got {got}")
    _refuse_unread(message, where, allowed=())
    return Turn(role, _content(message.get("content"), where, pictures))  # type: ignore[arg-type]


def _llava_turn(turn: Any, where: str, pictures: list[Any]) -> Turn:
    speaker = turn.get("from") if isinstance(turn, dict) else None
    if not isinstance(speaker, str) or speaker not in LLAVA_ROLES:
        got = excerpt(speaker if isinstance(turn, dict) else turn)
        raise ValueError(f"{where} must be from one of {', '.join(LLAVA_ROLES)}, got {got}")
    _refuse_unread(turn, where, allowed=())
    content = _content(turn.get("value"), where, pictures)
    return Turn(LLAVA_ROLES[speaker], content)  # type: ignore[arg-type]


def _content(content: Any, where: str, pictures: list[Any]) -> str:
    if isinstance(content, list):
        content = "".join(_part(part, where, pictures) for part in content)
    if not isinstance(content, str):
        raise ValueError(
            f"{where}: content must be a string or a list of parts, got {excerpt(content)}"
        )
    for placeholder in PLACEHOLDERS:
        if placeholder in content:
            raise ValueError(
                f"{where}: content holds {placeholder}, which a processor writes; images stand at "
                f"{IMAGE_MARK}"
            )
    return _checked_text(content, f"{where}: content")


def _part(part: Any, where: str, pictures: list[Any]) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        _refuse_unread(part, where, allowed=())
        return part["text"]
    if kind in ("image", "image_url"):
        keys = ("image", "path", "url", "image_path", "image_url")
        _refuse_unread(part, where, allowed=keys)
        named = [part[key] for key in keys if not _is_empty(part.get(key))]
        named = [one.get("url") if isinstance(one, dict) else one for one in named]
        if len(named) > 1:
            raise ValueError(f"{where}: a part must name one picture, got {len(named)}")
        pictures += named
        return IMAGE_MARK
    if isinstance(part, dict):
        what = f"{excerpt(kind, 40)} with {excerpt(part)}"
    else:
        what = excerpt(part)
    raise ValueError(f"{where}: a part must be an image or a text, got {what}")


def _check_turns(turns: Iterable[Turn], num_images: int, where: str) -> None:
    marks = sum(turn.text.count(IMAGE_MARK) for turn in turns)
    if marks not in (0, num_images):
        raise ValueError(
            f"{where}: messages hold {IMAGE_MARK} {marks} times for {num_images} images"
        )
    roles = [turn.role for turn in turns]
    if "assistant" not in roles:
        raise ValueError(f"{where}: messages hold no assistant turn to learn from")
    if "user" not in roles or roles.index("assistant") < roles.index("user"):
        raise ValueError(
            f"{where}: a user turn must come before the assistant's, got {', '.join(roles[:4])}"
        )
