"""The families of vision-language models that can take a token-adaptive projector.

All that is particular to a family is how its vision tower's output becomes patch grids, and where
its projector stands. Everything else is shared: :mod:`tokenflex.dropin.seam` has the model's side,
:mod:`tokenflex.dropin.processor` the processor's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from tokenflex.counts import token_grid

# [images, H, W, C], or one [H, W, C] per image where sizes differ.
PatchGrids: TypeAlias = "torch.Tensor | list[torch.Tensor]"


@dataclass(frozen=True)
class Deepstack:
    """Patch grids with further maps that the language model adds to its first layers.

    Attributes:
        grids: as other families give them.
        layers: for each language-model layer one [h, w, D] map per image, in the language model's
            width; pooled to the image's token grid.
    """

    grids: PatchGrids
    layers: list[list[torch.Tensor]]


@dataclass(frozen=True)
class Family:
    """How models of one ``model_type`` see images; see :func:`register_family`."""

    model_type: str
    patch_grids: Callable[..., PatchGrids | Deepstack]
    projector: str = "multi_modal_projector"
    stock_projector: str = "multi_modal_projector"
    stand_in: Callable[[nn.Module], nn.Module] | None = None
    merge: Callable[[list[torch.Tensor]], Any] = list
    vision_width: str = "hidden_size"
    patch_merge: str | int = 1
    stock_tokens: Callable[..., torch.Tensor] | None = None
    tiles: Callable[[Any, Any, int], int] | None = None
    flat_images: bool = False
    no_packing: str = ""

    def stock_patch_merge(self, config: Any) -> int:
        """m, where the stock projector puts m x m patches side by side."""
        if isinstance(self.patch_merge, int):
            return self.patch_merge
        value = config
        for name in self.patch_merge.split("."):
            value = getattr(value, name)
        return value if isinstance(value, int) else round(1 / value)  # a ratio: 0.5 is 2 x 2

    def width(self, config: Any) -> int:
        """C, the width of a patch: that of the vision tower, times the layers side by side."""
        layers = getattr(config, "vision_feature_layer", None)
        if layers is None:
            layers = getattr(config, "vision_feature_layers", None)
        side_by_side = len(layers) if isinstance(layers, (list, tuple)) else 1
        return getattr(config.vision_config, self.vision_width) * side_by_side


_FAMILIES: dict[str, Family] = {}


def register_family(
    *model_types: str,
    projector: str = "multi_modal_projector",
    stock_projector: str | None = None,
    stand_in: Callable[[nn.Module], nn.Module] | None = None,
    merge: Callable[[list[torch.Tensor]], Any] = list,
    vision_width: str = "hidden_size",
    patch_merge: str | int = 1,
    stock_tokens: Callable[..., torch.Tensor] | None = None,
    tiles: Callable[[Any, Any, int], int] | None = None,
    flat_images: bool = False,
    no_packing: str = "",
) -> Callable[[Callable[..., PatchGrids | Deepstack]], Callable[..., PatchGrids | Deepstack]]:
    """Teach :func:`tokenflex.replace_projector` a family of models; decorates its patch grids.

    The decorated function is called with the base model (``model.base_model``) and the image
    inputs that the model's own ``get_image_features`` takes, by name. It returns the features of
    the vision tower before the stock projector as patch grids: [inputs, H, W, C], or a list with
    one [H, W, C] for each input of the vision encoder (image or tile), in order of appearance.

    What a model must bring: ``base.get_image_features``, whose ``pooler_output`` its forward
    scatters into the placeholders and its ``generate`` computes once before the prompt
    (transformers >= 5.18 does so for its own models), and a config with ``image_token_id``,
    ``vision_config`` and a text config.

    Args:
        model_types: ``config.model_type`` of the models; a known one is replaced.
        projector: attribute of the base model where the new projector stands.
        stock_projector: dotted path, from the base model, of the module it replaces; ``projector``
            if None.
        stand_in: what to leave at ``stock_projector`` where that is not where the new projector
            goes (a projector inside the vision tower): called with the base model.
        merge: what the base model's forward wants to find as ``pooler_output``: ``list`` for one
            [N, D] per image, ``torch.cat`` for a flat tensor.
        vision_width: the field of ``vision_config`` that holds C.
        patch_merge: m, where the stock projector puts m x m patches side by side before it
            projects them, as a number or as the field of the config that holds m or 1/m.
        stock_tokens: what the stock projector makes of the same inputs, flat [sum of tokens, D],
            row-major: called with the base model and the image inputs. By default the projector's
            output is caught on its way; needed where that is not in row-major order.
        tiles: how many inputs of the vision encoder the processor makes of an image: called with
            the processor, what its image processor returned, and the image's index. Needed where
            several tiles share one run of placeholders; a tile per run if None.
        flat_images: the processor takes the images of several prompts as one list, one image a
            prompt, not as a list per prompt.
        no_packing: why samples of these models cannot be packed into one row; "" if they can.

    Raises:
        TypeError: no model type, or one that is not a string.

    Example:
        >>> @register_family("my_vlm", merge=torch.cat)
        ... def my_vlm(base, pixel_values, **_):
        ...     return square_grids(base.vision_tower(pixel_values).last_hidden_state)
    """
    if not model_types or not all(isinstance(name, str) for name in model_types):
        raise TypeError(f"model_types must be one string or more, got {model_types!r}")

    def register(
        patch_grids: Callable[..., PatchGrids | Deepstack],
    ) -> Callable[..., PatchGrids | Deepstack]:
        for model_type in model_types:
            _FAMILIES[model_type] = Family(
                model_type=model_type,
                patch_grids=patch_grids,
                projector=projector,
                stock_projector=projector if stock_projector is None else stock_projector,
                stand_in=stand_in,
                merge=merge,
                vision_width=vision_width,
                patch_merge=patch_merge,
                stock_tokens=stock_tokens,
                tiles=tiles,
                flat_images=flat_images,
                no_packing=no_packing,
            )
        return patch_grids

    return register


def supported_families() -> list[str]:
    """The model types that :func:`tokenflex.replace_projector` knows."""
    return sorted(_FAMILIES)


def family_of(config: Any) -> Family:
    """The family of a model's config.

    Raises:
        ValueError: its ``model_type`` is not supported; the message lists those that are.
    """
    model_type = getattr(config, "model_type", None)
    if model_type not in _FAMILIES:
        raise ValueError(
            f"model must be of a supported family, got model_type {model_type!r}; supported are "
            f"{', '.join(supported_families())} (register_family adds one)"
        )
    return _FAMILIES[model_type]


# ---- what adapters are made of


def square_grids(features: torch.Tensor) -> torch.Tensor:
    """[images, L, C] -> [images, n, n, C], L = n * n.

    Raises:
        ValueError: L is not a perfect square.
    """
    return features.unflatten(1, token_grid(features.shape[1], name="patches of an image"))


def chosen_layers(
    outputs: Any, layers: int | Sequence[int], *, drop_class_token: bool
) -> torch.Tensor:
    """The hidden states of one layer, or of several side by side: [images, L, C]."""
    first = 1 if drop_class_token else 0
    chosen = [layers] if isinstance(layers, int) else layers
    return torch.cat([outputs.hidden_states[layer][:, first:] for layer in chosen], dim=-1)


def split_grids(rows: torch.Tensor, grids: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Flat [sum of H*W, C] -> one [H, W, C] per image."""
    pieces = rows.split([height * width for height, width in grids])
    return [piece.unflatten(0, tuple(grid)) for piece, grid in zip(pieces, grids, strict=True)]


def _pixtral_grids(base: Any, outputs: Any, layers: Any, image_sizes: Any) -> PatchGrids:
    """A Pixtral tower sees all images in one row, each at its own size."""
    rows = chosen_layers(outputs, layers, drop_class_token=False).squeeze(0)
    patch = base.vision_tower.patch_size
    sizes = torch.as_tensor(image_sizes).tolist()
    return split_grids(rows, [(height // patch, width // patch) for height, width in sizes])


def _real_tiles(base: Any, pixel_values: Any, image_sizes: Any, alone: list[bool]) -> Any:
    """[images, most tiles, 3, h, w] -> [tiles, 3, h, w] without those that only fill up."""
    if pixel_values.ndim == 4:
        return pixel_values
    config = base.config
    counts = [
        image_size_to_num_patches(
            size, config.image_grid_pinpoints, config.vision_config.image_size
        )
        if tiled
        else 1
        for size, tiled in zip(image_sizes, alone, strict=True)
    ]
    return torch.cat([image[:count] for image, count in zip(pixel_values, counts, strict=True)])


# ---- one vision-encoder input a tile, each with its own tokens


@register_family("llava")
def _llava(
    base: Any,
    pixel_values: torch.Tensor,
    vision_feature_layer: Any = None,
    vision_feature_select_strategy: str | None = None,
    image_sizes: Any = None,
    **_: Any,
) -> PatchGrids:
    config = base.config
    layers = config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
    strategy = vision_feature_select_strategy or config.vision_feature_select_strategy
    sizes = {} if image_sizes is None else {"image_sizes": image_sizes}
    outputs = base.vision_tower(pixel_values.to(base.dtype), output_hidden_states=True, **sizes)
    if image_sizes is not None:
        return _pixtral_grids(base, outputs, layers, image_sizes)
    return square_grids(chosen_layers(outputs, layers, drop_class_token=strategy == "default"))


@register_family("vipllava", merge=torch.cat)
def _vipllava(base: Any, pixel_values: torch.Tensor, **_: Any) -> PatchGrids:
    config = base.config
    layers = getattr(config, "vision_feature_layer", None)
    layers = config.vision_feature_layers if layers is None else layers
    outputs = base.vision_tower(pixel_values.to(base.dtype), output_hidden_states=True)
    return square_grids(chosen_layers(outputs, layers, drop_class_token=True))


def _anyres_tiles(processor: Any, image_inputs: Any, index: int) -> int:
    images_per_prompt = image_inputs.get("batch_num_images")
    if images_per_prompt is not None:
        alone = [int(n) == 1 for n in images_per_prompt for _ in range(int(n))]
        if not alone[index]:
            return 1
    size = image_inputs["image_sizes"][index]
    size = size.tolist() if hasattr(size, "tolist") else size
    tile = processor.image_processor.size
    edge = tile["shortest_edge"] if "shortest_edge" in tile else tile["height"]
    return image_size_to_num_patches(size, processor.image_processor.image_grid_pinpoints, edge)


@register_family("llava_next", "llava_onevision", tiles=_anyres_tiles)
def _anyres(
    base: Any,
    pixel_values: torch.Tensor,
    image_sizes: Any,
    batch_num_images: Any = None,
    **_: Any,
) -> PatchGrids:
    config = base.config
    alone = [True] * len(image_sizes)
    if batch_num_images is not None:
        per_prompt = torch.as_tensor(batch_num_images).tolist()
        alone = [count == 1 for count in per_prompt for _ in range(count)]
    tiles = _real_tiles(base, pixel_values, image_sizes, alone)
    outputs = base.vision_tower(tiles.to(base.dtype), output_hidden_states=True)
    strategy = config.vision_feature_select_strategy
    return square_grids(
        chosen_layers(outputs, config.vision_feature_layer, drop_class_token=strategy == "default")
    )


def _tiles_of_one_run(processor: Any, image_inputs: Any, index: int) -> int:
    return int(image_inputs["num_patches"][index])


@register_family(
    "internvl", merge=torch.cat, patch_merge="downsample_ratio", tiles=_tiles_of_one_run
)
def _internvl(base: Any, pixel_values: torch.Tensor, **_: Any) -> PatchGrids:
    config = base.config
    outputs = base.vision_tower(
        pixel_values=pixel_values.to(base.dtype),
        output_hidden_states=config.vision_feature_layer != -1,
    )
    first = 1 if config.vision_feature_select_strategy == "default" else 0
    if config.vision_feature_layer == -1:  # the last hidden state, after the tower's own norm
        return square_grids(outputs.last_hidden_state[:, first:])
    return square_grids(outputs.hidden_states[config.vision_feature_layer][:, first:])


_BIDIRECTIONAL = (
    "its attention is bidirectional within a prompt's image or prefix, and finds those by "
    "positions that packing does not keep apart"
)


@register_family("gemma3", "paligemma", merge=torch.cat, no_packing=_BIDIRECTIONAL)
@register_family("cohere2_vision", merge=torch.cat, patch_merge="downsample_factor")
def _last_hidden_state(base: Any, pixel_values: torch.Tensor, **_: Any) -> PatchGrids:
    return square_grids(base.vision_tower(pixel_values.to(base.dtype)).last_hidden_state)


@register_family("janus", "deepseek_vl", projector="aligner", merge=torch.cat)
def _aligner(base: Any, pixel_values: torch.Tensor, **_: Any) -> PatchGrids:
    return square_grids(base.vision_model(pixel_values.to(base.dtype)).last_hidden_state)


@register_family("aya_vision", merge=torch.cat, patch_merge="downsample_factor")
def _aya_vision(base: Any, pixel_values: torch.Tensor, **_: Any) -> PatchGrids:
    config = base.config
    outputs = base.vision_tower(pixel_values.to(base.dtype), output_hidden_states=True)
    strategy = config.vision_feature_select_strategy
    return square_grids(
        chosen_layers(outputs, config.vision_feature_layer, drop_class_token=strategy == "default")
    )


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
    return features.permute(0, 2, 3, 1)  # a convolution's [tiles, C, H, W]


def _tokens_of_one_row(tokens: list[torch.Tensor]) -> torch.Tensor:
    # transformers 5.18 looks vision tokens up by (block, row): blocks of one row fit any count.
    return torch.cat(tokens).unsqueeze(1)


@register_family(
    "idefics3",
    "smolvlm",
    projector="connector",
    merge=_tokens_of_one_row,
    patch_merge="scale_factor",
)
def _idefics3(
    base: Any, pixel_values: torch.Tensor, pixel_attention_mask: Any = None, **_: Any
) -> PatchGrids:
    tiles = pixel_values.flatten(0, 1)
    real = (tiles != 0).flatten(1).any(1)  # prompts with fewer tiles are filled up with zeros
    options = {}
    if pixel_attention_mask is not None:
        patch = base.config.vision_config.patch_size
        seen = pixel_attention_mask.flatten(0, 1)[real].unfold(1, patch, patch)
        options["patch_attention_mask"] = seen.unfold(2, patch, patch).flatten(3).any(-1)
    features = base.vision_model(pixel_values=tiles[real].to(base.dtype), **options)
    return square_grids(features.last_hidden_state)


# ---- images at their own size


@register_family("mistral3", patch_merge="spatial_merge_size")
def _mistral3(base: Any, pixel_values: torch.Tensor, image_sizes: Any, **_: Any) -> PatchGrids:
    outputs = base.vision_tower(
        pixel_values.to(base.dtype), image_sizes=image_sizes, output_hidden_states=True
    )
    return _pixtral_grids(base, outputs, base.config.vision_feature_layer, image_sizes)


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
    shapes = [tuple(shape) for shape in spatial_shapes.tolist()]
    return [
        image[: height * width].unflatten(0, (height, width))
        for image, (height, width) in zip(features, shapes, strict=True)
    ]


# ---- a projector inside the vision tower


class Unmerged(nn.Module):
    """Stands where Qwen's PatchMerger stood: keeps the patches of a merged cell side by side."""

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


def _image_grids(image_grid_thw: torch.Tensor) -> list[tuple[int, int]]:
    grids = []
    for frames, height, width in image_grid_thw.tolist():
        if frames != 1:
            raise ValueError(f"image_grid_thw must hold images of one frame, got {frames} frames")
        grids.append((height, width))
    return grids


def _raster(cells: torch.Tensor, grids: list[tuple[int, int]], merge: int) -> list[torch.Tensor]:
    """[cells, merge**2 * C], cells and the patches within each row-major -> [H, W, C] each."""
    merged = split_grids(cells, [(height // merge, width // merge) for height, width in grids])
    return [
        image.unflatten(2, (merge, merge, -1)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
        for image in merged
    ]


_register_qwen = partial(
    register_family,
    stock_projector="visual.merger",
    stand_in=_unmerged,
    patch_merge="vision_config.spatial_merge_size",
    stock_tokens=_merged_tokens,
)


@_register_qwen("qwen2_vl", vision_width="embed_dim")
@_register_qwen("qwen2_5_vl")
def _qwen2_vl(
    base: Any, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor, **_: Any
) -> PatchGrids:
    outputs = base.visual(pixel_values.to(base.dtype), grid_thw=image_grid_thw)
    merge = base.visual.spatial_merge_size
    return _raster(outputs.pooler_output, _image_grids(image_grid_thw), merge)


@_register_qwen("qwen3_vl")
def _qwen3_vl(
    base: Any, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor, **_: Any
) -> Deepstack:
    outputs = base.visual(pixel_values.to(base.dtype), grid_thw=image_grid_thw)
    merge = base.visual.spatial_merge_size
    grids = _image_grids(image_grid_thw)
    merged = [(height // merge, width // merge) for height, width in grids]
    return Deepstack(
        grids=_raster(outputs.pooler_output, grids, merge),
        layers=[split_grids(layer, merged) for layer in outputs.deepstack_features],
    )
