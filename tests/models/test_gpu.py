"""The model on a CUDA device: packed rows and generation."""

from __future__ import annotations

import pytest
import torch

from tests.models.test_packed_attention import alone_logits, largest_difference, packed_inputs
from tests.models.tiny import Prompt, prompts, tiny_model

pytestmark = pytest.mark.gpu


def on_cuda(inputs: dict) -> dict:
    return {k: v.to("cuda") if hasattr(v, "to") else v for k, v in inputs.items()}


def packed_on_cuda(model, batch: list[Prompt]) -> list[torch.Tensor]:
    inputs = packed_inputs(batch)
    logits = model(**on_cuda(inputs)).logits[0]
    return [rows.float().cpu() for rows in logits.split(inputs["plan"].lengths)]


@torch.no_grad()
def test_packed_float32_logits_are_those_of_each_sample_alone_on_the_cpu() -> None:
    expected = alone_logits(tiny_model(), prompts())
    assert largest_difference(packed_on_cuda(tiny_model().cuda(), prompts()), expected) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_packed_half_precision_is_no_worse_than_each_sample_alone(dtype: torch.dtype) -> None:
    """Here the flash kernel for variable lengths runs."""
    truth = alone_logits(tiny_model(), prompts())
    model = tiny_model().to("cuda", dtype)
    packed = packed_on_cuda(model, prompts())
    alone = [model(**on_cuda(one.inputs())).logits[0].float().cpu() for one in prompts()]
    error, peer = largest_difference(packed, truth), largest_difference(alone, truth)
    assert error < 2 * peer + 1e-3


@torch.no_grad()
def test_packed_samples_do_not_see_each_other() -> None:
    model = tiny_model().to("cuda", torch.bfloat16)
    batch = prompts()
    before = packed_on_cuda(model, batch)
    batch[1] = batch[1]._replace(pixels=-batch[1].pixels)
    after = packed_on_cuda(model, batch)
    assert largest_difference(before[1:2], after[1:2]) > 0
    assert largest_difference(before[:1] + before[2:], after[:1] + after[2:]) == 0


@torch.no_grad()
def test_generation_is_that_of_the_cpu() -> None:
    inputs = prompts()[1].inputs()
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = tiny_model().generate(**inputs, **options)
    actual = tiny_model().cuda().generate(**on_cuda(inputs), **options)
    assert torch.equal(actual.cpu(), expected)
