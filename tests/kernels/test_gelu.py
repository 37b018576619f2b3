"""GELU on host memory against float64 PyTorch."""

import pytest
import torch
import torch.nn.functional as F

from tokenflex_kernels.gelu import gelu_tanh


def value_and_gradient(gelu, x, grad):
    x = x.clone().requires_grad_()
    out = gelu(x)
    out.backward(grad.to(out.dtype))
    return out.detach().double(), x.grad.double()


def eager(x):
    return F.gelu(x, approximate="tanh")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (0, 5), (1,), (3, 1, 17), (211, 130)])
def test_values_and_gradients(dtype, shape):
    torch.manual_seed(len(shape))
    x, grad = (3 * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)
    expected = value_and_gradient(eager, x.double(), grad.double())
    plain = value_and_gradient(eager, x, grad)
    ours = value_and_gradient(gelu_tanh, x, grad)
    for got, reference, exact in zip(ours, plain, expected, strict=True):
        assert got.shape == exact.shape
        if x.numel():
            rounding = 4 * torch.finfo(dtype).eps * exact.abs().max()  # counts for a few numbers
            rounding += 4 * torch.finfo(torch.float64).eps * exact.abs().sum()  # of ``exact``
            allowed = 1.2 * (reference - exact).abs().sum() + rounding
            assert (got - exact).abs().sum() <= allowed


@pytest.mark.parametrize("x", [-1e6, -40.0, -11.0, -0.0, 1e-30, 11.0, 1e6, float("nan")])
def test_the_ends_of_the_range(x):
    x = torch.tensor([x])
    ours, plain = (value_and_gradient(f, x, torch.ones(1)) for f in (gelu_tanh, eager))
    torch.testing.assert_close(ours, plain, equal_nan=True, rtol=1e-5, atol=1e-6)


def test_rows_that_do_not_lie_together():
    x, grad = torch.randn(2, 40, 60).unbind()
    ours = value_and_gradient(gelu_tanh, x.t()[::2], grad.t()[::2])
    plain = value_and_gradient(eager, x.t()[::2], grad.t()[::2])
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
