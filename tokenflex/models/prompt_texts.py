"""The prompts of a processor's call, and the images and videos that they show."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice
from typing import Any

from tokenflex.models.video_inputs import VIDEO_MARK


@dataclass(frozen=True)
class Prompts:
    """The prompts of a call.

    Attributes:
        texts: the prompts.
        image_index: for prompts that share images the image that each placeholder shows, frames
            included; None where none are shared.
        kinds: "image" or "video" for each image and video in order of appearance; shared ones
            count once.
        frames: the frames of the videos of each text, in the order of their marks. In a text
            without videos the mark is text.
    """

    texts: list[str] = field(default_factory=list)
    image_index: list[int] | None = None
    kinds: list[str] = field(default_factory=list)
    frames: list[list[int]] = field(default_factory=list)


def read_prompts(
    text: Any,
    image_token: str,
    num_images: int,
    per_group: Sequence[int] | None = None,
    frames: Sequence[int] | None = None,
    videos_per_group: Sequence[int | None] | None = None,
) -> Prompts:
    """Check the prompts of a call.

    Args:
        text: None, a prompt, a list of prompts, or a list of lists: prompts in an inner list share
            their images.
        image_token: stands in a prompt once for each of its images.
        num_images: images of the call; shared ones count once.
        per_group: images of each prompt or inner list, where they are given so.
        frames: frames of each video, for which :data:`VIDEO_MARK` stands in a prompt. Without
            videos, None, the mark is text.
        videos_per_group: videos of each prompt or inner list, where they are given so. None for
            one in which the mark is text.

    Raises:
        TypeError: a prompt is no string.
        ValueError: there are none, or placeholders, images and videos do not fit together.
    """
    if text is None:
        return Prompts(kinds=["image"] * num_images + ["video"] * len(frames or ()))
    if not isinstance(text, (str, list, tuple)):
        raise TypeError(f"text must be a string or a list of strings, got {type(text).__name__}")
    entries = [text] if isinstance(text, str) else list(text)
    if not entries:
        raise ValueError("text must hold at least one prompt, got an empty list")
    are_shared = any(isinstance(entry, (list, tuple)) for entry in entries)
    prompts: list[str] = []
    groups: list[list[str]] = []  # kinds of each
    image_index: list[int] = []
    first = 0
    frames_left = iter(frames or ())
    shown_frames: list[list[int]] = []
    for i, entry in enumerate(entries):
        name = f"text[{i}]"
        if are_shared and not isinstance(entry, (list, tuple)):
            raise TypeError(f"{name} must be a list as others are, got {type(entry).__name__}")
        group = list(entry) if are_shared else [entry]
        if not group:
            raise ValueError(f"{name} must hold at least one prompt, got an empty list")
        for j, prompt in enumerate(group):
            if not isinstance(prompt, str):
                prompt_name = f"{name}[{j}]" if are_shared else name
                raise TypeError(f"{prompt_name} must be a string, got {type(prompt).__name__}")
        has_videos = frames is not None
        if videos_per_group is not None and i < len(videos_per_group):
            has_videos = videos_per_group[i] is not None
        kinds = [_kinds(prompt, image_token, has_videos) for prompt in group]
        if any(of_prompt != kinds[0] for of_prompt in kinds):
            marks = f"{image_token} or {VIDEO_MARK}" if has_videos else image_token
            raise ValueError(
                f"{name}: prompts that share their images must each hold one {marks} per "
                f"image, got {[len(of_prompt) for of_prompt in kinds]}"
            )
        of_videos = [*islice(frames_left, kinds[0].count("video"))]
        shown_frames += [of_videos] * len(group)
        images = kinds[0].count("image") + sum(of_videos)
        image_index += [*range(first, first + images)] * len(group)
        first += images
        groups.append(kinds[0])
        prompts += group
    _check_number("image", image_token, groups, num_images, per_group)
    if frames is not None:
        given = None if videos_per_group is None else [number or 0 for number in videos_per_group]
        _check_number("video", VIDEO_MARK, groups, len(frames), given)
    shown = [kind for kinds in groups for kind in kinds]
    return Prompts(prompts, image_index if are_shared else None, shown, shown_frames)


def _kinds(prompt: str, image_token: str, has_videos: bool) -> list[str]:
    if not has_videos:
        return ["image"] * prompt.count(image_token)
    marks = re.findall(f"{re.escape(image_token)}|{re.escape(VIDEO_MARK)}", prompt)
    return ["image" if mark == image_token else "video" for mark in marks]


def _check_number(
    kind: str,
    mark: str,
    groups: Sequence[Sequence[str]],
    total: int,
    per_group: Sequence[int] | None,
) -> None:
    """Compare the marks of one kind with what is given for them."""
    held = [kinds.count(kind) for kinds in groups]
    if per_group is not None and [*per_group] != held:
        # Equal totals would show a prompt the image of another.
        raise ValueError(
            f"text: the number of {mark} tokens in the prompts should be the same "
            f"as the number of {kind}s of each, got {held} for {per_group} {kind}s"
        )
    if sum(held) != total:
        raise ValueError(
            f"text: the number of {mark} tokens in the prompts should be the same "
            f"as the number of {kind}s, got {sum(held)} (per prompt {held}) for "
            f"{total} {kind}s"
        )


def tiles_of_images(images: Sequence[int], tiles_per_image: Sequence[int]) -> list[int]:
    """Return the tiles of some images, in their order."""
    ends = [*accumulate(tiles_per_image)]
    return [
        tile
        for image in images
        for tile in range(ends[image] - tiles_per_image[image], ends[image])
    ]
