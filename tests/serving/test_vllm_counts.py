"""Counts that a request to vLLM asks for, and those that are chosen before vLLM sees it."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from tests.models.tiny import IMAGE, picture
from tests.serving.checkpoints import COUNTS, save_checkpoint
from tokenflex.counts import token_grid
from tokenflex.models.loading import load_checkpoint
from tokenflex.serving.vllm import ConfigHook, feature_cache_bytes
from tokenflex.serving.vllm.choosing import CountChooser
from tokenflex.serving.vllm.wishes import image_choices, image_wishes, request_counts

CACHE = 1 << 20


@pytest.mark.parametrize(
    ("value", "images", "expected"),
    [
        (4, 2, [(2, 2)] * 2),
        ((2, 3), 2, [(2, 3)] * 2),
        ([2, 3], 1, [(2, 3)]),  # JSON has no pairs
        ([2, 3], 3, [(2, 3)] * 3),
        ([4, 9], 2, [(2, 2), (3, 3)]),
        ([[2, 3], 16], 2, [(2, 3), (4, 4)]),
        ("auto", 2, ["auto"] * 2),
        (["auto", 4, (1, 5)], 3, ["auto", (2, 2), (1, 5)]),
    ],
)
def test_counts_of_a_request_are_a_grid_per_image(value, images, expected):
    assert request_counts(value, images) == expected


@pytest.mark.parametrize(
    ("value", "images", "words"),
    [
        (5, 1, "num_image_tokens must be a perfect square .* got 5"),
        (0, 1, "num_image_tokens must be at least 1, got 0"),
        (True, 1, "num_image_tokens must be an int"),
        ("large", 1, "num_image_tokens must be a count or 'auto', got 'large'"),
        ([4, 9, 16], 2, "got 3 entries for 2 images"),
        ([4, 5], 2, r"num_image_tokens\[1\] must be a perfect square"),
        ([4, "many"], 2, r"num_image_tokens\[1\] must be a count or 'auto'"),
        ({"count": 4}, 1, "num_image_tokens must be an int"),
    ],
)
def test_a_bad_count_is_refused_by_name(value, images, words):
    with pytest.raises((TypeError, ValueError), match=words):
        request_counts(value, images)


def image_part(**image) -> dict:
    return {"type": "image_url", "image_url": {"url": "data:image/png;base64,", **image}}


def test_wishes_of_images_are_read_in_order_of_appearance():
    messages = [
        {"role": "system", "content": "be short"},
        {
            "role": "user",
            "content": [
                image_part(detail="low"),
                {"type": "text", "text": "and"},
                image_part(),
                image_part(num_image_tokens=9),
            ],
        },
        {"role": "user", "content": [image_part(num_image_tokens=[2, 3], detail="auto")]},
    ]
    assert image_wishes(messages) == ["low", None, (3, 3), (2, 3)]


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ({"detail": "medium"}, r"content\[0\].image_url.detail must be one of low, high, auto"),
        ({"detail": "low", "num_image_tokens": 4}, "one of detail and num_image_tokens"),
        ({"num_image_tokens": 5}, r"content\[0\].image_url.num_image_tokens must be a perfect"),
    ],
)
def test_a_bad_wish_is_refused_by_its_place(image, words):
    with pytest.raises(ValueError, match=words):
        image_wishes([{"role": "user", "content": [image_part(**image)]}])


def test_an_image_without_a_wish_takes_the_requests_choice():
    wishes = ["low", None, "high", (2, 3), [1, 4], "auto"]
    choices = image_choices([(5, 5)] * 6, wishes, COUNTS, chooses=True)
    assert choices == [(2, 2), (5, 5), (4, 4), (2, 3), (1, 4), "auto"]


@pytest.mark.parametrize(("chooses", "expected"), [(True, "auto"), (False, (5, 5))])
def test_auto_detail_is_the_requests_choice_where_nothing_chooses(chooses, expected):
    wishes = image_wishes([{"role": "user", "content": [image_part(detail="auto")]}])
    assert image_choices([(5, 5)], wishes, (), chooses=chooses) == [expected]


def test_an_automatic_count_that_an_image_names_is_never_replaced():
    wishes = image_wishes([{"role": "user", "content": [image_part(num_image_tokens="auto")]}])
    assert image_choices([(5, 5)], wishes, (), chooses=False) == ["auto"]


def test_details_need_counts_that_the_model_knows():
    with pytest.raises(ValueError, match="trained_num_image_tokens, got 'low'"):
        image_choices([(5, 5)], ["low"], (), chooses=False)
    with pytest.raises(ValueError, match="got 1 for 2 images"):
        image_choices([(5, 5)] * 2, ["low"], COUNTS, chooses=False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("served") / "model", max_tiles=4)


QUESTIONS = [[4 + i, IMAGE, 20 + i, IMAGE, 7] for i in range(6)]


def test_choices_are_those_of_the_whole_model(checkpoint):
    model, processor = load_checkpoint(checkpoint)
    chooser = CountChooser(checkpoint, model.config, CACHE)
    assert chooser.has_router
    assert chooser.known_counts == COUNTS
    seen = set()
    for i, ids in enumerate(QUESTIONS):
        data, tiles = processor.process_images([picture(i, (32, 96)), picture(i + 1)])
        pixels = data["pixel_values"].split(tiles)
        text = " ".join(processor.tokenizer.convert_ids_to_tokens(ids))
        inputs = processor.encode_text(text, tiles, num_image_tokens="auto")
        inputs["pixel_values"] = data["pixel_values"]
        for budget in (None, 30):
            expected = model.choose_counts(**inputs, budget=budget)["num_image_tokens"]
            chosen = chooser.choose(ids, pixels, [None, None], budget=budget)
            assert chosen == [token_grid(expected[tile]) for tile in (0, tiles[0])]
            seen.add(tuple(chosen))
    assert any(first != second for first, second in seen)
    assert len({first for first, _ in seen}) > 1  # the router does choose


def test_a_second_question_about_a_picture_runs_no_encoder(checkpoint):
    model, processor = load_checkpoint(checkpoint)
    chooser = CountChooser(checkpoint, model.config, CACHE)
    pixels = processor.process_images([picture(1)])[0]["pixel_values"]
    for ids in ([5, IMAGE], [6, IMAGE], [IMAGE, 7]):
        chooser.choose(ids, [pixels], [None])
    assert (chooser.features.passes, chooser.features.hits) == (1, 2)


def test_a_budget_is_kept(checkpoint):
    model, processor = load_checkpoint(checkpoint)
    chooser = CountChooser(checkpoint, model.config, CACHE)
    pixels = [processor.process_images([picture(i)])[0]["pixel_values"] for i in (1, 2)]
    sizes = [h * w for h, w in chooser.choose([IMAGE, 5, IMAGE], pixels, [None] * 2, budget=14)]
    assert sum(sizes) <= 14
    with pytest.raises(ValueError, match="budget must be at least 8"):
        chooser.choose([IMAGE, 5, IMAGE], pixels, [None] * 2, budget=7)


def test_a_checkpoint_without_a_router_knows_the_counts_of_its_training(tmp_path):
    folder = save_checkpoint(tmp_path / "model", router=False, trained_num_image_tokens=[16, 4])
    model, _ = load_checkpoint(folder)
    chooser = CountChooser(folder, model.config, CACHE)
    assert not chooser.has_router
    assert chooser.known_counts == (4, 16)


@pytest.mark.parametrize("positions", ["sequential", "shared"])
def test_the_model_gives_positions_where_the_tokens_of_an_image_share_one(positions):
    config = SimpleNamespace(image_positions=positions)
    settings = SimpleNamespace(tokenizer_mode="auto", hf_config=config)
    ConfigHook.verify_and_update_model_config(settings)
    assert settings.tokenizer_mode == "tokenflex"
    assert hasattr(config, "mrope_section") == (positions == "shared")


@pytest.mark.parametrize("value", ["0", "-1", "much", "1.5"])
def test_a_cache_of_no_size_is_refused(monkeypatch, value):
    monkeypatch.setenv("TOKENFLEX_FEATURE_CACHE_MB", value)
    with pytest.raises(ValueError, match="TOKENFLEX_FEATURE_CACHE_MB must be a positive integer"):
        feature_cache_bytes()


def test_the_cache_size_is_in_megabytes(monkeypatch):
    monkeypatch.setenv("TOKENFLEX_FEATURE_CACHE_MB", "3")
    assert feature_cache_bytes() == 3_000_000


def test_the_plugin_is_light_and_harmless_without_vllm():
    """vLLM loads the plugin in each of its processes, whatever model they serve."""
    program = (
        "import sys; sys.modules['vllm'] = None\n"
        "from tokenflex.serving.vllm import register\n"
        "register(); register()\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"
    assert "cannot be registered" in run.stderr
