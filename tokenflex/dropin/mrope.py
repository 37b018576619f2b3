"""M-RoPE positions of Qwen-like models: those of an image with as many cells as vision tokens."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from tokenflex.counts import Grid, ImageTokenCounts, TokenCount, token_grid, token_grids
from tokenflex.dropin.features import default_count
from tokenflex.dropin.variants import Variant
from tokenflex.models.generation import cache_of


class RopePositions(Variant):
    """Changes of a base model's class that has ``get_rope_index``."""

    _tokenflex_method = "get_rope_index"

    def get_rope_index(
        self: Any,
        input_ids: torch.Tensor,
        mm_token_type_ids: Any = None,
        image_grid_thw: torch.Tensor | None = None,
        num_image_tokens: ImageTokenCounts | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return what the stock method does, for the vision tokens in place of the patches."""
        if image_grid_thw is not None and len(image_grid_thw):
            runs = _image_runs(mm_token_type_ids, kwargs.get("attention_mask"))
            grids = _grids_of_runs(runs, num_image_tokens, default_count(self.config))
            merge = self.config.vision_config.spatial_merge_size
            image_grid_thw = image_grid_thw.new_tensor(
                [[1, height * merge, width * merge] for height, width in grids]
            )
        return super().get_rope_index(
            input_ids, mm_token_type_ids=mm_token_type_ids, image_grid_thw=image_grid_thw, **kwargs
        )


def set_rope_positions(base: Any, kwargs: dict[str, Any], counts: Any) -> None:
    """Add positions to the arguments of a forward, which would derive them from the patches."""
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
    kwargs["position_ids"], base.rope_deltas = base.get_rope_index(
        **inputs, num_image_tokens=counts
    )


def rope_positions(base: Any, inputs: dict[str, Any], mask: torch.Tensor) -> torch.Tensor:
    """Return the positions [3, B, L] of the processor's outputs for a padded batch.

    ``base`` is a base model, converted or stock.
    """
    converted = isinstance(base, Variant)
    stock = type(base)._tokenflex_stock_class if converted else type(base)
    names = [*inspect.signature(stock.get_rope_index).parameters]
    names += ["num_image_tokens"] if converted else []
    arguments = {name: inputs[name] for name in names if inputs.get(name) is not None}
    if "mm_token_type_ids" not in arguments:
        is_image = inputs["input_ids"] == base.config.image_token_id
        arguments["mm_token_type_ids"] = is_image.long()
    positions: torch.Tensor = base.get_rope_index(**arguments | {"attention_mask": mask})[0]
    return positions


def _image_runs(mm_token_type_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> list[int]:
    """Return the length of each run of image tokens, whose token type is 1."""
    runs: list[int] = []
    for i, row in enumerate(mm_token_type_ids):
        seen = row if attention_mask is None else row[attention_mask[i].bool()]
        types, lengths = seen.unique_consecutive(return_counts=True)
        runs += lengths[types == 1].tolist()
    return runs


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
