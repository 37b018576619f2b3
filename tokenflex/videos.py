"""The one reading of a clip: from any form to a few upright RGB frames and the times of them.

Data sets, the processor and the command line all read clips here. A clip is a folder of pictures in
the natural order of their names, a GIF or an animated WebP, a list or array of frames, or a video
file. Pillow decodes the first three, always. Video files take a decoder that transformers knows,
PyAV (``pip install 'tokenflex[video]'``), torchcodec or OpenCV.

Frames are chosen before anything is decoded, and each is read as
:func:`tokenflex.images.load_image` reads a picture: turned upright, and laid over white.

Files may come from strangers. A GIF or WebP is looked through without decoding it, and refused if
it is cut off, has more than :data:`MAX_FRAMES` frames or takes more than :data:`MAX_WALKED_PIXELS`
to decode up to the last frame that is needed. The chosen frames of a clip have at most
:data:`MAX_PICTURES` times the pixels of the largest picture, :func:`tokenflex.images.max_pixels`.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch
from PIL import Image

from tokenflex.counts import Grid
from tokenflex.images import (
    find_content,
    image_size,
    load_image,
    max_pixels,
    open_image,
    opened_image,
    readable,
    upright_rgb,
)
from tokenflex_kernels.checks import check_count

SHOWN_FRAMES = 32
"""Default of the most frames of a clip that are shown."""

MAX_FRAMES = 10_000
"""Most frames of a GIF or WebP, of a list or of a folder."""

MAX_WALKED_PIXELS = 1_000_000_000
"""Most pixels of a GIF or WebP that are decoded on the way to its last frame that is needed."""

MAX_PICTURES = 4
"""Most pixels of a clip's chosen frames together, as a multiple of those of one picture."""

_FRAMES = "avif bmp gif jfif jp2 jpe jpeg jpg pbm pgm png pnm ppm tif tiff webp"
FRAME_ENDINGS = frozenset(_FRAMES.split())
"""Endings of the files in a folder that are frames."""

_NO_DELAY = 0.1  # seconds of a frame that states none, as browsers show it
_SIGNATURES = (
    re.compile(rb"^.{4}(?:ftyp|moov|mdat|wide|free)", re.DOTALL),  # MP4, QuickTime
    re.compile(rb"^\x1a\x45\xdf\xa3"),  # Matroska, WebM
    re.compile(rb"^RIFF.{4}AVI ", re.DOTALL),
    re.compile(rb"^OggS|^FLV|^\x00\x00\x01\xba|^\x00\x00\x01\xb3"),
    re.compile(rb"^\x47.{187}\x47", re.DOTALL),  # MPEG transport stream
    re.compile(rb"^\x30\x26\xb2\x75\x8e\x66\xcf\x11"),  # WMV
)
"""Beginnings of video files. Of others, such as playlists, a decoder may open further files."""


@dataclass(frozen=True)
class FrameSampling:
    """A rule for the frames of a clip that are shown.

    With ``fps`` the frame at each multiple of 1 / fps seconds is taken, and without it each frame.
    If these are more than ``max_frames``, that many of them are taken, evenly from the first to the
    last. No frame is taken twice.

    Args:
        max_frames: Most frames of a clip.
        fps: Frames per second; None for all.

    Raises:
        TypeError, ValueError: ``max_frames`` is not an int of at least 1, or ``fps`` not a number
            above 0.
    """

    max_frames: int = SHOWN_FRAMES
    fps: float | None = None

    def __post_init__(self) -> None:
        check_count("max_frames", self.max_frames)
        if self.fps is None:
            return
        if isinstance(self.fps, bool) or not isinstance(self.fps, (int, float)):
            raise TypeError(f"fps must be a number or None, got {self.fps!r:.60}")
        if not 0 < self.fps < math.inf:
            raise ValueError(f"fps must be a number above 0, got {self.fps}")

    def choose(self, num_frames: int, ends: Sequence[float] | None = None) -> list[int]:
        """Return the indices of the frames to show, rising.

        Args:
            num_frames: Frames of the clip.
            ends: The second at which each frame ends; the first one starts at 0. None if the clip
                has no times.

        Raises:
            ValueError: ``fps`` is set and the clip has no times.
        """
        chosen: Sequence[int] = range(num_frames)
        if self.fps is not None:
            if ends is None:
                raise ValueError(
                    f"fps={self.fps} needs a clip with times, a GIF, a WebP or a video file; of "
                    "others max_frames are taken"
                )
            # The number of multiples of 1 / fps before each frame's end, despite rounding.
            before = np.ceil(np.asarray(ends, np.float64) * self.fps - 1e-6)
            chosen = np.flatnonzero(np.diff(before, prepend=0.0) > 0).tolist() or [0]
        if len(chosen) <= self.max_frames:
            return list(chosen)
        places = np.linspace(0, len(chosen) - 1, self.max_frames).round().astype(int)
        return [chosen[place] for place in places.tolist()]


EACH_FRAME = FrameSampling()
"""The default rule: each frame, up to :data:`SHOWN_FRAMES`."""


@dataclass(frozen=True)
class Clip:
    """The frames of a clip that are shown.

    Attributes:
        frames: Upright RGB pictures, one or more.
        times: The second at which each starts; None if the clip has no times.
        indices: Their indices among all frames of the clip.
        num_frames: All frames of the clip.
        duration: Its seconds; None if it has no times.
    """

    frames: list[Image.Image]
    times: list[float] | None
    indices: list[int]
    num_frames: int
    duration: float | None


def load_video(
    source: Any,
    name: str | None = None,
    sampling: FrameSampling = EACH_FRAME,
    *,
    check_frame: Callable[[Path], object] = lambda path: None,
) -> Clip:
    """Read the frames of a clip that are shown.

    Args:
        source: The path of a folder of pictures, of a GIF or WebP, or of a video file; the bytes of
            one of these files, or an open one; an http(s) or data URL; a list of pictures, each as
            :func:`tokenflex.images.load_image` takes it; or an array or tensor of them, of four
            dimensions.
        name: Name of the clip in error messages; ``video`` and its path if None, and for a path
            in a string.
        sampling: Chooses the frames.
        check_frame: Called with the path of each frame of a folder before it is read; may raise.

    Raises:
        FileNotFoundError: Nothing exists at the path.
        ImportError: A video file is given, and no decoder is installed.
        OSError: The URL cannot be read.
        TypeError: ``source`` is of another type.
        ValueError: The clip has no frames, is cut off, too large, of an unknown format, or has no
            times for ``sampling``.
    """
    reader = _open(source, name, check_frame)
    with readable(reader.name):
        chosen = sampling.choose(reader.num_frames, reader.ends)
    frames = reader.read(chosen)
    ends = reader.ends
    if ends is None:
        return Clip(frames, None, chosen, reader.num_frames, None)
    times = [0.0 if index == 0 else ends[index - 1] for index in chosen]
    return Clip(frames, times, chosen, reader.num_frames, ends[-1])


def frame_sizes(
    source: Any,
    name: str | None = None,
    sampling: FrameSampling = EACH_FRAME,
    *,
    check_frame: Callable[[Path], object] = lambda path: None,
) -> list[Grid]:
    """Return (height, width) of each frame that :func:`load_video` reads, without decoding any.

    The arguments and errors are those of :func:`load_video`.
    """
    reader = _open(source, name, check_frame)
    with readable(reader.name):
        chosen = sampling.choose(reader.num_frames, reader.ends)
    return reader.sizes(chosen)


def is_frames(source: Any) -> bool:
    """Return whether ``source`` is a list of pictures in memory, or an array of four dimensions."""
    if isinstance(source, (np.ndarray, torch.Tensor)):
        return source.ndim == 4
    return (
        isinstance(source, (list, tuple))
        and bool(source)
        and all(
            isinstance(frame, Image.Image)
            or (isinstance(frame, (np.ndarray, torch.Tensor)) and frame.ndim in (2, 3))
            for frame in source
        )
    )


def is_animated(source: Any) -> bool:
    """Return whether ``source``, a path or the bytes of a file, is a GIF or WebP of several frames.

    A damaged file is not.
    """
    if isinstance(source, (bytes, bytearray)):
        content: BinaryIO = BytesIO(source)
    elif isinstance(source, (str, os.PathLike)) and os.path.isfile(source):
        content = open(source, "rb")  # noqa: SIM115
    else:
        return False
    with content:
        head = content.read(12)
        content.seek(0)
        try:
            if _is_gif(head):
                return len(_scan_gif(content)[0]) > 1
            return _is_webp(head) and len(_scan_webp(content)[0]) > 1
        except ValueError:
            return False


def frame_files(folder: Path, name: str | None = None) -> list[Path]:
    """Return the pictures in a folder in the natural order of their names, 2 before 10.

    Raises:
        ValueError: The folder holds no pictures, or more than :data:`MAX_FRAMES`.
    """
    name = name or f"video {folder}"
    files: list[Path] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            ending = entry.name.rpartition(".")[2].lower()
            if ending not in FRAME_ENDINGS or entry.name.startswith(".") or not entry.is_file():
                continue
            files.append(Path(entry.path))
            if len(files) > MAX_FRAMES:
                raise ValueError(f"{name} cannot be read: it has more than {MAX_FRAMES} frames")
    if not files:
        raise ValueError(f"{name} cannot be read: it holds no pictures")
    return sorted(files, key=lambda file: _natural(file.name))


def _natural(name: str) -> tuple[tuple[tuple[int, str], ...], str]:
    parts = re.findall(r"\d+|\D+", name)
    key = tuple((int(part[:40]), "") if part.isdecimal() else (-1, part) for part in parts)
    return key, name


# ---------------------------------------------------------------------- readers


class _Reader(Protocol):
    """A clip of which only the head was read."""

    name: str
    """Its name in error messages."""

    @property
    def num_frames(self) -> int:
        """Frames of the clip, 1 or more."""

    @property
    def ends(self) -> Sequence[float] | None:
        """The second at which each frame ends; None for a clip without times."""

    def sizes(self, indices: Sequence[int]) -> list[Grid]:
        """Return (height, width) of the frames at rising ``indices``."""

    def read(self, indices: Sequence[int]) -> list[Image.Image]:
        """Return the frames at rising ``indices``."""


def _open(source: Any, name: str | None, check_frame: Callable[[Path], object]) -> _Reader:
    shown = name or "video"
    if isinstance(source, str) and not _is_folder(source):
        found = find_content(source, shown, kind="video", is_content=_is_clip)
        return _of_file(found, f"video {found}" if isinstance(found, Path) else shown)
    if isinstance(source, str):
        source, name = Path(source), None
    if isinstance(source, os.PathLike):
        path = Path(source)
        name = name or f"video {path}"
        if path.is_dir():
            return _Folder(path, name, check_frame)
        if not path.is_file():
            problem = "is not a file" if path.exists() else "does not exist"
            raise FileNotFoundError(f"{name} {problem}")
        return _of_file(path, name)
    if isinstance(source, (list, tuple)):
        return _Frames([*source], shown)
    if isinstance(source, (np.ndarray, torch.Tensor)):
        if source.ndim != 4:
            raise ValueError(
                f"{shown} must have the shape [frames, height, width, channels] or [frames, "
                f"channels, height, width], got {list(source.shape)}"
            )
        return _Frames(source, shown)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _of_file(BytesIO(source), shown)
    if hasattr(source, "read"):
        return _of_file(source, shown)
    raise TypeError(
        f"{shown} must be a path, bytes, a URL, a list of frames or an array of four dimensions, "
        f"got {type(source).__name__}"
    )


def _is_folder(path: str) -> bool:
    try:
        return bool(path) and Path(path).is_dir()  # an empty path is that of the current folder
    except (OSError, ValueError):  # too long for a path, or with a null byte
        return False


def _is_clip(content: bytes) -> bool:
    """Return whether a file begins as a GIF, a WebP or a known video file does."""
    return _is_gif(content) or _is_webp(content) or _is_video_file(content)


def _is_gif(head: bytes) -> bool:
    return head[:6] in (b"GIF87a", b"GIF89a")


def _is_webp(head: bytes) -> bool:
    return head[:4] == b"RIFF" and head[8:12] == b"WEBP"


def _is_video_file(head: bytes) -> bool:
    return any(signature.match(head) for signature in _SIGNATURES)


def _of_file(file: Path | BinaryIO, name: str) -> _Reader:
    with file.open("rb") if isinstance(file, Path) else nullcontext(file) as content:
        content.seek(0)
        head = content.read(192)
        content.seek(0)
        with readable(name):
            if _is_gif(head):
                return _Animation(file, name, *_scan_gif(content))
            if _is_webp(head):
                return _Animation(file, name, *_scan_webp(content))
            if not _is_video_file(head):
                raise ValueError(
                    "it is neither a GIF, a WebP, nor a video file of a known kind (MP4, "
                    "QuickTime, Matroska, WebM, AVI, Ogg, FLV, MPEG, WMV)"
                )
    return _VideoFile(file, name)


def _check_number(num_frames: int) -> None:
    if num_frames > MAX_FRAMES:
        raise ValueError(f"it has more than {MAX_FRAMES} frames")


def _check_memory(sizes: Iterable[Grid]) -> None:
    """Refuse frames that would take too much memory together."""
    limit = MAX_PICTURES * max_pixels()
    total = 0
    for number, (height, width) in enumerate(sizes, 1):
        total += height * width
        if total > limit:
            raise ValueError(
                f"the first {number} of its chosen frames have {total} pixels, more than {limit}, "
                f"{MAX_PICTURES} times what TOKENFLEX_MAX_PIXELS allows; take fewer of them by "
                "max_frames or fps"
            )


class _Frames:
    """Frames in memory, or a list of anything that holds a picture."""

    ends = None

    def __init__(self, frames: Any, name: str) -> None:
        self._frames, self.name = frames, name
        self.num_frames = len(frames)
        with readable(name):
            if not self.num_frames:
                raise ValueError("it has no frames")
            _check_number(self.num_frames)

    def sizes(self, indices: Sequence[int]) -> list[Grid]:
        return [(frame.height, frame.width) for frame in self.read(indices)]

    def read(self, indices: Sequence[int]) -> list[Image.Image]:
        frames = []
        for index in indices:
            frames.append(load_image(self._frames[index], f"{self.name} frame {index}"))
            with readable(self.name):
                _check_memory((frame.height, frame.width) for frame in frames)
        return frames


class _Folder:
    """Pictures in a folder."""

    ends = None

    def __init__(self, folder: Path, name: str, check_frame: Callable[[Path], object]) -> None:
        self._files, self._check_frame = frame_files(folder, name), check_frame
        self.name = name
        self.num_frames = len(self._files)

    def _chosen(self, indices: Sequence[int]) -> Iterator[Path]:
        for index in indices:
            self._check_frame(self._files[index])
            yield self._files[index]

    def sizes(self, indices: Sequence[int]) -> list[Grid]:
        sizes = [image_size(file) for file in self._chosen(indices)]
        with readable(self.name):
            _check_memory(sizes)
        return sizes

    def read(self, indices: Sequence[int]) -> list[Image.Image]:
        self.sizes(indices)
        return [open_image(file) for file in self._chosen(indices)]


@dataclass
class _Animation:
    """A GIF or WebP.

    Attributes:
        file: Its path, or the open file.
        name: Its name in errors.
        canvases: (height, width) of each frame as it is stored.
        durations: Seconds of each frame.
    """

    file: Path | BinaryIO
    name: str
    canvases: list[Grid]
    durations: list[float]
    ends: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.ends = [*accumulate(self.durations)]

    @property
    def num_frames(self) -> int:
        return len(self.durations)

    def _check(self, indices: Sequence[int]) -> None:
        with readable(self.name):
            height, width = max(self.canvases, key=lambda size: size[0] * size[1])
            walked = (indices[-1] + 1) * height * width
            if walked > MAX_WALKED_PIXELS:
                raise ValueError(
                    f"{indices[-1] + 1} frames of {width} x {height} pixels lead to the last one "
                    f"that is needed, more than {MAX_WALKED_PIXELS} pixels"
                )
            _check_memory(self.canvases[index] for index in indices)

    def _content(self) -> Path | BinaryIO:
        if not isinstance(self.file, Path):
            self.file.seek(0)
        return self.file

    def sizes(self, indices: Sequence[int]) -> list[Grid]:
        self._check(indices)
        first = image_size(self._content(), self.name)
        turned = first == self.canvases[0][::-1]
        return [self.canvases[index][:: -1 if turned else 1] for index in indices]  # type: ignore[misc]

    def read(self, indices: Sequence[int]) -> list[Image.Image]:
        self._check(indices)
        frames = []
        with opened_image(self._content(), self.name) as image:
            for index in indices:
                image.seek(index)
                frames.append(upright_rgb(image))
        return frames


class _VideoFile:
    """A video file, for one of the decoders that transformers knows."""

    def __init__(self, file: Path | BinaryIO, name: str) -> None:
        self._file, self.name = file, name
        self._decode = _decoder(name, needs_path=not isinstance(file, Path))
        with readable(name):
            try:
                self._run(_raise_head)
            except _HeadRead as head:
                self._head = head.metadata
            frames, rate = self._head.total_num_frames, self._head.fps
            if not frames:
                raise ValueError(
                    "it does not state its number of frames; write it anew as MP4, or give its "
                    "frames as a folder of pictures"
                )
        self.num_frames: int = int(frames)
        self.ends = None
        if rate:
            self.ends = (np.arange(1, self.num_frames + 1) / float(rate)).tolist()

    def _run(self, sample: Callable[..., Any]) -> Any:
        if isinstance(self._file, Path):
            # An absolute path: a decoder takes "concat:a" for a command.
            return self._decode(str(self._file.absolute()), sample)
        self._file.seek(0)
        return self._decode(BytesIO(self._file.read()), sample)

    def sizes(self, indices: Sequence[int]) -> list[Grid]:
        size = (int(self._head.height or 0), int(self._head.width or 0))
        with readable(self.name):
            _check_memory([size] * len(indices))
        return [size] * len(indices)

    def read(self, indices: Sequence[int]) -> list[Image.Image]:
        self.sizes(indices)
        with readable(self.name):
            frames, _ = self._run(lambda metadata, **_: np.array(indices))
            if len(frames) != len(indices):
                raise ValueError(
                    f"it is cut off: {len(frames)} of the {len(indices)} chosen frames were found"
                )
        return [
            load_image(frame, f"{self.name} frame {index}")
            for index, frame in zip(indices, frames, strict=True)
        ]


class _HeadRead(Exception):
    """Ends a decoder once it has read the head of a file."""

    def __init__(self, metadata: Any) -> None:
        super().__init__("only the head was needed")
        self.metadata = metadata


def _raise_head(metadata: Any, **_: Any) -> None:
    raise _HeadRead(metadata)


def _decoder(name: str, *, needs_path: bool) -> Callable[[Any, Callable[..., Any]], Any]:
    """Return a function that decodes chosen frames of a video file."""
    from transformers import video_utils

    available = {
        "torchcodec": video_utils.is_torchcodec_available,
        "pyav": video_utils.is_av_available,
        "opencv": video_utils.is_cv2_available,
    }
    if needs_path:
        del available["opencv"]  # which reads files alone
    for backend, is_available in available.items():
        if is_available():
            return video_utils.VIDEO_DECODERS[backend]
    raise ImportError(
        f"{name} is a video file, and no decoder is installed for it: pip install "
        "'tokenflex[video]' (PyAV), or torchcodec. A folder of frames, a GIF or a WebP needs none"
    )


# ---------------------------------------------------------------------- heads


def _scan_gif(file: BinaryIO) -> tuple[list[Grid], list[float]]:
    """Return the (height, width) and seconds of each frame of a GIF, without decoding any.

    A frame that reaches beyond the canvas enlarges it, as in Pillow.

    Raises:
        ValueError: The file is cut off, has no frames, or more than :data:`MAX_FRAMES`.
    """

    def take(size: int) -> bytes:
        content = file.read(size)
        if len(content) < size:
            raise ValueError(f"it is cut off in frame {len(durations)}")
        return content

    def skip_blocks() -> None:
        while length := take(1)[0]:
            take(length)

    durations: list[float] = []
    canvases: list[Grid] = []
    head = take(13)
    width, height = (int.from_bytes(head[i : i + 2], "little") for i in (6, 8))
    if head[10] & 128:
        take(3 << (head[10] & 7) + 1)
    delay = 0
    # Some files have no end mark, or waste behind their frames.
    while (kind := file.read(1)) in (b"!", b",", b"\0"):
        if kind == b"!":
            if take(1) == b"\xf9":
                length = take(1)[0]
                control = take(length)
                if length >= 4:
                    delay = int.from_bytes(control[1:3], "little")
                if not length:
                    continue
            skip_blocks()
        elif kind == b",":
            left, top, wide, high = (
                int.from_bytes(pair, "little") for pair in (take(2), take(2), take(2), take(2))
            )
            flags = take(1)[0]
            if flags & 128:
                take(3 << (flags & 7) + 1)
            take(1)
            skip_blocks()
            width, height = max(width, left + wide), max(height, top + high)
            canvases.append((height, width))
            durations.append(delay / 100 or _NO_DELAY)
            delay = 0
            _check_number(len(durations))
    if not durations:
        raise ValueError("it has no frames")
    return canvases, durations


def _scan_webp(file: BinaryIO) -> tuple[list[Grid], list[float]]:
    """Return the (height, width) and seconds of each frame of a WebP, without decoding any.

    Raises:
        ValueError: The file is cut off, or has more than :data:`MAX_FRAMES` frames.
    """
    file.seek(12)
    canvas: Grid | None = None
    durations: list[float] = []
    while len(head := file.read(8)) == 8:
        kind, size = head[:4], int.from_bytes(head[4:], "little")
        content = file.read(min(size, 16))
        if len(content) < min(size, 16):
            raise ValueError(f"it is cut off in frame {len(durations)}")
        if kind == b"VP8X":
            width, height = (int.from_bytes(content[i : i + 3], "little") + 1 for i in (4, 7))
            canvas = (height, width)
        elif kind == b"ANMF":
            durations.append(int.from_bytes(content[12:15], "little") / 1000 or _NO_DELAY)
            _check_number(len(durations))
        file.seek(size - len(content) + size % 2, os.SEEK_CUR)
    file.seek(0)
    if not durations or canvas is None:  # a picture
        return [image_size(file, "it")], [_NO_DELAY]
    return [canvas] * len(durations), durations
