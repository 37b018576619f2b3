"""Requests before vLLM's engine sees them: prompts, cache keys, tiles, errors."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.models.tiny import IMAGE, picture
from tests.serving.checkpoints import save_checkpoint
from tokenflex.models.loading import load_checkpoint

vllm = pytest.importorskip("vllm", reason="vllm is not installed; make test-vllm installs it")

from vllm.config import ModelConfig  # noqa: E402
from vllm.exceptions import VLLMValidationError  # noqa: E402
from vllm.multimodal import MULTIMODAL_REGISTRY  # noqa: E402
from vllm.multimodal.cache import MultiModalProcessorOnlyCache  # noqa: E402
from vllm.multimodal.media.image import ImageMediaIO  # noqa: E402

from tokenflex.serving.vllm import register  # noqa: E402
from tokenflex.serving.vllm.wishes import PER_IMAGE  # noqa: E402

A, B = picture(1), picture(2)


def processor_of(folder, **mm_processor_kwargs):
    """Return vLLM's processor for a checkpoint, as a server started with these options has it."""
    register()
    config = ModelConfig(
        model=str(folder),
        dtype="float32",
        mm_processor_kwargs=mm_processor_kwargs or None,
        limit_mm_per_prompt={"image": 8},
    )
    return MULTIMODAL_REGISTRY.create_processor(config), config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("served") / "model", max_tiles=6)


@pytest.fixture(scope="module")
def served(folder):
    return processor_of(folder)[0]


def process(processor, prompt, images, cache=None, uuids=None, **kwargs):
    items = processor.info.parse_mm_data({"image": images})
    return processor(prompt, items, uuids, hf_processor_mm_kwargs=kwargs, cache=cache)


def grids(result) -> list[list[int]]:
    return [item.get_data()["token_grids"].tolist() for item in result["mm_kwargs"]["image"]]


def runs(result) -> list[int]:
    return [place.length for place in result["mm_placeholders"]["image"]]


@pytest.mark.parametrize(
    "counts", [None, 4, (2, 3), [4, 9], [(2, 3), 16], [[3, 1], [1, 2]]], ids=str
)
def test_prompts_and_pixels_are_those_of_our_processor(served, folder, counts):
    _, ours = load_checkpoint(folder)
    text = "odd <image> read <image> where"
    images = [picture(1, (32, 96)), picture(2, (64, 64))]
    given = counts
    if isinstance(counts, list):  # in JSON a pair is a list
        given = [tuple(count) if isinstance(count, list) else count for count in counts]
    expected = ours(images=images, text=text, num_image_tokens=given)
    result = process(served, text, images, **({"num_image_tokens": counts} if counts else {}))
    assert result["prompt_token_ids"] == expected["input_ids"][0].tolist()
    pixels = [item.get_data()["pixel_values"] for item in result["mm_kwargs"]["image"]]
    assert torch.equal(torch.cat(pixels), expected["pixel_values"])
    assert [len(tiles) for tiles in pixels] == [4, 5]


def test_a_pictures_key_is_its_pixels_and_its_own_grid(served):
    def keys(images, counts, **kwargs):
        prompt = "<image> " * len(images)
        result = process(served, prompt, images, num_image_tokens=counts, **kwargs)
        return result["mm_hashes"]["image"]

    (a4,), (a9,), (b4,) = keys([A], 4), keys([A], 9), keys([B], 4)
    assert len({a4, a9, b4}) == 3
    assert keys([A, A, B], [4, 9, 4]) == [a4, a9, b4]  # whatever the other images ask for
    assert keys([B, A], [9, 4])[1] == a4
    assert keys([A], (2, 2)) == [a4]  # a count and its grid are the same
    assert keys([A], (1, 4)) != [a4]
    assert keys([A], 4, max_tiles=1) != [a4]
    assert keys([A], 4, max_tiles=6) == [a4]  # the server's own
    assert keys([A], 4, do_normalize=False) != [a4]


def test_a_users_name_for_a_picture_does_not_hide_its_count(served):
    from vllm.multimodal.parse import parse_mm_uuids

    uuids = parse_mm_uuids({"image": ["mine"]})
    results = [
        process(served, "<image>", [A], uuids=uuids, num_image_tokens=count) for count in (4, 9)
    ]
    (first,), (second,) = (result["mm_hashes"]["image"] for result in results)
    assert first != second


def test_an_automatic_count_has_the_key_of_the_count_that_was_chosen(served, folder):
    model, ours = load_checkpoint(folder)
    seen = set()
    for question in ("odd", "majority red", "where 3", "read r2c3"):
        text = f"<image> {question}"
        inputs = ours(images=A, text=text, num_image_tokens="auto")
        chosen = model.choose_counts(**inputs)["num_image_tokens"][0]
        auto = process(served, text, [A], num_image_tokens="auto")
        fixed = process(served, text, [A], num_image_tokens=chosen)
        assert auto["prompt_token_ids"] == fixed["prompt_token_ids"]
        assert auto["mm_hashes"] == fixed["mm_hashes"]
        seen.add(chosen)
    assert len(seen) > 1


def test_automatic_and_fixed_counts_stand_side_by_side(served):
    text = "<image> odd <image>"
    both = process(served, text, [A, B], num_image_tokens="auto")
    mixed = process(served, text, [A, B], num_image_tokens=["auto", (1, 5)])
    assert grids(mixed) == [grids(both)[0], [1, 5]]


def test_a_budget_bounds_an_automatic_choice(served):
    result = process(
        served, "<image> odd <image>", [A, B], num_image_tokens="auto", budget=14, max_tiles=1
    )
    assert sum(runs(result)) <= 14


def test_images_without_a_count_share_what_a_budget_leaves(served, folder):
    model, ours = load_checkpoint(folder)
    text, images = "<image> odd <image>", [A, B]

    def sizes(**kwargs):
        return runs(process(served, text, images, max_tiles=1, **kwargs))

    inputs = ours(images=images, text=text, num_image_tokens="auto", max_tiles=1)
    shared = model.choose_counts(**inputs, budget=13)["num_image_tokens"]
    assert sizes(budget=13) == sizes(num_image_tokens="auto", budget=13) == shared
    inputs = ours(images=[B], text="odd <image>", num_image_tokens="auto", max_tiles=1)
    (rest,) = model.choose_counts(**inputs, budget=9)["num_image_tokens"]
    assert rest < 16  # the budget binds
    assert sizes(num_image_tokens=[4, "auto"], budget=13) == [4, rest]
    assert sizes(budget=13, **{PER_IMAGE: ["low", None]}) == [4, rest]
    assert sizes(num_image_tokens=[(1, 3), 16], budget=19) == [3, 16]
    with pytest.raises(VLLMValidationError, match=r"budget must be at least 20, .* got 19"):
        sizes(num_image_tokens=[16, "auto"], budget=19)


def test_a_budget_counts_every_tile(served):
    images = [picture(1, (32, 96)), A]  # four tiles with the thumbnail, and one
    result = process(served, "<image> <image>", images, num_image_tokens=[9, "auto"], budget=40)
    assert runs(result) == [36, 4]
    with pytest.raises(VLLMValidationError, match=r"budget must be at least 40, .* got 39"):
        process(served, "<image> <image>", images, num_image_tokens=[9, "auto"], budget=39)
    with pytest.raises(VLLMValidationError, match=r"budget must be at least 45, .* got 44"):
        process(served, "<image> <image>", images, num_image_tokens=9, budget=44)
    with pytest.raises(VLLMValidationError, match=r"budget must be at least 25, .* got 24"):
        process(served, "<image> <image>", images, num_image_tokens=["auto", 9], budget=24)


def test_a_budget_that_fixed_counts_keep_runs_no_encoder(served, monkeypatch):
    monkeypatch.setattr(type(served.info.chooser), "_loaded", None)
    assert runs(process(served, "<image>", [A], num_image_tokens=4, budget=4)) == [4]


def test_a_servers_count_is_not_an_images_own(folder):
    processor, _ = processor_of(folder, num_image_tokens=16, max_tiles=1)
    assert sum(runs(process(processor, "<image><image>", [A, B], budget=13))) <= 13
    assert runs(process(processor, "<image>", [A])) == [16]


def test_a_server_may_have_a_budget(folder):
    processor, _ = processor_of(folder, budget=13, max_tiles=1)
    assert sum(runs(process(processor, "<image><image>", [A, B]))) <= 13
    assert runs(process(processor, "<image>", [A], num_image_tokens=4)) == [4]
    assert runs(processor.get_dummy_mm_inputs({"image": 1})) == [64]


def test_a_budget_needs_counts_to_choose_from(tmp_path):
    processor, _ = processor_of(save_checkpoint(tmp_path / "model", router=False))
    with pytest.raises(VLLMValidationError, match="budget needs counts to choose from"):
        process(processor, "<image>", [A], budget=30)
    assert runs(process(processor, "<image>", [A], num_image_tokens=9, budget=30)) == [9]


def test_what_is_in_vllms_cache_is_not_processed_again(folder, monkeypatch):
    processor, config = processor_of(folder)
    cache = MultiModalProcessorOnlyCache(config)
    ours = processor.info.get_hf_processor()
    seen = []
    process_images = type(ours).process_images

    def noting(self, images, *args, **kwargs):
        seen.extend(images)
        return process_images(self, images, *args, **kwargs)

    monkeypatch.setattr(type(ours), "process_images", noting)
    first = process(processor, "<image> <image>", [A, B], cache, num_image_tokens=[4, 9])
    assert len(seen) == 2
    again = process(processor, "<image> <image>", [B, A], cache, num_image_tokens=[9, 16])
    assert [np.asarray(image).sum() for image in seen[2:]] == [np.asarray(A).sum()]
    assert grids(first) == [[2, 2], [3, 3]]
    assert grids(again) == [[3, 3], [4, 4]]
    assert runs(again) == [9, 16]


def test_pictures_are_read_as_in_training(served, folder):
    """vLLM's own reader clips 16-bit pictures."""
    levels = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    data = io.BytesIO()
    Image.fromarray(levels).save(data, "PNG")
    fetched = ImageMediaIO().load_bytes(data.getvalue())
    _, ours = load_checkpoint(folder)
    expected = ours.process_images([data.getvalue()])[0]["pixel_values"]
    cache = MultiModalProcessorOnlyCache(processor_of(folder)[1])
    for result in (
        process(served, "<image>", [fetched]),
        process(served, "<image>", [fetched], cache),
    ):
        (item,) = result["mm_kwargs"]["image"]
        assert torch.equal(item.get_data()["pixel_values"], expected)


def test_marks_stand_around_an_image_whether_the_prompt_has_them_or_not(tmp_path):
    folder = save_checkpoint(tmp_path / "model", marks=("<img>", "</img>"))
    processor, _ = processor_of(folder)
    _, ours = load_checkpoint(folder)
    for text in (
        "odd <image> read <img><image></img> where <image>",
        "<image><image> odd <img><image>",
    ):
        images = [A, B, A]
        expected = ours(images=images, text=text, num_image_tokens=[4, 9, 1])
        result = process(processor, text, images, num_image_tokens=[4, 9, 1])
        assert result["prompt_token_ids"] == expected["input_ids"][0].tolist()
        assert runs(result) == [4, 9, 1]


def test_the_largest_image_sets_the_memory_that_is_reserved(folder):
    processor, _ = processor_of(folder)
    most = processor.info.get_mm_max_tokens_per_item(4096, {"image": 1})
    assert most == {"image": 7 * 64}  # six tiles and the thumbnail, of 8 x 8 patches each
    dummy = processor.get_dummy_mm_inputs({"image": 2})
    assert runs(dummy) == [7 * 64] * 2
    one_tile, _ = processor_of(folder, max_tiles=1)
    assert one_tile.info.get_mm_max_tokens_per_item(4096, {"image": 1}) == {"image": 64}
    assert one_tile.info.get_mm_max_tokens_per_item(50, {"image": 1}) == {"image": 50}


def test_the_servers_options_are_defaults_of_its_requests(folder):
    processor, _ = processor_of(folder, num_image_tokens=[2, 3], max_tiles=1)
    assert grids(process(processor, "<image> <image>", [A, B])) == [[2, 3]] * 2
    assert grids(process(processor, "<image>", [A], num_image_tokens=9)) == [[3, 3]]
    with pytest.raises(VLLMValidationError, match="max_tiles must be at most 1"):
        process(processor, "<image>", [A], max_tiles=2)


@pytest.mark.parametrize(
    ("prompt", "kwargs", "words"),
    [
        ("<image>", {"num_image_tokens": 5}, "must be a perfect square .* got 5"),
        ("<image>", {"num_image_tokens": -4}, "must be at least 1, got -4"),
        ("<image>", {"num_image_tokens": 81}, "at most the 8 x 8 patches .* got 9 x 9 = 81"),
        ("<image>", {"num_image_tokens": [1, 64]}, "8 x 8 patches .* got 1 x 64 = 64"),
        ("<image>", {"num_image_tokens": [64, 1]}, "8 x 8 patches .* got 64 x 1 = 64"),
        ("<image>", {"num_image_tokens": [4, 16]}, "8 x 8 patches .* got 4 x 16 = 64"),
        ("<image>", {"num_image_tokens": [9, 1], "max_tiles": 6}, "8 x 8 .* got 9 x 1 = 9"),
        ("<image>", {PER_IMAGE: [[1, 9]]}, "8 x 8 patches .* got 1 x 9 = 9"),
        ("<image>", {"num_image_tokens": [4, 9, 4]}, "got 3 entries for 1 images"),
        ("<image>", {"num_image_token": 4}, "did you mean num_image_tokens"),
        ("<image>", {"max_tiles": 0}, "max_tiles must be at least 1, got 0"),
        ("<image>", {"num_image_tokens": "auto", "penalty": -1}, "penalty must be finite and"),
        ("<image>", {"num_image_tokens": "auto", "budget": 3}, "budget must be at least"),
        (
            "<image>",
            {"num_image_tokens": 16, "budget": 15},
            "budget must be at least 16, .* 15",
        ),
        ("<image>", {"num_image_tokens": 4, "penalty": 0.1}, "penalty must come with .* 'auto'"),
        ("<image>", {"budget": 0}, "budget must be at least 1, got 0"),
        ("<image>", {"num_image_tokens": 4, "budget": "many"}, "budget must be an int, got 'many'"),
        ("<image>", {"num_image_tokens": 4, "budget": True}, "budget must be an int, got True"),
        ("odd", {}, "<image>' once per image, got 0 for 1 images"),
        ("<image> <image>", {}, "<image>' once per image, got 2 for 1 images"),
    ],
)
def test_a_bad_request_is_an_error_of_the_caller(served, prompt, kwargs, words):
    with pytest.raises(VLLMValidationError, match=words):
        process(served, prompt, [A], **kwargs)


def test_auto_without_a_router_names_no_folder_of_the_server(tmp_path):
    processor, _ = processor_of(save_checkpoint(tmp_path / "model", router=False))
    with pytest.raises(VLLMValidationError, match="'auto' needs a router") as raised:
        process(processor, "<image>", [A], num_image_tokens="auto")
    assert str(tmp_path) not in str(raised.value)


def test_a_truncated_picture_is_an_error_of_the_caller(served):
    data = io.BytesIO()
    picture(1, (64, 64)).save(data, "PNG")
    fetched = ImageMediaIO().load_bytes(data.getvalue())
    with pytest.raises(VLLMValidationError, match="image"):
        process(served, "<image>", [replace(fetched, original_bytes=data.getvalue()[:200])])


def test_a_grid_beyond_the_patches_is_refused_before_pictures_are_read(served, monkeypatch):
    ours = served.info.get_hf_processor()
    monkeypatch.setattr(type(ours), "process_images", None)  # a call would be a TypeError of it
    for images, counts in (([A], [1, 9]), ([A, B], ["auto", [9, 1]])):
        with pytest.raises(VLLMValidationError, match="the 8 x 8 patches of a tile"):
            process(served, "<image>" * len(images), images, num_image_tokens=counts)


@pytest.mark.parametrize("counts", [[8, 8], [1, 8], [8, 1], 64])
def test_a_grid_may_have_a_token_per_patch(served, counts):
    (grid,) = grids(process(served, "<image>", [A], num_image_tokens=counts, max_tiles=1))
    assert grid == ([8, 8] if counts == 64 else counts)


def save_any_shape(folder, **options):
    """Save a model whose pictures keep their shape, in at most 64 patches."""
    from transformers import Siglip2ImageProcessorPil

    from tokenflex import TokenFlexProcessor

    save_checkpoint(folder, vision="siglip2", **options)
    _, ours = load_checkpoint(folder)
    image_processor = Siglip2ImageProcessorPil(patch_size=4, max_num_patches=64)
    ours = TokenFlexProcessor(image_processor, ours.tokenizer, num_image_tokens=4)
    ours.save_pretrained(folder)
    return ours


def test_grids_are_at_most_the_patches_of_a_picture_of_any_shape(tmp_path, monkeypatch):
    ours = save_any_shape(tmp_path / "model")
    processor, _ = processor_of(tmp_path / "model")
    wide, square = picture(1, (16, 64)), picture(2, (32, 32))
    (height, width), other = ours.process_images([wide, square])[0]["grids"]
    assert height < 8 < width
    assert other == (8, 8)
    most = process(processor, "<image>", [wide], num_image_tokens=(height, width))
    assert grids(most) == [[height, width]]
    words = f"at most the {height} x {width} patches of a tile"
    with pytest.raises(VLLMValidationError, match=words + r".*got 8 x 8 = 64"):
        process(processor, "<image>", [wide], num_image_tokens=64)
    with pytest.raises(VLLMValidationError, match=r"the 8 x 8 patches .* got 1 x 9"):
        process(processor, "<image><image>", [wide, square], num_image_tokens=[(1, 9), (1, 9)])
    with pytest.raises(VLLMValidationError, match="at most 64, the most patches of an image"):
        process(processor, "<image>", [wide], num_image_tokens=81)
    # A bad grid is told before another picture's count is chosen.
    monkeypatch.setattr(type(processor.info.chooser), "choose", None)
    with pytest.raises(VLLMValidationError, match=words):
        process(processor, "<image><image>", [square, wide], num_image_tokens=["auto", 64])


def test_memory_is_reserved_for_the_most_patches_of_a_picture_of_any_shape(tmp_path):
    save_any_shape(tmp_path / "model", router=False)
    processor, _ = processor_of(tmp_path / "model")
    assert runs(processor.get_dummy_mm_inputs({"image": 2})) == [64] * 2


def test_pictures_of_any_shape_come_with_their_patch_grids(tmp_path):
    ours = save_any_shape(tmp_path / "model", router=False)
    processor, _ = processor_of(tmp_path / "model")
    images = [picture(1, (16, 64)), picture(2, (64, 16))]
    result = process(processor, "<image> <image>", images, num_image_tokens=[(1, 3), 4])
    expected = ours(images=images, text="<image> <image>", num_image_tokens=[(1, 3), 4])
    patches = [
        tuple(item.get_data()["patch_grids"][0].tolist()) for item in result["mm_kwargs"]["image"]
    ]
    assert patches == expected["grids"]
    assert runs(result) == [3, 4]
    assert IMAGE in result["prompt_token_ids"]
