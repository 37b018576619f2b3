"""Families whose encoder takes images or tiles of one size."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import nn
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from tokenflex.dropin.adapters.sizes import pixtral, seen_patches, tokens_of_images
from tokenflex.dropin.families import (
    Clips,
    Deepstack,
    PatchGrids,
    chosen_layers,
    feature_layers,
    register_family,
    square_grids,
    vision_encoder,
)
from tokenflex.dropin.features import merge_patches
from tokenflex_kernels.versions import is_older


def _blocks_of_one_row(tokens: list[torch.Tensor]) -> torch.Tensor:
    # Video-LLaVA, and Idefics3 in transformers 5.18, index vision tokens by (block, row): blocks of
    # one row fit any count.
    return torch.cat(tokens).unsqueeze(1)


def _frames_of_video_tower(
    base: Any,
    pixel_values_videos: Sequence[torch.Tensor],
    vision_feature_layer: Any = None,
    **_: Any,
) -> Clips:
    """Return the frames of clips without the class tokens, which have no place in the frame."""
    layers = feature_layers(base.config) if vision_feature_layer is None else vision_feature_layer
    pixels = torch.cat(list(pixel_values_videos)).to(base.dtype)
    outputs = base.video_tower(pixels, output_hidden_states=True)
    grids = square_grids(chosen_layers(outputs, layers, drop_class_token=True))
    return Clips(grids, [len(clip) for clip in pixel_values_videos])


@register_family("llava")
@register_family("vipllava", merge=torch.cat)
# Before 5.21 it takes images by another name than all others.
@register_family(
    "video_llava",
    merge=_blocks_of_one_row,
    videos=_frames_of_video_tower,
    merge_frames=_blocks_of_one_row,
    transformers="5.21",
)
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
        return pixtral(base, pixel_values, image_sizes, vision_feature_layer)
    layers = feature_layers(base.config) if vision_feature_layer is None else vision_feature_layer
    strategy = vision_feature_select_strategy or getattr(
        base.config, "vision_feature_select_strategy", "default"
    )
    outputs = vision_encoder(base)(pixel_values.to(base.dtype), output_hidden_states=True)
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


def _frames(base: Any, pixel_values_videos: Sequence[torch.Tensor], **options: Any) -> Clips:
    """Return the frames of clips, each of which the encoder takes as an image."""
    grids = _llava(base, torch.cat(list(pixel_values_videos)), **options)
    return Clips(grids, [len(clip) for clip in pixel_values_videos])


def _newline(base: Any) -> torch.Tensor:
    newline: torch.Tensor = base.image_newline[None]
    return newline


@register_family("llava_next", tiles=_anyres_tiles)
@register_family("llava_next_video", tiles=_anyres_tiles, videos=_frames)
@register_family(
    "llava_onevision",
    tiles=_anyres_tiles,
    videos=_frames,
    merge_frames=_blocks_of_one_row,
    clip_end=_newline,
    clip_end_tokens=1,
)
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


_register_internvl = partial(
    register_family, merge=torch.cat, patch_merge="downsample_ratio", tiles=_tiles_of_one_run
)


@_register_internvl("internvl", frames_are_images=True)
@_register_internvl("qianfan_ocr")
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
    "pp_chart2table",
    merge=torch.cat,
    vision_width="output_channels",
    patch_merge=4,  # two convolutions of stride 2
    tiles=_tiles_of_one_run,
    flat_images=True,
)
@register_family("fast_vlm", merge=torch.cat)
def _feature_maps(base: Any, pixel_values: torch.Tensor, **_: Any) -> PatchGrids:
    features = base.vision_tower(pixel_values.to(base.dtype)).last_hidden_state
    return features.permute(0, 2, 3, 1)  # from [images, C, H, W]


def _width_of_downsampled(config: Any) -> int:
    width: int = 4 * config.vision_config.hidden_size  # two convolutions double it
    return width


@register_family("step3p7", vision_width=_width_of_downsampled, stock_tokens=tokens_of_images)
def _step3p7(
    base: Any,
    pixel_values: torch.Tensor,
    pixel_values_local: torch.Tensor | None = None,
    num_local_patches: Any = None,
    **_: Any,
) -> PatchGrids:
    def grids(pixels: torch.Tensor) -> torch.Tensor:
        return square_grids(base.vision_model(pixels.to(base.dtype)).last_hidden_state)

    images = grids(pixel_values)
    if pixel_values_local is None:
        return images
    tiles = iter(grids(pixel_values_local))
    numbers = torch.as_tensor(num_local_patches).tolist()
    # The tiles of an image stand before the whole of it, which has another size.
    return [
        view
        for image, number in zip(images, numbers, strict=True)
        for view in (*islice(tiles, number), image)
    ]


def _indicators(base: Any) -> dict[str, Any]:
    """Return the embeddings of the tokens around images, which come from a table of the encoder."""
    number, last = base.vision_tower.num_visual_indicator_tokens, base.visual_vocab_size
    ids = torch.arange(last - number, last, device=base.visual_embeddings_table.weight.device)
    return {"visual_indicator_features": base.visual_embeddings_table(ids)}


def _tokens_of_table(base: Any, **inputs: Any) -> torch.Tensor:
    tokens: torch.Tensor = base.get_image_features(**inputs).pooler_output
    return tokens.flatten(0, -2)


def _width_of_cells(config: Any) -> int:
    width: int = config.vision_config.hidden_size * config.vision_config.hidden_stride**2
    return width


# The stock projector is a soft choice of rows of a table, which stays for the tokens around images.
@register_family(
    "ovis2",
    stock_projector="visual_embeddings_table",
    merge=_blocks_of_one_row,
    vision_width=_width_of_cells,
    stock_tokens=_tokens_of_table,
    more_outputs=_indicators,
    no_prompt_embeds="the tokens around its images are embedded by a table of the encoder",
)
def _ovis2(base: Any, pixel_values: torch.Tensor, **_: Any) -> PatchGrids:
    return square_grids(base.vision_tower(pixel_values.to(base.dtype)).last_hidden_state)


def _width_in_timm(config: Any) -> int:
    width: int = config.vision_config.model_args["embed_dim"]
    return width


def _stacked_tiles(processor: Any, image_inputs: Any, index: int) -> int:
    return len(image_inputs["pixel_values"][index])


# Before 5.20 its encoder is one of timm, with which it was not tested.
@register_family(
    "perception_lm",
    transformers="5.20",
    merge=torch.cat,
    vision_width=_width_in_timm,
    tiles=_stacked_tiles,
    no_videos="its model takes them as images, without a `get_video_features` of their own",
)
def _perception_lm(base: Any, pixel_values: torch.Tensor, **_: Any) -> PatchGrids:
    features = base.vision_tower(pixel_values.flatten(0, 1).to(base.dtype)).last_hidden_state
    return square_grids(features[:, 1:] if base.config.vision_use_cls_token else features)


class DeepstackMergers(nn.Module):
    """Stand-in for Granite Docling's connector: its coarse path's mergers of earlier layers."""

    def __init__(self, connector: Any) -> None:
        super().__init__()
        self.scale_factor = connector.coarse.scale_factor
        self.coarse: Any = nn.Module()  # under their stock names
        self.coarse.deepstack_mergers = connector.coarse.deepstack_mergers

    def forward(
        self, patches: torch.Tensor, earlier: list[torch.Tensor], fine: bool = False
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the patches as they are, and a map [tiles, h, w, D] of each earlier layer."""
        mergers: Any = self.coarse.deepstack_mergers
        maps = [
            merger(merge_patches(square_grids(layer), self.scale_factor))
            for merger, layer in zip(mergers, earlier, strict=True)
        ]
        return patches, maps


def _mergers(base: Any) -> DeepstackMergers:
    return DeepstackMergers(base.vision_model.connector)


def _no_router(base: Any) -> dict[str, Any]:
    return {"router_logits": None}


# Its projector takes the place of both paths: the count is an argument, not a choice of two.
@register_family(
    "granite_docling",
    stock_projector="vision_model.connector",
    stand_in=_mergers,
    patch_merge="vision_config.scale_factor",
    stock_tokens=tokens_of_images,
    more_outputs=_no_router,
    no_prompt_embeds="its language model takes features of earlier layers of the encoder, too",
)
def _granite_docling(
    base: Any,
    pixel_values: torch.Tensor,
    pixel_attention_mask: torch.Tensor,
    tile_fine_mask: Any = None,
    **_: Any,
) -> Deepstack:
    if tile_fine_mask is not None:
        raise ValueError(
            "tile_fine_mask must be None: num_image_tokens takes the place of the fine route"
        )
    outputs = base.vision_model(pixel_values[pixel_attention_mask.bool()].to(base.dtype))
    return Deepstack(
        square_grids(outputs.pooler_output), [[*maps] for maps in outputs.deepstack_features]
    )


_register_idefics = partial(
    register_family,
    projector="connector",
    merge=_blocks_of_one_row,
    patch_merge="scale_factor",
)


# Before 5.23 its processor takes videos in another form.
_HAS_VIDEOS = not is_older("transformers", "5.23")


@_register_idefics("idefics3")
@_register_idefics(
    "smolvlm",
    frames_are_images=_HAS_VIDEOS,
    no_mixture="its stock processor returns the pixels of one of them",
    no_videos="they need transformers 5.23 or newer",
)
def _idefics3(
    base: Any, pixel_values: torch.Tensor, pixel_attention_mask: Any = None, **_: Any
) -> PatchGrids:
    tiles = pixel_values.flatten(0, 1)
    real = (tiles != 0).flatten(1).any(1)  # prompts with fewer tiles are padded with zeros
    options = {}
    if pixel_attention_mask is not None:
        seen = seen_patches(
            pixel_attention_mask.flatten(0, 1)[real], base.config.vision_config.patch_size
        )
        options["patch_attention_mask"] = seen.any(-1)
    features = base.vision_model(pixel_values=tiles[real].to(base.dtype), **options)
    return square_grids(features.last_hidden_state)
