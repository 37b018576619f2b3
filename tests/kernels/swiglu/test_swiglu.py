"""`swiglu` against its formula in float64, and its error against that of two eager Linears."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.kernels.common import (
    DTYPES,
    GATED,
    assert_equal_in_float64,
    assert_not_less_exact,
    eager_swiglu,
    gated_of,
    rms_error,
    run,
    wide,
)
from tokenflex_kernels import swiglu

NAMES = ("x", *GATED)


def formula(x, gate_weight, up_weight, gate_bias=None, up_bias=None):
    """The sigmoid written out, nothing fused; biases that are None add nothing."""
    gate = x @ gate_weight.T + (0 if gate_bias is None else gate_bias)
    up = x @ up_weight.T + (0 if up_bias is None else up_bias)
    return gate / (1 + torch.exp(-gate)) * up


def inputs_of(tokens=7, width=5, hidden=11, dtype=torch.float64):
    """Random inputs in the order of ``NAMES``; products of unit scale."""
    return [torch.randn(tokens, width, dtype=dtype), *gated_of(width, hidden, dtype)]


def ours_peer_and_truth(inputs, gradient):
    """Outputs and gradients by name, of `swiglu`, of PyTorch, and of the formula in float64."""
    named = dict(zip(NAMES, inputs, strict=True))
    return (
        run(swiglu, named, gradient),
        run(eager_swiglu, named, gradient),
        run(formula, wide(named), gradient.cpu().double()),
    )


class TestValues:
    @pytest.mark.parametrize("shape", [(1, 1, 1), (7, 5, 11), (1, 33, 3), (50, 3, 17)])
    def test_equals_the_formula(self, shape):
        inputs = inputs_of(*shape)
        actual = swiglu(*inputs)
        assert actual.shape == (shape[0], shape[2])
        assert_equal_in_float64(actual, formula(*inputs))

    @pytest.mark.parametrize("gate_has_bias", [False, True])
    @pytest.mark.parametrize("up_has_bias", [False, True])
    def test_each_bias_is_optional(self, gate_has_bias, up_has_bias):
        inputs = inputs_of()
        inputs[3] = inputs[3] if gate_has_bias else None
        inputs[4] = inputs[4] if up_has_bias else None
        assert_equal_in_float64(swiglu(*inputs), formula(*inputs))

    def test_silu_acts_on_the_gate_and_not_on_up(self):
        x = torch.ones(1, 1)
        gate, up = torch.full((1, 1), -30.0), torch.full((1, 1), 7.0)
        assert swiglu(x, gate, up).abs().item() < 1e-9
        torch.testing.assert_close(swiglu(x, up, gate), torch.tensor([[-210.0]]), rtol=0.01, atol=0)

    def test_large_gates_do_not_overflow(self):
        x = torch.tensor([[1.0], [-1.0]], dtype=torch.float16, requires_grad=True)
        weights = torch.full((1, 1), 200.0, dtype=torch.float16)
        out = swiglu(x, weights, weights / 200)
        out.sum().backward()
        assert out.tolist() == [[200.0], [0.0]]
        assert x.grad.tolist() == [[400.0], [0.0]]


class TestPrecision:
    """R1: not further from float64 than 1.2 times eager PyTorch in the same dtype."""

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_forward_and_backward(self, dtype):
        inputs = inputs_of(96, 64, 130, dtype)
        gradient = torch.randn(96, 130, dtype=dtype)
        assert_not_less_exact(*ours_peer_and_truth(inputs, gradient))


class TestDtypes:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_float32_weights_with_narrow_activations(self, dtype):
        x, *parameters = inputs_of(96, 64, 130, torch.float32)
        x = x.to(dtype)
        for tensor in parameters:
            tensor.requires_grad_()
        out = swiglu(x, *parameters)
        assert out.dtype == dtype
        narrow = [tensor.detach().to(dtype) for tensor in parameters]
        truth = formula(x.double(), *(tensor.double() for tensor in narrow))
        assert rms_error(out.detach(), truth) <= 1.2 * rms_error(eager_swiglu(x, *narrow), truth)
        out.sum().backward()
        for tensor in parameters:
            assert tensor.grad.dtype == torch.float32
            assert tensor.grad.abs().sum() > 0

    def test_float32_biases_with_weights_of_the_activations_dtype(self):
        x, gate, up, gate_bias, up_bias = inputs_of(dtype=torch.bfloat16)
        expected = swiglu(x, gate, up, gate_bias, up_bias)
        assert torch.equal(swiglu(x, gate, up, gate_bias.float(), up_bias.float()), expected)

    @pytest.mark.parametrize(
        ("dtype", "parameter_dtype"),
        [
            (torch.float32, torch.float32),
            (torch.bfloat16, torch.float32),
            (torch.float16, torch.float32),
            (torch.float32, torch.bfloat16),
            (torch.float64, torch.float64),
        ],
        ids=str,
    )
    def test_autocast_gives_the_dtype_and_values_of_two_linears(self, dtype, parameter_dtype):
        x = torch.randn(20, 32, dtype=dtype)
        gate, up = (nn.Linear(32, 40, dtype=parameter_dtype) for _ in range(2))
        with torch.autocast("cpu", torch.bfloat16):
            out = swiglu(x, gate.weight, up.weight, gate.bias, up.bias)
            expected = F.silu(gate(x)) * up(x)
        assert out.dtype == expected.dtype == (dtype if dtype == torch.float64 else torch.bfloat16)
        parameters = (gate.weight, up.weight, gate.bias, up.bias)
        truth = formula(x.double(), *(tensor.detach().double() for tensor in parameters))
        limit = max(1.2 * rms_error(expected.detach(), truth), 1e-15)  # rounding of float64
        assert rms_error(out.detach(), truth) <= limit
        out.sum().backward()
        assert gate.weight.grad.dtype == up.bias.grad.dtype == parameter_dtype


class TestGradients:
    @pytest.mark.parametrize(
        "wanted", [flags for flags in product([False, True], repeat=5) if any(flags)]
    )
    def test_gradcheck_for_any_subset_of_inputs(self, wanted):
        inputs = inputs_of(3, 2, 4)
        for tensor, flag in zip(inputs, wanted, strict=True):
            tensor.requires_grad_(flag)
        assert torch.autograd.gradcheck(swiglu, inputs, fast_mode=True)
        swiglu(*inputs).sum().backward()
        assert [tensor.grad is not None for tensor in inputs] == list(wanted)

    def test_gradcheck_of_every_entry(self):
        inputs = [tensor.requires_grad_() for tensor in inputs_of(3, 2, 4)]
        assert torch.autograd.gradcheck(swiglu, inputs)
        assert torch.autograd.gradcheck(swiglu, inputs[:3])

    def test_no_graph_where_nothing_requires_grad(self):
        assert not swiglu(*inputs_of()).requires_grad

    def test_expanded_gradient_equals_a_dense_one(self):
        inputs = [tensor.requires_grad_() for tensor in inputs_of()]
        out = swiglu(*inputs)
        expanded = torch.tensor(0.5, dtype=torch.float64).expand(out.shape)
        actual = torch.autograd.grad(out, inputs, expanded, retain_graph=True)
        dense = torch.autograd.grad(out, inputs, expanded.contiguous())
        for got, expected in zip(actual, dense, strict=True):
            assert_equal_in_float64(got, expected)

    def test_inputs_and_incoming_gradient_are_not_written(self):
        tensors = [
            *(tensor.requires_grad_() for tensor in inputs_of()),
            torch.randn(7, 11).double(),
        ]
        before = [tensor.detach().clone() for tensor in tensors]
        out = swiglu(*tensors[:5])
        first = torch.autograd.grad(out, tensors[:5], tensors[5], retain_graph=True)
        second = torch.autograd.grad(out, tensors[:5], tensors[5])
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


class TestLayouts:
    @pytest.mark.parametrize(
        "lay_out",
        [
            pytest.param(lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]], id="row-strided"),
            pytest.param(lambda t: t.repeat_interleave(2, -1)[..., ::2], id="every-other-column"),
            pytest.param(lambda t: t.T.contiguous().T, id="transposed"),
            pytest.param(lambda t: F.pad(t.flatten(), (1, 0))[1:].view_as(t), id="unaligned"),
        ],
    )
    def test_any_memory_layout_gives_the_same(self, lay_out):
        inputs = inputs_of()
        laid_out = [lay_out(t) if t.ndim == 2 else t.repeat_interleave(2)[::2] for t in inputs]
        assert all(torch.equal(a, b) for a, b in zip(inputs, laid_out, strict=True))
        assert_equal_in_float64(swiglu(*laid_out), formula(*inputs))

    def test_expanded_rows(self):
        x, *parameters = inputs_of(1)
        expected = formula(x, *parameters).expand(6, -1)
        assert_equal_in_float64(swiglu(x.expand(6, -1), *parameters), expected)

    def test_no_tokens(self):
        inputs = [tensor.requires_grad_() for tensor in inputs_of(0)]
        out = swiglu(*inputs)
        assert (out.shape, out.dtype) == ((0, 11), torch.float64)
        out.sum().backward()
        for tensor in inputs:
            assert torch.equal(tensor.grad, torch.zeros_like(tensor))


def call(**changes):
    """A call that works, but for ``changes``."""
    inputs = inputs_of(3, 5, 8, torch.float32)
    return swiglu(**{**dict(zip(NAMES, inputs, strict=True)), **changes})


class TestMisuse:
    def test_the_unchanged_call_works(self):
        assert call().shape == (3, 8)

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"x": None}, TypeError, r"^x must be a torch\.Tensor, got NoneType"),
            ({"x": torch.randn(2, 3, 5)}, ValueError, r"^x .*2 dim.*\(2, 3, 5\)"),
            ({"x": torch.randn(5)}, ValueError, r"^x .*2 dim.*\(5,\)"),
            ({"x": torch.ones(3, 5).long()}, TypeError, r"^x .*float.*torch\.int64"),
            ({"x": torch.randn(3, 6)}, ValueError, r"^gate_weight .*\(8, 6\).*\(8, 5\)"),
            ({"gate_weight": torch.randn(5, 8)}, ValueError, r"^gate_weight .*\(5, 5\).*\(5, 8\)"),
            ({"up_weight": torch.randn(5, 8)}, ValueError, r"^up_weight .*\(8, 5\).*\(5, 8\)"),
            ({"up_weight": torch.randn(9, 5)}, ValueError, r"^up_weight .*\(8, 5\).*\(9, 5\)"),
            ({"gate_weight": torch.randn(8)}, ValueError, r"^gate_weight .*2 dim.*\(8,\)"),
            ({"up_weight": torch.randn(8)}, ValueError, r"^up_weight .*2 dim.*\(8,\)"),
            ({"gate_bias": torch.randn(5)}, ValueError, r"^gate_bias .*\(8,\).*\(5,\)"),
            ({"up_bias": torch.randn(1, 8)}, ValueError, r"^up_bias .*\(8,\).*\(1, 8\)"),
            ({"gate_weight": nn.Linear(5, 8)}, TypeError, r"^gate_weight .*Tensor, got Linear"),
            ({"up_weight": None}, TypeError, r"^up_weight .*Tensor, got NoneType"),
            ({"gate_bias": 0.0}, TypeError, r"^gate_bias .*Tensor, got float"),
            ({"up_bias": [0.0] * 8}, TypeError, r"^up_bias .*Tensor, got list"),
            (
                {"gate_weight": torch.randn(8, 5).double()},
                TypeError,
                r"^gate_weight .*torch\.float32.*torch\.float64",
            ),
            (
                {"x": torch.randn(3, 5).double()},
                TypeError,
                r"^gate_weight .*torch\.float64.*torch\.float32",
            ),
            (
                {"up_weight": torch.randn(8, 5).half()},
                TypeError,
                r"^up_weight .*torch\.float32.*torch\.float16",
            ),
            (
                {"gate_bias": torch.randn(8).bfloat16()},
                TypeError,
                r"^gate_bias .*torch\.float32.*torch\.bfloat16",
            ),
            ({"up_bias": torch.ones(8).int()}, TypeError, r"^up_bias .*float.*torch\.int32"),
            (
                {"up_weight": torch.randn(8, 5, device="meta")},
                ValueError,
                r"^up_weight .*x, cpu.*meta",
            ),
            (
                {"gate_bias": torch.randn(8, device="meta")},
                ValueError,
                r"^gate_bias .*x, cpu.*meta",
            ),
        ],
        ids=lambda value: None if isinstance(value, type) else str(value)[:40],
    )
    def test_says_what_is_wrong(self, changes, error, message):
        with pytest.raises(error, match=message):
            call(**changes)

    def test_float64_and_float32_do_not_mix_under_autocast_either(self):
        # Autocast leaves float64 alone, so two Linears could not multiply these.
        with (
            torch.autocast("cpu", torch.bfloat16),
            pytest.raises(TypeError, match=r"^gate_weight .*torch\.float64.*torch\.float32"),
        ):
            call(x=torch.randn(3, 5).double())


@pytest.mark.parametrize(
    "dtype", [pytest.param(dtype, marks=pytest.mark.gpu, id=str(dtype)) for dtype in DTYPES]
)
def test_cuda_is_as_close_to_float64_as_eager_cuda(dtype):
    tokens = 64 + 144 + 256
    inputs = [tensor.cuda() for tensor in inputs_of(tokens, 1152, 3456, dtype)]
    gradient = torch.randn(tokens, 3456, dtype=dtype).cuda()
    assert_not_less_exact(*ours_peer_and_truth(inputs, gradient))
