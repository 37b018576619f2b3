"""One record of a conversation with pictures, in the layout of TRL or of LLaVA, checked.

Every reader comes here, so that a record means the same in a JSONL file, a JSON list, a tar and a
table. What is not of a known form is refused: a picture under a key that nothing reads would
otherwise be trained on as text alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

from tokenflex.data.media import is_empty, unread_media
from tokenflex.data.placeholders import find_placeholder
from tokenflex.data.samples import Conversation, Turn
from tokenflex.files import describe_payload, excerpt
from tokenflex.models.chat import IMAGE_MARK

Record: TypeAlias = "tuple[str, list[Any], Conversation]"
"""Its id, its pictures, and what is said about them."""

MAX_RECORD_BYTES = 64 * 2**20
"""Bytes of a record's JSON at most."""

MAX_PATH_LENGTH = 4096

MAX_NAME_BYTES = 255
"""Bytes of each file's or folder's name in a path, as file systems have it."""

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

_PART_KEYS = ("image", "path", "url", "image_path", "image_url")
"""Keys of an image part, of which one may name its picture."""

_PAYLOAD_KEYS = ("base64", "bytes", "data", "file", "source")
"""Keys of an image part under which other programs store its content."""


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
    elif any(map(_is_payload, pictures)):
        raise ValueError(
            f"{where}: a part or record holds a picture, and others are stored with it"
        )
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
    named = {key: record[key] for key in PICTURE_KEYS if not is_empty(record.get(key))}
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
        if key in allowed or is_empty(value):
            continue
        is_number = isinstance(value, (bool, int, float))  # of frames, for example
        if key.lower() in PICTURE_KEYS or (key.lower() in UNREAD_KEYS and not is_number):
            raise _unread(key, where)


def _check_text_only(record: dict[str, Any], where: str) -> None:
    """Refuse a record without images that has what looks like a picture or sound elsewhere."""
    key = "conversations" if record.get("messages") is None else "messages"
    content = "value" if key == "conversations" else "content"
    # The other layout's turns are not read, and may say the same as these.
    _refuse_media(record, where, ("id", "kind", "messages", "conversations", *PICTURE_KEYS))
    for i, turn in enumerate(record[key]):
        _refuse_media(turn, f"{where}: {key}[{i}]", ("role", "from", content))
        if isinstance(turn[content], list):
            for part in turn[content]:
                _refuse_media(part, f"{where}: {key}[{i}]", ("type", "text"))


def _refuse_media(fields: dict[str, Any], where: str, read: Sequence[str]) -> None:
    key = unread_media(fields, read)
    if key is not None:
        raise _unread(key, where)


def _unread(key: str, where: str) -> ValueError:
    return ValueError(
        f"{where}: {excerpt(key)} looks like pictures or sound that are not read; images belong "
        f"under one of {', '.join(PICTURE_KEYS)} of the record"
    )


def _is_payload(picture: Any) -> bool:
    """Return whether a picture is given by its content, not by a path or URL."""
    if isinstance(picture, dict):
        return any(not is_empty(picture.get(key)) for key in ("base64", "bytes"))
    if isinstance(picture, str):
        return describe_payload(picture) is not None
    return isinstance(picture, (bytes, bytearray))


def check_paths(paths: Sequence[Any], where: str) -> None:
    """Check that the pictures of a record are paths, and no URLs.

    Raises:
        ValueError: One is not. The message begins with ``where``.
    """
    for path in paths:
        if not isinstance(path, str) or not path:
            raise ValueError(f"{where}: images must be paths, got {excerpt(path)}")
        if "://" in path[:32] or path.lstrip()[:5].lower() == "data:":
            raise ValueError(
                f"{where}: images must be files, which are not fetched, got {excerpt(path, 40)}"
            )
        if len(path) > MAX_PATH_LENGTH or "\0" in path:
            raise ValueError(f"{where}: images must be paths, got {excerpt(path)}")
        longest = max(len(name.encode("utf-8", "surrogatepass")) for name in path.split("/"))
        if longest > MAX_NAME_BYTES:
            raise ValueError(
                f"{where}: names in an image's path must have at most {MAX_NAME_BYTES} bytes, got "
                f"one of {longest:,}"
            )
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
    placeholder = find_placeholder(content)
    if placeholder is not None:
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
        _refuse_unread(part, where, allowed=_PART_KEYS)
        for key in _PAYLOAD_KEYS:
            if not is_empty(part.get(key)):
                raise _unread(key, where)
        _refuse_media(part, where, ("type", *_PART_KEYS))
        named = [part[key] for key in _PART_KEYS if not is_empty(part.get(key))]
        named = [one.get("url") or one if isinstance(one, dict) else one for one in named]
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
