"""M-RoPE positions of Qwen-like models: those of an image with as many cells as vision tokens.

A clip has the positions of a stock clip with as many cells in each frame. Where its frames have
different counts, each frame starts at the same height and width, at its own time.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch

from tokenflex.counts import Grid, ImageTokenCounts, TokenCount, token_grid, token_grids
from tokenflex.dropin.features import default_count
from tokenflex.dropin.variants import Variant
from tokenflex.dropin.video_features import VideoTokenCounts, frame_grids
from tokenflex.models.generation import cache_of

# The frames of each run of vision tokens in the running call, None for an image.
_RUNS: ContextVar[Iterator[list[Grid] | None] | None] = ContextVar("_RUNS", default=None)


class RopePositions(Variant):
    """Changes of a base model's class that has ``get_rope_index``."""

    _tokenflex_method = "get_rope_index"

    def get_rope_index(
        self: Any,
        input_ids: torch.Tensor,
        mm_token_type_ids: Any = None,
        image_grid_thw: torch.Tensor | None = None,
        num_image_tokens: ImageTokenCounts | None = None,
        num_video_tokens: VideoTokenCounts | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return what the stock method does, for the vision tokens in place of the patches."""
        default, merge = default_count(self.config), self.config.vision_config.spatial_merge_size
        video_grid_thw = kwargs.get("video_grid_thw")
        runs = []
        if (image_grid_thw is not None and len(image_grid_thw)) or (
            video_grid_thw is not None and len(video_grid_thw)
        ):
            runs = _vision_runs(mm_token_type_ids, kwargs.get("attention_mask"))
        clips: list[list[Grid]] = []  # the frames of each run
        if image_grid_thw is not None and len(image_grid_thw):
            lengths = [length for kind, length in runs if kind == _IMAGE]
            grids = _grids_of_runs(lengths, num_image_tokens, default)
            image_grid_thw = image_grid_thw.new_tensor(
                [[1, height * merge, width * merge] for height, width in grids]
            )
        if video_grid_thw is not None and len(video_grid_thw):
            lengths = [length for kind, length in runs if kind == _VIDEO]
            frames = video_grid_thw[:, 0].tolist()
            clips = _clips_of_runs(lengths, frame_grids(num_video_tokens, frames, default))
            kwargs["video_grid_thw"] = video_grid_thw.new_tensor(
                [
                    [len(clip), *(max(side) * merge for side in zip(*clip, strict=True))]
                    for clip in clips
                ]
            )
        rest = iter(clips)
        running = _RUNS.set(iter([next(rest) if kind == _VIDEO else None for kind, _ in runs]))
        try:
            return super().get_rope_index(
                input_ids,
                mm_token_type_ids=mm_token_type_ids,
                image_grid_thw=image_grid_thw,
                **kwargs,
            )
        finally:
            _RUNS.reset(running)

    def get_vision_position_ids(
        self, start_position: int, grid_thw: Any, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Return the positions of one run of vision tokens, whose frames may differ in size."""
        stock = super().get_vision_position_ids
        runs = _RUNS.get()
        frames = None if runs is None else next(runs)
        if frames is None or len({*frames}) == 1:
            positions: torch.Tensor = stock(start_position, grid_thw, *args, **kwargs)
            return positions
        options = inspect.signature(stock).bind(start_position, grid_thw, *args, **kwargs).arguments
        merge, interval = options.get("spatial_merge_size", 1), options.get("time_interval", 1.0)
        of_frames = []
        for time, (height, width) in enumerate(frames):
            grid = grid_thw.new_tensor([1, height * merge, width * merge])
            of_frame = stock(**{**options, "grid_thw": grid})
            of_frame[0] += int(time * interval)
            of_frames.append(of_frame)
        return torch.cat(of_frames, dim=1)


def set_rope_positions(base: Any, kwargs: dict[str, Any], counts: dict[str, Any]) -> None:
    """Add positions to the arguments of a forward, which would derive them from the patches.

    ``counts`` are ``num_image_tokens`` and ``num_video_tokens``, by name.
    """
    cache = cache_of(kwargs)
    if (
        not hasattr(base, "get_rope_index")
        or kwargs.get("position_ids") is not None
        or kwargs.get("input_ids") is None
        or kwargs.get("mm_token_type_ids") is None
        or (cache is not None and cache.get_seq_length())
    ):
        return
    stock = type(base)._tokenflex_stock_class
    names = inspect.signature(stock.get_rope_index).parameters
    inputs = {name: kwargs[name] for name in names if name in kwargs}
    kwargs["position_ids"], base.rope_deltas = base.get_rope_index(**inputs, **counts)


def rope_positions(base: Any, inputs: dict[str, Any], mask: torch.Tensor) -> torch.Tensor:
    """Return the positions [3, B, L] of the processor's outputs for a padded batch.

    ``base`` is a base model, converted or stock.
    """
    converted = isinstance(base, Variant)
    stock = type(base)._tokenflex_stock_class if converted else type(base)
    names = [*inspect.signature(stock.get_rope_index).parameters]
    names += ["num_image_tokens", "num_video_tokens"] if converted else []
    arguments = {name: inputs[name] for name in names if inputs.get(name) is not None}
    if "mm_token_type_ids" not in arguments:
        is_image = inputs["input_ids"] == base.config.image_token_id
        arguments["mm_token_type_ids"] = is_image.long()
    positions: torch.Tensor = base.get_rope_index(**arguments | {"attention_mask": mask})[0]
    return positions


_IMAGE, _VIDEO = 1, 2
"""Token types of images and videos."""


def _vision_runs(
    mm_token_type_ids: torch.Tensor, attention_mask: torch.Tensor | None
) -> list[tuple[int, int]]:
    """Return the token type and the length of each run of image or video tokens."""
    runs: list[tuple[int, int]] = []
    for i, row in enumerate(mm_token_type_ids):
        seen = row if attention_mask is None else row[attention_mask[i].bool()]
        types, lengths = seen.unique_consecutive(return_counts=True)
        pairs = zip(types.tolist(), lengths.tolist(), strict=True)
        runs += [(kind, length) for kind, length in pairs if kind in (_IMAGE, _VIDEO)]
    return runs


def _clips_of_runs(runs: list[int], clips: list[list[Grid]]) -> list[list[Grid]]:
    """Return the frames of each run of video tokens, which holds a whole clip, or one frame of it.

    Raises:
        ValueError: The runs fit neither.
    """
    frames = [[grid] for clip in clips for grid in clip]
    for candidate in (clips, frames):
        if [sum(height * width for height, width in run) for run in candidate] == runs:
            return candidate
    raise ValueError(
        f"input_ids hold runs of {runs} video placeholders, but num_video_tokens gives the clips "
        f"{[[height * width for height, width in clip] for clip in clips]} vision tokens"
    )


def _grids_of_runs(runs: list[int], counts: Any, default: TokenCount) -> list[Grid]:
    if counts is not None:
        grids = token_grids(counts, len(runs), name="num_image_tokens")
    else:
        height, width = token_grid(default)
        name = "a run of image placeholders without num_image_tokens"
        grids = [
            (height, width) if run == height * width else token_grid(run, name=name) for run in runs
        ]
    for i, (run, (height, width)) in enumerate(zip(runs, grids, strict=True)):
        if run != height * width:
            raise ValueError(
                f"input_ids hold {run} placeholders for image {i}, but num_image_tokens gives it "
                f"{height} x {width} = {height * width} vision tokens"
            )
    return grids
