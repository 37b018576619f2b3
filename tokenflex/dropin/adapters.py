"""The built-in families: one function each, from image inputs to patch grids."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from tokenflex.counts import Grid
from tokenflex.dropin.families import (
    Deepstack,
    PatchGrids,
    chosen_layers,
    feature_layers,
    register_family,
    split_grids,
    square_grids,
    vision_encoder,
)

# ---- images and tiles of one size


@register_family("llava")
@register_family("vipllava", merge=torch.cat)
@register_family("aya_vision", merge=torch.cat, patch_merge="downsample_factor")
def _llava(
    base: Any,
    pixel_values: torch.Tensor,
    vision_feature_layer: Any = None,
    vision_feature_select_strategy: str | None = None,
    image_sizes: Any = None,
    **_: Any,
) -> Any:
    if image_sizes is not None:
        return _pixtral(base, pixel_values, image_sizes, vision_feature_layer)
    layers = feature_layers(base.config) if vision_feature_layer is None else vision_feature_layer
    strategy = vision_feature_select_strategy or getattr(
        base.config, "vision_feature_select_strategy", "default"
    )
    outputs = base.vision_tower(pixel_values.to(base.dtype), output_hidden_states=True)
    return square_grids(chosen_layers(outputs, layers, drop_class_token=strategy == "default"))


def _are_tiled(images_per_prompt: Any, number: int) -> list[bool]:
    """Tell for each image whether it is cut into tiles: only alone in its prompt, or by default."""
    if images_per_prompt is None:
        return [True] * number
    per_prompt = torch.as_tensor(images_per_prompt).tolist()
    return [count == 1 for count in per_prompt for _ in range(count)]


def _anyres_tiles(processor: Any, image_inputs: Any, index: int) -> int:
    sizes = image_inputs["image_sizes"]
    if not _are_tiled(image_inputs.get("batch_num_images"), len(sizes))[index]:
        return 1
    images = processor.image_processor
    edge = images.size["shortest_edge" if "shortest_edge" in images.size else "height"]
    size = torch.as_tensor(sizes[index]).tolist()
    return image_size_to_num_patches(size, images.image_grid_pinpoints, edge)


@register_family("llava_next", "llava_onevision", tiles=_anyres_tiles)
def _anyres(
    base: Any,
    pixel_values: torch.Tensor,
    image_sizes: Any = None,
    batch_num_images: Any = None,
    **options: Any,
) -> Any:
    if pixel_values.ndim == 5:  # [images, most tiles, 3, h, w], with padding for missing tiles
        pinpoints = base.config.image_grid_pinpoints
        edge = base.config.vision_config.image_size
        tiled = _are_tiled(batch_num_images, len(image_sizes))
        counts = [
            image_size_to_num_patches(size, pinpoints, edge) if is_tiled else 1
            for size, is_tiled in zip(image_sizes, tiled, strict=True)
        ]
        pixel_values = torch.cat(
            [image[:count] for image, count in zip(pixel_values, counts, strict=True)]
        )
    return _llava(base, pixel_values, **options)


def _tiles_of_one_run(processor: Any, image_inputs: Any, index: int) -> int:
    return int(image_inputs["num_patches"][index])


@register_family(
    "internvl", merge=torch.cat, patch_merge="downsample_ratio", tiles=_tiles_of_one_run
)
def _internvl(base: Any, pixel_values: torch.Tensor, **_: Any) -> PatchGrids:
    layer = base.config.vision_feature_layer
    outputs = base.vision_tower(
        pixel_values=pixel_values.to(base.dtype), output_hidden_states=layer != -1
    )
    # -1 is the last hidden state, after the encoder's final norm.
    features = outputs.last_hidden_state if layer == -1 else outputs.hidden_states[layer]
    first = 1 if base.config.vision_feature_select_strategy == "default" else 0
    return square_grids(features[:, first:])


_BIDIRECTIONAL = (
    "its attention is bidirectional within a prompt's image or prefix, and finds those by "
    "positions that packing does not keep apart"
)


@register_family(
    "gemma3",
    "paligemma",
    merge=torch.cat,
    no_packing=_BIDIRECTIONAL,
    no_prompt_embeds="its attention is bidirectional within a prompt's image or prefix",
)
@register_family("cohere2_vision", merge=torch.cat, patch_merge="downsample_factor")
@register_family("janus", "deepseek_vl", projector="aligner", merge=torch.cat)
def _last_hidden_state(base: Any, pixel_values: torch.Tensor, **_: Any) -> PatchGrids:
    return square_grids(vision_encoder(base)(pixel_values.to(base.dtype)).last_hidden_state)


@register_family(
    "got_ocr2",
    merge=torch.cat,
    vision_width="output_channels",
    patch_merge=4,  # two convolutions of stride 2
    tiles=_tiles_of_one_run,
    flat_images=True,
)
def _got_ocr2(base: Any, pixel_values: torch.Tensor, **_: Any) -> PatchGrids:
    features = base.vision_tower(pixel_values.to(base.dtype)).last_hidden_state
    return features.permute(0, 2, 3, 1)  # from [tiles, C, H, W]


def _blocks_of_one_row(tokens: list[torch.Tensor]) -> torch.Tensor:
    # transformers 5.18 indexes vision tokens by (block, row): blocks of one row fit any count.
    return torch.cat(tokens).unsqueeze(1)


@register_family(
    "idefics3",
    "smolvlm",
    projector="connector",
    merge=_blocks_of_one_row,
    patch_merge="scale_factor",
)
def _idefics3(
    base: Any, pixel_values: torch.Tensor, pixel_attention_mask: Any = None, **_: Any
) -> PatchGrids:
    tiles = pixel_values.flatten(0, 1)
    real = (tiles != 0).flatten(1).any(1)  # prompts with fewer tiles are padded with zeros
    options = {}
    if pixel_attention_mask is not None:
        patch = base.config.vision_config.patch_size
        seen = pixel_attention_mask.flatten(0, 1)[real].unfold(1, patch, patch)
        options["patch_attention_mask"] = seen.unfold(2, patch, patch).flatten(3).any(-1)
    features = base.vision_model(pixel_values=tiles[real].to(base.dtype), **options)
    return square_grids(features.last_hidden_state)


# ---- images of different sizes


@register_family("mistral3", patch_merge="spatial_merge_size")
def _pixtral(
    base: Any,
    pixel_values: torch.Tensor,
    image_sizes: Any,
    vision_feature_layer: Any = None,
    **_: Any,
) -> PatchGrids:
    layers = feature_layers(base.config) if vision_feature_layer is None else vision_feature_layer
    outputs = base.vision_tower(
        pixel_values.to(base.dtype), image_sizes=image_sizes, output_hidden_states=True
    )
    # All images are in one row of patches, each at its own size.
    rows = chosen_layers(outputs, layers, drop_class_token=False).squeeze(0)
    patch = base.vision_tower.patch_size
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


# ---- Qwen, whose projector is inside the vision encoder


class Unmerged(nn.Module):
    """Stand-in for Qwen's PatchMerger that only concatenates the patches of a merged cell."""

    def __init__(self, merge_size: int) -> None:
        super().__init__()
        self.merge_size = merge_size

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """[sum of H*W, C] -> [sum of H*W / merge_size**2, merge_size**2 * C]."""
        return patches.reshape(-1, self.merge_size**2 * patches.shape[-1])


def _unmerged(base: Any) -> Unmerged:
    return Unmerged(base.visual.spatial_merge_size)


def _merged_tokens(base: Any, pixel_values: Any, image_grid_thw: Any, **_: Any) -> torch.Tensor:
    return base.visual(pixel_values.to(base.dtype), grid_thw=image_grid_thw).pooler_output


def _raster(cells: torch.Tensor, grids: list[Grid], merge: int) -> list[torch.Tensor]:
    """Reorder [cells, merge**2 * C] to one [H, W, C] per image.

    Cells are in row-major order, and so are the patches within each. ``grids`` counts cells.
    """
    return [
        image.unflatten(2, (merge, merge, -1)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
        for image in split_grids(cells, grids)
    ]


_register_qwen = partial(
    register_family,
    stock_projector="visual.merger",
    stand_in=_unmerged,
    patch_merge="vision_config.spatial_merge_size",
    stock_tokens=_merged_tokens,
    no_prompt_embeds="its positions of image tokens have three axes (M-RoPE)",
)


@_register_qwen("qwen2_vl", vision_width="embed_dim")
@_register_qwen("qwen2_5_vl", "qwen3_vl")
def _qwen(
    base: Any, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor, **_: Any
) -> PatchGrids | Deepstack:
    outputs = base.visual(pixel_values.to(base.dtype), grid_thw=image_grid_thw)
    merge = base.visual.spatial_merge_size
    cells = []
    for frames, height, width in image_grid_thw.tolist():
        if frames != 1:
            raise ValueError(f"image_grid_thw must hold images of one frame, got {frames} frames")
        cells.append((height // merge, width // merge))
    patches = _raster(outputs.pooler_output, cells, merge)
    layers = getattr(outputs, "deepstack_features", None)
    if layers is None:
        return patches
    return Deepstack(patches, [split_grids(layer, cells) for layer in layers])
