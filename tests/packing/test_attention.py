"""Prepared models keep samples apart under every attention, and refuse rows that would leak."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from tests.dropin.configs import ALL
from tests.dropin.table import CONFIGS
from tests.dropin.tiny import Prompt, stock_model
from tests.models.tiny import tiny_model
from tests.packing.cases import PACKED, PROMPTS, logits_and_gradients, model_of, padded
from tokenflex import packing, replace_projector
from tokenflex.dropin import families
from tokenflex.dropin.packing import PACKED_TEXT_TYPES
from tokenflex.models.attention import PACKED_ATTENTION
from tokenflex_kernels.versions import is_older

BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def logits(model, inputs):
    with torch.no_grad():
        return model(**{k: v for k, v in inputs.items() if k != "labels"}).logits


def prepared(name: str = "llava", kind: str = "stock"):
    model = model_of(name, kind)
    packing.enable(model)
    return model, packing.pack_inputs(model, padded(name, kind, model))


def attention_of(model) -> str:
    return model.base_model.get_decoder().config._attn_implementation


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "cohere2_vision"])
def test_another_sample_in_the_row_changes_nothing(name):
    model, packed = prepared(name)
    first = int(packed["cu_seq_lens_q"][1])
    changed = {**packed, "input_ids": packed["input_ids"].clone()}
    changed["input_ids"][0, 0] = 17
    one, other = logits(model, packed), logits(model, changed)
    assert not torch.equal(one[:, :first], other[:, :first])
    assert torch.equal(one[:, first:], other[:, first:])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_other_implementations_stay_and_keep_samples_apart(attention):
    model = stock_model("llava")
    expected, _, gradients = logits_and_gradients(*prepared())
    model.set_attn_implementation(attention)
    packing.enable(model)
    assert attention_of(model) == (PACKED_ATTENTION if attention == "sdpa" else attention)
    found, _, found_gradients = logits_and_gradients(
        model, packing.pack_inputs(model, padded("llava", "stock", model))
    )
    assert torch.allclose(found, expected, atol=1e-5)
    for key, gradient in gradients.items():
        assert torch.allclose(found_gradients[key], gradient, rtol=1e-3, atol=1e-4), key


def test_no_mask_of_all_rows_is_made(monkeypatch):
    """The packed attention plans runs of sequences; transformers would make [T, T]."""
    model, packed = prepared()
    masks = []
    attention = nn.functional.scaled_dot_product_attention

    def watched(query, key, value, attn_mask=None, **options):
        masks.append((query.shape[2], None if attn_mask is None else attn_mask.shape))
        return attention(query, key, value, attn_mask=attn_mask, **options)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", watched)
    logits(model, packed)
    total = packed["input_ids"].shape[1]
    assert max(rows for rows, _ in masks) < total


@pytest.mark.parametrize(
    "change",
    [
        {"use_cache": True},
        {"use_cache": None},
        {"attention_mask": torch.ones(1, 1, dtype=torch.long)},
        {"position_ids": None},
        {"position_ids": "increase"},
    ],
    ids=["cache", "default cache", "mask", "no positions", "positions that go on"],
)
@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_rows_that_would_leak_are_refused(name, change):
    model, packed = prepared(name)
    if "attention_mask" in change:
        change = {"attention_mask": torch.ones_like(packed["input_ids"])}
    if change.get("position_ids") == "increase":
        increasing = torch.arange(packed["input_ids"].shape[1])
        change = {"position_ids": increasing.expand_as(packed["position_ids"])}
    with pytest.raises(ValueError, match="see each other"):
        model(**packed | change)


def test_positions_alone_are_refused_with_a_cache_and_right_without():
    model, packed = prepared()
    alone = {k: v for k, v in packed.items() if k not in BOUNDARIES}
    assert torch.allclose(logits(model, alone), logits(model, packed), atol=1e-5)
    with pytest.raises(ValueError, match="see each other"):
        model(**{k: v for k, v in alone.items() if k != "use_cache"})


def test_frames_alone_are_refused():
    model, packed = prepared("qwen2_vl")
    with pytest.raises(ValueError, match=r"see each other; got shape \(3, 1, "):
        model(**{**packed, "position_ids": packed["position_ids"][1:]})


def test_boundaries_of_another_row_are_refused():
    model, packed = prepared()
    short = packed["cu_seq_lens_q"].clone()
    short[-1] -= 1
    with pytest.raises(ValueError, match="cu_seq_lens_q must go from 0 to the row's"):
        model(**{**packed, "cu_seq_lens_q": short})


@pytest.mark.parametrize("name", ["cohere2_vision", "mistral3"])
def test_samples_longer_than_a_sliding_window(name):
    config = CONFIGS[name]()
    config.text_config.sliding_window = 8
    if name == "cohere2_vision":
        config.text_config.layer_types = ["sliding_attention", "full_attention"]
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    packing.enable(model)
    little_longer = [Prompt([*range(3, 15)], [], []), PROMPTS[2]]
    for prompts in (PROMPTS, little_longer):
        report = packing.verify(model, padded(name, "stock", model, prompts))
        assert report.gradient_cosine > 0.99999


def test_attention_with_dropout_stays():
    """Ours has none."""
    model = stock_model("llava")
    model.base_model.get_decoder().config.attention_dropout = 0.1
    packing.enable(model)
    assert attention_of(model) == "sdpa"


def test_the_vision_encoder_does_not_see_the_boundaries_of_text():
    """Its flash attention has its own, and would get them twice."""
    model, packed = prepared("qwen2_5_vl")
    visual, seen = model.base_model.visual, []
    hook = lambda module, args, kwargs: seen.append({*kwargs})  # noqa: E731
    visual.blocks[0].register_forward_pre_hook(hook, with_kwargs=True)
    boundaries = {name: packed[name] for name in BOUNDARIES}
    visual(packed["pixel_values"], grid_thw=packed["image_grid_thw"], **boundaries)
    assert len(seen) == 1
    assert not seen[0] & {*BOUNDARIES}


def test_other_batches_get_what_they_did():
    model = stock_model("llava")
    inputs = padded("llava", "stock", model)
    expected = logits(model, inputs)
    tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    packing.enable(model)
    assert torch.equal(logits(model, inputs), expected)
    assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), tokens)


def test_disable_leaves_the_stock_model():
    model = stock_model("qwen2_vl")
    packing.enable(model)
    packing.enable(model)
    assert packing.is_enabled(model)
    packing.disable(model)
    packing.disable(model)
    assert not packing.is_enabled(model)
    assert attention_of(model) == "sdpa"
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ValueError, match="enable"):
        packing.pack_inputs(model, padded("qwen2_vl", "stock", model))


def test_a_model_may_be_converted_later_and_copied():
    model, packed = prepared()
    again = copy.deepcopy(model)
    assert torch.equal(logits(again, packed), logits(model, packed))
    replace_projector(model, num_image_tokens=16)
    packed = packing.pack_inputs(model, padded("llava", "converted", model))
    converted = model_of("llava", "converted")
    converted.load_state_dict(model.state_dict())
    expected = packing.pack_inputs(converted, padded("llava", "converted", converted))
    assert torch.allclose(logits(model, packed), logits(converted, expected), atol=1e-5)


# ---- refusals by the model


def test_models_that_cannot_be_packed_say_why():
    model = stock_model("llava")
    text = model.base_model.get_decoder().config
    text.layer_types = ["full_attention", "linear_attention"]
    assert "linear_attention run across" in packing.why_not(model)
    text.layer_types = ["full_attention", "indexed_attention"]
    assert packing.why_not(model) == ""
    with pytest.raises(ValueError, match=r"batch must be given .* its layers choose keys"):
        packing.enable(model)
    text.layer_types = None
    text.is_causal = False
    assert packing.why_not(model) == "its attention is bidirectional"
    text.is_causal = True
    text._attn_implementation_internal = "made_up"
    assert "'made_up'" in packing.why_not(model)
    text._attn_implementation_internal = "flash_attention_2"
    assert packing.why_not(model) == ""
    model.config.is_encoder_decoder = True
    assert "encoder-decoder" in packing.why_not(model)
    with pytest.raises(ValueError, match="tokenflex cannot be packed: it is tokenflex's own"):
        packing.enable(tiny_model())


def test_unknown_types_are_compared(monkeypatch):
    known = {k: v for k, v in families._FAMILIES.items() if k not in ("llava", "gemma3")}
    monkeypatch.setattr(families, "_FAMILIES", known)
    model = stock_model("llava")
    inputs = padded("llava", "stock", model)
    with pytest.raises(ValueError, match="batch must be given for a model of type 'llava'"):
        packing.enable(model)
    packing.enable(model, inputs)
    assert packing.is_enabled(model)
    if is_older("transformers", "5.23"):
        return  # transformers 5.18 gives packed rows of Gemma 3 what its samples give alone
    gemma = stock_model("gemma3")
    with pytest.raises(ValueError, match="packed rows of this model are not what"):
        packing.enable(gemma, padded("gemma3", "stock", gemma))
    assert not packing.is_enabled(gemma)
    assert attention_of(gemma) == "sdpa"


def test_tested_language_models_are_those_of_the_table():
    types = {CONFIGS[name]().get_text_config(decoder=True).model_type for name in PACKED}
    assert types <= PACKED_TEXT_TYPES
    if len(CONFIGS) == len(ALL):  # older transformers has fewer families
        assert types == PACKED_TEXT_TYPES


def with_language_model(text_type: str, kind: str = "stock", **options):
    """Return a llava with a language model of another type."""
    config = CONFIGS["llava"]()
    text = config.text_config
    config.text_config = CONFIG_MAPPING[text_type](
        hidden_size=text.hidden_size,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts_per_tok=1,
        vocab_size=text.vocab_size,
        max_position_embeddings=512,
        pad_token_id=0,
        initializer_range=0.1,
        **options,
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    if kind == "converted":
        replace_projector(model, num_image_tokens=16)
    return model.eval()


@pytest.mark.parametrize("kind", ["stock", "converted"])
def test_a_known_wrapper_of_another_language_model_is_compared(kind):
    """gpt_oss makes its mask without the positions."""
    model = with_language_model("gpt_oss", kind, num_local_experts=2)
    inputs = padded("llava", kind, model)
    assert packing.why_not(model) == ""
    with pytest.raises(ValueError, match=r"batch must be given .* language model 'gpt_oss' is not"):
        packing.enable(model)
    with pytest.raises(ValueError, match="packed rows of this model are not what"):
        packing.enable(model, inputs)
    assert not packing.is_enabled(model)


def test_a_comparison_of_short_samples_sees_the_mask_of_long_ones():
    """afmoe makes its mask without the positions, and only long samples would need it."""
    experts = {"num_experts": 2, "moe_intermediate_size": 16, "num_dense_layers": 1}
    model = with_language_model("afmoe", sliding_window=32, **experts)
    prompts = [Prompt([*range(3, 15)], [], []), PROMPTS[2]]
    inputs = padded("llava", "stock", model, prompts)
    with pytest.raises(ValueError, match="packed rows of this model are not what"):
        packing.enable(model, inputs)


def test_converted_models_of_another_language_model_are_refused_until_compared(monkeypatch):
    model = model_of("llava", "converted")
    inputs = padded("llava", "converted", model)
    packed = packing.pack_inputs(model, inputs)
    expected = logits(model, packed)
    monkeypatch.setattr("tokenflex.dropin.packing.PACKED_TEXT_TYPES", frozenset())
    refused = r"'llama' is not among those tested: call tokenflex\.packing\.enable"
    with pytest.raises(ValueError, match=refused):
        packing.pack_inputs(model, inputs)
    with pytest.raises(ValueError, match=refused):
        packing.PackingCollator(model, packing.join_outputs)
    with pytest.raises(ValueError, match=refused):
        model(**packed)
    logits(model, inputs)  # a padded batch is not looked at
    packing.enable(model, inputs)
    packing.PackingCollator(model, packing.join_outputs)
    again = packing.pack_inputs(model, inputs)
    assert torch.allclose(logits(model, again), expected, atol=1e-5)


def test_a_comparison_that_fails_leaves_the_model_as_it_was():
    model = stock_model("llava")
    inputs = padded("llava", "stock", model)
    hook = lambda *_: (_ for _ in ()).throw(RuntimeError("of the model's own"))  # noqa: E731
    handle = model.base_model.language_model.register_forward_hook(hook)
    with pytest.raises(RuntimeError, match="of the model's own"):
        packing.enable(model, inputs)
    handle.remove()
    assert not packing.is_enabled(model)
    assert attention_of(model) == "sdpa"


# ---- the comparison sees faults


def _one_row_late(packed):
    packed["cu_seq_lens_q"] = packed["cu_seq_lens_q"].clone()
    packed["cu_seq_lens_q"][1:-1] += 1


def _one_sample(packed):
    packed["cu_seq_lens_q"] = packed["cu_seq_lens_q"][[0, -1]]


def _labels_moved(packed):
    packed["labels"] = packed["labels"].roll(1, 1)


@pytest.mark.parametrize("fault", [_one_row_late, _one_sample, _labels_moved])
def test_verify_sees_faults(fault, monkeypatch):
    model = stock_model("llava")
    packing.enable(model)
    model.train()
    inputs = padded("llava", "stock", model)
    assert packing.verify(model, inputs).gradient_cosine > 0.99999
    assert model.training

    def faulty(model, batch):
        packed = packing.pack_inputs(model, batch)
        fault(packed)
        return packed

    monkeypatch.setattr("tokenflex.packing.verification.pack_inputs", faulty)
    with pytest.raises(ValueError, match="packed rows of this model are not what"):
        packing.verify(model, inputs)


def test_verify_needs_samples_to_compare():
    model = stock_model("llava")
    packing.enable(model)
    with pytest.raises(ValueError, match="at least two samples and labels"):
        packing.verify(model, padded("llava", "stock", model, PROMPTS[:1]))
