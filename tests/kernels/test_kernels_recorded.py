"""Recorded calls compute what the first call of their kind does, on tensors of their own."""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from benchmarks.stubbed_gpu import unrecorded
from tests.kernels.common import (
    FEW_IN_GRIDS,
    FEW_OUT_GRIDS,
    GATED,
    ON_TRITON,
    PARAMETERS,
    SAVES,
    parameters_of,
    rows_of,
    run,
    sampled,
)
from tokenflex_kernels import (
    call_records,
    plan_packing,
    pool_norm,
    project_and_pack,
    project_tokens,
    swiglu,
)
from tokenflex_kernels.backend import extension
from tokenflex_kernels.call_records import forget_records

pytestmark = ON_TRITON

PATCHES, CELLS = rows_of(FEW_IN_GRIDS), rows_of(FEW_OUT_GRIDS)
WIDTH, HIDDEN, TEXT = 16, 32, 16
DTYPES = (torch.bfloat16, torch.float32)


@pytest.fixture(autouse=True)
def no_records():
    forget_records()
    yield
    forget_records()


def pool(x, norm_weight=None, norm_bias=None, **_):
    return pool_norm(x, FEW_IN_GRIDS, FEW_OUT_GRIDS, weight=norm_weight, bias=norm_bias)


def unit(x, gate_weight, up_weight, gate_bias=None, up_bias=None, **_):
    return swiglu(x, gate_weight, up_weight, gate_bias, up_bias)


def project(x, save="preactivation", **parameters):
    return project_tokens(x, FEW_IN_GRIDS, FEW_OUT_GRIDS, **parameters, save=save)


# Two images whose rows lie apart, follow one another, and come in the other order.
PLANS = [
    plan_packing(prompts, [4, 3], 9, image_index=order)
    for prompts, order in (
        ([[1, 9, 2], [9, 3]], None),
        ([[1, 9, 9]], None),
        ([[9], [4, 9]], [1, 0]),
    )
]


def pack(plan, x, **tensors):
    grids = FEW_IN_GRIDS, FEW_OUT_GRIDS
    return project_and_pack(x, *grids, plan=plan.to(x.device), **tensors)


def inputs_of(device, dtype=torch.float32):
    x = torch.randn(PATCHES, WIDTH).to(device, dtype)
    return {"x": x, **parameters_of(WIDTH, HIDDEN, TEXT, dtype, device)}


OPS = [
    pytest.param(pool, ("x", *PARAMETERS[:2]), WIDTH, id="pool_norm"),
    pytest.param(unit, ("x", *GATED), HIDDEN, id="swiglu"),
    pytest.param(project, ("x", *PARAMETERS), TEXT, id="project_tokens"),
]


def recorded():
    return len(call_records._records)


class TestAgainstFirstCalls:
    @pytest.mark.parametrize("dtype", sampled(1, DTYPES), ids=str)
    @pytest.mark.parametrize(("op", "names", "width"), OPS)
    def test_values_and_gradients_are_the_same_bits(self, device, op, names, width, dtype):
        for call in range(3):
            inputs = {name: inputs_of(device, dtype)[name] for name in names}
            gradient = torch.randn(PATCHES if op is unit else CELLS, width).to(device, dtype)
            ours = run(op, inputs, gradient)
            with unrecorded():
                expected = run(op, inputs, gradient)
            assert recorded() == (call > 0)
            for name, value in expected.items():
                assert torch.equal(ours[name], value), (name, call)

    @pytest.mark.parametrize("save", SAVES)
    def test_any_subset_that_requires_grad(self, device, save):
        draw = random.Random(0)
        for _ in sampled(1, range(2)):
            wanted = [name for name in ("x", *PARAMETERS) if draw.random() < 0.3] or ["x"]
            for _ in range(3):
                inputs = inputs_of(device)
                gradient = torch.randn(CELLS, TEXT).to(device)
                op = partial(project, save=save)
                ours = run(op, inputs, gradient, wanted)
                with unrecorded():
                    expected = run(op, inputs, gradient, wanted)
                for name, value in expected.items():
                    assert torch.equal(ours[name], value), (name, wanted)

    @pytest.mark.skipif(extension() is None, reason="needs the extension")
    @pytest.mark.parametrize(
        "wanted",
        sampled(1, [None, ["embedding"], ["down_weight", "embedding"], ["x"], ["down_bias"]]),
    )
    def test_packing_with_another_plan_in_each_call(self, device, wanted):
        for call, plan in enumerate(PLANS * 2):
            inputs = {"embedding": torch.randn(5, TEXT).to(device), **inputs_of(device)}
            gradient = torch.randn(plan.num_tokens, TEXT).to(device)
            ours = run(partial(pack, plan), inputs, gradient, wanted)
            with unrecorded():
                expected = run(partial(pack, plan), inputs, gradient, wanted)
            assert recorded() == (call > 0)
            for name, value in expected.items():
                assert torch.equal(ours[name], value), (name, call)


class TestTensors:
    def test_results_and_tensors_kept_for_backward_are_of_each_call(self, device):
        calls = []
        for _ in range(3):
            inputs = {name: tensor.requires_grad_() for name, tensor in inputs_of(device).items()}
            calls.append((inputs, project(**inputs)))
        for inputs, out in calls:  # backward after all forwards
            gradient = torch.randn_like(out)
            leaves = [*inputs.values()]
            ours = torch.autograd.grad(out, leaves, gradient, retain_graph=True)
            again = torch.autograd.grad(out, leaves, gradient)
            with unrecorded():
                expected = torch.autograd.grad(project(**inputs), leaves, gradient)
            for one, other, value in zip(ours, again, expected, strict=True):
                assert torch.equal(one, value)
                assert torch.equal(other, value)

    def test_one_tensor_in_two_places(self, device):
        inputs = inputs_of(device)
        weight, other = inputs["gate_weight"], inputs["up_weight"]
        with torch.no_grad():
            for _ in range(3):
                swiglu(inputs["x"], weight, weight)
            ours = swiglu(inputs["x"], weight, other)
            with unrecorded():
                assert torch.equal(ours, swiglu(inputs["x"], weight, other))

    def test_rows_with_strides_and_offsets(self, device):
        wide = torch.randn(PATCHES + 2, 3 * WIDTH).to(device)
        weights = inputs_of(device)
        views = [wide[:PATCHES, :WIDTH], wide[2:, WIDTH : 2 * WIDTH], wide[1:-1, 3 : 3 + WIDTH]]
        views += [wide[:PATCHES, ::3], wide[:PATCHES, :1].expand(-1, WIDTH)]
        with torch.no_grad():
            for x in views * 3:
                ours = project(**weights | {"x": x})
                with unrecorded():
                    assert torch.equal(ours, project(**weights | {"x": x}))

    def test_a_call_in_inference_mode_does_not_spoil_later_ones(self, device):
        inputs = inputs_of(device)
        for _ in range(3):
            with torch.inference_mode():
                project(**inputs)
        for wanted in (["down_bias"], ["down_weight"], ["x"]):
            for _ in range(3):
                run(project, inputs, torch.randn(CELLS, TEXT).to(device), wanted)

    def test_checkpoints_unpack_once(self, device):
        for _ in range(3):
            inputs = {name: tensor.requires_grad_() for name, tensor in inputs_of(device).items()}
            out = checkpoint(project, **inputs, use_reentrant=False)
            grads = torch.autograd.grad(out.sum(), [*inputs.values()])
            with unrecorded():
                expected = torch.autograd.grad(project(**inputs).sum(), [*inputs.values()])
            assert all(torch.equal(one, other) for one, other in zip(grads, expected, strict=True))

    @pytest.mark.parametrize(("op", "names", "width"), sampled(2, OPS))
    def test_batched_gradients(self, device, op, names, width):
        for _ in range(3):
            inputs = {name: inputs_of(device)[name].requires_grad_() for name in names}
            out = op(**inputs)
            grads = torch.randn(2, *out.shape).to(device)
            leaves = [*inputs.values()]
            batched = torch.autograd.grad(
                out, leaves, grads, retain_graph=True, is_grads_batched=True
            )
            for example, grad in enumerate(grads):
                single = torch.autograd.grad(out, leaves, grad, retain_graph=True)
                for many, one in zip(batched, single, strict=True):
                    torch.testing.assert_close(many[example], one)

    def test_pooling_without_a_norm_has_all_derivatives(self, device):
        for _ in range(3):
            x = torch.randn(PATCHES, WIDTH).to(device).requires_grad_()
            (grad,) = torch.autograd.grad((pool(x) ** 2).sum(), x, create_graph=True)
            (second,) = torch.autograd.grad((grad**2).sum(), x)
            assert second.abs().max() > 0

    def test_second_derivatives_are_refused(self, device):
        for _ in range(3):
            inputs = {name: tensor.requires_grad_() for name, tensor in inputs_of(device).items()}
            (grad,) = torch.autograd.grad(
                (project(**inputs) ** 2).sum(), inputs["x"], create_graph=True
            )
            with pytest.raises(RuntimeError, match="once_differentiable"):
                grad.sum().backward()


def test_calls_under_transforms_and_compilers_are_not_recorded(device):
    inputs = inputs_of(device)
    for _ in range(3):
        torch.func.grad(lambda x: pool(x, inputs["norm_weight"]).sum())(inputs["x"])
    assert recorded() == 0
