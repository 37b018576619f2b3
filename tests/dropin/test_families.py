"""The registry, and the building blocks of adapters."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import SiglipImageProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.processing_utils import ProcessorMixin

from tests.dropin.configs import ALL, CONFIGS, model_type
from tests.dropin.processors import picture
from tests.dropin.table import IMAGE, tokenizer
from tests.dropin.test_model import logits
from tests.dropin.tiny import PROMPTS, Prompt, batch, stock_model
from tokenflex import register_family, replace_projector
from tokenflex.dropin import families, square_grids, supported_families
from tokenflex.dropin.adapters import grids, sizes, tiles
from tokenflex.dropin.families import family_of
from tokenflex.dropin.features import flat_grids
from tokenflex.dropin.processor import convert_processor
from tokenflex_kernels import versions


@pytest.fixture
def registry(monkeypatch):
    """Remove what a test registers."""
    monkeypatch.setattr(families, "_FAMILIES", dict(families._FAMILIES))


def grid(height: int, width: int, channels: int) -> torch.Tensor:
    return torch.arange(height * width * channels).view(height, width, channels)


# ---- grids


def test_merged_patches_stand_side_by_side():
    patches = grid(4, 6, 3)
    rows, sizes = flat_grids([patches, grid(2, 2, 3)], merge=2)
    assert sizes == [(2, 3), (1, 1)]
    assert rows.shape == (7, 12)
    for i in range(2):
        for j in range(3):
            cell = patches[2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
            assert torch.equal(rows[3 * i + j], cell.flatten())
    batched, batched_sizes = flat_grids(torch.stack([patches, patches + 100]), merge=2)
    assert batched_sizes == [(2, 3)] * 2
    assert torch.equal(batched[:6], rows[:6])
    assert torch.equal(batched[6:], rows[:6] + 100)


def test_grid_that_cannot_be_merged_is_refused():
    with pytest.raises(
        ValueError, match=r"patch_merge=2 must divide every patch grid, got.* 3 x 4"
    ):
        flat_grids(grid(3, 4, 1)[None], merge=2)


def test_cells_of_qwen_become_rows_of_patches():
    patches = [grid(4, 6, 2), grid(2, 4, 2)]
    cells = [
        patch.unflatten(0, (-1, 2)).unflatten(2, (-1, 2)).transpose(1, 2).flatten(2).flatten(0, 1)
        for patch in patches
    ]
    raster = grids._raster(torch.cat(cells), [(2, 3), (1, 2)], 2)
    for actual, expected in zip(raster, patches, strict=True):
        assert torch.equal(actual, expected)


def test_grid_that_is_not_square_is_refused():
    with pytest.raises(ValueError, match=r"patches of an image.*12"):
        square_grids(torch.zeros(1, 12, 4))


# ---- the registry


def test_every_registered_family_has_a_tiny_model():
    assert set(supported_families()) == {model_type(name) for name in ALL}


NEWER = sorted(name for name, family in families._FAMILIES.items() if family.transformers)


@pytest.mark.parametrize("name", NEWER)
def test_a_family_names_the_release_of_transformers_that_it_needs(name, monkeypatch):
    config, oldest = SimpleNamespace(model_type=name), families._FAMILIES[name].transformers
    monkeypatch.setattr(versions, "version", lambda package: "5.18.0")
    match = f"{name} in tokenflex.dropin needs transformers >= {oldest}, found 5.18.0"
    with pytest.raises(ImportError, match=match):
        family_of(config)
    monkeypatch.setattr(versions, "version", lambda package: f"{oldest}.0")
    assert family_of(config).model_type == name


def test_families_that_need_no_newer_transformers_are_known_to_the_installed_one():
    names = {model_type(name) for name in CONFIGS}
    assert names <= {*MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    assert {*supported_families()} - names <= {*NEWER}


def test_a_model_of_too_old_a_transformers_stays_as_it_is(registry):
    model = stock_model("llava")
    stock_class = type(model)
    families._FAMILIES["llava"] = replace(family_of(model.config), transformers="1000.0")
    with pytest.raises(ImportError, match=r"llava in tokenflex.dropin needs transformers >= 1000"):
        replace_projector(model, num_image_tokens=16)
    assert type(model) is stock_class
    assert logits(model, batch("llava", [Prompt([3, 4, 5], [], [])])).shape[0] == 1


@pytest.mark.parametrize("model_types", [(), (3,), ("a", None)])
def test_model_types_must_be_strings(model_types):
    with pytest.raises(TypeError, match="model_types"):
        register_family(*model_types)


def test_misspelt_options_are_refused(registry):
    with pytest.raises(TypeError, match="patchmerge"):
        register_family("mine", patchmerge=2)(lambda base, **_: None)
    assert "mine" not in supported_families()


def test_a_family_of_one_s_own(registry):
    seen = []

    @register_family("llava", vision_width="hidden_size", no_packing="it is a test")
    def mine(base, pixel_values, **_):
        seen.append(len(pixel_values))
        return square_grids(base.vision_tower(pixel_values).last_hidden_state)

    assert mine.__name__ == "mine"
    model = replace_projector(stock_model("llava-siglip"), num_image_tokens=16)
    assert logits(model, batch("llava-siglip", PROMPTS)).shape[0] == 2
    assert seen == [3]


# ---- layouts of placeholders that are tested without their families' own image processors


class TaggedProcessor(ProcessorMixin):
    """A processor whose text for an image a test sets."""

    image_token = "<image>"
    image_break_token = "<break>"
    layout = ""

    def __init__(self, image_processor=None, tokenizer=None):
        super().__init__(image_processor, tokenizer)

    def replace_image_token(self, image_inputs, image_idx, **kwargs):
        return self.layout


def tagged(layout: str, name: str):
    words = tokenizer("<image>", ["<break>", "<end>", "<tile>"])
    processor = TaggedProcessor(SiglipImageProcessor(size={"height": 8, "width": 8}), words)
    processor.layout = layout
    convert_processor(processor, stock_model(name).config, 16)
    return processor


def call(processor, count):
    inputs = processor(
        images=[picture(1)], text=["<image> what"], num_image_tokens=count, return_tensors="pt"
    )
    names = {51: "break", 52: "end", 53: "tile", IMAGE: "image", 4: "what"}
    return [names[i] for i in inputs["input_ids"][0].tolist()], inputs["num_image_tokens"]


def test_rows_of_pixtral_become_one_run():
    rows = "<image><image><break><image><image><end>"
    ids, counts = call(tagged(rows, "mistral3"), 9)
    assert ids == ["image"] * 9 + ["end", "what"]
    assert counts == [9]


def test_a_run_for_each_tile():
    ids, counts = call(tagged("<tile><image><tile><image><image>", "cohere2_vision"), 4)
    assert ids == ["tile", *["image"] * 4, "tile", *["image"] * 4, "what"]
    assert counts == [4, 4]


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("<image><image>", ["image"] * 12),
        ("<tile><image><tile><image><tile><image>", ["tile", *["image"] * 4] * 3),
    ],
    ids=["without tags", "with tags"],
)
def test_tiles_of_one_run_share_it(registry, layout, expected):
    register_family("llava", tiles=lambda processor, inputs, index: 3)(tiles._llava)
    ids, counts = call(tagged(layout, "llava"), 4)
    assert ids == [*expected, "what"]
    assert counts == [4, 4, 4]


def test_tiles_that_do_not_fit_the_runs_are_refused(registry):
    register_family("llava", tiles=lambda processor, inputs, index: 3)(tiles._llava)
    with pytest.raises(ValueError, match="image 0 has 3 tiles, but 2 runs"):
        call(tagged("<image><tile><image>", "llava"), 4)
    with pytest.raises(ValueError, match="0 runs"):
        call(tagged("<tile>", "llava"), 4)


def test_tiles_of_lfm2_count_the_thumbnail():
    class Images:
        use_thumbnail = True

    class Processor:
        image_processor = Images()

    inputs = {"image_rows": [1, 2], "image_cols": [1, 3]}
    assert sizes._naflex_tiles(Processor, inputs, 0) == 1
    assert sizes._naflex_tiles(Processor, inputs, 1) == 7
    Images.use_thumbnail = False
    assert sizes._naflex_tiles(Processor, inputs, 1) == 6
