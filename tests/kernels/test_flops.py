"""Operations that PyTorch's counter counts in our ops."""

from __future__ import annotations

import sys
from functools import partial
from unittest.mock import patch

import pytest
import torch
from torch.utils import flop_counter
from torch.utils.flop_counter import FlopCounterMode

from tests.kernels.common import GATED, PARAMETERS, eager_swiglu, gated_of, parameters_of
from tokenflex_kernels import flops, plan_packing, project_and_pack, project_tokens, swiglu
from tokenflex_kernels.backend import extension

GRIDS = [(5, 4), (3, 4)], [(2, 3), (2, 2)]
PATCHES, CELLS, WIDTH, HIDDEN, TEXT = 32, 10, 12, 20, 7


@pytest.fixture(autouse=True, params=["native", "reference"])
def backend(request, monkeypatch):
    if request.param == "native" and extension() is None:
        pytest.skip("needs the extension")
    monkeypatch.setenv("TOKENFLEX_BACKEND", request.param)
    return request.param


def swiglu_inputs():
    return dict(zip(("x", *GATED), [torch.randn(9, WIDTH), *gated_of(WIDTH, HIDDEN)], strict=True))


def project(**inputs):
    return project_tokens(inputs.pop("x"), *GRIDS, **inputs)


def project_inputs():
    return {"x": torch.randn(PATCHES, WIDTH), **parameters_of(WIDTH, HIDDEN, TEXT)}


def pack(**inputs):
    plan = plan_packing([[1, 9, 2], [9, 3]], [CELLS - 4, 4], 9)
    return project_and_pack(inputs.pop("x"), *GRIDS, plan=plan, **inputs)


def pack_inputs():
    return {**project_inputs(), "embedding": torch.randn(4, TEXT)}


OPS = {
    "project_and_pack": (pack, pack_inputs, CELLS * (2 * WIDTH + TEXT) * HIDDEN),
    "swiglu": (swiglu, swiglu_inputs, 9 * 2 * WIDTH * HIDDEN),
    "project_tokens": (project, project_inputs, CELLS * (2 * WIDTH + TEXT) * HIDDEN),
    "project_tokens, input": (
        partial(project, save="input"),
        project_inputs,
        CELLS * (2 * WIDTH + TEXT) * HIDDEN,
    ),
}


def counted(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def recorded(op, inputs, wanted):
    leaves = {name: value.requires_grad_(name in wanted) for name, value in inputs.items()}
    return op(**leaves), [leaves[name] for name in wanted]


@pytest.mark.parametrize("name", OPS)
class TestCounts:
    def test_forward(self, name):
        op, make, products = OPS[name]
        inputs = make()
        with torch.no_grad():
            assert counted(lambda: op(**inputs)) == 2 * products

    def test_forward_and_backward(self, name):
        op, make, products = OPS[name]
        inputs = make()

        def train():
            out, leaves = recorded(op, inputs, list(inputs))
            torch.autograd.grad(out.sum(), leaves)

        again = 2 * 2 * CELLS * WIDTH * HIDDEN if name.endswith("input") else 0
        assert counted(train) == 3 * 2 * products + again

    def test_backward_alone(self, name):
        """Of a call that the counter did not see, and that passed the dispatcher by."""
        op, make, products = OPS[name]
        out, leaves = recorded(op, inputs := make(), list(inputs))
        again = 2 * 2 * CELLS * WIDTH * HIDDEN if name.endswith("input") else 0
        backward = partial(torch.autograd.grad, out.sum(), leaves)
        assert counted(backward) == 2 * 2 * products + again

    def test_products_that_nothing_needs_do_not_count(self, name):
        op, make, _ = OPS[name]
        out, leaves = recorded(op, make(), ["up_bias"])
        through_down = 2 * CELLS * TEXT * HIDDEN if name.startswith("project") else 0
        again = 2 * 2 * CELLS * WIDTH * HIDDEN if name.endswith("input") else 0
        backward = partial(torch.autograd.grad, out.sum(), leaves)
        assert counted(backward) == through_down + again


def test_the_formulas_are_those_of_ops_and_count_what_pytorch_does():
    inputs = swiglu_inputs()
    assert all(hasattr(torch.ops.tokenflex, name) for name in flops.FORMULAS)
    with torch.no_grad():
        assert counted(lambda: swiglu(**inputs)) == counted(lambda: eager_swiglu(**inputs))
    assert len(PARAMETERS) == 8  # the positions in the formula of project_tokens


def test_a_counter_that_was_made_before_the_first_call_counts_too(monkeypatch):
    """As where the counter is imported later than the ops."""
    ours = {getattr(torch.ops.tokenflex, name) for name in flops.FORMULAS}
    unaware = {op: f for op, f in flop_counter.flop_registry.items() if op not in ours}
    monkeypatch.setattr(flop_counter, "flop_registry", unaware)
    inputs = swiglu_inputs()
    for _ in range(2):
        with torch.no_grad():
            assert counted(lambda: swiglu(**inputs)) == 2 * 9 * 2 * WIDTH * HIDDEN


def test_the_counter_is_not_imported_for_it():
    assert flop_counter.__name__ == flops.COUNTER
    with patch.dict(sys.modules, {flops.COUNTER: None}):
        flops.tell_counters()
