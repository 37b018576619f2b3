"""Embeddings of prompts of converted models: the plain language model answers from them alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from tests.dropin.configs import MROPE, model_type
from tests.dropin.tiny import MODELS, PROMPTS, batch, stock_model
from tokenflex import replace_projector

REFUSED = {
    **dict.fromkeys(("gemma3", "paligemma"), "bidirectional"),
    **dict.fromkeys(MROPE, "M-RoPE"),
    "gemma4": "token ids",
    "granite_docling": "earlier layers of the encoder",
    "ovis2": "embedded by a table",
    **dict.fromkeys(
        (
            *("glm5_next", "mistral3-mistral4", "mistral_large4", "muse_glimmer", "muse_spark"),
            "step3p7",
        ),
        "no causal language model",
    ),
}


def converted(name: str) -> Any:
    model = stock_model(name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return replace_projector(model, num_image_tokens=16)


def plain_language_model(model: Any) -> Any:
    """Transformers' own causal model of the same config, with a copy of the weights."""
    config = model.config.get_text_config()
    language_model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval()
    language_model.base_model.load_state_dict(model.get_decoder().state_dict())
    language_model.get_output_embeddings().load_state_dict(
        model.get_output_embeddings().state_dict()
    )
    return language_model


@pytest.mark.parametrize("name", sorted({*MODELS} - REFUSED.keys()))
def test_the_plain_language_model_answers_as_the_converted_one(name):
    model = converted(name)
    inputs = batch(name, PROMPTS)
    expected = model.generate(**inputs, max_new_tokens=5, do_sample=False)[:, -5:]
    embeddings = model.merged_embeddings(**inputs)
    language_model = plain_language_model(model)
    assert [len(e) for e in embeddings] == inputs["attention_mask"].sum(-1).tolist()
    for embeds, answer in zip(embeddings, expected, strict=True):
        generated = language_model.generate(
            inputs_embeds=embeds[None],
            attention_mask=torch.ones(1, len(embeds), dtype=torch.int64),
            max_new_tokens=5,
            do_sample=False,
            eos_token_id=None,
        )
        assert generated[0].tolist() == answer.tolist()


@pytest.mark.parametrize("name", sorted({*REFUSED} & {*MODELS}))
def test_a_language_side_that_is_no_plain_language_model_is_refused(name):
    with pytest.raises(
        ValueError, match=f"language model of {model_type(name)} cannot.*{REFUSED[name]}"
    ):
        converted(name).merged_embeddings(**batch(name, PROMPTS))


def test_one_prompt_has_one_tensor():
    model, inputs = converted("llava"), batch("llava", PROMPTS[:1])
    batched = model.merged_embeddings(**inputs)
    ids = inputs.pop("input_ids")[0]
    inputs["attention_mask"] = inputs["attention_mask"][0]
    assert torch.equal(model.merged_embeddings(ids, **inputs), batched[0])


def test_placeholders_that_do_not_fit_are_refused():
    model, inputs = converted("llava"), batch("llava", PROMPTS[:1])
    inputs["num_image_tokens"] = [16]
    with pytest.raises(ValueError, match=r"9 image placeholders.*16"):
        model.merged_embeddings(**inputs)
