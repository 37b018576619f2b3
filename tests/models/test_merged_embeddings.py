"""Embeddings of prompts with their images: a plain language model answers from them alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from tests.models.tiny import IMAGE, padded_batch, pixels, prompts, tiny_model

NEW_TOKENS = 6


def plain_language_model(model: Any) -> Any:
    """Transformers' own model of the same config, with a copy of the weights."""
    config = model.config.text_config
    language_model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval()
    language_model.model.load_state_dict(model.model.language_model.state_dict())
    language_model.lm_head.load_state_dict(model.lm_head.state_dict())
    language_model.generation_config.suppress_tokens = [IMAGE]
    return language_model


def answer(language_model: Any, embeds: torch.Tensor) -> list[int]:
    mask = torch.ones(1, len(embeds), dtype=torch.int64)
    tokens = language_model.generate(
        inputs_embeds=embeds[None], attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False
    )
    return tokens[0].tolist()


@pytest.mark.parametrize("text", ["qwen2", "llama"])
def test_the_plain_language_model_answers_as_the_model(text):
    model = tiny_model(text)
    inputs = padded_batch(prompts())
    expected = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    language_model = plain_language_model(model)
    embeddings = model.merged_embeddings(**inputs)
    assert [len(embeds) for embeds in embeddings] == inputs["attention_mask"].sum(-1).tolist()
    for embeds, tokens in zip(embeddings, expected[:, -NEW_TOKENS:].tolist(), strict=True):
        assert not embeds.requires_grad
        assert answer(language_model, embeds) == tokens


def test_one_prompt_is_one_tensor():
    model, example = tiny_model(), prompts()[1]
    ids = torch.tensor(example.expanded())
    images = {"pixel_values": example.pixels, "num_image_tokens": example.counts}
    embeds = model.merged_embeddings(ids, **images)
    assert embeds.shape == (len(ids), 32)
    assert torch.equal(embeds, model.merged_embeddings(ids[None], **images)[0])
    assert torch.equal(
        embeds[ids != IMAGE], model.get_input_embeddings()(ids[ids != IMAGE]).detach()
    )
    tokens = model.get_image_features(**images).pooler_output
    assert torch.equal(embeds[ids == IMAGE], torch.cat(tokens))


def test_images_encoded_once_serve_every_count_and_prompt():
    model, tile = tiny_model(), pixels(1)
    images = model.encode_images(tile)
    for count in (4, 9):
        ids = torch.tensor([[IMAGE] * count + [5, 6], [7, 8] + [IMAGE] * count])
        from_features = model.merged_embeddings(
            ids, num_image_tokens=count, encoded_images=images, image_index=[0, 0]
        )
        from_pixels = model.merged_embeddings(
            ids, pixel_values=tile.repeat(2, 1, 1, 1), num_image_tokens=count
        )
        for mine, other in zip(from_features, from_pixels, strict=True):
            torch.testing.assert_close(mine, other)


def test_a_prompt_without_images_is_its_embeddings():
    model, ids = tiny_model(), torch.tensor([5, 6, 7])
    assert torch.equal(model.merged_embeddings(ids), model.get_input_embeddings()(ids).detach())


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"input_ids": torch.tensor([IMAGE, 5])}, "1 image placeholders.*gives 0"),
        ({"input_ids": torch.tensor([[[5]]])}, r"\[L\] or \[B, L\], got shape \[1, 1, 1\]"),
        (
            {"input_ids": torch.tensor([5, 6]), "attention_mask": torch.ones(1, 2)},
            r"shape of input_ids, \[2\], got \[1, 2\]",
        ),
        (
            {
                "input_ids": torch.tensor([IMAGE] * 4),
                "pixel_values": pixels(1),
                "num_image_tokens": 9,
            },
            "4 image placeholders.*9 vision tokens",
        ),
        (
            {
                "input_ids": torch.tensor([IMAGE] * 4),
                "pixel_values": pixels(1),
                "num_image_tokens": "auto",
            },
            "must be counts here, got 'auto'",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_refused(inputs, words):
    with pytest.raises(ValueError, match=words):
        tiny_model().merged_embeddings(**inputs)


def test_ids_that_are_no_tensor_are_refused():
    with pytest.raises(TypeError, match="input_ids must be a tensor, got list"):
        tiny_model().merged_embeddings([5, 6])


def test_shared_positions_are_refused():
    model = tiny_model(projector_position="normalized", image_positions="shared")
    with pytest.raises(ValueError, match="image_positions='sequential', got 'shared'"):
        model.merged_embeddings(torch.tensor([5, 6]))
