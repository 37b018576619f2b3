"""Videos of a call: clips of frames, each frame an image of one tile with a count of its own.

A prompt holds :data:`VIDEO_MARK` once per clip. The frames' image prompts stand in its place, one
after another, so that the model sees a clip as several images.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from os import PathLike
from typing import Any

import numpy as np
import torch
from PIL import Image

from tokenflex.counts import TokenCount, is_one_count
from tokenflex.models.image_inputs import NamedImage
from tokenflex.videos import FrameSampling, is_frames, load_video
from tokenflex_kernels.checks import check_count

VIDEO_MARK = "<video>"
"""The mark of a video in texts."""


class NamedVideo:
    """A video as the caller gave it, and its name in errors.

    No dataclass: transformers 5.24 makes dictionaries of those in messages.
    """

    __slots__ = ("name", "source")

    def __init__(self, source: Any, name: str) -> None:
        self.source = source
        self.name = name

    def frames(self, sampling: FrameSampling) -> list[NamedImage]:
        """Read the frames that are shown.

        Raises:
            ImportError, OSError, TypeError, ValueError: As :func:`tokenflex.videos.load_video`.
        """
        name = None if isinstance(self.source, PathLike) else self.name  # its path says more
        frames = load_video(self.source, name, sampling).frames
        return [NamedImage(frame, f"{self.name} frame {i}") for i, frame in enumerate(frames)]


def name_videos(
    videos: Any, name: str = "videos"
) -> tuple[list[NamedVideo], list[int | None] | None]:
    """Bring the videos of a call into one list, in order of appearance.

    Args:
        videos: a video, a list of videos, or a list of those per prompt, None for a prompt in which
            the mark is text. A list of pictures in memory is one video; an array or tensor of five
            dimensions is a list of videos.
        name: their name in errors.

    Returns:
        The videos; and the number of each prompt's videos where they come as a list per prompt,
        else None. A prompt without a list has None in place of the number.

    Raises:
        TypeError: an entry is no video.
    """
    if _is_video(videos):
        return [_named(videos, name)], None
    entries = _entries(videos, name)
    if all(map(_is_video, entries)):
        return [_named(video, f"{name}[{i}]") for i, video in enumerate(entries)], None
    flat: list[NamedVideo] = []
    per_prompt: list[int | None] = []
    for i, entry in enumerate(entries):
        if entry is None:
            per_prompt.append(None)
            continue
        group = [entry] if _is_video(entry) else _entries(entry, f"{name}[{i}]")
        for j, video in enumerate(group):
            if not _is_video(video):
                raise TypeError(
                    f"{name}[{i}][{j}] must be a video: a path, bytes, a list of frames in memory, "
                    f"or an array of four dimensions, got {type(video).__name__}"
                )
            flat.append(_named(video, f"{name}[{i}][{j}]"))
        per_prompt.append(len(group))
    return flat, per_prompt


def _is_video(video: Any) -> bool:
    is_file = isinstance(video, (str, bytes, bytearray, PathLike))
    return isinstance(video, NamedVideo) or is_file or hasattr(video, "read") or is_frames(video)


def _entries(videos: Any, name: str) -> list[Any]:
    if isinstance(videos, (list, tuple)):
        return list(videos)
    if isinstance(videos, (np.ndarray, torch.Tensor)) and videos.ndim == 5:
        return list(videos)
    got = type(videos).__name__
    if isinstance(videos, (Image.Image, np.ndarray, torch.Tensor)):
        got = f"one picture, a {got}"
    raise TypeError(
        f"{name} must be a video, a list of videos or a list of those per prompt, got {got}"
    )


def _named(video: Any, name: str) -> NamedVideo:
    return video if isinstance(video, NamedVideo) else NamedVideo(video, name)


def image_limits(frames: Sequence[int | None], max_tiles: int | None) -> list[int | None]:
    """Return the most tiles of each image in order, 1 for a frame.

    Args:
        frames: for each image None, and for each clip its number of frames.
        max_tiles: of an image; None for the processor's own.
    """
    limits: list[int | None] = []
    for number in frames:
        limits += [max_tiles] if number is None else [1] * number
    return limits


def counts_of_images(
    counts: Any,
    frames: Sequence[int | None],
    budget: int | None,
    default: TokenCount,
    *,
    name: str = "num_image_tokens",
) -> Any:
    """Return the counts of a call with clips as one per image or frame, or one for all.

    Args:
        counts: one count for all or "auto"; a list with one entry per image or frame; or a list
            with one entry per image or clip, of which a clip's is a count for all of its frames or
            a list of those. With a budget, one count for all images or a list of theirs.
        frames: for each image None, and for each clip its number of frames.
        budget: vision tokens of each clip, see :func:`spread_evenly`; None for no budget.
        default: the count of images without one, beside clips with a budget.
        name: the name of ``counts`` in errors.

    Raises:
        TypeError: ``budget`` is no int, or a count is neither an int nor a pair.
        ValueError: the numbers of entries do not fit.
    """
    if isinstance(counts, (np.ndarray, torch.Tensor)) and counts.ndim:
        counts = counts.tolist()
    if budget is not None:
        return _with_budget(counts, frames, budget, default)
    if counts is None or isinstance(counts, str) or is_one_count(counts):
        return counts
    if not isinstance(counts, Sequence):
        return counts  # refused as for images
    entries = list(counts)
    total = sum(1 if number is None else number for number in frames)
    if len(entries) == total and len(entries) != len(frames):
        return entries
    if len(entries) != len(frames):
        raise ValueError(
            f"{name} must have one entry per image or frame, {total}, or one per image "
            f"or video, {len(frames)}, got {len(entries)} entries for {_described(frames)}"
        )
    flat: list[Any] = []
    for i, (entry, number) in enumerate(zip(entries, frames, strict=True)):
        if number is None:
            flat.append(entry)
        elif isinstance(entry, list):
            if len(entry) != number:
                raise ValueError(
                    f"{name}[{i}] must have one count per frame, got {len(entry)} for "
                    f"the {number} frames of a video"
                )
            flat += entry
        else:
            flat += [entry] * number
    return flat


def _with_budget(
    counts: Any, frames: Sequence[int | None], budget: int, default: TokenCount
) -> list[Any]:
    images = sum(number is None for number in frames)
    if counts is None or is_one_count(counts):
        of_images = [default if counts is None else counts] * images
    elif isinstance(counts, str) or not isinstance(counts, Sequence):
        raise ValueError(
            f"num_image_tokens must be the counts of the images beside a budget for each video, "
            f"got {counts!r}"
        )
    else:
        of_images = list(counts)
    if len(of_images) != images:
        raise ValueError(
            "num_image_tokens must have one entry per image beside a budget for each video, got "
            f"{len(of_images)} entries for {_described(frames)}"
        )
    remaining = iter(of_images)
    flat: list[Any] = []
    for number in frames:
        flat += [next(remaining)] if number is None else spread_evenly(budget, number)
    return flat


def _described(frames: Sequence[int | None]) -> str:
    of_videos = [number for number in frames if number is not None]
    return f"{len(frames) - len(of_videos)} images and videos of {of_videos} frames"


def spread_evenly(budget: int, num_frames: int) -> list[int]:
    """Spread a budget of vision tokens over the frames of a clip, before they are seen.

    Every frame gets the largest square that all can have. What is left raises frames that lie
    evenly over the clip to the next square.

    Raises:
        TypeError: ``budget`` is no int.
        ValueError: it is less than one token a frame.

    Example:
        >>> spread_evenly(24, 4)
        [9, 4, 4, 4]
    """
    check_count("budget", budget)
    if budget < num_frames:
        raise ValueError(
            f"budget must be at least {num_frames}, a vision token for each frame of a video, got "
            f"{budget}; show fewer frames by max_frames"
        )
    side = isqrt(budget // num_frames)
    low, high = side * side, (side + 1) ** 2
    raised = (budget - num_frames * low) // (high - low)
    # Frame i is raised where i * raised / num_frames passes a whole number: raised < num_frames.
    return [
        high if -(-(i + 1) * raised // num_frames) > -(-i * raised // num_frames) else low
        for i in range(num_frames)
    ]


def in_order(
    kinds: Sequence[str], images: Sequence[Any], clips: Sequence[Sequence[Any]]
) -> tuple[list[Any], list[int | None]]:
    """Return images and frames in order of appearance, and for each clip its number of frames.

    Args:
        kinds: "image" or "video" for each that appears.
        images: the images.
        clips: the frames of each clip.

    Returns:
        The images and frames; and None for each image, a number for each clip.
    """
    next_image = iter(images)
    next_clip = iter(clips)
    shown: list[Any] = []
    frames: list[int | None] = []
    for kind in kinds:
        if kind == "image":
            shown.append(next(next_image))
            frames.append(None)
        else:
            clip = next(next_clip)
            shown += clip
            frames.append(len(clip))
    return shown, frames
