"""torch.export traces image features and whole models once, for batches of any size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.export import Dim, export

from tests.models.tiny import IMAGE, padded_batch, pixels, prompt, tiny_model
from tokenflex_kernels.versions import is_older

KINDS = {
    "plain": {},
    "shared positions": {"projector_position": "normalized", "image_positions": "shared"},
    "clip, llama, resize": {"vision": "clip", "text": "llama", "pooling": "resize"},
}


class Features(torch.nn.Module):
    def __init__(self, model: Any, count: Any) -> None:
        super().__init__()
        self.model, self.count = model, count

    def forward(self, pixel_values):
        return self.model.get_image_features(pixel_values, num_image_tokens=self.count)


class Logits(torch.nn.Module):
    def __init__(self, model: Any, count: Any) -> None:
        super().__init__()
        self.model, self.count = model, count

    def forward(self, input_ids, attention_mask, pixel_values):
        return self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            pixel_values=pixel_values,
            num_image_tokens=self.count,
            use_cache=False,
        ).logits


def batch(size: int, count: int = 4) -> dict[str, torch.Tensor]:
    """Prompts of different lengths with an image each, left-padded."""
    rows = [prompt([5] * (i % 3) + [IMAGE, 7, 8 + i], [count], seed=i) for i in range(size)]
    inputs = padded_batch(rows)
    return {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}


def exported_logits(model: Any, count: Any = 4) -> Any:
    shapes = ({0: Dim("rows"), 1: Dim("length")}, {0: Dim.AUTO, 1: Dim.AUTO}, {0: Dim.AUTO})
    # torch 2.11 takes the strides of the heads for a guard on the length of the prompt.
    options = {"prefer_deferred_runtime_asserts_over_guards": is_older("torch", "2.13")}
    example = tuple(batch(2).values())
    return export(Logits(model, count), example, dynamic_shapes=shapes, **options)


@pytest.mark.parametrize(("kind", "count"), list(zip(KINDS, [9, (2, 3), 1], strict=True)))
def test_image_features_are_exported_for_any_number_of_tiles(kind, count):
    model = tiny_model(**KINDS[kind])
    program = export(Features(model, count), (pixels(2),), dynamic_shapes=({0: Dim("tiles")},))
    assert not [node for node in program.graph.nodes if "tokenflex" in str(node.target)]
    for tiles in (1, 3, 5):
        expected = model.get_image_features(pixels(tiles, seed=7), num_image_tokens=count)
        tokens = program.module()(pixels(tiles, seed=7)).pooler_output
        torch.testing.assert_close(tokens, torch.stack(expected.pooler_output))


@pytest.mark.parametrize("kind", ["plain", "shared positions"])
def test_the_whole_model_is_exported_for_any_batch(kind):
    model = tiny_model(**KINDS[kind])
    program = exported_logits(model)
    for size in (1, 3, 5):
        inputs = batch(size)
        real = inputs["attention_mask"].bool()
        logits = program.module()(*inputs.values())
        expected = model(**inputs, num_image_tokens=4).logits
        torch.testing.assert_close(logits[real], expected[real])
    inputs = batch(3)
    inputs["input_ids"][0, -1] = IMAGE
    with pytest.raises(RuntimeError, match="as many image placeholders as there are vision tokens"):
        program.module()(*inputs.values())


def test_a_count_per_tile_is_exported_for_that_number_of_tiles():
    model = tiny_model()
    program = export(Features(model, [4, 9]), (pixels(2),))
    for mine, other in zip(
        program.module()(pixels(2, seed=3)).pooler_output,
        model.get_image_features(pixels(2, seed=3), num_image_tokens=[4, 9]).pooler_output,
        strict=True,
    ):
        torch.testing.assert_close(mine, other)


def test_an_encoder_that_takes_patches_is_refused():
    with pytest.raises(ValueError, match="encoder that takes pixels, got Siglip2VisionModel"):
        export(Features(tiny_model(vision="siglip2"), 4), (torch.randn(2, 64, 48),))


def test_outside_of_an_export_features_are_a_list():
    assert isinstance(
        tiny_model().get_image_features(pixels(2), num_image_tokens=4).pooler_output, list
    )
