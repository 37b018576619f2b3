"""Signs of pictures, videos and sounds in the fields of a record that no reader opens."""

from __future__ import annotations

import datetime
import decimal
import re
from collections.abc import Collection, Mapping
from typing import Any

from tokenflex.files import describe_payload

PICTURE_KEYS = ("images", "image", "image_paths", "image_path")
"""Keys of a record's images. The plural ones hold a list, the others a list or one image."""

VIDEO_KEYS = ("videos", "video", "video_paths", "video_path")
"""Keys of a record's videos, as :data:`PICTURE_KEYS` of its images."""

MEDIA_KEYS = {
    f"{name}{ending}"
    for name in ("audio", "frame", "img", "media", "photo", "picture", "video")
    for ending in ("", "s", "_path", "_paths", "_file", "_files", "_url", "_urls", "_bytes")
} | {
    *PICTURE_KEYS,
    *["image_url", "image_urls", "image_file", "image_files", "image_bytes", "pixel_values"],
}
"""Keys of pictures, videos and sounds, in lower case."""

MAX_DEPTH = 3
"""Levels of objects and lists within a field that are searched."""

_IMAGES = (
    "apng avif bmp cur dib eps gif heic heif ico j2c j2k jfif jp2 jpc jpe jpeg jpf jpg jpx jxl pbm "
    "pcx pfm pgm png pnm ppm psd raw svg tga tif tiff webp"
)
_VIDEOS = "3g2 3gp asf avi flv m2ts m4v mkv mov mp4 mpe mpeg mpg mts ogv webm wmv"
_SOUNDS = "aac aif aiff amr au caf flac m4a mid midi mka mp3 oga ogg opus wav weba wma"
FILE_ENDINGS = frozenset(f"{_IMAGES} {_VIDEOS} {_SOUNDS}".split())
"""Endings of files of pictures, videos and sound."""

_WORD = re.compile(r"image|img|picture|photo|video|audio|base64|b64|attachment", re.IGNORECASE)
_OF_MEDIA = re.compile(  # a number or a text about a picture, by how its key begins or ends
    r"^(?:num|n|has|is)_|_(?:ids?|uid|uuid|idx|index|nums?|numbers?|counts?|sizes?|widths?|heights?"
    r"|shapes?|resolutions?|formats?|types?|modes?|captions?|descriptions?|titles?|alt|tags?"
    r"|labels?|categor(?:y|ies)|licenses?|hash|phash|md5|sha1|sha256|scores?)$"
)
_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_FILE = re.compile(rf"\.(?:{'|'.join(FILE_ENDINGS)})\s*(?:[?#].*)?$", re.IGNORECASE | re.DOTALL)
_FILE_KEYS = ("base64", "bytes", "path", "url")
_NUMBERS = (bool, int, float, decimal.Decimal, datetime.date, datetime.time, datetime.timedelta)


def is_empty(value: Any) -> bool:
    """Return True for an empty field; tables fill missing fields with such values."""
    return value is None or (isinstance(value, (str, bytes, list, dict)) and not value)


def unread_key(fields: Mapping[str, Any], read: Collection[str] = ()) -> str | None:
    """Return the first key that is known to hold media and is not among the ``read`` ones.

    Numbers, of frames for example, may stand under such a key.
    """
    for key, value in fields.items():
        if key in read or is_empty(value) or key.lower() not in MEDIA_KEYS:
            continue
        if key.lower() in PICTURE_KEYS or not isinstance(value, (bool, int, float)):
            return key
    return None


def unread_media(fields: Mapping[Any, Any], read: Collection[str] = ()) -> str | None:
    """Return the first key whose field looks like a picture, a video or sound.

    The rule is for records without images, and general, since no list of keys is complete. A field
    looks like media if

    * its key contains "image", "img", "picture", "photo", "video", "audio", "base64", "b64" or
      "attachment" in any case, unless it names a number or a description (``image_id``,
      ``numImages``, ``video_caption``) or its value is empty, a number or a list of numbers;
    * or its value is a media file's name, a data URL, base64, bytes, or an object that JSON lacks.

    Objects and lists within a field are searched by the same rule, :data:`MAX_DEPTH` levels deep.

    Args:
        fields: Fields of a record, a message or a part.
        read: Keys that are left out, since they are read.
    """
    for key, value in fields.items():
        if key not in read and (_is_file(value) or _is_media(str(key), value, MAX_DEPTH)):
            return str(key)
    return None


def _is_media(key: str, value: Any, depth: int) -> bool:
    if is_empty(value) or isinstance(value, _NUMBERS):
        return False
    if _names_media(key) and not _is_without_media(value):
        return True
    if isinstance(value, str):
        return describe_payload(value) is not None or _FILE.search(value[-256:]) is not None
    if isinstance(value, dict):
        fields = [(str(inner), field) for inner, field in value.items()]
    elif isinstance(value, (list, tuple)):
        fields = [("", element) for element in value]
    else:
        return True  # bytes, a decoded picture or sound of a table
    return depth > 0 and any(_is_media(inner, field, depth - 1) for inner, field in fields)


def _names_media(key: str) -> bool:
    words = _HUMP.sub("_", key).lower().replace("-", "_")
    return _WORD.search(key) is not None and _OF_MEDIA.search(words) is None


def _is_without_media(value: Any, depth: int = MAX_DEPTH) -> bool:
    """Return whether a value holds only numbers, such as a box or a size, or nothing."""
    if isinstance(value, (dict, list, tuple)):
        fields = value.values() if isinstance(value, dict) else value
        return depth > 0 and all(_is_without_media(field, depth - 1) for field in fields)
    return is_empty(value) or isinstance(value, _NUMBERS)


def _is_file(value: Any) -> bool:
    """Return whether a value, or the first of a list, is an object that stands for a file."""
    if isinstance(value, list) and value:
        value = value[0]
    return isinstance(value, dict) and any(not is_empty(value.get(key)) for key in _FILE_KEYS)
