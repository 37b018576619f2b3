"""The gated unit's kernels, forward and backward, against its formula in float64."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from tests.kernels.common import (
    DTYPES,
    GATED,
    ON_TRITON,
    SPREADS,
    assert_as_close_as_eager,
    check,
    eager_swiglu,
    gated_of,
    run,
    sampled,
    wide,
)
from tokenflex_kernels import swiglu
from tokenflex_kernels.launch import can_describe
from tokenflex_kernels.launch_configs import INTERPRETER, launch_config

pytestmark = ON_TRITON

NAMES = ("x", *GATED)
FUSED = launch_config("gate_up", 1, torch.float32, INTERPRETER)  # tiles of 32 x 32 x 32
DESCRIPTORS = FUSED._replace(tma=True)
CONFIGS = [
    FUSED,
    FUSED._replace(block_m=16, block_n=64, group_m=3),
    None,  # PyTorch's products
]


def inputs_of(device, tokens=7, width=33, hidden=70, dtype=torch.float32, missing=()):
    x = torch.randn(tokens, width).to(device, dtype)
    return dict(zip(NAMES, [x, *gated_of(width, hidden, dtype, device, missing)], strict=True))


def check_swiglu(device, inputs, wanted=None):
    """One draw of inputs, or a list of some."""
    draws = [inputs] if isinstance(inputs, dict) else inputs
    gradients = [
        torch.randn(len(draw["x"]), len(draw["gate_weight"])).to(device, draw["x"].dtype)
        for draw in draws
    ]
    check(swiglu, eager_swiglu, draws, gradients, wanted)


@pytest.mark.first
class TestAgainstFloat64:
    @pytest.mark.parametrize(
        ("shape", "config", "dtype"),
        sampled(12, [(1, 7, 9), (7, 33, 70), (40, 96, 33), (65, 64, 64)], CONFIGS, DTYPES),
    )
    def test_forward_and_backward(self, device, products, config, dtype, shape):
        tokens, width, hidden = shape
        products(config)
        draws = max(1, 80 // (tokens * width))  # of few numbers, several
        check_swiglu(
            device, [inputs_of(device, tokens, width, hidden, dtype) for _ in range(draws)]
        )

    @pytest.mark.parametrize("config", CONFIGS)
    @pytest.mark.parametrize("missing", [(), ("gate_bias",), ("up_bias",), GATED[2:]], ids="+".join)
    def test_each_bias_is_optional(self, device, products, config, missing):
        products(config)
        check_swiglu(device, inputs_of(device, missing=missing))

    @pytest.mark.parametrize(("seed", "config"), sampled(4, range(6), CONFIGS[::2]))
    def test_random_shapes(self, device, products, config, seed):
        products(config)
        draw = random.Random(seed)
        shape = [draw.randint(1, 80) for _ in range(3)]
        missing = [name for name in GATED[2:] if draw.random() < 0.3]
        dtype = draw.choice(DTYPES)
        check_swiglu(device, [inputs_of(device, *shape, dtype, missing) for _ in range(4)])

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_tensor_map_descriptors(self, device, products, dtype):
        products(DESCRIPTORS)
        check_swiglu(device, inputs_of(device, 40, 64, 96, dtype))

    def test_unaligned_shapes_do_without_descriptors(self, device, products):
        products(DESCRIPTORS)
        check_swiglu(device, inputs_of(device, 7, 33, 70))

    def test_many_tiles_in_groups(self, device, products):
        # Seven tiles of rows in groups of three: the last group is a smaller one.
        products(FUSED._replace(block_m=16, block_n=16, group_m=3))
        check_swiglu(device, inputs_of(device, 16 * 7 - 3, 20, 40))

    def test_narrow_tiles_of_the_pointwise_kernel(self, device, products, use_config):
        use_config(
            gate_up=None, input_gradient=None, pointwise=FUSED._replace(block_m=16, block_n=16)
        )
        check_swiglu(device, inputs_of(device, 50, 20, 45))

    @pytest.mark.parametrize("config", CONFIGS)
    def test_silu_acts_on_the_gate_and_not_on_up(self, device, products, config):
        products(config)
        x = torch.ones(1, 1, device=device)
        gate, up = torch.full((1, 1), -30.0).to(device), torch.full((1, 1), 7.0).to(device)
        assert swiglu(x, gate, up).abs().item() < 1e-9
        torch.testing.assert_close(swiglu(x, up, gate).item(), -210.0, rtol=0.01, atol=0)

    @pytest.mark.parametrize("config", CONFIGS)
    def test_large_gates_do_not_overflow(self, device, products, config):
        products(config)
        x = torch.tensor([[1.0], [-1.0]], dtype=torch.float16, device=device, requires_grad=True)
        weights = torch.full((1, 1), 200.0, dtype=torch.float16, device=device)
        out = swiglu(x, weights, weights / 200)
        out.sum().backward()
        assert out.tolist() == [[200.0], [0.0]]
        assert x.grad.tolist() == [[400.0], [0.0]]


class TestDtypes:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_float32_weights_with_narrow_activations(self, device, dtype):
        inputs = inputs_of(device)
        inputs["x"] = inputs["x"].to(dtype)

        def peer(x, **weights):
            return eager_swiglu(x, **{name: tensor.to(x.dtype) for name, tensor in weights.items()})

        gradient = torch.randn(7, 70).to(device, dtype)
        ours = check(swiglu, peer, inputs, gradient)
        assert ours["out"].dtype == ours["x"].dtype == dtype
        assert all(ours[name].dtype == torch.float32 for name in GATED)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
    def test_autocast_gives_the_dtypes_of_two_linears(self, device, dtype, weight_dtype):
        inputs = inputs_of(device, 20, dtype=weight_dtype)
        inputs["x"] = inputs["x"].to(dtype)
        gradient = torch.randn(20, 70).to(device, torch.bfloat16)
        with torch.autocast(device, torch.bfloat16):
            ours = run(swiglu, inputs, gradient)
            peer = run(eager_swiglu, inputs, gradient)
        assert ours["out"].dtype == torch.bfloat16
        truth = run(eager_swiglu, wide(inputs), gradient.cpu().double())
        assert_as_close_as_eager(ours, peer, truth)


LAYOUTS = [
    lambda t: torch.cat([t, t + 1], -1)[..., : t.shape[-1]],  # left part of rows
    lambda t: torch.cat([t + 1, t], -1)[..., t.shape[-1] :],  # right part of rows
    lambda t: t.repeat_interleave(2, -1)[..., ::2],  # every other column
    lambda t: t.T.contiguous().T,  # transposed
    lambda t: F.pad(t.flatten(), (1, 0))[1:].view_as(t),  # unaligned
]


class TestLayouts:
    @pytest.mark.parametrize(
        ("lay_out", "config", "dtype"),
        sampled(15, LAYOUTS, [*CONFIGS[::2], DESCRIPTORS], DTYPES[::2]),
    )
    def test_any_memory_layout_gives_the_same(self, device, products, lay_out, dtype, config):
        products(config)
        inputs = inputs_of(device, 8, 32, 64, dtype)
        gradient = torch.randn(8, 64).to(device, dtype)
        assert all(torch.equal(lay_out(t), t) for t in inputs.values() if t.ndim == 2)
        laid_out = {
            name: lay_out(t) if t.ndim == 2 else F.pad(t, (1, 0))[1:] for name, t in inputs.items()
        }
        expected = run(swiglu, inputs, gradient)
        for name, result in run(swiglu, laid_out, lay_out(gradient)).items():
            torch.testing.assert_close(result, expected[name], msg=lambda m, name=name: name + m)

    @pytest.mark.parametrize("name", NAMES[:3])
    def test_each_matrix_has_a_stride_of_its_own(self, device, products, name):
        products(FUSED)
        inputs = inputs_of(device)
        inputs[name] = torch.cat([inputs[name], inputs[name] + 1], 1)[:, : inputs[name].shape[1]]
        check_swiglu(device, inputs)

    @pytest.mark.parametrize("spread", SPREADS)
    @pytest.mark.parametrize("name", GATED[2:])
    def test_strided_biases(self, device, products, spread, name):
        products(FUSED)
        inputs = inputs_of(device)
        inputs[name] = spread(inputs[name])
        check_swiglu(device, inputs)

    @pytest.mark.parametrize("config", CONFIGS)
    @pytest.mark.parametrize("shape", [(1, 70), (7, 1), (1, 1)])
    def test_expanded_gradient_equals_a_dense_one(self, device, products, config, shape):
        products(config)
        inputs = inputs_of(device)
        gradient = torch.randn(shape, device=device).expand(7, 70)
        expected = run(swiglu, inputs, gradient.contiguous())
        for name, result in run(swiglu, inputs, gradient).items():
            assert torch.equal(result, expected[name]), name

    @pytest.mark.parametrize("config", [FUSED, DESCRIPTORS, None])
    def test_expanded_rows(self, device, products, config):
        products(config)
        inputs = inputs_of(device, 1, 32, 64)
        expected = swiglu(**inputs).expand(6, -1)
        actual = swiglu(**{**inputs, "x": inputs["x"].expand(6, -1)})
        torch.testing.assert_close(actual, expected)

    def test_rows_far_apart(self, device):
        # In a process of its own: what is read beyond the tensor kills it. Few pages are touched.
        code = f"""
import torch
from tokenflex_kernels import swiglu
x = torch.empty(20 * 2**27, dtype=torch.float16, device={device!r}).view(20, 2**27)[:, :16]
x.copy_(torch.randn(20, 16))
weight = torch.randn(32, 16).to(x)
torch.testing.assert_close(swiglu(x, weight, weight), swiglu(x.contiguous(), weight, weight))
"""
        path = os.pathsep.join(entry for entry in sys.path if entry)
        result = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert result.returncode == 0, result.stderr[-2000:]

    def test_can_describe_wants_aligned_rows(self, device):
        matrix = torch.zeros(4, 16, device=device)
        assert can_describe(matrix, matrix[1:], matrix[:, 4:], matrix[::2])
        for other in (matrix[:, 1:], matrix[:, ::2], matrix.T, matrix[:1].expand(4, 16)):
            assert not can_describe(matrix, other)
        assert not can_describe(torch.zeros(4, 15, device=device))


class TestGradients:
    @pytest.mark.parametrize("config", CONFIGS[::2])
    @pytest.mark.parametrize(
        "wanted", [flags for flags in product([False, True], repeat=5) if any(flags)]
    )
    def test_any_subset_of_inputs(self, device, products, config, wanted):
        products(config)
        names = [name for name, flag in zip(NAMES, wanted, strict=True) if flag]
        check_swiglu(device, inputs_of(device, 5, 9, 13), names)

    def test_only_what_is_wanted_runs(self, device, products, launched):
        products(FUSED)
        expected = {
            "x": ["gate_up", "gate_gradient", "input_gradient"],
            "gate_weight": ["gate_up", "gate_gradient"],
            "up_bias": ["gate_up", "gate_gradient"],
        }
        inputs = inputs_of(device, 5, 9, 13)
        for name, kernels in expected.items():
            launched.clear()
            run(swiglu, inputs, torch.ones(5, 13, device=device), [name])
            assert launched == kernels

    def test_the_library_form_has_one_pointwise_kernel_each_way(self, device, products, launched):
        products(None)
        run(swiglu, inputs_of(device), torch.ones(7, 70, device=device))
        assert launched == ["gated_product", "gate_gradient"]

    def test_sums_for_the_biases_run_only_if_wanted(self, device, stages):
        inputs = inputs_of(device)
        for names, wanted in ((GATED[:2], False), (GATED[2:3], True), (GATED[3:], True)):
            stages.clear()
            run(swiglu, inputs, torch.ones(7, 70, device=device), names)
            assert dict(stages)["down_gradient"]["bias"] is wanted
            assert dict(stages)["down_gradient"]["product"] is False

    def test_no_graph_where_nothing_requires_grad(self, device, stages):
        inputs = inputs_of(device)
        assert not swiglu(**inputs).requires_grad
        with torch.no_grad():
            inputs["x"].requires_grad_()
            assert not swiglu(**inputs).requires_grad
        assert [options["save"] for _, options in stages] == [False, False]

    @pytest.mark.parametrize("config", CONFIGS)
    def test_nothing_is_written_in_place_and_retain_graph_gives_the_same_again(
        self, device, products, config
    ):
        products(config)
        leaves = [tensor.requires_grad_() for tensor in inputs_of(device).values()]
        gradient = torch.randn(7, 70, device=device)
        saved: list[tuple[torch.Tensor, torch.Tensor]] = []

        def pack(tensor):
            saved.append((tensor, tensor.detach().clone()))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = swiglu(*leaves)
        before = [(tensor, tensor.detach().clone()) for tensor in (*leaves, gradient, out)]
        first = torch.autograd.grad(out, leaves, gradient, retain_graph=True)
        second = torch.autograd.grad(out, leaves, gradient)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert len(saved) >= 5
        for tensor, copy in before + saved:
            assert torch.equal(tensor, copy)

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_gradient_checkpointing(self, device, use_reentrant):
        inputs = inputs_of(device)

        def gradients(op):
            leaves = [tensor.clone().requires_grad_() for tensor in inputs.values()]
            op(*leaves).sin().sum().backward()
            return [leaf.grad for leaf in leaves]

        plain = gradients(swiglu)
        again = gradients(lambda *leaves: checkpoint(swiglu, *leaves, use_reentrant=use_reentrant))
        assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))

    @pytest.mark.parametrize("config", CONFIGS)
    def test_forward_and_backward_repeat_bitwise(self, device, products, config):
        products(config)
        inputs = inputs_of(device, 40)
        gradient = torch.randn(40, 70, device=device)
        first, second = (run(swiglu, inputs, gradient) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)


class TestEmpty:
    @pytest.mark.parametrize("config", CONFIGS[::2])
    def test_no_tokens_launch_nothing(self, device, products, launched, config):
        products(config)
        inputs = inputs_of(device, 0)
        results = run(swiglu, inputs, torch.empty(0, 70, device=device))
        assert launched == []
        assert results["out"].shape == (0, 70)
        for name, tensor in inputs.items():
            assert torch.equal(results[name], torch.zeros_like(tensor))
