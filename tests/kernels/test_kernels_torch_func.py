"""torch.func over the kernels: what is computed equals the reference, what is not is refused."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.func import grad, hessian, jacrev, jvp, vjp, vmap

from tests.kernels.common import GATED, ON_TRITON, PARAMETERS, gated_of, parameters_of, sampled
from tokenflex_kernels import pool_norm, project_tokens, swiglu

pytestmark = ON_TRITON

WIDTH, HIDDEN, TEXT = 6, 10, 4
GRIDS = [(3, 2), (1, 2)], [(2, 2), (1, 3)]
PATCHES = 8


def project_of(save):
    def project(x, *parameters):
        named = dict(zip(PARAMETERS, parameters, strict=True))
        return project_tokens(x, *GRIDS, save=save, **named)

    return project


def op_and_inputs(name, device):
    x = torch.randn(PATCHES, WIDTH, device=device)
    weight, bias = torch.randn(2, WIDTH, device=device)
    parameters = tuple(parameters_of(WIDTH, HIDDEN, TEXT, device=device).values())
    return {
        "pool": (lambda x: pool_norm(x, *GRIDS), (x,)),
        "pool_norm": (
            lambda x, weight, bias: pool_norm(x, *GRIDS, weight=weight, bias=bias),
            (x, weight, bias),
        ),
        "swiglu": (
            lambda x, *parameters: swiglu(x, **dict(zip(GATED, parameters, strict=True))),
            (x, *gated_of(WIDTH, HIDDEN, device=device)),
        ),
        "preactivation": (project_of("preactivation"), (x, *parameters)),
        "input": (project_of("input"), (x, *parameters)),
    }[name]


OPS = ("pool", "pool_norm", "swiglu", "preactivation", "input")


def loss_of(op):
    return lambda *inputs: op(*inputs).sin().sum()


def with_examples(x):
    """Two examples of the rows, one set of parameters."""
    return (torch.stack([x[0], x[0].cos()]), *x[1:]), (0, *[None] * (len(x) - 1))


def per_sample_gradients(op, x):
    inputs, dims = with_examples(x)
    return vmap(grad(loss_of(op), tuple(range(len(x)))), dims)(*inputs)


def of_parameters(op, x):
    """A module's parameters require grad themselves."""
    leaves = [value.clone().requires_grad_() for value in x]
    return [value.detach() for value in grad(loss_of(op), tuple(range(len(x))))(*leaves)]


def all_examples(op, x):
    inputs, dims = with_examples(x)
    return (vmap(op, dims)(*inputs),)


TRANSFORMS = {
    "grad": lambda op, x: grad(loss_of(op), tuple(range(len(x))))(*x),
    "vjp": lambda op, x: vjp(op, *x)[1](torch.ones_like(op(*x))),
    "jacrev": lambda op, x: (jacrev(op)(*x),),
    "vmap": all_examples,
    "per-sample gradients": per_sample_gradients,
    "grad of parameters": of_parameters,
}
REFUSED = {
    "jvp": lambda op, x: jvp(op, x, x),
    "hessian": lambda op, x: hessian(loss_of(op))(*x),
    "grad of grad": lambda op, x: jacrev(grad(loss_of(op)))(*x),
}


@pytest.mark.parametrize(("transform", "name"), sampled(9, [*TRANSFORMS], OPS))
def test_first_derivatives_and_batches_equal_the_reference(device, name, transform, monkeypatch):
    op, inputs = op_and_inputs(name, device)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="There is a performance drop")
        actual = TRANSFORMS[transform](op, inputs)
    monkeypatch.setenv("TOKENFLEX_BACKEND", "reference")
    expected = TRANSFORMS[transform](op, inputs)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("transform", REFUSED)
@pytest.mark.parametrize("name", OPS)
def test_other_derivatives_are_refused(device, name, transform):
    op, inputs = op_and_inputs(name, device)
    with pytest.raises((RuntimeError, NotImplementedError), match=r"has no derivative|jvp"):
        REFUSED[transform](op, inputs)
