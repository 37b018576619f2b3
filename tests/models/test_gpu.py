"""The model on a CUDA device: packed rows and generation."""

from __future__ import annotations

import pytest
import torch

from tests.models.test_packed_attention import alone_logits, largest_difference, packed_inputs
from tests.models.test_shared_prefixes import forest_loss, in_dtype, shared_inputs, trees
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


def shared_on(device: str, dtype: torch.dtype) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits and gradients of branches and their prefixes."""
    model, forest = tiny_model().to(device, dtype).train(), trees()
    inputs = {
        k: v.to(device) if hasattr(v, "to") else v
        for k, v in in_dtype(shared_inputs(forest), dtype).items()
    }
    logits = model(**inputs).logits[0].float().cpu()
    forest_loss(list(logits.split(inputs["plan"].lengths)), forest).backward()
    gradients = {n: p.grad.float().cpu() for n, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), gradients


def test_float32_branches_are_those_of_the_cpu() -> None:
    expected, actual = (shared_on(device, torch.float32) for device in ("cpu", "cuda"))
    assert float((actual[0] - expected[0]).abs().max()) < 1e-4
    for name, gradient in expected[1].items():
        scale = max(1.0, float(gradient.abs().max()))
        assert float((actual[1][name] - gradient).abs().max()) < 1e-3 * scale, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_branches_are_no_worse_than_on_the_cpu(dtype: torch.dtype) -> None:
    """Flash attention with more keys than queries: its causal mask must end at the last row."""
    truth, on_cpu, on_gpu = (
        shared_on(*where) for where in (("cpu", torch.float32), ("cpu", dtype), ("cuda", dtype))
    )

    def off(one: torch.Tensor, exact: torch.Tensor) -> float:
        return float((one - exact).norm() / exact.norm())

    assert off(on_gpu[0], truth[0]) < 1.5 * off(on_cpu[0], truth[0]) + 1e-3
    for name, exact in truth[1].items():
        if float(exact.norm()) > 1e-3:
            assert off(on_gpu[1][name], exact) < 2 * off(on_cpu[1][name], exact) + 0.02, name


@torch.no_grad()
def test_generation_is_that_of_the_cpu() -> None:
    inputs = prompts()[1].inputs()
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = tiny_model().generate(**inputs, **options)
    actual = tiny_model().cuda().generate(**on_cuda(inputs), **options)
    assert torch.equal(actual.cpu(), expected)
