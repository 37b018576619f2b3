"""Each family's patch grids are what its stock projector is given, on images that are not square.

The stock model is the witness: what goes into its projector, during its own ``get_image_features``.
"""

from __future__ import annotations

from math import isqrt

import pytest
import torch
import transformers
from packaging import version

from tests.dropin.configs import CONFIGS, GRIDS
from tests.dropin.table import (
    ANYRES,
    MINICPM,
    PATCH,
    PIXELS,
    PIXTRALS,
    VISION_WIDTH,
    cell_inputs,
    grid_inputs,
    image_inputs,
    minicpm_inputs,
    pixels,
    places,
)
from tests.dropin.test_model import converted
from tests.dropin.tiny import stock_model
from tokenflex.dropin.families import family_of
from tokenflex.dropin.features import flat_grids

WIDE, TALL = (4, 8), (6, 2)  # patches
# Families whose encoder ends with cells of 2 x 2 patches.
MERGED_BEFORE = (
    *("gemma4", "glm46v", "glm4v", "glm4v_moe", "glm_ocr", "glmga"),
    *("glm5_next", "hyperclovax_vision_v2", "muse_glimmer", "muse_spark"),
)


def inputs_of(name: str) -> dict:
    """Image inputs of unequal shapes and several tiles, where the family knows such."""
    if name in PIXTRALS:
        sizes = torch.tensor([[side * PATCH for side in grid] for grid in (WIDE, TALL)])
        return {"pixel_values": pixels(2, 3, PIXELS, PIXELS), "image_sizes": sizes}
    if name in GRIDS:
        return grid_inputs(name, [1, 2], [WIDE, TALL])
    if name == "inkling2":
        return cell_inputs([1, 2], [(2, 4), (3, 1)])
    if name in MINICPM:
        return minicpm_inputs([1, 2], [(4, 8), (8, 4)])
    if name == "granite_docling":  # two tiles of the first image, padding in the second
        mask = torch.tensor([[True, True], [True, False]])
        return {"pixel_values": pixels(2, 2, 3, PIXELS, PIXELS), "pixel_attention_mask": mask}
    if name == "step3p7":  # two tiles of the first image, which are smaller than the whole of it
        return {
            "pixel_values": pixels(2, 3, PIXELS, PIXELS),
            "pixel_values_local": pixels(2, 3, PIXELS // 2, PIXELS // 2, seed=1),
            "num_local_patches": [2, 0],
        }
    if name == "gemma4":
        positions = torch.full((2, 32, 2), -1)
        positions[0], positions[1, :12] = places(*WIDE), places(*TALL)
        return {"pixel_values": pixels(2, 32, 3 * PATCH * PATCH), "image_position_ids": positions}
    if name == "aria":
        mask = torch.zeros(2, PIXELS, PIXELS, dtype=torch.bool)
        mask[0, : 4 * PATCH], mask[1, : 6 * PATCH, : 2 * PATCH] = True, True
        return {"pixel_values": pixels(2, 3, PIXELS, PIXELS), "pixel_mask": mask}
    if name == "perception_lm":
        return {"pixel_values": pixels(1, 3, 3, PIXELS, PIXELS)}  # three tiles of an image
    if name == "lfm2_vl":
        mask = torch.zeros(2, 32, dtype=torch.long)
        mask[0], mask[1, :12] = 1, 1
        return {
            "pixel_values": pixels(2, 32, 3 * PATCH * PATCH),
            "spatial_shapes": torch.tensor([WIDE, TALL]),
            "pixel_attention_mask": mask,
        }
    if name in ANYRES:
        # a grid of 1 x 2 tiles and the whole image; and one of 1 x 1, filled up with a tile
        sizes = torch.tensor([[60, 130], [64, 64]])
        values = pixels(2, 3, 3, PIXELS, PIXELS)
        values[1, 2] = 0
        return {"pixel_values": values, "image_sizes": sizes}
    if name in ("idefics3", "smolvlm"):
        mask = torch.ones(2, 2, PIXELS, PIXELS, dtype=torch.bool)
        mask[0, 1, 40:] = False  # the lower part of a tile is padding
        values = pixels(2, 2, 3, PIXELS, PIXELS)
        values[1, 1] = 0  # the second prompt has one tile only
        return {"pixel_values": values, "pixel_attention_mask": mask}
    return image_inputs(name, [1, 2])


def given_to_stock_projector(name: str, inputs: dict, **config) -> torch.Tensor:
    """[patches, C], in the order of the stock model."""
    model = stock_model(name)
    for field, value in config.items():
        setattr(model.config, field, value)
    base = model.base_model
    projector = base.get_submodule(family_of(model.config).stock_projector)
    caught = []
    projector.register_forward_pre_hook(
        lambda module, args, kwargs: caught.append((*args, *kwargs.values())[0]), with_kwargs=True
    )
    with torch.no_grad():
        base.get_image_features(**inputs)
    if name in ("got_ocr2", "pp_chart2table"):
        caught = [features.permute(0, 2, 3, 1) for features in caught]
    if name in ("internvl", "qianfan_ocr"):  # its patches stand side by side already
        caught = [unshuffled(cells) for cells in caught]
    if name == "ovis2":  # the rows of its table are weighed by a head of the encoder
        caught = [base.vision_tower(inputs["pixel_values"]).last_hidden_state.detach()]
    if name == "aria":  # with the padding of images
        (features,), sizes = caught, (WIDE, TALL)
        maps = features.unflatten(1, (PIXELS // PATCH, PIXELS // PATCH))
        caught = [
            image[:height, :width] for image, (height, width) in zip(maps, sizes, strict=True)
        ]
        caught = [image.flatten(0, 1) for image in caught]
    return torch.cat([features.flatten(0, -2) for features in caught])


def unshuffled(cells: torch.Tensor) -> torch.Tensor:
    """[images, n * n, 4 * C] -> [images, 2 * n, 2 * n, C]"""
    side = isqrt(cells.shape[1])
    parts = cells.unflatten(1, (side, side)).unflatten(-1, (2, 2, -1))
    patches = cells.new_empty(len(cells), 2 * side, 2 * side, parts.shape[-1])
    for i in range(2):
        for j in range(2):
            patches[:, i::2, j::2] = parts[:, :, :, i, j]
    return patches


def cells_in_raster_order(rows: torch.Tensor, grids: list) -> torch.Tensor:
    """2 x 2 patches of a cell after one another -> patches row by row."""
    rows, images = iter(rows), []
    for height, width in grids:
        image = torch.empty(height, width, VISION_WIDTH)
        for i in range(0, height, 2):
            for j in range(0, width, 2):
                for a, b in ((0, 0), (0, 1), (1, 0), (1, 1)):
                    image[i + a, j + b] = next(rows)
        images.append(image.flatten(0, 1))
    return torch.cat(images)


@torch.no_grad()
def test_patch_grids_are_what_the_stock_projector_is_given(name):
    model, inputs = converted(name), inputs_of(name)
    rows, grids = flat_grids(family_of(model.config).patch_grids(model.base_model, **inputs))
    if name in MINICPM:
        assert grids == [(2, 4), (4, 2)]
    elif name in MERGED_BEFORE:
        assert grids == [(2, 4), (3, 1)]
    elif name in (*GRIDS, *PIXTRALS, "aria", "lfm2_vl", "inkling2"):
        assert grids == [WIDE, TALL]
    elif name == "step3p7":
        assert grids == [(2, 2), (2, 2), (4, 4), (4, 4)]
    if name == "lfm2_vl" and version.parse(transformers.__version__) >= version.parse("5.24"):
        pytest.skip("since transformers 5.24 its projector is given blocks of all images as one")
    stock = given_to_stock_projector(name, inputs)
    if name in ("qwen2_5_vl", "exaone4_5"):  # by windows, and cells in order afterwards
        windows = pytest.importorskip("transformers.vision_utils")
        vision = model.config.vision_config
        order, _ = windows.get_vision_window_index(
            inputs["image_grid_thw"], vision.spatial_merge_size, vision.window_size, PATCH
        )
        stock = stock.unflatten(0, (-1, 4))[torch.argsort(order)].flatten(0, 1)
    if name == "step3p7":  # the images go first through its projector
        first, second, *tiles = stock.split([16, 16, 4, 4])
        stock = torch.cat([*tiles, first, second])
    if name == "inkling2":
        stock = stock.unflatten(-1, (4, -1)).flatten(0, 1)
    if name in (*GRIDS, "inkling2") and name not in (
        *MERGED_BEFORE,
        "paddleocr_vl",
        "video_llama_3",
    ):
        stock = cells_in_raster_order(stock, grids)
    assert rows.shape == stock.shape
    assert torch.allclose(rows, stock, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("family", ["internvl", "llava", "llava_next", "aya_vision", "mistral3"])
def test_an_earlier_layer_is_the_one_of_the_stock_model(family):
    model, inputs = converted(family), inputs_of(family)
    model.config.vision_feature_layer = 1
    rows, _ = flat_grids(family_of(model.config).patch_grids(model.base_model, **inputs))
    stock = given_to_stock_projector(family, inputs, vision_feature_layer=1)
    assert torch.allclose(rows, stock, atol=1e-6)
    last = given_to_stock_projector(family, inputs, vision_feature_layer=-1)
    assert not torch.allclose(rows, last, atol=1e-5)


DEEPSTACK = ("qwen3_vl", "qwen3_vl_moe", "cohere_compass", "cosmos3_omni")


@torch.no_grad()
@pytest.mark.parametrize("family", [name for name in DEEPSTACK if name in CONFIGS])
def test_deepstack_maps_are_pooled_to_each_token_grid(family):
    model, inputs = converted(family), inputs_of(family)
    stock = stock_model(family).base_model.get_image_features(**inputs).deepstack_features
    counts = [(2, 3), (1, 1)]
    pooled = model.base_model.get_image_features(**inputs, num_image_tokens=counts)
    assert len(pooled.deepstack_features) == len(stock) == 2
    for layer, expected in zip(pooled.deepstack_features, stock, strict=True):
        images = torch.cat([*expected]).split([2 * 4, 3 * 1])  # half the patches a side
        for tokens, image, cells, grid in zip(layer, images, [(2, 4), (3, 1)], counts, strict=True):
            grids = image.unflatten(0, cells).permute(2, 0, 1)
            means = torch.nn.functional.adaptive_avg_pool2d(grids, grid)
            assert float(means.abs().max()) > 0.01
            assert torch.allclose(tokens, means.flatten(1).T, atol=1e-5)


@torch.no_grad()
def test_tokens_around_images_of_ovis2_are_the_stock_ones():
    model, inputs = converted("ovis2"), image_inputs("ovis2", [1])
    stock = stock_model("ovis2").base_model.get_image_features(**inputs)
    more = family_of(model.config).more_outputs(model.base_model)
    assert more.keys() == {"visual_indicator_features"}
    assert torch.equal(more["visual_indicator_features"], stock.visual_indicator_features)


@torch.no_grad()
def test_granite_docling_keeps_its_maps_of_earlier_layers():
    model, inputs = converted("granite_docling"), inputs_of("granite_docling")
    (stock,) = stock_model("granite_docling").base_model.get_image_features(**inputs)[
        "deepstack_features"
    ]
    counts = [(2, 3), (1, 1), (4, 4)]
    (pooled,) = model.base_model.get_image_features(
        **inputs, num_image_tokens=counts
    ).deepstack_features
    for tokens, tile, grid in zip(pooled, torch.cat(stock).split(16), counts, strict=True):
        maps = tile.unflatten(0, (4, 4)).permute(2, 0, 1)
        means = torch.nn.functional.adaptive_avg_pool2d(maps, grid)
        torch.testing.assert_close(tokens, means.flatten(1).T, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="tile_fine_mask must be None"):
        model.base_model.get_image_features(**inputs, tile_fine_mask=torch.ones(2).bool())
