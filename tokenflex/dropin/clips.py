"""Videos of a converted processor's call: their frames, counts and places in the prompts.

Clips are read by :mod:`tokenflex.videos`, which chooses the frames. The family's own video
processor gets these frames and their times, and its text for a clip keeps its time stamps and tags:
only the runs of placeholders change their length.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.video_utils import VideoMetadata

from tokenflex.counts import AUTO, Grid, TokenCount, is_one_count, token_grid, token_grids
from tokenflex.dropin.calls import Call, ProcessorState, as_count
from tokenflex.dropin.sampling import CountStream
from tokenflex.models.call_options import check_sampling_names, options_of_videos
from tokenflex.models.image_inputs import name_images
from tokenflex.models.video_inputs import counts_of_images, name_videos
from tokenflex.videos import SHOWN_FRAMES, Clip, FrameSampling, load_video

OPTIONS = ("max_frames", "fps", "budget")
"""Our options of a call with videos."""


@dataclass(frozen=True)
class CallVideos:
    """The videos of a call.

    Attributes:
        clips: The frames that are shown.
        frames: The number of frames of each clip as the model sees them, see :func:`frames_of`.
        kinds: For each prompt, "image" or "video" for each that it shows.
    """

    clips: list[Clip]
    frames: list[int]
    kinds: list[list[str]]

    def in_order(self) -> list[int | None]:
        """Return None for each image and the number of frames of each clip, in order."""
        frames = iter(self.frames)
        return [
            next(frames) if kind == "video" else None for prompt in self.kinds for kind in prompt
        ]


def take_video_options(
    options: dict[str, Any], has_videos: bool
) -> tuple[FrameSampling, int | None]:
    """Take our options of videos out of those of a call.

    Returns:
        The rule for frames, and the budget of each clip or None.

    Raises:
        ValueError: One is given twice; a budget is given without videos; or one of transformers'
            own beside videos, where it would have no effect.
    """
    given = options_of_videos(options)
    if has_videos:
        check_sampling_names(options)
        # Chats give these names without a value, so that transformers does not choose the frames.
        for name in ("num_frames", "do_sample_frames", "video_metadata"):
            options.pop(name, None)
    elif given["budget"] is not None:
        raise ValueError(
            f"budget is for videos, of which there are none, got {given['budget']}; generate takes "
            "one for images, with num_image_tokens='auto'"
        )
    for name in OPTIONS:
        options.pop(name, None)
    if options.get("videos_kwargs") is not None:
        group = options["videos_kwargs"]
        options["videos_kwargs"] = {k: v for k, v in group.items() if k not in OPTIONS}
    max_frames = SHOWN_FRAMES if given["max_frames"] is None else given["max_frames"]
    return FrameSampling(max_frames, given["fps"]), given["budget"]


def read_videos(
    processor: Any, videos: Any, text: Any, images: Any, sampling: FrameSampling
) -> CallVideos:
    """Read the videos of a call, and find their places in its prompts, beside its images.

    Raises:
        ImportError, OSError, TypeError, ValueError: As :func:`tokenflex.videos.load_video`; or
            frames of a clip differ in size, or the prompts hold other numbers of videos.
    """
    named, per_prompt = name_videos(videos)
    clips = [
        video.source
        if isinstance(video.source, Clip)  # read before, for several calls
        else load_video(video.source, video.name, sampling)
        for video in named
    ]
    for video, clip in zip(named, clips, strict=True):
        if len(sizes := {frame.size for frame in clip.frames}) > 1:
            shown = ", ".join(f"{width} x {height}" for width, height in sorted(sizes)[:3])
            raise ValueError(f"{video.name}: its frames must be of one size, got {shown}")
    frames = [frames_of(processor, len(clip.frames)) for clip in clips]
    if text is None:
        kinds = [["image"] * len(name_images(images or [])[0]) + ["video"] * len(clips)]
    else:
        kinds = [
            _kinds(processor, prompt) for prompt in ([text] if isinstance(text, str) else text)
        ]
    held = [prompt.count("video") for prompt in kinds]
    if sum(held) != len(clips) or (per_prompt is not None and held != [n or 0 for n in per_prompt]):
        # Equal totals alone would show a prompt the video of another.
        raise ValueError(
            f"text must hold {processor.video_prompt!r} once per video, got it {held} times in the "
            f"prompts for {len(clips) if per_prompt is None else per_prompt} videos"
        )
    return CallVideos(clips, frames, kinds)


def frames_of(processor: Any, pictures: int) -> int:
    """Return the number of frames that a family's encoder makes of the pictures of a clip."""
    joined = getattr(processor.video_processor, "temporal_patch_size", None) or 1
    return -(-pictures // joined)


def _kinds(processor: Any, prompt: str) -> list[str]:
    """Return "image" or "video" for each placeholder in a prompt."""
    video = processor.video_prompt
    marks = re.findall(f"{re.escape(processor.image_prompt)}|{re.escape(video)}", prompt)
    return ["video" if mark == video else "image" for mark in marks]


def stock_videos(processor: Any, clips: Sequence[Clip]) -> dict[str, Any]:
    """Return the stock processor's arguments for clips whose frames are chosen."""
    most = max(len(clip.frames) for clip in clips)
    # Without patch grids, the video processor stacks the clips, and only some pad them.
    video_processor = processor.video_processor
    # Some families repeat the last picture of a clip with fewer than they join, others refuse it.
    joined = getattr(video_processor, "temporal_patch_size", None) or 1
    is_stacked = "video_grid_thw" not in video_processor.model_input_names
    is_stacked &= not getattr(video_processor, "do_pad", None)
    pictures = []
    for clip in clips:
        frames = torch.from_numpy(np.stack([np.asarray(frame) for frame in clip.frames]))
        if (missing := (most if is_stacked else joined) - len(frames)) > 0:
            frames = torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)])
        pictures.append(frames.permute(0, 3, 1, 2).contiguous())
    metadata = [_metadata(clip) for clip in clips]
    return {"videos": pictures, "video_metadata": metadata, "do_sample_frames": False}


def _metadata(clip: Clip) -> VideoMetadata:
    """Return what transformers knows about a video, of which some frames were chosen."""
    width, height = clip.frames[0].size
    fps, indices = None, list(clip.indices)
    if clip.times is not None and clip.duration:
        fps = clip.num_frames / clip.duration
        # Frames of a GIF last differently long; transformers divides an index by fps.
        indices = [_whole(time * fps) for time in clip.times]
    return VideoMetadata(
        total_num_frames=clip.num_frames,
        fps=fps,
        width=width,
        height=height,
        duration=clip.duration,
        frames_indices=indices,
    )


def _whole(number: float) -> Any:
    nearest = round(number)
    return nearest if abs(number - nearest) < 1e-3 else number


def call_with_videos(
    state: ProcessorState, counts: Any, videos: CallVideos, budget: int | None
) -> Call:
    """Return a running call with the count of each image and frame.

    Args:
        state: The processor's.
        counts: As for a call of :class:`tokenflex.TokenFlexProcessor` with videos.
        videos: The videos of the call.
        budget: Vision tokens of each clip, or None.

    Raises:
        ValueError: Counts and videos do not fit together.
    """
    if isinstance(counts, str):
        if counts == AUTO:
            raise ValueError(
                "num_image_tokens must be counts or a budget beside videos, got 'auto', which is "
                "for images alone"
            )
        raise ValueError(f"num_image_tokens must be counts or 'auto', got {counts!r}")
    in_order = videos.in_order()
    if counts is None:
        counts = _default_counts(state, videos, budget)
    counts = counts_of_images(counts, in_order, budget, default=0)
    if not is_one_count(counts):
        total = sum(1 if number is None else number for number in in_order)
        rest = iter(token_grids(counts, total, name="num_image_tokens"))
    else:
        rest = iter(lambda: token_grid(counts, name="num_image_tokens"), None)
    grids, clips = [], []
    for number in in_order:
        if number is None:
            grids.append(next(rest))
        else:
            clips.append([next(rest) for _ in range(number)])
    return Call(grids, clips=clips)


def _default_counts(state: ProcessorState, videos: CallVideos, budget: int | None) -> Any:
    """Return the counts of a call without counts; those of images alone beside a budget."""
    if not isinstance(state.counts, CountStream):
        return state.counts
    # One draw per prompt, for all that it shows.
    return [
        count
        for prompt in videos.kinds
        for count in [state.counts.next()] * sum(budget is None or k == "image" for k in prompt)
    ]


def text_of_clip(text: str, token: str, grids: Sequence[Grid], end_tokens: int) -> str:
    """Return a stock text for a clip with as many placeholders as its frames have vision tokens.

    Args:
        text: The stock text, with one run of placeholders for the clip, or one per frame.
        token: The placeholder.
        grids: The token grid of each frame.
        end_tokens: Learned tokens after the last frame.

    Raises:
        ValueError: The text has another number of runs.
    """
    run = re.compile(f"(?:{re.escape(token)})+")
    runs = len(run.findall(text))
    sizes = [height * width for height, width in grids]
    if runs == 1:
        sizes = [sum(sizes)]
    if runs != len(sizes):
        raise ValueError(
            f"a video has {len(sizes)} frames, but {runs} runs of placeholders in {text[:200]!r}"
        )
    sizes[-1] += end_tokens
    rest = iter(sizes)
    return run.sub(lambda _: token * next(rest), text)


def tiles_in_order(call: Call, videos: CallVideos) -> tuple[list[TokenCount], list[int] | None]:
    """Return the count of each tile and frame where frames are images, and which inputs are kept.

    Returns:
        The counts in order of appearance; and the indices of the pixels that are no padding, None
        if all of them.
    """
    counts: list[TokenCount] = []
    kept: list[int] = []
    most = max(videos.frames)
    images, clips = iter(enumerate(call.tiles)), iter(call.clips)
    first = 0
    for number in videos.in_order():
        if number is None:
            image, tiles = next(images)
            size = int(tiles)
            counts += [as_count(call.grid(image))] * size
            kept += range(first, first + size)
            first += size
        else:
            counts += [as_count(grid) for grid in next(clips)]
            kept += range(first, first + number)
            first += most
    return counts, None if len(kept) == first else kept


def counts_of_clips(call: Call) -> list[list[TokenCount]]:
    """Return the counts of each clip's frames."""
    return [[as_count(grid) for grid in clip] for clip in call.clips]
