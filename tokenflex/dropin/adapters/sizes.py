"""Families whose encoder takes images of different sizes, in patches."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from tokenflex.dropin.families import (
    RECURRENT,
    PatchGrids,
    chosen_layers,
    feature_layers,
    register_family,
    split_grids,
)


@register_family("mistral3", patch_merge="spatial_merge_size")
@register_family("mistral_large4", patch_merge="spatial_merge_size", transformers="5.22")
def pixtral(
    base: Any,
    pixel_values: torch.Tensor,
    image_sizes: Any,
    vision_feature_layer: Any = None,
    **_: Any,
) -> PatchGrids:
    """Return the patch grids of a Pixtral encoder."""
    layers = feature_layers(base.config) if vision_feature_layer is None else vision_feature_layer
    outputs = base.vision_tower(
        pixel_values.to(base.dtype), image_sizes=image_sizes, output_hidden_states=True
    )
    # All images are in one row of patches, each at its own size.
    rows = chosen_layers(outputs, layers, drop_class_token=False).squeeze(0)
    return _pixtral_grids(rows, image_sizes, base.vision_tower.patch_size)


@register_family("lighton_ocr", projector="vision_projection", patch_merge="spatial_merge_size")
def _lighton_ocr(base: Any, pixel_values: torch.Tensor, image_sizes: Any, **_: Any) -> PatchGrids:
    encoder = base.vision_encoder
    rows = encoder(pixel_values.to(base.dtype), image_sizes=image_sizes).last_hidden_state
    return _pixtral_grids(rows.squeeze(0), image_sizes, encoder.patch_size)


def _pixtral_grids(rows: torch.Tensor, image_sizes: Any, patch: int) -> list[torch.Tensor]:
    sizes = torch.as_tensor(image_sizes).tolist()
    return split_grids(rows, [(height // patch, width // patch) for height, width in sizes])


def _naflex_tiles(processor: Any, image_inputs: Any, index: int) -> int:
    tiles = int(image_inputs["image_rows"][index]) * int(image_inputs["image_cols"][index])
    return tiles + (1 if tiles > 1 and processor.image_processor.use_thumbnail else 0)


@register_family(
    "lfm2_vl",
    patch_merge="downsample_factor",
    tiles=_naflex_tiles,
    no_packing="its short convolutions run across the boundaries of samples",
)
def _lfm2_vl(
    base: Any,
    pixel_values: torch.Tensor,
    spatial_shapes: torch.Tensor,
    pixel_attention_mask: torch.Tensor,
    **_: Any,
) -> PatchGrids:
    features = base.vision_tower(
        pixel_values=pixel_values.to(base.dtype),
        spatial_shapes=spatial_shapes,
        pixel_attention_mask=pixel_attention_mask,
    ).last_hidden_state
    return [
        image[: height * width].unflatten(0, (height, width))
        for image, (height, width) in zip(features, spatial_shapes.tolist(), strict=True)
    ]


def tokens_of_images(base: Any, **inputs: Any) -> torch.Tensor:
    """Return the vision tokens of a stock base model, flat."""
    return torch.cat(base.get_image_features(**inputs).pooler_output)


_register_minicpm = partial(
    register_family,
    projector="merger",
    patch_merge="merge_kernel_size",
    no_packing=RECURRENT,
    stock_tokens=tokens_of_images,
    no_videos="its processor may cut a frame into slices",
)


@_register_minicpm("minicpmv4_6")
@_register_minicpm("minicpm_ocr", transformers="5.21")
def _minicpm(
    base: Any,
    pixel_values: torch.Tensor,
    target_sizes: torch.Tensor,
    downsample_mode: str | None = None,
    **_: Any,
) -> PatchGrids:
    # In the mode "16x" the encoder merges 2 x 2 patches half-way.
    merges = (downsample_mode or base.config.downsample_mode) != "4x"
    outputs = base.vision_tower(
        pixel_values.to(base.dtype), target_sizes=target_sizes, use_vit_merger=merges
    )
    grids = (target_sizes // 2 if merges else target_sizes).tolist()
    return split_grids(outputs.last_hidden_state.squeeze(0), grids)


@register_family(
    "gemma4",
    projector="embed_vision",
    no_packing="its attention may be bidirectional within an image",
    no_prompt_embeds="its layers read the token ids, too",
    no_videos="its frames are padded patches with positions beside them, not grids",
)
def _gemma4(
    base: Any, pixel_values: torch.Tensor, image_position_ids: torch.Tensor, **_: Any
) -> PatchGrids:
    outputs = base.vision_tower(
        pixel_values=pixel_values.to(base.dtype), pixel_position_ids=image_position_ids
    )
    pool = base.config.vision_config.pooling_kernel_size  # the encoder's last step is a mean
    sizes = (image_position_ids.amax(1) + 1) // pool  # (width, height); padding is -1
    return split_grids(outputs.last_hidden_state, [size[::-1] for size in sizes.tolist()])


# ---- padded images


def seen_patches(mask: torch.Tensor, patch: int) -> torch.Tensor:
    """Cut a mask of pixels [images, H, W] into patches: [images, h, w, patch * patch]."""
    return mask.bool().unfold(1, patch, patch).unfold(2, patch, patch).flatten(3)


def _without_padding(features: torch.Tensor, seen: torch.Tensor) -> list[torch.Tensor]:
    """[images, h * w, C], with padding below and on the right, -> one [H, W, C] per image."""
    sizes = zip(seen.any(2).sum(1).tolist(), seen.any(1).sum(1).tolist(), strict=True)
    maps = features.unflatten(1, seen.shape[1:])
    return [image[:height, :width] for image, (height, width) in zip(maps, sizes, strict=True)]


def _crops(processor: Any, image_inputs: Any, index: int) -> int:
    return int(image_inputs["num_crops"])


@register_family(
    "aria",
    merge=torch.cat,
    tiles=_crops,
    no_fit="its tokens are learned queries, which have no place in the image",
)
def _aria(
    base: Any,
    pixel_values: torch.Tensor,
    pixel_mask: torch.Tensor | None = None,
    vision_feature_layer: int | None = None,
    **_: Any,
) -> PatchGrids:
    layer = (
        base.config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
    )
    if pixel_mask is None:
        pixel_mask = torch.ones_like(pixel_values[:, 0])
    seen = seen_patches(pixel_mask, base.config.vision_config.patch_size).any(-1)
    outputs = base.vision_tower(
        pixel_values.to(base.dtype), patch_attention_mask=seen, output_hidden_states=True
    )
    return _without_padding(outputs.hidden_states[layer], seen)
