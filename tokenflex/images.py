"""The one reading of a picture, from any form to the same upright RGB pixels.

Data sets, the processor, tiles, the command line and the harnesses all open pictures here, so that
a model sees the same pixels in use as in training:

* the first frame, turned as the EXIF orientation says;
* transparent pixels laid over white;
* 8 bits a channel: unsigned 16-bit values are divided by 257, and floats in 0..1 multiplied by 255
  (Pillow keeps the high byte of 16-bit color files). Other numbers are kept if they all lie in
  0..255, divided by 257 if they lie in 0..65535, and otherwise stretched from their smallest value
  to their largest.

Files may come from strangers. Only the raster formats in :data:`FORMATS` are decoded, never one for
which Pillow starts another program (EPS), and no picture of more than :func:`max_pixels` pixels.
Nor is one that a small file makes slow: of more than :data:`MAX_SCANS` scans, in more than
:data:`MAX_READS` pieces or :data:`MAX_STRIPS` strips, or with more than :data:`MAX_COMMENTS`
comments.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
    UnknownHandler,
)

import numpy as np
import torch
from PIL import ExifTags, Image

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Pillow's names of the formats that are decoded, if Pillow was built with them."""

MAX_PIXELS = 89_478_485
"""Default limit of a picture's pixels. Reading as many takes up to 1.4 GiB for a moment."""

MAX_DOWNLOAD = 256 * 2**20
"""Largest content that is read from a URL, in bytes."""

CONNECT_SECONDS = 10.0
"""Time that a server has for its next sign of life."""

DOWNLOAD_SECONDS = 30.0
"""Time that a server has for all of its answer."""

MAX_SCANS = 100
"""Most scans of a JPEG. Each costs a pass over the picture; progressive files have about 10."""

MAX_READS = 1_000_000
"""Most times that a decoder asks for more of a file: Pillow takes some formats apart in Python."""

MAX_STRIPS = 100_000
"""Most strips or tiles of a TIFF: files in use have at most one per row."""

MAX_COMMENTS = 1000
"""Most comments of a plain PPM, each of which makes Pillow copy what follows."""

Source: TypeAlias = "Image.Image | np.ndarray | torch.Tensor | bytes | str | os.PathLike[str]"
"""Any form of a picture: see :func:`load_image`."""

_PATH_CHARACTERS = 256  # of a text that may be a path; a longer one holds content
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> the turn that makes the picture upright."""

_GRAY_STEPS = {"L;2": 85, "L;4": 17}
"""Pillow's name of a depth of gray -> step from one value to the next in 8-bit levels."""

_MARKER = re.compile(rb"\xff[\x02-\xcf\xd9-\xfe]")
"""A JPEG's marker that has a length, or ends the picture."""

_SCAN, _END = 0xDA, 0xD9

OVERSHOOT = 1.5
"""Largest value of floats that are taken for 0..1, which a resize that sharpens may exceed."""


def max_pixels() -> int:
    """Return the limit of a picture's width times height.

    It is ``TOKENFLEX_MAX_PIXELS`` of the environment, or :data:`MAX_PIXELS`.

    Raises:
        ValueError: The variable is not a positive integer.
    """
    text = os.environ.get("TOKENFLEX_MAX_PIXELS", "")
    if not text:
        return MAX_PIXELS
    if not text.isascii() or not text.isdigit() or not int(text):
        raise ValueError(f"TOKENFLEX_MAX_PIXELS must be a positive integer, got {text!r}")
    return int(text)


def load_image(source: Source, name: str = "image", max_download: int | None = None) -> Image.Image:
    """Turn anything that holds a picture into upright RGB pixels.

    Args:
        source: A PIL image; an array or tensor as :func:`channels_last` takes it; the bytes of an
            image file, or an open one; a path; an http(s) URL; a data URL; or base64 text.
        name: Name of the picture in error messages.
        max_download: Largest content that is read from a URL, in bytes; :data:`MAX_DOWNLOAD` if
            None.

    Raises:
        FileNotFoundError: No file exists at the path.
        OSError: The URL cannot be read within :data:`DOWNLOAD_SECONDS`.
        TypeError: ``source`` is of another type.
        ValueError: The picture is not of a known format, is cut off, or has too many pixels. The
            message does not quote the source.
    """
    if isinstance(source, (Image.Image, np.ndarray, torch.Tensor)):
        with readable(name):
            return upright_rgb(source) if isinstance(source, Image.Image) else _from_array(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return open_image(BytesIO(source), name)
    if isinstance(source, str):
        return _from_text(source, name, max_download)
    if isinstance(source, os.PathLike):
        return open_image(Path(source))
    if hasattr(source, "read"):
        return open_image(source, name)
    raise TypeError(
        f"{name} must be a PIL image, an array, a tensor, bytes, a path, a URL or base64 text, got "
        f"{type(source).__name__}"
    )


def channels_last(
    source: np.ndarray | torch.Tensor, channels: Sequence[int] = (1, 2, 3, 4)
) -> np.ndarray:
    """Return an array or tensor of pixels as an array [H, W] or [H, W, C].

    Args:
        source: [H, W], [H, W, C] or [C, H, W]. If both ends could be channels, they are the first
            dimension of a tensor, and the last of an array.
        channels: The possible C, 1 to 4 by default (gray, gray and alpha, RGB, RGBA).

    Raises:
        ValueError: ``source`` is of another shape, or has no pixels.
    """
    if 0 in source.shape:
        raise ValueError(f"it has no pixels, but shape {list(source.shape)}")
    is_tensor = isinstance(source, torch.Tensor)
    if isinstance(source, torch.Tensor):
        source = source.detach().cpu()
        # NumPy has no bfloat16.
        source = (source.float() if source.dtype == torch.bfloat16 else source).numpy()
    if source.ndim == 2:
        return source
    is_first = source.ndim == 3 and source.shape[0] in channels
    is_last = source.ndim == 3 and source.shape[-1] in channels
    if not (is_first or is_last):
        raise ValueError(
            "its shape must be [height, width], [height, width, channels] or [channels, height, "
            f"width] with {channels[0]} to {channels[-1]} channels, got {list(source.shape)}"
        )
    return source.transpose(1, 2, 0) if is_first and (is_tensor or not is_last) else source


def open_image(file: Path | BinaryIO, name: str | None = None) -> Image.Image:
    """Read an image file as upright RGB pixels.

    Args:
        file: A path, or an open file.
        name: Name of the picture in error messages; ``image file PATH`` if None.

    Raises:
        FileNotFoundError: No file exists at the path.
        ValueError: The picture is not of a known format, is cut off, or has too many pixels.
    """
    with opened_image(file, name) as image:
        return upright_rgb(image)


def image_size(file: Path | BinaryIO, name: str | None = None) -> tuple[int, int]:
    """Return (height, width) in pixels of the upright picture, from the file's head alone.

    The arguments and errors are those of :func:`open_image`.
    """
    with opened_image(file, name) as image:
        if image.format == "PNG" and _has_late_metadata(image):
            image.load()  # the orientation may stand behind the pixels
        width, height = image.size
        turned = image.format != "TIFF" and _orientation(image) >= 5  # Pillow turns TIFF itself
        return (width, height) if turned else (height, width)


# ---------------------------------------------------------------------- files


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Turn any error of a decoder into a ValueError that names the picture."""
    try:
        yield
    except Image.UnidentifiedImageError:  # its message quotes memory addresses
        reason = f"Pillow finds no picture in it of the formats {', '.join(FORMATS)}"
        raise ValueError(f"{name} cannot be read: {reason}") from None
    except MemoryError:
        raise
    except Exception as error:  # each format's decoder raises its own kinds
        reason = str(error) or type(error).__name__
        raise ValueError(f"{name} cannot be read: {reason[:300]}") from error


@contextmanager
def opened_image(file: Path | BinaryIO, name: str | None) -> Iterator[Image.Image]:
    """Open a picture and read only its head."""
    if isinstance(file, Path):
        path = str(file)
        shown = path if len(path) <= 256 else f"of a path of {len(path)} characters"
        name = name or f"image file {shown}"
        if not _is_file(file):
            problem = "is not a file" if os.path.exists(file) else "does not exist"
            raise FileNotFoundError(f"{name} {problem}")
    limit = max_pixels()
    if Image.MAX_IMAGE_PIXELS is not None and limit > max(MAX_PIXELS, Image.MAX_IMAGE_PIXELS):
        Image.MAX_IMAGE_PIXELS = limit  # Pillow's own bound would refuse what ours was raised for
    with (
        readable(name or "image"),
        file.open("rb") if isinstance(file, Path) else nullcontext(file) as content,
        Image.open(_Pieces(content), formats=_formats()) as image,
    ):
        _check_pixels(image)
        yield image


class _Pieces:
    """An open file that is read in at most :data:`MAX_READS` pieces."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._left = file, MAX_READS

    def read(self, size: int = -1) -> bytes:
        self._left -= 1
        if self._left < 0:
            raise ValueError(f"its format cuts it into more than {MAX_READS} pieces")
        return self._file.read(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(format for format in FORMATS if format in Image.OPEN)


def _check_pixels(image: Image.Image) -> None:
    limit = max_pixels()
    if image.width * image.height > limit:
        raise ValueError(
            f"it has {image.width} x {image.height} pixels, more than the {limit} that "
            "TOKENFLEX_MAX_PIXELS allows"
        )


def _check_passes(image: Image.Image) -> None:
    """Refuse a file whose decoding takes far longer than its pixels and bytes tell."""
    strips = len(getattr(image, "tile", ()))
    if strips > MAX_STRIPS:
        raise ValueError(f"it has {strips} strips or tiles, more than {MAX_STRIPS}")
    file = getattr(image, "fp", None)
    if file is None or image.format not in ("JPEG", "MPO", "PPM"):
        return
    position = file.tell()
    file.seek(0)
    content = file.read()
    file.seek(position)
    if image.format == "PPM":
        if content[:2] in (b"P1", b"P2", b"P3") and content.count(b"#") > MAX_COMMENTS:
            raise ValueError(f"it has more than {MAX_COMMENTS} comments")
    elif content.count(b"\xff\xda") > MAX_SCANS and _jpeg_scans(content) > MAX_SCANS:
        raise ValueError(f"it has more than {MAX_SCANS} scans, each a pass over the picture")


def _jpeg_scans(content: bytes) -> int:
    """Return the number of a JPEG's scans, counted up to one more than :data:`MAX_SCANS`.

    The bytes of its marker also occur by chance in metadata, and behind the picture in the video
    that some cameras append.
    """
    scans, position = 0, 2
    while scans <= MAX_SCANS and (found := _MARKER.search(content, position)):
        marker, position = content[found.start() + 1], found.end()
        if marker == _END:
            break
        scans += marker == _SCAN
        position += int.from_bytes(content[position : position + 2], "big")
    return scans


def _has_late_metadata(image: Image.Image) -> bool:
    """Return whether a PNG has metadata behind its pixels, which are not decoded."""
    file: Any = image.fp  # type: ignore[attr-defined]
    position = file.tell()
    try:
        file.seek(8)
        pixels_seen = False
        while len(head := file.read(8)) == 8:
            kind = head[4:]
            if kind == b"IEND":
                return False
            if pixels_seen and kind in (b"eXIf", b"iTXt", b"tEXt", b"zTXt"):
                return True
            pixels_seen = pixels_seen or kind == b"IDAT"
            file.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR)  # and its checksum
        return False
    finally:
        file.seek(position)


# ---------------------------------------------------------------------- texts


def _from_text(source: str, name: str, max_download: int | None) -> Image.Image:
    content = find_content(source, name, max_download)
    return open_image(content) if isinstance(content, Path) else open_image(content, name)


def find_content(
    source: str,
    name: str,
    max_download: int | None = None,
    kind: str = "image",
    is_content: Callable[[bytes], bool] = lambda content: True,
) -> Path | BytesIO:
    """Return the file that a text names, or the content that it links or holds.

    Args:
        source: An http(s) URL, a data URL in base64, the path of a file, or base64 text.
        name: Name of the picture or video in error messages.
        max_download: Largest content that is read from a URL, in bytes; :data:`MAX_DOWNLOAD` if
            None.
        kind: "image" or "video", for error messages.
        is_content: Return whether what a short base64 text holds may be a picture or video. If not,
            the text is the path of something that does not exist.

    Raises:
        FileNotFoundError: The text looks like a path, and no file exists there.
        OSError: The URL cannot be read within :data:`DOWNLOAD_SECONDS`.
        ValueError: The text is none of these, or empty, or the content is too large.
    """
    if not source:
        raise ValueError(
            f"{name} must be an existing file, a URL or base64 text, got an empty text"
        )
    if source.startswith(("http://", "https://")):
        limit = MAX_DOWNLOAD if max_download is None else max_download
        return BytesIO(_download(source, name, limit))
    if source.startswith("data:"):
        head, comma, payload = source.partition(",")
        if not comma or not head.endswith(";base64"):
            raise ValueError(f"{name} must be a data URL in base64, got one without ';base64,'")
        return BytesIO(_from_base64(payload, name))
    if _is_file(Path(source)):
        return Path(source)
    try:
        content = _from_base64(source, name)
        if len(source) > _PATH_CHARACTERS or is_content(content):
            return BytesIO(content)
        raise FileNotFoundError(f"{kind} file {source} does not exist")
    except ValueError:
        if _is_path(source):
            raise FileNotFoundError(f"{kind} file {source} does not exist") from None
        raise ValueError(
            f"{name} must be an existing file, a URL or base64 text, got a text of {len(source)} "
            "characters"
        ) from None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long for a path, or with a null byte
        return False


def _is_path(text: str) -> bool:
    """Return whether a text that names no file looks like a path, not like damaged base64."""
    is_base64 = re.fullmatch(r"[\w+/-]*=*", text, re.ASCII) and len(text) > 32
    return len(text) <= _PATH_CHARACTERS and text.isprintable() and not is_base64


def _from_base64(text: str, name: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{name} is not base64: {error}") from None


def _download(url: str, name: str, limit: int) -> bytes:
    """Read at most ``limit`` bytes from a URL, within :data:`DOWNLOAD_SECONDS`."""
    shown = url.split("?")[0][:200]  # a query may hold a secret
    request = Request(url, headers={"User-Agent": "tokenflex"})
    try:
        with _deadline() as opener, opener.open(request, timeout=CONNECT_SECONDS) as response:
            content: bytes = response.read(limit + 1)
    except (OSError, ValueError, HTTPException) as error:
        reason = str(error)[:200].replace(url, shown)
        raise OSError(f"{name}: {shown} cannot be read: {reason}") from None
    if len(content) > limit:
        raise ValueError(f"{name}: {shown} sends more than {limit} bytes")
    return content


@contextmanager
def _deadline() -> Iterator[OpenerDirector]:
    """Give an opener of http(s) URLs whose connections end after :data:`DOWNLOAD_SECONDS`.

    The timeout of a socket is for each piece of an answer, so that a server could send it byte by
    byte, its head and its TLS included, for ever.

    Raises:
        TimeoutError: The time is over.
    """
    connections: list[socket.socket] = []
    is_over = threading.Event()

    def end() -> None:
        is_over.set()
        for connection in [*connections]:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    class Connection(HTTPConnection):
        def connect(self) -> None:
            super().connect()
            connections.append(self.sock.dup())  # TLS takes the socket itself
            if is_over.is_set():
                end()

    class SecureConnection(HTTPSConnection, Connection):
        pass

    class Handler(HTTPHandler):
        def http_open(self, request: Request) -> Any:
            return self.do_open(Connection, request)

    class SecureHandler(HTTPSHandler):
        def https_open(self, request: Request) -> Any:
            return self.do_open(SecureConnection, request)

    opener = OpenerDirector()
    for handler in (
        *(ProxyHandler(), UnknownHandler(), Handler(), SecureHandler()),
        *(HTTPDefaultErrorHandler(), HTTPRedirectHandler(), HTTPErrorProcessor()),
    ):
        opener.add_handler(handler)
    timer = threading.Timer(DOWNLOAD_SECONDS, end)
    timer.daemon = True
    timer.start()
    try:
        yield opener
    except (OSError, ValueError, HTTPException):
        if not is_over.is_set():
            raise
    finally:
        timer.cancel()
        for connection in connections:
            connection.close()
    if is_over.is_set():
        raise TimeoutError(f"it takes longer than {DOWNLOAD_SECONDS:g} seconds")


# ---------------------------------------------------------------------- pixels


def upright_rgb(image: Image.Image) -> Image.Image:
    """Convert to upright, opaque, 8-bit RGB; return the image itself if it is so already."""
    _check_pixels(image)  # one that a caller opened may not be decoded yet
    if getattr(image, "tile", None):
        _check_passes(image)
    _scale_transparency(image)
    image.load()
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        levels = _gray_levels(values)
        if isinstance(transparent := image.info.get("transparency"), int):
            levels[values == transparent] = 255
        rgb = Image.fromarray(levels).convert("RGB")
    elif image.has_transparency_data:
        opaque = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        rgb = Image.alpha_composite(Image.new("RGBA", opaque.size, "white"), opaque).convert("RGB")
    elif type(image) is Image.Image and image.mode == "RGB":
        rgb = image
    else:
        rgb = image.convert("RGB")  # of a file in RGB, a copy that holds no file
    turn = _TURNS.get(_orientation(image))
    if turn is not None:
        rgb = rgb.transpose(turn)
    if rgb is not image:
        rgb.info = {}  # an orientation that was applied must not be applied again
    return rgb


def _scale_transparency(image: Image.Image) -> None:
    """Scale the transparent color of a PNG to 8 bits, as Pillow scales its pixels."""
    transparent, tiles = image.info.get("transparency"), getattr(image, "tile", ())
    if image.format != "PNG" or transparent is None or not tiles:
        return
    depth = tiles[0][3]
    if depth in _GRAY_STEPS and isinstance(transparent, int):
        image.info["transparency"] = transparent * _GRAY_STEPS[depth]
    elif depth == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in transparent)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1..8; 1 (upright) if it is missing or damaged."""
    try:
        # Pillow's own method for PNG would decode the pixels first.
        value = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:  # a damaged EXIF block does not spoil the pixels
        return 1
    return value if value in _TURNS else 1


def _from_array(array: np.ndarray | torch.Tensor) -> Image.Image:
    levels = _gray_levels(channels_last(array))
    if levels.ndim == 3 and levels.shape[-1] == 1:
        levels = levels[..., 0]
    return upright_rgb(Image.fromarray(np.ascontiguousarray(levels)))


def _gray_levels(values: np.ndarray) -> np.ndarray:
    """Convert numbers of any type to uint8, by the rule at the top of this module."""
    kind = values.dtype.kind
    if values.dtype == np.uint8:
        return values
    if kind == "b":
        return values.astype(np.uint8) * np.uint8(255)
    if kind not in "iuf":
        raise ValueError(f"it must hold integers or floats, got {values.dtype}")
    if kind == "f" and not np.isfinite(values).all():
        raise ValueError("it holds values that are not finite")
    if values.dtype.itemsize == 2 and kind == "u":
        return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 65535:
        start, scale = low, 255 / max(high - low, np.finfo(np.float64).tiny)
    elif kind == "f" and high <= OVERSHOOT:
        start, scale = 0.0, 255.0
    else:
        start, scale = 0.0, 1 / 257 if high > 255 else 1.0
    levels = np.empty(values.shape, np.uint8)
    for rows in range(0, len(values), 64):  # a whole picture in float64 would take gigabytes
        scaled = (values[rows : rows + 64] - np.float64(start)) * scale
        levels[rows : rows + 64] = np.rint(scaled.clip(0, 255))
    return levels
