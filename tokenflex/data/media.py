"""Signs of pictures, videos and sounds in fields that no reader opens.

A record without pictures that holds one of them would be trained on as text alone. The rule is
general, because lists of keys never end: see :func:`unread_media`.
"""

from __future__ import annotations

import datetime
import decimal
import re
from collections.abc import Collection, Mapping
from typing import Any

from tokenflex.files import describe_payload

MAX_DEPTH = 3
"""Levels of objects and lists within a field that are looked at."""

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
_PLAIN = (str, bool, int, float, decimal.Decimal, datetime.date, datetime.time, datetime.timedelta)


def unread_media(fields: Mapping[Any, Any], read: Collection[str] = ()) -> str | None:
    """Return the key of the first field that holds a picture, a video or sound.

    A field does if

    * its key contains "image", "img", "picture", "photo", "video", "audio", "base64", "b64" or
      "attachment" in any case, unless it names a number or a description (``image_id``,
      ``numImages``, ``video_caption``) or its value is empty, a number or a list of numbers;
    * or its value is a media file's name, a data URL, base64, bytes, or an object that JSON lacks.

    Objects and lists within a field are looked at by the same rule, :data:`MAX_DEPTH` levels deep.

    Args:
        fields: Of a record, a message or a part.
        read: Keys that are left out, since they are read.
    """
    for key, value in fields.items():
        if key not in read and (_is_file(value) or _is_media(str(key), value, MAX_DEPTH)):
            return str(key)
    return None


def is_empty(value: Any) -> bool:
    """Return whether a field holds nothing; tables fill the fields that a row lacks so."""
    return value is None or value in ("", b"") or (isinstance(value, (list, dict)) and not value)


def _is_media(key: str, value: Any, depth: int) -> bool:
    if is_empty(value) or (isinstance(value, _PLAIN) and not isinstance(value, str)):
        return False
    if _names_media(key) and not _is_without_media(value):
        return True
    if isinstance(value, str):
        return is_media_text(value)
    if isinstance(value, dict):
        return depth > 0 and any(
            _is_media(str(inner), field, depth - 1) for inner, field in value.items()
        )
    if isinstance(value, (list, tuple)):
        return depth > 0 and any(_is_media("", element, depth - 1) for element in value)
    return True  # bytes, a decoded picture or sound of a table


def _names_media(key: str) -> bool:
    return (
        _WORD.search(key) is not None
        and _OF_MEDIA.search(_HUMP.sub("_", key).lower().replace("-", "_")) is None
    )


def _is_without_media(value: Any, depth: int = MAX_DEPTH) -> bool:
    """Return whether a value holds numbers alone, such as a box or a size, or nothing."""
    if isinstance(value, (dict, list, tuple)):
        fields = value.values() if isinstance(value, dict) else value
        return depth > 0 and all(_is_without_media(field, depth - 1) for field in fields)
    return is_empty(value) or (isinstance(value, _PLAIN) and not isinstance(value, str))


def is_media_text(text: str) -> bool:
    """Return whether a text is a media file's name, a data URL or base64."""
    if describe_payload(text) is not None:
        return True
    return _FILE.search(text[-256:]) is not None


def _is_file(value: Any) -> bool:
    """An object that stands for a file, alone or first in a list."""
    if isinstance(value, list) and value:
        value = value[0]
    return isinstance(value, dict) and any(not is_empty(value.get(key)) for key in _FILE_KEYS)
