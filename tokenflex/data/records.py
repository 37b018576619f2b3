"""Records of conversations with images, in TRL's layout or in LLaVA's, and the data sets of them.

All readers check records here, so that a record means the same in a JSONL file, a JSON list, a tar
and a table. A picture under a key that no reader opens is refused: training would otherwise see its
record as text alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from tokenflex.data.image_paths import check_paths
from tokenflex.data.media import PICTURE_KEYS, is_empty, unread_key, unread_media
from tokenflex.data.placeholders import find_placeholder
from tokenflex.data.samples import Conversation, Sample, Turn
from tokenflex.files import check_utf8, describe_payload, excerpt
from tokenflex.images import image_size, open_image
from tokenflex.models.chat import IMAGE_MARK

Record: TypeAlias = "tuple[str, list[Any], Conversation]"
"""The record's id, its images as they are stored, and its conversation."""

MAX_RECORD_BYTES = 64 * 2**20
"""Largest size of a record's JSON."""

_LAYOUTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "messages": (
        "role",
        "content",
        {"system": "system", "user": "user", "assistant": "assistant"},
    ),
    "conversations": (
        "from",
        "value",
        {"human": "user", "gpt": "assistant", "system": "system"},
    ),
}
"""Key of the turns -> keys of a turn's speaker and text, and the role of each speaker."""

_PART_KEYS = ("image", "path", "url", "image_path", "image_url")
"""Keys of an image part, of which one may name its image."""

_PAYLOAD_KEYS = ("base64", "bytes", "data", "file", "source")
"""Keys of an image part under which other programs store its content."""


class RecordDataset:
    """Base of data sets of records: samples and outlines from one reading of a record."""

    def __getitem__(self, index: int) -> Sample:
        name, images, conversation = self._record(index)
        files = self._image_files(images, self.where(index))
        return Sample(name, tuple(open_image(*file) for file in files), (conversation,))

    def outline(self, index: int) -> Sample:
        """Return the sample's text and the sizes that its image files state; no pixels are read."""
        name, images, conversation = self._record(index)
        files = self._image_files(images, self.where(index))
        return Sample(name, tuple(image_size(*file) for file in files), (conversation,))

    def where(self, index: int) -> str:
        """Return a name of the sample's place for error messages, such as its file and line."""
        raise NotImplementedError

    def _record(self, index: int) -> Record:
        """Return a checked record.

        Raises:
            ValueError: The record is broken. The message begins with its place.
        """
        raise NotImplementedError

    def _image_files(
        self, images: Sequence[Any], where: str
    ) -> Iterator[tuple[Path | BinaryIO, str]]:
        """Yield the file of each image of a record, and its name for error messages."""
        raise NotImplementedError


def read_record(value: Any, where: str, stored: Sequence[Any] | None = None) -> Record:
    """Check a record and return its id, its images and its conversation.

    Args:
        value: A record with ``messages`` (TRL's layout) or ``conversations`` (LLaVA's).
        where: The record's place for error messages, such as file and line; its id by default.
        stored: The images, if they are stored beside the record. Those that the record names are
            then only counted. If None, the images are the paths that the record names.

    Raises:
        ValueError: The record is not of this form. The message begins with ``where`` and quotes no
            more than a few words.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(value).__name__}")
    key = "conversations" if value.get("messages") is None else "messages"
    in_parts: list[Any] = []
    turns = _read_turns(value, key, where, in_parts)
    images = images_of(value, where)
    if in_parts and images and not _are_same(images, in_parts):
        raise ValueError(
            f"{where}: parts of the messages name {len(in_parts)} pictures, and the record others"
        )
    images = images or in_parts
    if stored is None:
        check_paths(images, where)
    elif any(map(_is_payload, images)):
        raise ValueError(
            f"{where}: a part or record holds a picture, and others are stored with it"
        )
    elif images and len(images) != len(stored):
        raise ValueError(
            f"{where}: the record names {len(images)} images, {len(stored)} are stored with it"
        )
    else:
        images = list(stored)
    if not images:
        _check_text_only(value, key, where)
    _check_conversation(turns, len(images), len(in_parts), where)
    name, kind = (_label(value.get(label), label, where) for label in ("id", "kind"))
    return name or where, images, Conversation(turns, kind=kind)


def _label(value: Any, key: str, where: str) -> str:
    """Return an ``id`` or ``kind`` as a text, which is empty if the record has none."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"{where}: {key} must be a text or a number, got {excerpt(value)}")
    return check_utf8(str(value), f"{where}: {key}")


# ---------------------------------------------------------------------- images


def images_of(record: dict[str, Any], where: str) -> list[Any]:
    """Return the images under a record's :data:`tokenflex.data.media.PICTURE_KEYS`.

    Raises:
        ValueError: A plural key holds no list, keys name different images, or an image, video or
            sound stands under another known key.
    """
    _refuse(unread_key(record, PICTURE_KEYS), where)
    named = {key: record[key] for key in PICTURE_KEYS if not is_empty(record.get(key))}
    lists = []
    for key, value in named.items():
        if key.endswith("s") and not isinstance(value, list):
            raise ValueError(f"{where}: {key} must be a list of paths, got {excerpt(value)}")
        lists.append(value if isinstance(value, list) else [value])
    if not all(_are_same(images, lists[0]) for images in lists[1:]):
        raise ValueError(f"{where}: {' and '.join(named)} hold different images")
    return lists[0] if lists else []


def _are_same(images: list[Any], others: list[Any]) -> bool:
    """Compare images by their bytes or paths; anything else, however deep, is never the same."""
    contents = [_content(image) for image in (*images, *others)]
    is_known = all(isinstance(content, (str, bytes)) for content in contents)
    return is_known and contents[: len(images)] == contents[len(images) :]


def _content(image: Any) -> Any:
    if not isinstance(image, dict):
        return image
    return image.get("path") if image.get("bytes") is None else image["bytes"]


def _is_payload(image: Any) -> bool:
    """Return whether an image is given by its content, not by a path or URL."""
    if isinstance(image, dict):
        return any(not is_empty(image.get(key)) for key in ("base64", "bytes"))
    if isinstance(image, str):
        return describe_payload(image) is not None
    return isinstance(image, (bytes, bytearray))


def _refuse(key: str | None, where: str) -> None:
    """Raise for the key of a field that no reader opens; None stands for no such field."""
    if key is not None:
        raise ValueError(
            f"{where}: {excerpt(key)} looks like pictures or sound that are not read; images "
            f"belong under one of {', '.join(PICTURE_KEYS)} of the record"
        )


def _check_text_only(record: dict[str, Any], key: str, where: str) -> None:
    """Refuse a record without images if any field looks like a picture or sound."""
    # The other layout's turns are not read, and may say the same as these.
    _refuse(unread_media(record, ("id", "kind", *_LAYOUTS, *PICTURE_KEYS)), where)
    speaker, content, _ = _LAYOUTS[key]
    for i, turn in enumerate(record[key]):
        parts = turn[content] if isinstance(turn[content], list) else []
        _refuse(unread_media(turn, (speaker, content)), f"{where}: {key}[{i}]")
        for part in parts:
            _refuse(unread_media(part, ("type", "text")), f"{where}: {key}[{i}]")


# ---------------------------------------------------------------------- turns


def _read_turns(
    record: dict[str, Any], key: str, where: str, images: list[Any]
) -> tuple[Turn, ...]:
    """Read the turns under ``key``; images that their parts name are added to ``images``."""
    turns = record.get(key)
    if not isinstance(turns, list) or not turns:
        wanted = "messages must be a list with at least one"
        if key == "conversations":
            wanted = "conversations must be a list of turns where there are no messages"
        raise ValueError(f"{where}: {wanted}, got {excerpt(turns)}")
    return tuple(
        _read_turn(turn, key, f"{where}: {key}[{i}]", images) for i, turn in enumerate(turns)
    )


def _read_turn(turn: Any, key: str, where: str, images: list[Any]) -> Turn:
    speaker_key, content_key, roles = _LAYOUTS[key]
    speaker = turn.get(speaker_key) if isinstance(turn, dict) else turn
    if not isinstance(turn, dict) or not isinstance(speaker, str) or speaker not in roles:
        raise ValueError(
            f"{where} must have a {speaker_key} out of {', '.join(roles)}, got {excerpt(speaker)}"
        )
    _refuse(unread_key(turn), where)
    return Turn(roles[speaker], _read_content(turn.get(content_key), where, images))


def _read_content(content: Any, where: str, images: list[Any]) -> str:
    if isinstance(content, list):
        content = "".join(_read_part(part, where, images) for part in content)
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
    return check_utf8(content, f"{where}: content")


def _read_part(part: Any, where: str, images: list[Any]) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        _refuse(unread_key(part), where)
        return part["text"]
    if kind in ("image", "image_url"):
        stored = [key for key in _PAYLOAD_KEYS if not is_empty(part.get(key))]
        _refuse(unread_key(part, _PART_KEYS) or next(iter(stored), None), where)
        _refuse(unread_media(part, ("type", *_PART_KEYS)), where)
        named = [part[key] for key in _PART_KEYS if not is_empty(part.get(key))]
        if len(named) > 1:
            raise ValueError(f"{where}: a part must name one picture, got {len(named)}")
        images += [
            image.get("url") or image if isinstance(image, dict) else image for image in named
        ]
        return IMAGE_MARK
    got = f"{excerpt(kind, 40)} with {excerpt(part)}" if isinstance(part, dict) else excerpt(part)
    raise ValueError(f"{where}: a part must be an image or a text, got {got}")


def _check_conversation(
    turns: Iterable[Turn], num_images: int, images_in_parts: int, where: str
) -> None:
    """Check that the turns ask before they answer, and mark every image or none."""
    marks = sum(turn.text.count(IMAGE_MARK) for turn in turns)
    if images_in_parts not in (0, marks):
        raise ValueError(
            f"{where}: {images_in_parts} parts of the messages name a picture, for {marks} images"
        )
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
