"""Offsets beyond 2^31 elements, on memory of which only the pages of the rows exist."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.common import ON_TRITON
from tokenflex_kernels import pool_norm
from tokenflex_kernels.launch_configs import INTERPRETER, launch_config
from tokenflex_kernels.swiglu.stages import (
    launch_down_gradient,
    launch_gate_up,
    launch_input_gradient,
)

pytestmark = ON_TRITON

POINTERS = launch_config("gate_up", 1, torch.float32, INTERPRETER)
DESCRIPTORS = POINTERS._replace(tma=True, programs_per_sm=1)
CONFIGS = [pytest.param(POINTERS, id="pointers"), pytest.param(DESCRIPTORS, id="descriptors")]
STRIDE = 2**22 - 8  # the largest that products read without a copy
ROWS = 2**31 // STRIDE + 8


def far_apart(rows, width, stride, device):
    """Random rows, the last one more than 2^31 elements behind the first."""
    assert (rows - 1) * stride > 2**31
    memory = torch.empty((rows - 1) * stride + width, dtype=torch.float16, device=device)
    return memory.as_strided((rows, width), (stride, 1)).copy_(torch.randn(rows, width))


@pytest.mark.parametrize("mode", ["adaptive", "resize"])
def test_pooling(device, mode):
    x = far_apart(6, 16, 2**29, device).requires_grad_()
    near = x.detach().contiguous().requires_grad_()
    grids = [(2, 2), (1, 2)], [(1, 1), (2, 2)]
    results = []
    for rows in (x, near):
        out = pool_norm(rows, *grids, weight=torch.ones(16).to(rows), mode=mode)
        (grad,) = torch.autograd.grad(out, rows, torch.arange(80.0).view(5, 16).to(rows))
        results.append((out, grad))
    for far, expected in zip(*results, strict=True):
        assert torch.equal(far, expected)


@pytest.mark.parametrize("config", CONFIGS)
def test_products_of_the_gated_unit(device, products, launched, config):
    products(config)
    x = far_apart(ROWS, 16, STRIDE, device)
    gate, up, down = torch.randn(3, 16, 16).to(x).unbind()
    calls = [
        lambda rows: launch_gate_up(rows, gate, up, None, None, True, True),
        lambda rows: launch_down_gradient(rows, down, rows, rows, True, False),
        lambda rows: launch_input_gradient(rows.repeat(1, 2), gate, up),
    ]
    for call in calls:
        for far, expected in zip(call(x), call(x.contiguous()), strict=True):
            assert torch.equal(far, expected)
    assert {name.removesuffix("_pair") for name in launched} == {
        *("gate_up", "down_gradient", "input_gradient")
    }
