"""A call takes and returns the same as that of transformers' own models."""

from __future__ import annotations

import pytest
import torch
from transformers.utils import ModelOutput

from tests.models.test_modeling import one_image
from tests.models.tiny import (
    IMAGE,
    PATCH,
    PIXELS,
    VOCABULARY,
    WIDTH,
    padded_batch,
    pixels,
    prompts,
    tiny_model,
)
from tokenflex_kernels import plan_packing

PATCHES = (PIXELS // PATCH) ** 2
LAYERS = 2


def packed() -> dict:
    batch = prompts()
    counts = [count for prompt in batch for count in prompt.counts]
    return {
        "plan": plan_packing([prompt.ids for prompt in batch], counts, IMAGE),
        "pixel_values": torch.cat([prompt.pixels for prompt in batch]),
        "num_image_tokens": counts,
    }


def calls(model) -> dict:
    """Each way in, with what it returns at least."""
    padded, features = padded_batch(prompts()), {"pixel_values": pixels(2), "num_image_tokens": 9}
    return {
        "model": (model, padded),
        "base model": (model.model, padded),
        "packed": (model, packed()),
        "packed base model": (model.model, packed()),
        "features": (model.get_image_features, features),
        "features of the base model": (model.model.get_image_features, features),
    }


@pytest.mark.parametrize("name", calls(tiny_model()))
@pytest.mark.parametrize("way", ["argument", "configuration"])
def test_outputs_come_as_a_tuple_where_that_is_asked_for(name, way):
    model = tiny_model()
    call, inputs = calls(model)[name]
    with torch.no_grad():
        expected = call(**inputs, output_hidden_states=True)
        assert isinstance(expected, ModelOutput)
        if way == "argument":
            actual = call(**inputs, output_hidden_states=True, return_dict=False)
        else:
            model.config.return_dict = False
            actual = call(**inputs, output_hidden_states=True)
            assert isinstance(call(**inputs, return_dict=True), ModelOutput)
    assert type(actual) is tuple
    assert len(actual) == len(expected.to_tuple())
    for a, b in zip(actual, expected.to_tuple(), strict=True):
        assert type(a) is type(b)
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b)


def test_a_tuple_begins_with_the_loss():
    model, inputs = tiny_model(), one_image(9, 9)
    loss, logits, *_ = model(**inputs, labels=inputs["input_ids"], return_dict=False)
    assert loss.ndim == 0
    assert logits.shape[-1] == VOCABULARY


def test_generation_needs_no_configuration_of_outputs():
    model, inputs = tiny_model(), one_image(9, 9)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**inputs, **options)
    for config in (model.config, model.config.text_config, model.config.vision_config):
        config.return_dict = False
    assert torch.equal(model.generate(**inputs, **options), expected)
    encoded = model.encode_images(inputs.pop("pixel_values"))
    assert torch.equal(model.generate(**inputs, encoded_images=encoded, **options), expected)


@pytest.mark.parametrize("inputs", [padded_batch(prompts()), packed()], ids=["padded", "packed"])
def test_hidden_states_of_every_layer(inputs):
    model = tiny_model()
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
        base = model.model(**inputs, output_hidden_states=True)
        assert model(**inputs).hidden_states is None
    assert len(output.hidden_states) == LAYERS + 1
    assert torch.equal(output.hidden_states[-1], base.last_hidden_state)
    assert torch.equal(model.lm_head(output.hidden_states[-1]), output.logits)


@pytest.mark.parametrize("inputs", [padded_batch(prompts()), packed()], ids=["padded", "packed"])
def test_attentions_of_every_layer(inputs):
    model = tiny_model()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(**inputs, output_attentions=True)
    rows, length = output.logits.shape[:2]
    assert [a.shape for a in output.attentions] == [(rows, 4, length, length)] * LAYERS


@pytest.mark.parametrize("vision", ["siglip", "clip", "siglip2"])
def test_hidden_states_and_attentions_of_the_encoder(vision):
    model = tiny_model(vision=vision)
    model.set_attn_implementation("eager")
    inputs = {"pixel_values": pixels(2), "num_image_tokens": [4, 9]}
    special = 1 if vision == "clip" else 0
    if vision == "siglip2":
        inputs["pixel_values"] = pixels(2).reshape(2, PATCHES, -1)
        inputs["grids"] = [(8, 8), (8, 8)]
    with torch.no_grad():
        plain = model.get_image_features(**inputs)
        full = model.get_image_features(**inputs, output_hidden_states=True, output_attentions=True)
    assert plain.hidden_states is plain.attentions is None
    assert len(full.hidden_states) == LAYERS + 1
    assert full.hidden_states[-1].shape == (2, PATCHES + special, WIDTH)
    length = PATCHES + special
    assert [a.shape for a in full.attentions] == [(2, 2, length, length)] * LAYERS
    for a, b in zip(plain.pooler_output, full.pooler_output, strict=True):
        assert torch.equal(a, b)


def test_encoded_images_have_no_hidden_states_to_give():
    model = tiny_model()
    encoded = model.encode_images(pixels(1))
    with pytest.raises(ValueError, match=r"encoded_images.*output_hidden_states"):
        model.get_image_features(encoded_images=encoded, output_hidden_states=True)


@pytest.mark.parametrize("inputs", [padded_batch(prompts()), packed()], ids=["padded", "packed"])
def test_the_output_has_the_vision_tokens(inputs):
    model = tiny_model()
    with torch.no_grad():
        images = model.get_image_features(inputs["pixel_values"], inputs["num_image_tokens"])
        output = model(**inputs)
        assert torch.equal(output.image_hidden_states, torch.cat(images.pooler_output))
        assert model(input_ids=torch.tensor([[5, 6]])).image_hidden_states is None


# ---- embeddings in place of ids


@pytest.mark.parametrize("positions", [None, "normalized"])
def test_embeddings_with_placeholders_give_the_logits_and_gradients_of_ids(positions):
    changes = {"projector_position": positions}
    if positions:
        changes["image_positions"] = "shared"
    model, inputs = tiny_model(**changes), padded_batch(prompts())
    outputs, gradients = [], []
    for given in ("input_ids", "inputs_embeds"):
        model.zero_grad()
        call = dict(inputs)
        if given == "inputs_embeds":
            call["inputs_embeds"] = model.get_input_embeddings()(call.pop("input_ids"))
        outputs.append(model(**call, labels=inputs["input_ids"]))
        outputs[-1].loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_vectors_of_padding_are_no_placeholders():
    """Zeros on padding, where the placeholder was never trained and is zero as well."""
    model, inputs = tiny_model(), padded_batch(prompts())
    with torch.no_grad():
        model.get_input_embeddings().weight[IMAGE] = 0
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        embeds = embeds * inputs["attention_mask"][..., None]
        expected = model(**inputs).logits
        del inputs["input_ids"]
        actual = model(inputs_embeds=embeds, **inputs).logits
    seen = inputs["attention_mask"].bool()
    assert torch.allclose(actual[seen], expected[seen], atol=1e-6)


@pytest.mark.parametrize("counts", [[16, 9], [4, 9], []])
def test_embeddings_and_counts_must_fit_together(counts):
    model = tiny_model()
    ids = torch.tensor([[5, *[IMAGE] * 9, 6, *[IMAGE] * 16]])
    images = {"pixel_values": pixels(len(counts)), "num_image_tokens": counts} if counts else {}
    with pytest.raises(ValueError, match="row 0 of inputs_embeds"):
        model(inputs_embeds=model.get_input_embeddings()(ids), **images)


# ---- no images


def no_images(vision: str) -> torch.Tensor:
    if vision == "siglip2":
        return torch.zeros(0, PATCHES, 3 * PATCH**2)
    return torch.zeros(0, 3, PIXELS, PIXELS)


@pytest.mark.parametrize("vision", ["siglip", "clip", "siglip2"])
@pytest.mark.parametrize("way", ["input_ids", "inputs_embeds", "plan"])
@pytest.mark.parametrize("counts", [[], 9, None])
@pytest.mark.parametrize("positions", [{}, {"projector_position": "normalized"}])
def test_no_images_run_every_module(vision, way, counts, positions):
    """A process of DDP whose share of a batch is text must have a gradient for what others have."""
    if positions:
        positions["image_positions"] = "shared"
    model = tiny_model(vision=vision, **positions).train()
    with_image = {"pixel_values": pixels(1)}
    if vision == "siglip2":
        with_image = {"pixel_values": pixels(1).reshape(1, PATCHES, -1), "grids": [(8, 8)]}
    ids = torch.tensor([[IMAGE] * 4 + [5]])
    model(input_ids=ids, labels=ids, num_image_tokens=[4], **with_image).loss.backward()
    expected = {name for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)

    ids = torch.tensor([[5, 6, 7, 8]])
    images = {"pixel_values": no_images(vision), "num_image_tokens": counts}
    if way == "input_ids":
        output = model(input_ids=ids, labels=ids, **images)
    elif way == "inputs_embeds":
        embeds = model.get_input_embeddings()(ids)
        output = model(inputs_embeds=embeds, labels=ids, **images)
    else:
        output = model(plan=plan_packing([ids[0].tolist()], [], IMAGE), labels=ids, **images)
    output.loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == expected
    assert expected > {"model.projector.gate.weight", "model.projector.layernorm.bias"}
    for name, parameter in model.named_parameters():
        if not name.startswith(("model.language_model", "lm_head")) and parameter.grad is not None:
            assert not parameter.grad.any(), name
    with torch.no_grad():
        assert torch.equal(output.logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("vision", ["siglip", "clip", "siglip2"])
def test_features_and_answers_without_images(vision):
    model = tiny_model(vision=vision)
    images = model.get_image_features(no_images(vision), [])
    assert images.pooler_output == []
    assert images.last_hidden_state.shape == (0, WIDTH)
    ids = torch.tensor([[5, 6, 7]])
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(input_ids=ids, **options)
    inputs = {"pixel_values": no_images(vision), "num_image_tokens": []}
    assert torch.equal(model.generate(input_ids=ids, **inputs, **options), expected)
    assert torch.equal(model.generate(input_ids=ids, **inputs, **options, num_beams=2)[:, :3], ids)


def test_no_images_for_placeholders_are_refused():
    ids = torch.tensor([[5, *[IMAGE] * 4]])
    with pytest.raises(ValueError, match=r"4 image placeholders.*0 vision tokens"):
        tiny_model()(input_ids=ids, pixel_values=no_images("siglip"), num_image_tokens=[])
