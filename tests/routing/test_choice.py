"""``num_image_tokens="auto"`` answers what the chosen counts answer, token for token."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForImageTextToText, Siglip2ImageProcessorPil

from tests.models.test_modeling import GENERATION, SEARCHES, CallCounter
from tests.models.test_ristretto import CONTEXT, released_tensors, write_release
from tests.models.test_tiling import tiling_processor
from tests.models.tiny import PAD, picture, tiny_model
from tests.routing.planted import COUNTS, FixedRouter
from tokenflex import TokenFlexProcessor
from tokenflex.digits.processor import digits_processor
from tokenflex.models.loading import load_checkpoint
from tokenflex.routing.router import Router
from tokenflex.routing.storage import attach_router, load_router, save_router

IMAGES = [[picture(1), picture(2)], [], [picture(3)]]
TEXTS = ["read <image> odd <image> where", "count majority", "<image> odd"]
TO_9, TO_16, TO_4 = [0, 1, 0], [0, 0, 1], [1, 0, 0]


def routed_model(*chances, **options):
    model = tiny_model()
    attach_router(model, FixedRouter(*chances, **options))
    return model


@pytest.mark.parametrize("search", SEARCHES)
def test_answers_are_those_of_the_chosen_counts_token_for_token(search):
    model, processor = routed_model(TO_9, TO_16, TO_4), digits_processor()
    options = {**GENERATION, **SEARCHES[search]}
    auto = processor(images=IMAGES, text=TEXTS, num_image_tokens="auto")
    output = model.generate(**auto, **options)
    fixed = processor(images=IMAGES, text=TEXTS, num_image_tokens=[9, 16, 4])
    expected = model.generate(**fixed, **options)
    assert torch.equal(
        output[:, auto["input_ids"].shape[1] :], expected[:, fixed["input_ids"].shape[1] :]
    )
    prompts = auto["input_ids"].repeat_interleave(len(output) // 3, 0)
    assert torch.equal(output[:, : auto["input_ids"].shape[1]], prompts)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_chosen_inputs_are_those_of_a_processor_that_was_told(padding_side):
    model, processor = routed_model(TO_9, TO_16, TO_4), digits_processor()
    asked = processor(images=IMAGES, text=TEXTS, num_image_tokens="auto", padding_side=padding_side)
    assert (asked["input_ids"] == 3).sum(-1).tolist() == [2, 0, 1]
    encoder = CallCounter(model.model.vision_model)
    chosen = model.choose_counts(**asked)
    fixed = processor(images=IMAGES, text=TEXTS, num_image_tokens=[9, 16, 4])
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(chosen[name], fixed[name])
        assert chosen[name].dtype == fixed[name].dtype
    assert chosen["num_image_tokens"] == fixed["num_image_tokens"] == [9, 16, 4]
    assert encoder.calls == 1


def test_an_images_tiles_share_its_count():
    model, processor = routed_model(TO_9, TO_4), tiling_processor(6, use_thumbnail=True)
    pictures = [[picture(1, (64, 96)), picture(2)], [picture(3, (32, 64))]]
    texts = ["<image> odd <image>", "read <image>"]
    chosen = model.choose_counts(**processor(images=pictures, text=texts, num_image_tokens="auto"))
    fixed = processor(images=pictures, text=texts, num_image_tokens=[9, 4, 9])
    assert chosen["num_image_tokens"] == fixed["num_image_tokens"] == [9] * 7 + [4] + [9] * 3
    assert torch.equal(chosen["input_ids"], fixed["input_ids"])


def test_marks_around_an_image_and_its_tiles_stay_around_them(tmp_path):
    model, processor = load_checkpoint(write_release(tmp_path / "r", released_tensors()))
    router = FixedRouter([0, 1], counts=(16, 64))
    router.vision_width = model.config.vision_config.hidden_size
    router.text_width = model.config.text_config.hidden_size
    attach_router(model, router)
    wide, text = picture(1, (300, 700)), "What <img><IMG_CONTEXT></img>\n ?"
    fixed = processor(images=wide, text=text, num_image_tokens=64)
    asked = processor(images=wide, text=text, num_image_tokens="auto")
    assert int((asked["input_ids"] == CONTEXT).sum()) == 1
    chosen = model.choose_counts(**asked)
    assert torch.equal(chosen["input_ids"], fixed["input_ids"])
    assert chosen["num_image_tokens"] == fixed["num_image_tokens"] == [64] * 3


@pytest.mark.parametrize("options", [{}, {"budget": 13}])
def test_images_of_any_shape_are_chosen_for_too(options):
    model = tiny_model(vision="siglip2")
    attach_router(model, FixedRouter(TO_9, TO_4))
    base = digits_processor()
    processor = TokenFlexProcessor(
        Siglip2ImageProcessorPil(patch_size=4, max_num_patches=64), base.tokenizer
    )
    pictures = [picture(1, (16, 48)), picture(2, (40, 24))]
    text = "<image> odd <image>"
    chosen = model.choose_counts(
        **processor(images=pictures, text=text, num_image_tokens="auto"), **options
    )
    fixed = processor(images=pictures, text=text, num_image_tokens=[9, 4])
    assert chosen["num_image_tokens"] == [9, 4]
    encoded = chosen.pop("encoded_images")
    assert [list(grid) for grid in encoded.grids] == [list(grid) for grid in fixed["grids"]]
    output = model.generate(**chosen, encoded_images=encoded, **GENERATION)
    assert torch.equal(output, model.generate(**fixed, **GENERATION))


def test_a_prompt_is_routed_in_a_batch_as_it_is_alone():
    model, processor = tiny_model(), digits_processor()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        attach_router(model, Router(COUNTS, 32, 32))
    together = model.choose_counts(
        **processor(images=IMAGES, text=TEXTS, num_image_tokens="auto"), penalty=0.01
    )
    alone = [
        model.choose_counts(
            **processor(images=images or None, text=text, num_image_tokens="auto"), penalty=0.01
        ).get("num_image_tokens", [])
        for images, text in zip(IMAGES, TEXTS, strict=True)
    ]
    assert together["num_image_tokens"] == [count for counts in alone for count in counts]


def test_a_higher_penalty_spends_fewer_tokens_and_the_routers_own_is_used_unless_told():
    model = routed_model([0.5, 0.7, 0.75], penalty=0.2)
    inputs = digits_processor()(images=IMAGES[2], text=TEXTS[2], num_image_tokens="auto")
    options = {**GENERATION, "return_dict_in_generate": True}
    assert model.generate(**inputs, **options).num_image_tokens == [9]
    for penalty, count in ((0.0, 16), (0.2, 9), (1.0, 4)):
        answer = model.generate(**inputs, **options, penalty=penalty)
        assert answer.num_image_tokens == [count]
        assert torch.equal(answer.sequences[:, :2], inputs["input_ids"])


def test_images_that_are_encoded_already_are_not_encoded_again():
    model, processor = routed_model(TO_9), digits_processor()
    inputs = processor(images=IMAGES[2], text=TEXTS[2], num_image_tokens="auto")
    expected = model.generate(**inputs, **GENERATION)
    images = model.encode_images(inputs.pop("pixel_values"))
    encoder = CallCounter(model.model.vision_model)
    assert torch.equal(model.generate(**inputs, encoded_images=images, **GENERATION), expected)
    assert encoder.calls == 0


def test_a_batch_of_texts_alone_needs_no_router():
    model, processor = tiny_model(), digits_processor()
    inputs = processor(text=["odd", "count majority"], num_image_tokens="auto")
    output = model.generate(**inputs, num_image_tokens="auto", **GENERATION)
    assert torch.equal(output, model.generate(**inputs, **GENERATION))


def test_prompt_ids_may_be_the_first_argument():
    model = routed_model(TO_9)
    inputs = digits_processor()(images=IMAGES[2], text=TEXTS[2], num_image_tokens="auto")
    expected = model.generate(**inputs, **GENERATION)
    assert torch.equal(model.generate(inputs.pop("input_ids"), **inputs, **GENERATION), expected)


# ---- the router and the model


def test_a_router_beside_the_weights_is_found_and_is_none_of_them(tmp_path):
    model, processor = tiny_model(), digits_processor()
    model.save_pretrained(tmp_path)
    router = Router(COUNTS, 32, 32)
    torch.nn.init.zeros_(router.right.weight)
    with torch.no_grad():
        router.right.bias.copy_(torch.tensor([0.0, 2.0, 1.0]))
    save_router(router, tmp_path, {})
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    parameters = sum(parameter.numel() for parameter in loaded.parameters())
    inputs = processor(images=IMAGES[2], text=TEXTS[2], num_image_tokens="auto")
    assert loaded.choose_counts(**inputs)["num_image_tokens"] == [9]
    assert sum(parameter.numel() for parameter in loaded.parameters()) == parameters
    assert loaded.state_dict().keys() == model.state_dict().keys()


def test_a_router_of_another_model_is_refused():
    with pytest.raises(ValueError, match="of vision_width 32, got 16"):
        attach_router(tiny_model(), Router(COUNTS, 16, 32))
    with pytest.raises(ValueError, match="of text_width 32, got 16"):
        attach_router(tiny_model(), Router(COUNTS, 32, 16))


HOOK = """
import os, sys, torch, transformers
for first in sys.argv[1:]:
    child = os.fork()
    if child:
        assert os.waitpid(child, 0)[1] == 0, first
    else:
        __import__(first)
        from tokenflex.models.modeling import TokenFlexForConditionalGeneration
        os._exit(TokenFlexForConditionalGeneration.count_chooser is None)
"""


def test_the_hook_is_set_whatever_is_imported_first():
    """In processes that have imported nothing of ours."""
    first = ["tokenflex.models.loading", "tokenflex.routing.choice", "tokenflex.routing.cascade"]
    warnings = ["-W", "error::UserWarning"]
    subprocess.run([sys.executable, *warnings, "-c", HOOK, *first], check=True)


def test_a_model_may_have_a_chooser_of_its_own():
    model, processor = tiny_model(), digits_processor()
    inputs = processor(images=IMAGES[2], text=TEXTS[2], num_image_tokens="auto")
    fixed = processor(images=IMAGES[2], text=TEXTS[2], num_image_tokens=9)
    model.count_chooser = lambda model, input_ids, **options: dict(fixed)
    answer = model.generate(**inputs, **GENERATION)
    length = inputs["input_ids"].shape[1]
    assert torch.equal(answer[:, :length], inputs["input_ids"])
    expected = model.generate(**fixed, **GENERATION)[:, fixed["input_ids"].shape[1] :]
    assert torch.equal(answer[:, length:], expected)
    model.count_chooser = None
    with pytest.raises(ValueError, match=r"import tokenflex\.routing\.choice, "):
        model.choose_counts(**inputs)


# ---- what must be refused


@pytest.mark.parametrize("options", [{}, {"penalty": 0.1}, {"budget": 9, "penalty": 0.1}])
def test_a_checkpoint_without_a_router_says_how_to_make_one(tmp_path, options):
    tiny_model(trained_num_image_tokens=[4, 9]).save_pretrained(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    inputs = digits_processor()(images=IMAGES[2], text=TEXTS[2], num_image_tokens="auto")
    with pytest.raises(FileNotFoundError, match=f"no router.*tokenflex route --model {tmp_path}"):
        model.generate(**inputs, **options, **GENERATION)


@pytest.mark.parametrize(
    ("trained", "counts"),
    [
        ([16, 4, 9], "4,9,16"),
        ([[2, 3], 4, [3, 2]], "4,2x3"),
        ([64], "16,64"),
        ([[3, 4]], "4,3x4"),
        *[(value, "64,144,256") for value in (None, [1], 4, [5, 9], ["4", 9])],
    ],
)
def test_a_missing_router_is_made_at_the_counts_of_the_training(tmp_path, trained, counts):
    (tmp_path / "config.json").write_text(json.dumps({"trained_num_image_tokens": trained}))
    with pytest.raises(FileNotFoundError, match=f"--data DATA --counts {counts}`$"):
        load_router(tmp_path)


@pytest.mark.parametrize("config", [None, "", "[]", "{}"])
def test_a_missing_router_of_any_folder_is_told_with_an_example(tmp_path, config):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(FileNotFoundError, match=r"--counts 64,144,256`$"):
        load_router(tmp_path)


def test_a_forward_pass_refuses_auto():
    model = routed_model(TO_9)
    inputs = digits_processor()(images=IMAGES[2], text=TEXTS[2], num_image_tokens="auto")
    with pytest.raises(ValueError, match=r"must be counts here, got 'auto'.*choose_counts"):
        model(**inputs)
    with pytest.raises(ValueError, match="must be counts here, got 'auto'"):
        model.get_image_features(inputs["pixel_values"], "auto")
    assert model(**model.choose_counts(**inputs)).logits.shape[1] == 9 + 1


@pytest.mark.parametrize("knob", [{"penalty": 0.1}, {"budget": 64}])
@pytest.mark.parametrize("count", [None, 9])
def test_knobs_without_auto_are_refused(knob, count):
    inputs = digits_processor()(images=IMAGES[2], text=TEXTS[2], num_image_tokens=9)
    inputs["num_image_tokens"] = count
    with pytest.raises(ValueError, match="num_image_tokens must be 'auto'"):
        routed_model(TO_9).generate(**inputs, **knob, **GENERATION)


def test_another_word_than_auto_is_refused():
    inputs = {"images": IMAGES[2], "text": TEXTS[2]}
    with pytest.raises(ValueError, match="must be counts or 'auto', got 'best'"):
        digits_processor()(**inputs, num_image_tokens="best")
    asked = digits_processor()(**inputs, num_image_tokens="auto")
    asked["num_image_tokens"] = "best"
    with pytest.raises(ValueError, match=r"must be 'auto'.* got 'best'"):
        routed_model(TO_9).generate(**asked, **GENERATION)


def test_placeholders_that_are_repeated_already_are_refused():
    inputs = digits_processor()(images=IMAGES[2], text=TEXTS[2], num_image_tokens=9)
    inputs["num_image_tokens"] = "auto"
    with pytest.raises(ValueError, match=r"one placeholder per image.*got 9 placeholders"):
        routed_model(TO_9).generate(**inputs, **GENERATION)


def test_pads_of_chosen_inputs_are_masked():
    model, processor = routed_model(TO_16, TO_4), digits_processor()
    inputs = processor(images=[[picture(1)], [picture(2)]], text=["<image> odd"] * 2,
                       num_image_tokens="auto")  # fmt: skip
    chosen = model.choose_counts(**inputs)
    assert chosen["attention_mask"].sum(-1).tolist() == [17, 5]
    assert (chosen["input_ids"][1, :12] == PAD).all()


def test_a_processor_of_several_counts_says_tiles_only_with_auto():
    processor: TokenFlexProcessor = tiling_processor(6)
    inputs = processor(images=picture(1, (32, 64)), text="<image> odd", num_image_tokens="auto")
    assert (inputs["tiles_per_image"], inputs["num_image_tokens"]) == ([2], "auto")
    assert "tiles_per_image" not in processor(images=picture(1), text="<image> odd")
