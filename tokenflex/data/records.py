"""Records of conversations with images, in TRL's layout or in LLaVA's, and the data sets of them.

All readers check records here, so that a record means the same in a JSONL file, a JSON list, a tar
and a table. A picture under a key that no reader opens is refused: training would otherwise see its
record as text alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from tokenflex.data.image_paths import check_paths
from tokenflex.data.media import PICTURE_KEYS, VIDEO_KEYS, is_empty, unread_key, unread_media
from tokenflex.data.placeholders import find_placeholder
from tokenflex.data.samples import Conversation, Sample, Turn
from tokenflex.files import check_utf8, describe_payload, excerpt
from tokenflex.images import image_size, open_image
from tokenflex.models.chat import IMAGE_MARK
from tokenflex.models.video_inputs import VIDEO_MARK
from tokenflex.videos import EACH_FRAME, frame_sizes, load_video

Record: TypeAlias = "tuple[str, list[Any], Conversation]"
"""The record's id, its images as they are stored with each :class:`StoredVideo` in its place, and
its conversation."""


@dataclass(frozen=True)
class StoredVideo:
    """A video as it is stored."""

    source: Any


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

_VIDEO_PART_KEYS = ("video", "path", "url", "video_path", "video_url")
"""Keys of a video part, of which one may name its video."""

_PAYLOAD_KEYS = ("base64", "bytes", "data", "file", "source")
"""Keys of an image part under which other programs store its content."""


class RecordDataset:
    """Base of data sets of records: samples and outlines from one reading of a record.

    Attributes:
        sampling: Chooses the frames of videos.
    """

    sampling = EACH_FRAME

    def __getitem__(self, index: int) -> Sample:
        return self._sample(index, open_image, _read_frames)

    def outline(self, index: int) -> Sample:
        """Return the sample's text and the sizes that its image files state; no pixels are read."""
        return self._sample(index, image_size, frame_sizes)

    def _sample(
        self, index: int, read_image: Callable[..., Any], read_video: Callable[..., Sequence[Any]]
    ) -> Sample:
        name, media, conversation = self._record(index)
        where = self.where(index)
        images: list[Any] = []
        frames: list[int] = []
        for item, (file, file_name) in zip(media, self._media_files(media, where), strict=True):
            if not isinstance(item, StoredVideo):
                images.append(read_image(file, file_name))
                continue
            clip = read_video(
                file,
                f"{where}: video {_shown(item.source, file)}",
                self.sampling,
                check_frame=lambda path: self._check_frame(path, where),
            )
            images += clip
            frames.append(len(clip))
        if frames:
            conversation = conversation.show_frames(frames)
        return Sample(name, tuple(images), (conversation,))

    def where(self, index: int) -> str:
        """Return a name of the sample's place for error messages, such as its file and line."""
        raise NotImplementedError

    def _record(self, index: int) -> Record:
        """Return a checked record.

        Raises:
            ValueError: The record is broken. The message begins with its place.
        """
        raise NotImplementedError

    def _media_files(
        self, media: Sequence[Any], where: str
    ) -> Iterator[tuple[Path | BinaryIO, str]]:
        """Yield the file of each image or video of a record, and its name for error messages."""
        raise NotImplementedError

    def _check_frame(self, path: Path, where: str) -> None:
        """Check the path of a frame in a folder of frames.

        Raises:
            ValueError: It must not be read. The message begins with ``where``.
        """


def source_of(item: Any) -> tuple[Any, str]:
    """Return an image or video of a :data:`Record` as it is stored, and "image" or "video"."""
    return (item.source, "video") if isinstance(item, StoredVideo) else (item, "image")


def _shown(source: Any, file: Any) -> str:
    """Return the path of a video, without content that stands in its place."""
    return describe_payload(str(source)) or (str(file) if isinstance(file, Path) else "in bytes")


def _read_frames(*arguments: Any, **options: Any) -> Sequence[Any]:
    return load_video(*arguments, **options).frames


def read_record(
    value: Any,
    where: str,
    stored: Sequence[Any] | None = None,
    stored_videos: Sequence[Any] | None = None,
) -> Record:
    """Check a record and return its id, its images and videos, and its conversation.

    Args:
        value: A record with ``messages`` (TRL's layout) or ``conversations`` (LLaVA's).
        where: The record's place for error messages, such as file and line; its id by default.
        stored: The images, if they are stored beside the record. Those that the record names are
            then only counted. If None, the images are the paths that the record names.
        stored_videos: The videos, likewise. If None, a record with stored images has none.

    Raises:
        ValueError: The record is not of this form. The message begins with ``where`` and quotes no
            more than a few words.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(value).__name__}")
    key = "conversations" if value.get("messages") is None else "messages"
    takes_videos = stored is None or stored_videos is not None
    in_parts = _Parts(takes_videos)
    turns = _read_turns(value, key, where, in_parts)
    images = _media(images_of(value, where, takes_videos), in_parts.images, stored, "image", where)
    videos: list[Any] = []
    if takes_videos:
        videos = _media(
            _listed(value, VIDEO_KEYS, where), in_parts.videos, stored_videos, "video", where
        )
    if not images and not videos:
        _check_text_only(value, key, where, (*PICTURE_KEYS, *VIDEO_KEYS * takes_videos))
    if not videos:
        _refuse_video_marks(turns, where)
    _check_conversation(turns, len(images), len(in_parts.images), len(videos), where)
    name, kind = (_label(value.get(label), label, where) for label in ("id", "kind"))
    media = images
    if videos:
        turns = _marked(turns, len(images), len(videos))
        media = _in_order(turns, images, videos)
    return name or where, media, Conversation(turns, kind=kind)


def _media(
    named: list[Any], in_parts: list[Any], stored: Sequence[Any] | None, kind: str, where: str
) -> list[Any]:
    """Return the images or videos of a record, which it names, its parts name, or are stored."""
    if in_parts and named and not _are_same(named, in_parts):
        shown = "pictures" if kind == "image" else "videos"
        raise ValueError(
            f"{where}: parts of the messages name {len(in_parts)} {shown}, and the record others"
        )
    media = named or in_parts
    if stored is None:
        check_paths(media, where, kind)
        return media
    if any(map(_is_payload, media)):
        shown = "picture" if kind == "image" else "video"
        raise ValueError(
            f"{where}: a part or record holds a {shown}, and others are stored with it"
        )
    if media and len(media) != len(stored):
        raise ValueError(
            f"{where}: the record names {len(media)} {kind}s, {len(stored)} are stored with it"
        )
    return list(stored)


def _label(value: Any, key: str, where: str) -> str:
    """Return an ``id`` or ``kind`` as a text, which is empty if the record has none."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"{where}: {key} must be a text or a number, got {excerpt(value)}")
    return check_utf8(str(value), f"{where}: {key}")


# ---------------------------------------------------------------------- images


def images_of(record: dict[str, Any], where: str, takes_videos: bool = False) -> list[Any]:
    """Return the images under a record's :data:`tokenflex.data.media.PICTURE_KEYS`.

    Args:
        record: The record.
        where: Its place for error messages.
        takes_videos: Its :data:`tokenflex.data.media.VIDEO_KEYS` are read, too.

    Raises:
        ValueError: A plural key holds no list, keys name different images, or an image, video or
            sound stands under another known key.
    """
    _refuse(unread_key(record, (*PICTURE_KEYS, *VIDEO_KEYS * takes_videos)), where)
    return _listed(record, PICTURE_KEYS, where)


def videos_of(record: dict[str, Any], where: str) -> list[Any]:
    """Return the videos under a record's :data:`tokenflex.data.media.VIDEO_KEYS`.

    Raises:
        ValueError: A plural key holds no list, or keys name different videos.
    """
    return _listed(record, VIDEO_KEYS, where)


def _listed(record: dict[str, Any], keys: Sequence[str], where: str) -> list[Any]:
    named = {key: record[key] for key in keys if not is_empty(record.get(key))}
    if keys is VIDEO_KEYS:  # numbers, of frames for example, may stand there
        named = {k: v for k, v in named.items() if not isinstance(v, (bool, int, float))}
    kind = "images" if keys is PICTURE_KEYS else "videos"
    lists = []
    for key, value in named.items():
        if key.endswith("s") and not isinstance(value, list):
            raise ValueError(f"{where}: {key} must be a list of paths, got {excerpt(value)}")
        lists.append(value if isinstance(value, list) else [value])
    if not all(_are_same(images, lists[0]) for images in lists[1:]):
        raise ValueError(f"{where}: {' and '.join(named)} hold different {kind}")
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


def _check_text_only(record: dict[str, Any], key: str, where: str, read: Sequence[str]) -> None:
    """Refuse a record without images if any field that is not ``read`` looks like media."""
    # The other layout's turns are not read, and may say the same as these.
    _refuse(unread_media(record, ("id", "kind", *_LAYOUTS, *read)), where)
    speaker, content, _ = _LAYOUTS[key]
    for i, turn in enumerate(record[key]):
        parts = turn[content] if isinstance(turn[content], list) else []
        _refuse(unread_media(turn, (speaker, content)), f"{where}: {key}[{i}]")
        for part in parts:
            _refuse(unread_media(part, ("type", "text")), f"{where}: {key}[{i}]")


# ---------------------------------------------------------------------- turns


@dataclass
class _Parts:
    """The images and videos that parts of messages name."""

    takes_videos: bool
    images: list[Any] = field(default_factory=list)
    videos: list[Any] = field(default_factory=list)


def _read_turns(record: dict[str, Any], key: str, where: str, parts: _Parts) -> tuple[Turn, ...]:
    """Read the turns under ``key``; images that their parts name are added to ``parts``."""
    turns = record.get(key)
    if not isinstance(turns, list) or not turns:
        if turns is None:
            raise ValueError(
                f"{where}: a record must have messages, a list of turns with a role and content "
                f"(or LLaVA's conversations), got {excerpt(record)}"
            )
        wanted = "messages must be a list with at least one"
        if key == "conversations":
            wanted = "conversations must be a list of turns where there are no messages"
        raise ValueError(f"{where}: {wanted}, got {excerpt(turns)}")
    return tuple(
        _read_turn(turn, key, f"{where}: {key}[{i}]", parts) for i, turn in enumerate(turns)
    )


def _read_turn(turn: Any, key: str, where: str, parts: _Parts) -> Turn:
    speaker_key, content_key, roles = _LAYOUTS[key]
    speaker = turn.get(speaker_key) if isinstance(turn, dict) else turn
    if not isinstance(turn, dict) or not isinstance(speaker, str) or speaker not in roles:
        raise ValueError(
            f"{where} must have a {speaker_key} out of {', '.join(roles)}, got {excerpt(speaker)}"
        )
    _refuse(unread_key(turn), where)
    return Turn(roles[speaker], _read_content(turn.get(content_key), where, parts))


def _read_content(content: Any, where: str, parts: _Parts) -> str:
    if isinstance(content, list):
        content = "".join(_read_part(part, where, parts) for part in content)
    if not isinstance(content, str):
        raise ValueError(
            f"{where}: content must be a string or a list of parts, got {excerpt(content)}"
        )
    # A video's mark is judged once it is known whether the record has videos.
    _refuse_placeholder(content.replace(VIDEO_MARK, " ") if parts.takes_videos else content, where)
    return check_utf8(content, f"{where}: content")


def _refuse_placeholder(text: str, where: str) -> None:
    placeholder = find_placeholder(text)
    if placeholder is not None:
        raise ValueError(
            f"{where}: content holds {placeholder}, which a processor writes; images stand at "
            f"{IMAGE_MARK}"
        )


def _refuse_video_marks(turns: Sequence[Turn], where: str) -> None:
    for turn in turns:
        _refuse_placeholder(turn.text, where)


def _read_part(part: Any, where: str, parts: _Parts) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        _refuse(unread_key(part), where)
        return part["text"]
    if kind in ("image", "image_url"):
        parts.images += _named_in_part(part, _PART_KEYS, "picture", where)
        return IMAGE_MARK
    if parts.takes_videos and kind in ("video", "video_url"):
        parts.videos += _named_in_part(part, _VIDEO_PART_KEYS, "video", where)
        return VIDEO_MARK
    got = f"{excerpt(kind, 40)} with {excerpt(part)}" if isinstance(part, dict) else excerpt(part)
    raise ValueError(f"{where}: a part must be an image or a text, got {got}")


def _named_in_part(part: dict[str, Any], keys: Sequence[str], kind: str, where: str) -> list[Any]:
    """Return the image or video that a part names, or nothing."""
    stored = [key for key in _PAYLOAD_KEYS if not is_empty(part.get(key))]
    _refuse(unread_key(part, keys) or next(iter(stored), None), where)
    _refuse(unread_media(part, ("type", *keys)), where)
    named = [part[key] for key in keys if not is_empty(part.get(key))]
    if len(named) > 1:
        raise ValueError(f"{where}: a part must name one {kind}, got {len(named)}")
    return [source.get("url") or source if isinstance(source, dict) else source for source in named]


def _marked(turns: tuple[Turn, ...], num_images: int, num_videos: int) -> tuple[Turn, ...]:
    """Return turns that mark all images and videos, unmarked ones before the first question."""
    missing = ""
    for mark, number in ((IMAGE_MARK, num_images), (VIDEO_MARK, num_videos)):
        if not any(mark in turn.text for turn in turns):
            missing += mark * number
    first = [turn.role for turn in turns].index("user")
    marked = replace(turns[first], text=missing + turns[first].text)
    return (*turns[:first], marked, *turns[first + 1 :])


def _in_order(turns: Sequence[Turn], images: list[Any], videos: list[Any]) -> list[Any]:
    """Return images and videos in the order of their marks."""
    marks = re.findall(f"{IMAGE_MARK}|{VIDEO_MARK}", "\n".join(turn.text for turn in turns))
    next_image, next_video = iter(images), iter(videos)
    return [
        next(next_image) if mark == IMAGE_MARK else StoredVideo(next(next_video)) for mark in marks
    ]


def _check_conversation(
    turns: Sequence[Turn], num_images: int, images_in_parts: int, num_videos: int, where: str
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
    marks = sum(turn.text.count(VIDEO_MARK) for turn in turns)
    if num_videos and marks not in (0, num_videos):
        raise ValueError(
            f"{where}: messages hold {VIDEO_MARK} {marks} times for {num_videos} videos"
        )
    roles = [turn.role for turn in turns]
    if "assistant" not in roles:
        raise ValueError(f"{where}: messages hold no assistant turn to learn from")
    if "user" not in roles or roles.index("assistant") < roles.index("user"):
        raise ValueError(
            f"{where}: a user turn must come before the assistant's, got {', '.join(roles[:4])}"
        )
