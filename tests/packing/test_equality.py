"""Packed rows give the losses and the gradients of samples alone, in every family and kind."""

from __future__ import annotations

import pytest
import torch

from tests.packing.cases import (
    KINDS,
    PACKED,
    PROMPTS,
    REFUSED,
    cosine,
    logits_and_gradients,
    model_of,
    padded,
)
from tokenflex import packing
from tokenflex.dropin.families import vision_encoder
from tokenflex.models.attention import PACKED_ATTENTION


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PACKED)
def test_packed_loss_and_gradients_are_those_of_samples_alone(name, kind):
    model = model_of(name, kind)
    batch, text = padded(name, kind, model), model.base_model.get_decoder().config
    chooses_keys = "indexed_attention" in (getattr(text, "layer_types", None) or ())
    packing.enable(model, batch if chooses_keys else None)
    assert text._attn_implementation == ("sdpa" if chooses_keys else PACKED_ATTENTION)
    packed = packing.pack_inputs(model, batch)
    lengths = packed["cu_seq_lens_q"].diff().tolist()
    logits, loss, gradients = logits_and_gradients(model, packed)
    alone, of_all = 0.0, {}
    for rows, prompt in zip(logits[0].split(lengths), PROMPTS, strict=True):
        expected, value, one = logits_and_gradients(model, padded(name, kind, model, [prompt]))
        assert float((rows - expected[0]).abs().max()) < 1e-4
        alone += value
        of_all = {key: of_all.get(key, 0) + one.get(key, 0) for key in {*of_all, *one}}
    assert loss == pytest.approx(alone, rel=1e-5)
    assert {*gradients} == {*of_all}
    seeing = {id(p) for p in vision_encoder(model.base_model).parameters()}
    of_vision = [key for key, p in model.named_parameters() if id(p) in seeing and key in of_all]
    for keys in (of_vision, [*gradients]):
        one, other = (torch.cat([g[k].flatten() for k in keys]) for g in (gradients, of_all))
        assert cosine(one, other) >= 0.99999
    largest = max(float(gradient.norm()) for gradient in of_all.values())
    for key, expected in of_all.items():
        assert torch.allclose(gradients[key], expected, rtol=1e-3, atol=1e-5 * largest), key


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", REFUSED)
def test_families_whose_samples_would_mix_are_refused(name, kind):
    model = model_of(name, kind)
    before = model.base_model.get_decoder().config._attn_implementation
    assert len(packing.why_not(model)) > 20
    with pytest.raises(ValueError, match=f"{model.config.model_type} cannot be packed: "):
        packing.enable(model)
    with pytest.raises(ValueError, match=r"cannot be packed|enable\(model\) first"):
        packing.pack_inputs(model, {})
    assert model.base_model.get_decoder().config._attn_implementation == before
    assert not packing.is_enabled(model)
