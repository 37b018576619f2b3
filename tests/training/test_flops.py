"""Counted operations against PyTorch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.models.tiny import tiny_model
from tokenflex.training.flops import forward_flops, training_flops


def counted(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_forward_flops_are_those_pytorch_counts(monkeypatch):
    monkeypatch.setenv("TOKENFLEX_BACKEND", "reference")  # whose products are counted
    model = tiny_model()
    flops, inner = forward_flops(model), model.model
    inner.vision_model.set_attn_implementation("eager")  # the counter sees no fused attention
    config = model.config.vision_config
    pixels = torch.zeros(1, 3, config.image_size, config.image_size)
    with torch.no_grad():
        assert counted(lambda: inner.vision_model(pixels)) == pytest.approx(flops.tile, rel=0.01)
        features = inner.vision_model(pixels).last_hidden_state
        # At this width the counter's share of pooling, which we leave out, is not small.
        projected = counted(lambda: inner.projector(features, 4))
        assert 4 * flops.vision_token <= projected < 1.2 * 4 * flops.vision_token
        hidden = torch.zeros(1, 7, model.config.text_config.hidden_size)
        assert counted(lambda: model.lm_head(hidden)) == 7 * flops.target
        linear = [
            module
            for module in inner.language_model.modules()
            if isinstance(module, torch.nn.Linear)
        ]
        assert flops.token == sum(2 * one.weight.numel() for one in linear)


@pytest.mark.parametrize(
    ("learning", "tile", "vision_token", "token"),
    [
        (("projector",), 1, 2 + 1, 2),
        (("vision", "projector"), 3, 3, 2),
        (("vision", "projector", "text"), 3, 3, 3),
        (("text",), 1, 1, 3),
        (("vision",), 3, 2, 2),
    ],
)
def test_backward_passes_are_counted_where_something_learns(learning, tile, vision_token, token):
    model = tiny_model()
    forward, both = forward_flops(model), training_flops(model, learning)
    assert both.tile == tile * forward.tile
    assert both.vision_token == vision_token * forward.vision_token
    assert both.token == token * forward.token
    assert both.tile_cost == both.tile / both.token
