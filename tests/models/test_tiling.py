"""High resolution: which grid an image is cut into, what the tiles show, and what they cost."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    Siglip2ImageProcessorPil,
    SiglipImageProcessor,
    SiglipImageProcessorPil,
)
from transformers.utils import is_torchvision_available

from tests.models.tiny import IMAGE, PIXELS, check_same_pixels, picture, tiny_model
from tokenflex import TokenFlexProcessor
from tokenflex.counts import TokenCounts
from tokenflex.data.packing import DrawnSample, PackingCollator
from tokenflex.data.samples import Conversation, Sample, Turn
from tokenflex.digits.processor import digits_processor
from tokenflex.models.tiling import best_tile_grid, cut_tiles

TILE = (384, 384)


def tiling_processor(max_tiles: int = 6, **options) -> TokenFlexProcessor:
    base = digits_processor(4)
    return TokenFlexProcessor(
        base.image_processor, base.tokenizer, num_image_tokens=4, max_tiles=max_tiles, **options
    )


# ---- the grid


@pytest.mark.parametrize(
    ("size", "max_tiles", "grid"),
    [
        ((384, 384), 6, (1, 1)),
        ((384, 768), 6, (1, 2)),
        ((768, 384), 6, (2, 1)),
        ((400, 1150), 6, (1, 3)),
        ((1000, 1500), 6, (2, 3)),
        ((1500, 1000), 6, (3, 2)),
        ((300, 5000), 6, (1, 6)),
        ((900, 900), 1, (1, 1)),
        # Equally close shapes: the larger grid if the image fills more than half of it.
        ((542, 544), 4, (1, 1)),
        ((543, 543), 4, (1, 1)),  # 294849 pixels, half of 2 x 2 is 294912
        ((544, 544), 4, (2, 2)),
        ((544, 1088), 8, (2, 4)),
        ((543, 1086), 8, (1, 2)),
    ],
)
def test_grid_is_the_closest_in_shape(size, max_tiles, grid):
    # 542 x 544 is not square: 1 x 1 and 2 x 2 are equally far from it, and it is small.
    assert best_tile_grid(size, TILE, max_tiles) == grid


def test_grid_by_trying_all():
    """The rule written out: none is closer, and of those as close none fits its pixels better."""
    generator = np.random.default_rng(0)
    for height, width, limit in generator.integers((50, 50, 1), (3000, 3000, 13), (300, 3)):
        rows, columns = best_tile_grid((height, width), TILE, limit)
        assert 1 <= rows * columns <= limit
        distance = abs(width / height - columns / rows)
        for r, c in product(range(1, limit + 1), repeat=2):
            if r * c > limit:
                continue
            assert abs(width / height - c / r) >= distance
            if (c / r) == (columns / rows) and r * c > rows * columns:
                assert height * width <= 0.5 * 384 * 384 * r * c
            if (c / r) == (columns / rows) and r * c < rows * columns:
                assert height * width > 0.5 * 384 * 384 * rows * columns


def test_at_least_so_many_tiles():
    assert best_tile_grid((384, 384), TILE, 6, min_tiles=4) == (2, 2)
    assert best_tile_grid((300, 900), TILE, 6, min_tiles=4) == (1, 4)


def test_tiles_that_are_not_square():
    assert best_tile_grid((100, 200), (100, 200), 4) == (1, 1)
    assert best_tile_grid((200, 400), (100, 200), 4) == (2, 2)
    assert best_tile_grid((200, 200), (100, 200), 4) == (2, 1)


# ---- the tiles


def test_tiles_are_the_resized_image_row_by_row():
    image = picture(1, size=(70, 100))
    tiles = cut_tiles(
        image, (32, 32), (2, 3), use_thumbnail=True, resample=Image.Resampling.BICUBIC
    )
    whole = np.asarray(image.resize((96, 64), Image.Resampling.BICUBIC))
    assert len(tiles) == 7
    for i, tile in enumerate(tiles[:6]):
        top, left = i // 3 * 32, i % 3 * 32
        assert np.array_equal(np.asarray(tile), whole[top : top + 32, left : left + 32])
    assert np.array_equal(
        np.asarray(tiles[6]), np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC))
    )


def test_one_tile_needs_no_thumbnail():
    tiles = cut_tiles(picture(1), (32, 32), (1, 1), use_thumbnail=True, resample=3)
    assert len(tiles) == 1


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_tiles_are_rgb(mode):
    image = picture(1, size=(64, 64)).convert(mode)
    assert {
        tile.mode for tile in cut_tiles(image, TILE, (1, 1), use_thumbnail=False, resample=3)
    } == {"RGB"}


def test_arrays_are_cut_as_pictures_are():
    image = picture(1, size=(64, 96))
    processor = tiling_processor()
    expected = processor(images=image, text="<image> odd")["pixel_values"]
    array = processor(images=np.asarray(image), text="<image> odd")["pixel_values"]
    assert torch.equal(array, expected)


# ---- the processor


@pytest.mark.parametrize(("thumbnail", "tiles"), [(False, [6, 1, 2]), (True, [7, 1, 3])])
def test_each_tile_of_an_image_gets_its_count(thumbnail, tiles):
    processor = tiling_processor(use_thumbnail=thumbnail)
    images = [picture(1, (64, 96)), picture(2), picture(3, (32, 64))]
    batch = processor(
        images=[images[:2], images[2:]],
        text=["<image> odd <image>", "odd <image>"],
        num_image_tokens=[4, 9, (1, 3)],
    )
    a, b, c = tiles
    assert batch["pixel_values"].shape == (sum(tiles), 3, PIXELS, PIXELS)
    assert batch["num_image_tokens"] == [4] * a + [9] * b + [(1, 3)] * c
    assert (batch["input_ids"] == IMAGE).sum(-1).tolist() == [4 * a + 9 * b, 3 * c]
    assert processor.image_tokens(images, [4, 9, (1, 3)]) == [4 * a, 9 * b, 3 * c]


@pytest.mark.parametrize("counts", [None, [4, (1, 3)], "auto"])
def test_prompts_about_processed_images_are_those_of_a_call(counts):
    processor = tiling_processor(use_thumbnail=True)
    images, text = [picture(1, (64, 96)), picture(2)], ["<image> odd", "odd <image>"]
    expected = processor(images=images, text=text, num_image_tokens=counts)
    data, tiles = processor.process_images(images)
    inputs = processor.encode_text(text, tiles, num_image_tokens=counts)
    assert torch.equal(expected.pop("pixel_values"), data["pixel_values"])
    assert inputs.keys() == expected.keys()
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(inputs.pop(name), expected.pop(name))
    assert dict(inputs) == dict(expected)
    with pytest.raises(ValueError, match="max_tiles is for images, which are processed already"):
        processor.encode_text(text, tiles, max_tiles=1)
    with pytest.raises(ValueError, match="do_rescale is for images"):
        processor.encode_text(text, tiles, do_rescale=False)
    with pytest.raises(ValueError, match=r"got 2 \(per prompt \[1, 1\]\) for 1 images"):
        processor.encode_text(text, [1])


def test_cost_is_known_from_sizes_alone():
    processor = tiling_processor(use_thumbnail=True)
    assert processor.image_tokens([(64, 96), (32, 32)], 9) == [63, 9]
    assert processor.image_tokens([(64, 96), (32, 32)], 9, max_tiles=1) == [9, 9]
    assert digits_processor(16).image_tokens([(64, 96)]) == [16]
    data = processor._get_num_multimodal_tokens(image_sizes=[(64, 96), (32, 32)])
    assert (data.num_image_tokens, data.num_image_patches) == ([28, 4], [7, 1])


@pytest.mark.parametrize(
    ("options", "tokens", "tiles"),
    [
        ({"max_tiles": 2}, [12, 4], [3, 1]),
        ({"num_image_tokens": [9, (1, 2)]}, [63, 2], [7, 1]),
        ({"size": {"height": 32, "width": 48}}, [20, 28], [5, 7]),
        ({"images_kwargs": {"size": {"height": 32, "width": 48}}}, [20, 28], [5, 7]),
    ],
)
def test_servers_are_told_what_a_call_gives(options, tokens, tiles):
    processor = tiling_processor(use_thumbnail=True, patch_size=4)
    sizes = [(64, 96), (32, 32)]
    data = processor._get_num_multimodal_tokens(image_sizes=sizes, **options)
    assert (data.num_image_tokens, data.num_image_patches) == (tokens, tiles)
    batch = processor(
        images=[picture(i, size) for i, size in enumerate(sizes)],
        text=["<image>", "<image>"],
        **options,
    )
    assert (batch["input_ids"] == IMAGE).sum(-1).tolist() == tokens
    assert len(batch["pixel_values"]) == sum(tiles)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"max_tile": 2}, TypeError, "did you mean max_tiles"),
        ({"num_image_tokens": "auto"}, ValueError, "before images are seen, got 'auto'"),
    ],
)
def test_servers_ask_as_a_call_does(options, error, words):
    with pytest.raises(error, match=words):
        tiling_processor()._get_num_multimodal_tokens(image_sizes=[(64, 96)], **options)


def test_tiles_of_another_size_bring_their_grids():
    processor = tiling_processor(patch_size=4)
    batch = processor(images=picture(1, (64, 96)), text="<image>", size={"height": 64, "width": 64})
    assert batch["grids"] == [(16, 16)] * len(batch["pixel_values"])
    assert "grids" not in processor(images=picture(1, (64, 96)), text="<image>")


def test_turned_pictures_are_counted_as_they_are_cut(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(1, (32, 96)).save(tmp_path / "a.png", exif=exif)
    processor = tiling_processor(3)
    with Image.open(tmp_path / "a.png") as file:
        for image in (file, tmp_path / "a.png"):
            assert processor.image_tokens([image]) == [12]
            batch = processor(images=image, text="<image>")
            assert len(batch["pixel_values"]) == 3
    upright = picture(1, (32, 96)).transpose(Image.Transpose.ROTATE_270)
    assert torch.equal(
        batch["pixel_values"], processor(images=upright, text="<image>")["pixel_values"]
    )


def test_floats_are_cut_as_they_are():
    floats = np.random.default_rng(0).random((64, 96, 3), dtype=np.float32) * 3 - 1
    batch = tiling_processor(use_thumbnail=True)(
        images=floats, text="<image>", do_rescale=False, do_resize=False, do_normalize=False
    )
    assert len(batch["pixel_values"]) == 7
    assert np.array_equal(batch["pixel_values"][4], floats[32:, 32:64].transpose(2, 0, 1))


@pytest.mark.parametrize("scale", [1, 255, -1])
@pytest.mark.parametrize(
    "backend",
    [
        SiglipImageProcessorPil,
        pytest.param(
            SiglipImageProcessor,
            marks=pytest.mark.skipif(not is_torchvision_available(), reason="no torchvision"),
        ),
    ],
)
def test_floats_of_any_range_are_cut(scale, backend):
    """Bicubic filters overshoot at edges, and no range of values is refused without tiles."""
    own = digits_processor()
    values = own.image_processor.to_dict()
    image_processor = backend(
        **{name: values[name] for name in ("size", "image_mean", "image_std", "resample")}
    )
    processor = TokenFlexProcessor(image_processor, own.tokenizer, 4, max_tiles=6)
    edge = np.zeros((20, 40, 3), np.float32)
    edge[:, 20:] = scale
    options = {"do_rescale": False, "do_normalize": False}
    for image in (edge, torch.from_numpy(edge).permute(2, 0, 1)):
        tiles = processor(images=image, text="<image> odd", **options)["pixel_values"]
        assert tiles.shape == (2, 3, 32, 32)
        assert (tiles / scale).max() > 1
        assert (tiles / scale).min() < 0
        assert float(tiles[1, 0, 16, 24]) == pytest.approx(scale)


def test_what_is_no_number_is_cut_too():
    image = np.full((32, 64, 3), 0.5, np.float32)
    image[0, 0] = np.nan
    pixels = tiling_processor(2)(images=image, text="<image>", do_rescale=False)["pixel_values"]
    assert pixels.isnan().any(dim=(1, 2, 3)).tolist() == [True, False]


@pytest.mark.parametrize("limit", [1025, 100_000, 10**30])
def test_the_number_of_tiles_has_a_bound(limit):
    """All grids of at most so many tiles are compared for each image."""
    with pytest.raises(ValueError, match="max_tiles must be at most 1024, got"):
        tiling_processor(limit)
    processor = tiling_processor(6)
    for call in (
        lambda: processor(images=picture(1), text="<image>", max_tiles=limit),
        lambda: processor.image_tokens([(32, 32)], max_tiles=limit),
    ):
        with pytest.raises(ValueError, match="max_tiles must be at most 1024, got"):
            call()
    assert processor.image_tokens([(32, 64)], max_tiles=1024) == [2 * 4]


def test_limit_of_a_call_comes_before_the_processors():
    processor = tiling_processor(6, min_tiles=4)
    image = picture(1, (64, 96))
    for limit, tiles in ((None, 6), (1, 1), (2, 2), (12, 6)):
        batch = processor(images=image, text="<image> odd", max_tiles=limit)
        assert len(batch["pixel_values"]) == tiles, limit


def test_uncut_images_go_to_the_image_processor_as_they_are():
    image = picture(1, (50, 70))
    batch = tiling_processor(1)(images=image, text="<image> odd")
    assert torch.equal(
        batch["pixel_values"], digits_processor()(images=image, text="<image> odd")["pixel_values"]
    )


def test_tiles_are_as_large_as_the_crop():
    base = digits_processor()
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}
    )
    processor = TokenFlexProcessor(image_processor, base.tokenizer, max_tiles=4)
    batch = processor(images=picture(1, (64, 64)), text="<image> odd", num_image_tokens=4)
    assert batch["pixel_values"].shape == (4, 3, 32, 32)


def test_tiling_survives_saving(tmp_path):
    saved = tiling_processor(
        6, min_tiles=2, use_thumbnail=True, image_start="read", image_end="odd"
    )
    saved.save_pretrained(tmp_path)
    loaded = TokenFlexProcessor.from_pretrained(tmp_path)
    call = {"images": picture(1, (64, 96)), "text": "<image> blank"}
    before, after = saved(**call), loaded(**call)
    assert len(before["pixel_values"]) == 7
    check_same_pixels(saved, before.pop("pixel_values"), loaded, after.pop("pixel_values"))
    for name in before:
        same = before[name] == after[name]
        assert bool(same.all()) if isinstance(same, torch.Tensor) else same, name


def test_tiled_batch_gives_what_each_prompt_gives_alone():
    model, processor = tiny_model(), tiling_processor(4, use_thumbnail=True)
    images, counts = [picture(1, (32, 64)), picture(2), picture(3, (64, 64))], [4, 9, (2, 3)]
    texts = ["<image> odd <image>", "odd <image> read"]
    with torch.no_grad():
        together = model(
            **processor(images=[images[:2], images[2:]], text=texts, num_image_tokens=counts)
        ).logits
        for row, text, shown, n in zip(
            together, texts, (images[:2], images[2:]), (counts[:2], counts[2:]), strict=True
        ):
            alone = model(**processor(images=shown, text=text, num_image_tokens=n)).logits[0]
            assert float((row[-len(alone) :] - alone).abs().max()) < 1e-5


@pytest.mark.parametrize("thumbnail", [True, False])
def test_tiles_train_packed(thumbnail):
    """Training sees tiled images as the processor gives them for the same prompts."""
    model, processor = tiny_model(), tiling_processor(4, use_thumbnail=thumbnail)
    turns = (Turn("user", "odd <image> <image>"), Turn("assistant", "7"))
    samples = [
        Sample("a", (picture(1, (32, 64)), picture(2)), (Conversation(turns), Conversation(turns))),
        Sample("b", (picture(3, (64, 64)), picture(4)), (Conversation(turns),)),
    ]
    collate = PackingCollator(processor, TokenCounts((4, 9), (1.0, 1.0)))
    batch = collate([DrawnSample(i, 0, sample) for i, sample in enumerate(samples)])
    with torch.no_grad():
        packed = model(**batch.model_inputs()).logits[0]
        answers = [(sample, i) for i, sample in enumerate(samples) for _ in sample.conversations]
        for row, (sample, i) in enumerate(answers):
            inputs = processor(
                images=list(sample.images),
                text="odd <image> <image>",
                num_image_tokens=collate.counts.draw(i, 0),
            )
            alone = model(**inputs).logits[0, -1]
            first_of_answer = packed[2 * row]  # an answer is a word and <eos>
            assert float((first_of_answer - alone).abs().max()) < 1e-5


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"max_tiles": 0}, ValueError, "max_tiles.*0"),
        ({"max_tiles": 2.0}, TypeError, "max_tiles.*2.0"),
        ({"max_tiles": 2, "min_tiles": 3}, ValueError, "min_tiles.*3 and 2"),
        ({"patch_size": 0}, ValueError, "patch_size.*0"),
    ],
)
def test_limits_that_are_none(options, error, words):
    with pytest.raises(error, match=words):
        tiling_processor(**options)


def test_images_of_any_shape_are_not_cut():
    with pytest.raises(ValueError, match=r"max_tiles.*Siglip2ImageProcessorPil"):
        TokenFlexProcessor(Siglip2ImageProcessorPil(), digits_processor().tokenizer, max_tiles=4)
