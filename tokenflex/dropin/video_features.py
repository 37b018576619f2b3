"""Video features of a converted model: from the video inputs of a family to vision tokens.

A frame is an image with a count. Where the encoder joins two pictures to one patch in time, the
two are one frame.
"""

from __future__ import annotations

import functools
import inspect
from itertools import accumulate
from typing import Any, TypeAlias

import torch

from tokenflex.counts import Grid, TokenCount, is_one_count, token_grids
from tokenflex.dropin.families import Deepstack
from tokenflex.dropin.features import (
    ImageOutputs,
    Patches,
    default_count,
    encoder_fields,
    flat_grids,
    project_patches,
    recorded_encoder,
)
from tokenflex.models.video_inputs import counts_of_images

VideoTokenCounts: TypeAlias = "TokenCount | list[TokenCount] | list[TokenCount | list[TokenCount]]"
"""One count for all frames; one per frame of all clips; or per clip, one or those of its frames."""

_PIXELS = "pixel_values_videos"


@functools.cache
def video_input_names(stock: Any) -> list[str]:
    """Return the names of the arguments of a stock base class's ``get_video_features``."""
    parameters = inspect.signature(stock.get_video_features).parameters
    return [name for name in parameters if name not in ("self", "kwargs")]


def frame_grids(counts: Any, frames: list[int], default: TokenCount) -> list[list[Grid]]:
    """Return the token grid of each frame of each clip.

    Args:
        counts: As :data:`VideoTokenCounts`, or None for the default.
        frames: The number of frames of each clip.
        default: The default count.

    Raises:
        ValueError: The numbers of entries do not fit.
    """
    name = "num_video_tokens"
    if counts is None:
        counts = default
    of_frames = counts_of_images(counts, frames, None, default, name=name)
    grids = iter(token_grids(of_frames, sum(frames), name=name))
    return [[next(grids) for _ in range(number)] for number in frames]


def video_features(
    base: Any, video_inputs: dict[str, Any], counts: Any, options: dict[str, bool]
) -> ImageOutputs:
    """Encode the video inputs of a converted base model to vision tokens, one [N, D] per frame.

    Learned tokens after a clip are with those of its last frame. ``options`` may hold
    ``output_hidden_states`` and ``output_attentions``.
    """
    family = type(base)._tokenflex_family
    lengths = _lengths(counts)
    pixels = video_inputs[_PIXELS]
    if isinstance(pixels, torch.Tensor) and pixels.ndim == 5:
        # Clips of fewer frames than others are padded, and their counts tell how many they have.
        frames = [pixels.shape[1]] * len(pixels) if lengths is None else lengths
        if len(frames) != len(pixels) or any(number > pixels.shape[1] for number in frames):
            raise ValueError(
                f"num_video_tokens must have a list of counts for each of the {len(pixels)} clips, "
                f"of {pixels.shape[1]} frames at most, got lists of {frames}"
            )
        pixels = [clip[:number] for clip, number in zip(pixels, frames, strict=True)]
        video_inputs = {**video_inputs, _PIXELS: pixels}
    with recorded_encoder(base, options) as encoder_outputs:
        patches, frames = _encode_clips(base, video_inputs)
    grids = frame_grids(counts, frames, default_count(base.config))
    outputs = project_patches(base, patches, [grid for clip in grids for grid in clip])
    tokens = list(outputs.pooler_output)
    if family.clip_end is not None:
        for last in accumulate(frames):
            tokens[last - 1] = torch.cat([tokens[last - 1], family.clip_end(base)])
    outputs.pooler_output = tokens
    return ImageOutputs(**{**outputs, **encoder_fields(encoder_outputs)})


def _lengths(counts: Any) -> list[int] | None:
    """Return the number of frames of each clip, where all clips have a list of counts."""
    if counts is None or isinstance(counts, str) or is_one_count(counts):
        return None
    if not all(isinstance(entry, list) for entry in counts):
        return None
    return [len(entry) for entry in counts]


def _encode_clips(base: Any, video_inputs: dict[str, Any]) -> tuple[Patches, list[int]]:
    clips = type(base)._tokenflex_family.videos(base, **video_inputs)
    rows, grids = flat_grids(clips.grids, base.config.tokenflex["patch_merge"])
    layers = clips.grids.layers if isinstance(clips.grids, Deepstack) else []
    patches = Patches(rows, tuple(grids), tuple(flat_grids(maps) for maps in layers))
    return patches, clips.frames
