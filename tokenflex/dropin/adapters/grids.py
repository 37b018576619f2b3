"""Families whose processor gives the patches of each image as (frames, height, width)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from tokenflex.counts import Grid
from tokenflex.dropin.adapters.sizes import tokens_of_images
from tokenflex.dropin.families import (
    MROPE,
    NO_VIDEOS_YET,
    RECURRENT,
    Clips,
    Deepstack,
    PatchGrids,
    register_family,
    split_grids,
    vision_encoder,
)
from tokenflex_kernels.versions import is_older

# Before 5.23 Cosmos takes no positions of text.
_PACKED_FROM_5_23 = (
    "its packed rows need transformers 5.23 or newer" if is_older("transformers", "5.23") else ""
)


def _cells(grid_thw: torch.Tensor, merge: int) -> list[Grid]:
    """Return (height, width) of each image or frame, in cells of ``merge`` x ``merge`` patches."""
    return [
        (height // merge, width // merge)
        for frames, height, width in grid_thw.tolist()
        for _ in range(frames)
    ]


def _raster(cells: torch.Tensor, grids: list[Grid], merge: int) -> list[torch.Tensor]:
    """Reorder [cells, merge**2 * C] to one [H, W, C] per image.

    Cells are in row-major order, and so are the patches within each. ``grids`` counts cells.
    """
    return [
        image.unflatten(2, (merge, merge, -1)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
        for image in split_grids(cells, grids)
    ]


# ---- a projector inside the vision encoder


class Unmerged(nn.Module):
    """Stand-in for Qwen's PatchMerger that only concatenates the patches of a merged cell."""

    def __init__(self, merge_size: int) -> None:
        super().__init__()
        self.merge_size = merge_size

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """[sum of H*W, C] -> [sum of H*W / merge_size**2, merge_size**2 * C]."""
        return patches.reshape(-1, self.merge_size**2 * patches.shape[-1])


def _unmerged(base: Any) -> Unmerged:
    return Unmerged(vision_encoder(base).spatial_merge_size)


def _merged_tokens(base: Any, pixel_values: Any, image_grid_thw: Any, **_: Any) -> torch.Tensor:
    return vision_encoder(base)(pixel_values.to(base.dtype), grid_thw=image_grid_thw).pooler_output


def _clips_as_images(
    base: Any, pixel_values_videos: torch.Tensor, video_grid_thw: torch.Tensor, **_: Any
) -> Clips:
    """Return the frames of clips, which the encoder takes as it takes images."""
    patch_grids = type(base)._tokenflex_family.patch_grids
    grids = patch_grids(base, pixel_values=pixel_values_videos, image_grid_thw=video_grid_thw)
    return Clips(grids, video_grid_thw[:, 0].tolist())


def _identity(base: Any) -> nn.Identity:
    return nn.Identity()


_register_merger = partial(
    register_family,
    stock_projector="visual.merger",
    stand_in=_unmerged,
    patch_merge="vision_config.spatial_merge_size",
    stock_tokens=_merged_tokens,
    no_prompt_embeds=MROPE,
    videos=_clips_as_images,
)


@_register_merger("qwen2_vl", vision_width="embed_dim")
@_register_merger("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "cohere_compass", "cosmos3_omni")
@_register_merger("exaone4_5", no_prompt_embeds="")
@_register_merger("qwen3_5", "qwen3_5_moe", "qwen4_exp", no_packing=RECURRENT)
@_register_merger(
    "dots3_note",
    stock_projector="vision_tower.merger",
    no_prompt_embeds="",
    transformers="5.23",
    videos=None,
    no_videos=NO_VIDEOS_YET,
)
def _qwen(
    base: Any, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor, **_: Any
) -> PatchGrids | Deepstack:
    encoder = vision_encoder(base)
    outputs = encoder(pixel_values.to(base.dtype), grid_thw=image_grid_thw)
    merge = encoder.spatial_merge_size
    cells = _cells(image_grid_thw, merge)
    patches = _raster(outputs.pooler_output, cells, merge)
    layers = getattr(outputs, "deepstack_features", None)
    if layers is None:
        return patches
    return Deepstack(patches, [split_grids(layer, cells) for layer in layers])


# Its grids count merged cells, and its merger is given them concatenated.
@_register_merger(
    "inkling2",
    stock_projector="vision_tower.merger",
    stand_in=_identity,
    stock_tokens=tokens_of_images,
    no_packing="its short convolutions run across the boundaries of samples",
    no_prompt_embeds="",
    videos=None,
)
def _inkling2(
    base: Any, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor, **_: Any
) -> PatchGrids:
    cells = base.vision_tower(pixel_values.to(base.dtype), image_grid_thw).pooler_output
    merge = base.config.vision_config.spatial_merge_size
    return _raster(cells, _cells(image_grid_thw, 1), merge)


def _glm_clips(
    base: Any, pixel_values_videos: torch.Tensor, video_grid_thw: torch.Tensor, **_: Any
) -> Clips:
    """Return the frames of clips, each of which the encoder takes as an image."""
    frames = video_grid_thw[:, 0]
    grids = video_grid_thw.repeat_interleave(frames, dim=0)
    grids[:, 0] = 1
    return Clips(_glm(base, pixel_values_videos, grids), frames.tolist())


_register_glm = partial(
    _register_merger,
    stand_in=_identity,
    vision_width="out_hidden_size",
    patch_merge=1,
    videos=_glm_clips,
    frames_share_placeholder=True,
    no_mixture="its model tells frames from images by nothing but their order",
)


# GLM's encoder ends with a convolution, which stays: one patch per merged cell.
@_register_glm("glm4v", "glm46v", "glmga", "glm4v_moe", "glm_ocr")
@_register_glm(
    "glm5_next",
    no_packing=RECURRENT,
    no_prompt_embeds="",
    videos=None,
    frames_share_placeholder=False,
    no_mixture="",
    no_videos=NO_VIDEOS_YET,
)
def _glm(
    base: Any, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor, **_: Any
) -> PatchGrids:
    cells = base.visual(pixel_values.to(base.dtype), grid_thw=image_grid_thw).pooler_output
    return split_grids(cells, _cells(image_grid_thw, base.visual.spatial_merge_size))


# ---- a projector beside the vision encoder


@register_family(
    "lfm3_vl",
    videos=_clips_as_images,
    patch_merge="vision_config.spatial_merge_size",
    no_packing="its short convolutions run across the boundaries of samples",
    transformers="5.23",
)
# Before 5.23 its tokens attend to padding, and the samples of a packed row to each other.
@register_family(
    "minimax_m3_vl",
    no_videos="its processor cuts a clip into chunks, each with a grid of its own",
    patch_merge="vision_config.spatial_merge_size",
    transformers="5.23",
)
@register_family(
    "ernie4_5_vl_moe",
    no_videos="its projector joins frames in time",
    projector="resampler_model",
    patch_merge="vision_config.spatial_merge_size",
    no_prompt_embeds=MROPE,
)
@register_family(
    "cosmos3_edge",
    no_videos=NO_VIDEOS_YET,
    projector="projector",
    patch_merge="vision_config.spatial_merge_size",
    no_packing=_PACKED_FROM_5_23,
    no_prompt_embeds=MROPE,
)
def _blocks(
    base: Any, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor, **_: Any
) -> PatchGrids:
    outputs = vision_encoder(base)(pixel_values.to(base.dtype), grid_thw=image_grid_thw)
    merge = base.config.vision_config.spatial_merge_size
    patches = outputs.last_hidden_state.flatten(0, -2)  # those of a cell after one another
    cells = patches.reshape(-1, merge**2 * patches.shape[-1])
    return _raster(cells, _cells(image_grid_thw, merge), merge)


@register_family(
    "kimi_k25",
    projector="mm_projector",
    patch_merge="vision_config.merge_kernel_size",
    no_videos="its encoder means the frames of a chunk in time",
)
def _kimi(
    base: Any, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor, **_: Any
) -> PatchGrids:
    encoder = base.vision_tower
    cells = encoder(pixel_values.to(base.dtype), grid_thw=image_grid_thw).pooler_output
    merge = encoder.merge_kernel_size[0]
    return _raster(cells.flatten(1), _cells(image_grid_thw, merge), merge)


@register_family(
    "paddleocr_vl",
    projector="projector",
    patch_merge="vision_config.spatial_merge_size",
    no_prompt_embeds=MROPE,
)
def _paddleocr(
    base: Any, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor, **_: Any
) -> PatchGrids:
    outputs = base.visual(
        pixel_values=pixel_values.to(base.dtype).unsqueeze(0), grid_thw=image_grid_thw
    )
    return split_grids(outputs.last_hidden_state.flatten(0, -2), _cells(image_grid_thw, 1))


# A linear projector of the cells that Qwen2.5's encoder has merged.
@register_family(
    "hyperclovax_vision_v2",
    projector="projector",
    vision_width="out_hidden_size",
    videos=_clips_as_images,
)
def _hyperclovax(
    base: Any, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor, **_: Any
) -> PatchGrids:
    encoder = base.vision_model
    cells = encoder(pixel_values.to(base.dtype), grid_thw=image_grid_thw).pooler_output
    return split_grids(cells, _cells(image_grid_thw, encoder.spatial_merge_size))


@register_family(
    "video_llama_3",
    projector="projector",
    no_videos="its processor leaves out the tokens of patches that do not change",
)
def _video_llama_3(
    base: Any,
    pixel_values: torch.Tensor,
    image_grid_thw: torch.Tensor,
    image_merge_sizes: torch.Tensor,
    **_: Any,
) -> PatchGrids:
    outputs = base.vision_model(
        pixel_values=pixel_values.to(base.dtype),
        grid_thw=image_grid_thw,
        merge_sizes=image_merge_sizes,
    )
    grids = [
        grid
        for image, merge in zip(image_grid_thw.split(1), image_merge_sizes.tolist(), strict=True)
        for grid in _cells(image, merge)
    ]
    return split_grids(outputs.last_hidden_state, grids)


def _width_of_adapter(config: Any) -> int:
    width: int = config.projector_hidden_size
    return width


# Of its projector, the MLP stays before the patch grids and the norm without weights is left out.
@register_family("muse_glimmer", projector="vision_projection", vision_width=_width_of_adapter)
@register_family(
    "muse_spark",
    projector="vision_projection",
    vision_width=_width_of_adapter,
    transformers="5.20",
    no_videos=NO_VIDEOS_YET,
)
def _muse(
    base: Any, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor, **_: Any
) -> PatchGrids:
    outputs = base.vision_tower(pixel_values=pixel_values.to(base.dtype), grid_thw=image_grid_thw)
    cells = base.vision_adapter(outputs.last_hidden_state)
    return split_grids(cells, _cells(image_grid_thw, base.config.vision_config.merge_size))
