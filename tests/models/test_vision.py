"""Encoders of every kind: NaFlex and tiles that are not square; encoded once, pooled many times."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import CONFIG_MAPPING, Siglip2ImageProcessorPil, SiglipImageProcessorPil

from tests.models.test_modeling import GENERATION, CallCounter, one_image
from tests.models.tiny import (
    IMAGE,
    PATCH,
    picture,
    pixels,
    prompts,
    text_config,
    tiny_model,
)
from tokenflex import TokenFlexConfig, TokenFlexProcessor
from tokenflex.counts import TokenCounts
from tokenflex.data.packing import DrawnSample, PackingCollator
from tokenflex.data.samples import Conversation, Sample, Turn
from tokenflex.digits.processor import digits_processor
from tokenflex.models.modeling import TokenFlexModel
from tokenflex.models.vision import EncodedImages


@pytest.fixture(scope="module")
def naflex() -> TokenFlexProcessor:
    image_processor = Siglip2ImageProcessorPil(patch_size=PATCH, max_num_patches=64)
    return TokenFlexProcessor(image_processor, digits_processor().tokenizer, num_image_tokens=9)


@pytest.fixture(scope="module")
def naflex_model():
    return tiny_model(vision="siglip2")


SHAPES = [(32, 32), (16, 96), (80, 20)]


# ---- NaFlex


def test_naflex_processor_hands_the_grids_on(naflex):
    batch = naflex(images=[picture(i, s) for i, s in enumerate(SHAPES)], text="<image>" * 3)
    assert batch["grids"] == [(8, 8), (3, 18), (16, 4)]
    assert set(batch) == {
        "input_ids",
        "attention_mask",
        "pixel_values",
        "grids",
        "num_image_tokens",
    }


def test_naflex_features_are_the_encoders_own_without_padding(naflex, naflex_model):
    images = [picture(i, shape) for i, shape in enumerate(SHAPES)]
    batch = naflex(images=images, text="<image>" * 3)
    processed = naflex.image_processor(images, return_tensors="pt")
    with torch.no_grad():
        encoded = naflex_model.encode_images(batch["pixel_values"], batch["grids"])
        hidden = naflex_model.model.vision_model(**processed).last_hidden_state
    expected = torch.cat([h[: a * b] for h, (a, b) in zip(hidden, encoded.grids, strict=True)])
    assert torch.equal(encoded.features, expected)


def test_naflex_batch_of_mixed_shapes_and_counts_is_what_each_gives_alone(naflex, naflex_model):
    images, counts = [picture(i, shape) for i, shape in enumerate(SHAPES)], [4, (2, 5), 16]
    texts = ["<image> odd <image>", "read <image>"]
    batch = naflex(images=[images[:2], images[2:]], text=texts, num_image_tokens=counts)
    with torch.no_grad():
        together = naflex_model(**batch).logits
        for row, text, part in zip(together, texts, (slice(0, 2), slice(2, 3)), strict=True):
            inputs = naflex(images=images[part], text=text, num_image_tokens=counts[part])
            alone = naflex_model(**inputs).logits[0]
            assert float((row[-len(alone) :] - alone).abs().max()) < 1e-5


def test_naflex_generates(naflex, naflex_model):
    batch = naflex(images=picture(1, (16, 96)), text="<image> odd")
    output = naflex_model.generate(**batch, num_beams=2, **GENERATION)
    assert output.shape[1] == batch["input_ids"].shape[1] + 4


def test_naflex_trains_packed(naflex, naflex_model):
    drawn = [
        DrawnSample(
            i,
            0,
            Sample(
                str(i),
                (picture(i, s),),
                (Conversation((Turn("user", "odd"), Turn("assistant", "7"))),),
            ),
        )
        for i, s in enumerate(SHAPES)
    ]
    batch = PackingCollator(naflex, TokenCounts((4, 9, 16), (1.0, 1.0, 1.0)))(drawn)
    with torch.no_grad():
        packed = naflex_model(**batch.model_inputs()).logits[0]
        for i, item in enumerate(drawn):
            count = batch.num_image_tokens[i]
            inputs = naflex(images=item.sample.images, text="<image> odd", num_image_tokens=count)
            alone = naflex_model(**inputs).logits[0, -1]
            first_of_answer = packed[2 * i]  # an answer is a word and <eos>
            assert float((first_of_answer - alone).abs().max()) < 1e-5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"grids": None}, "grids .*None"),
        ({"grids": [(8, 8)]}, "grids .* 1 entries for 2 images"),
        ({"grids": [(8, 8), (9, 8)]}, r"grids\[1\] = \(9, 8\) holds 72 patches.* 64 per image"),
        ({"pixel_values": pixels(2)}, r"pixel_values .*patches, 48.*\(2, 3, 32, 32\)"),
    ],
)
def test_naflex_refuses(naflex_model, changes, words):
    arguments = {"pixel_values": torch.zeros(2, 64, 48), "grids": (8, 8), **changes}
    with pytest.raises(ValueError, match=words):
        naflex_model.encode_images(**arguments)


# ---- tiles that are not the encoder's square


@pytest.fixture(scope="module")
def wide() -> TokenFlexProcessor:
    return TokenFlexProcessor(
        SiglipImageProcessorPil(
            size={"height": 16, "width": 48}, image_mean=[0.5] * 3, image_std=[0.5] * 3
        ),
        digits_processor().tokenizer,
        num_image_tokens=(2, 6),
        patch_size=PATCH,
    )


@pytest.mark.parametrize("vision", ["siglip", "clip"])
def test_wide_tiles_keep_their_shape(wide, vision):
    model = tiny_model(vision=vision)
    batch = wide(images=picture(1, (16, 48)), text="<image> odd")
    assert batch["grids"] == [(4, 12)]
    with torch.no_grad():
        encoded = model.encode_images(batch["pixel_values"], batch["grids"])
        hidden = model.model.vision_model(
            pixel_values=batch["pixel_values"], interpolate_pos_encoding=True
        ).last_hidden_state
        tokens = model.get_image_features(batch["pixel_values"], (2, 6), batch["grids"])
        expected = model.model.projector(encoded.features, (2, 6), grids=(4, 12))
        assert model(**batch).logits.shape[1] == 12 + 1
    assert torch.equal(encoded.features, hidden[0, -48:])
    assert torch.equal(tokens.pooler_output[0], expected[0])
    assert model.generate(**batch, **GENERATION).shape[1] == 12 + 1 + 4


def test_wide_tiles_need_the_patch_size(wide):
    processor = TokenFlexProcessor(wide.image_processor, wide.tokenizer)
    with pytest.raises(ValueError, match=r"patch_size.*16 x 48"):
        processor(images=picture(1), text="<image> odd")


def test_grids_of_tiles_must_be_the_pixels(wide):
    with pytest.raises(ValueError, match=r"grids\[0\] must be \(4, 12\).*got \(12, 4\)"):
        tiny_model().encode_images(torch.zeros(1, 3, 16, 48), (12, 4))


# ---- encoded once, any count


def test_encoder_runs_once_for_generations_at_several_counts():
    model = tiny_model()
    inputs = {n: one_image(n, n) for n in (1, 4, 9, 16)}
    searches = ({}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2})
    expected = {
        (n, i): model.generate(**inputs[n], **GENERATION, **options).tolist()
        for n in inputs
        for i, options in enumerate(searches)
    }
    encoder = CallCounter(model.model.vision_model)
    images = model.encode_images(inputs[1]["pixel_values"])
    for n, i in expected:
        output = model.generate(
            input_ids=inputs[n]["input_ids"],
            encoded_images=images,
            num_image_tokens=n,
            **GENERATION,
            **searches[i],
        )
        assert output.tolist() == expected[n, i], (n, searches[i])
    assert encoder.calls == 1
    assert len({str(answer) for answer in expected.values()}) > 4


def test_encoded_images_give_the_same_logits_and_gradients():
    model = tiny_model().train()
    one = prompts()[1]
    inputs = one.inputs()

    def run(**arguments):
        model.zero_grad()
        output = model(**arguments, labels=arguments["input_ids"])
        output.loss.backward()
        gradient = model.model.vision_model.embeddings.patch_embedding.weight.grad
        return output.logits.detach(), gradient.clone()

    logits, gradient = run(**inputs)
    images = model.encode_images(inputs.pop("pixel_values"))
    again, gradient_again = run(**inputs, encoded_images=images)
    assert torch.equal(logits, again)
    assert torch.equal(gradient, gradient_again)
    assert float(gradient.abs().max()) > 0


def test_encoded_images_default_to_the_configurations_count():
    model = tiny_model(num_image_tokens=9)
    images = model.encode_images(pixels(1, seed=1))
    with torch.no_grad():
        expected = model(**one_image(9, 9)).logits
        logits = model(one_image(9, 9)["input_ids"], encoded_images=images).logits
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("other", ["pixel_values", "mm_encoder_outputs", "grids"])
def test_images_come_one_way(other):
    model = tiny_model()
    images = model.encode_images(pixels(1))
    extra = {
        "pixel_values": pixels(1),
        "mm_encoder_outputs": {"image": model.get_image_features(pixels(1), 4)},
        "grids": (8, 8),
    }[other]
    arguments = {
        "input_ids": torch.tensor([[IMAGE] * 4]),
        "encoded_images": images,
        "num_image_tokens": 4,
        other: extra,
    }
    with pytest.raises(ValueError, match=f"{other}"):
        model(**arguments)
    with pytest.raises(ValueError, match=f"{other}"):
        model.generate(**arguments, **GENERATION)


def test_encoded_images_know_their_length():
    with pytest.raises(ValueError, match=r"\[16, C\] for the 2 grids.*\(15, 8\)"):
        EncodedImages(torch.zeros(15, 8), ((2, 4), (4, 2)))
    with pytest.raises(ValueError, match=r"^grids\[0\] must .* at least 1, got \(-2, -4\)"):
        EncodedImages(torch.zeros(8, 8), ((-2, -4),))
    images = EncodedImages(torch.zeros(16, 8), ((2, 4), (4, 2)))
    assert len(images) == 2
    assert images.to(torch.bfloat16).features.dtype == torch.bfloat16
    assert images.to(torch.bfloat16).grids == images.grids


# ---- counts that were not trained


def test_untrained_counts_are_warned_of_once():
    model = tiny_model(trained_num_image_tokens=[4, 9])
    with pytest.warns(UserWarning, match=r"2 x 3, 16 vision tokens.*\[4, 9\]"):
        model.get_image_features(pixels(3), [16, 9, (2, 3)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for count in (16, (2, 3), 4):
            model.get_image_features(pixels(1), count)
    with pytest.warns(UserWarning, match="asks for 25 "):
        model.get_image_features(pixels(1), 25)


def test_trained_counts_survive_saving_and_unknown_ones_are_silent(tmp_path, recwarn):
    model = tiny_model(trained_num_image_tokens=[4, (2, 3)])
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    loaded.get_image_features(pixels(2), [4, (2, 3)])
    tiny_model().get_image_features(pixels(1), 25)
    assert not [w for w in recwarn if "num_image_tokens" in str(w.message)]
    with pytest.warns(UserWarning, match="asks for 9 "):
        loaded.get_image_features(pixels(1), 9)


def test_trained_counts_must_be_grids():
    with pytest.raises(ValueError, match=r"trained_num_image_tokens\[1\].*9 and 16"):
        tiny_model(trained_num_image_tokens=[4, 10])


# ---- encoders that give no grid of patches

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
SMALL |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 4}


def encode_with(model_type: str, fields: dict, pixel_values: torch.Tensor, grids=None):
    vision = CONFIG_MAPPING[model_type](**fields)
    config = TokenFlexConfig(vision, text_config(), image_token_id=IMAGE)
    return TokenFlexModel(config).encode_images(pixel_values, grids)


@pytest.mark.parametrize(
    ("model_type", "fields", "words"),
    [
        # All images in one row, as if they were one.
        ("pixtral", SMALL, r"PixtralVisionModel .*\[2, at least 64, C\].*\(1, 128, 32\)"),
        # Patches merged from stage to stage.
        (
            "swin",
            {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "window_size": 4}
            | {"num_heads": [2, 2]},
            r"SwinModel .*\[2, at least 64, C\].*\(2, 16, 16\)",
        ),
    ],
)
def test_an_encoder_without_a_row_per_patch_is_named(model_type, fields, words):
    with pytest.raises(ValueError, match=words):
        encode_with(model_type, fields, pixels(2))


@pytest.mark.parametrize("model_type", ["convnext", "timm_wrapper"])
def test_an_encoder_without_a_width_is_refused_by_its_config(model_type):
    with pytest.raises(ValueError, match=f"vision_config must have hidden_size.*{model_type}"):
        TokenFlexConfig({"model_type": model_type}, text_config(), image_token_id=IMAGE)


def test_a_shape_that_the_encoder_cannot_take_is_named():
    shape = torch.zeros(1, 3, 16, 32)
    with pytest.raises(ValueError, match=r"Aimv2VisionModel of image_size 32 .* 16 x 32"):
        encode_with("aimv2_vision_model", SMALL, shape, grids=(4, 8))


def test_some_of_the_images_keep_their_own_patches_in_the_order_asked_for():
    features = torch.arange(9.0)[:, None]
    images = EncodedImages(features, ((1, 2), (2, 3), (1, 1)))
    some = images.select([2, 0])
    assert some.grids == ((1, 1), (1, 2))
    assert some.features.flatten().tolist() == [8, 0, 1]
    assert len(images.select([])) == 0
