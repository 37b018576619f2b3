"""Eager calls on host memory, which compute without the registered ops."""

from __future__ import annotations

import pytest
import torch

from tokenflex_kernels import plan_pooling, pool_norm, project_tokens, swiglu
from tokenflex_kernels.backend import extension

pytestmark = pytest.mark.skipif(extension() is None, reason="needs the extension")

IN_GRIDS, OUT_GRIDS = [(3, 5), (4, 4)], [(2, 3), (5, 1)]
SHAPES = [(31, 7), (7,), (7,), (9, 7), (9,), (9, 7), (9,), (5, 9), (5,)]
NAMES = "norm_weight norm_bias gate_weight gate_bias up_weight up_bias down_weight down_bias"


def leaves(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in SHAPES]


def project(tensors: list[torch.Tensor], save: str = "preactivation") -> torch.Tensor:
    x, *weights = tensors
    named = dict(zip(NAMES.split(), weights, strict=True))
    return project_tokens(x, IN_GRIDS, OUT_GRIDS, **named, save=save)


def pool(tensors: list[torch.Tensor]) -> torch.Tensor:
    return pool_norm(tensors[0], IN_GRIDS, OUT_GRIDS, weight=tensors[1], bias=tensors[2])


def gate(tensors: list[torch.Tensor]) -> torch.Tensor:
    return swiglu(tensors[0], *(tensors[i] for i in (3, 5, 4, 6)))


@pytest.mark.parametrize("call", [project, pool, gate])
def test_gradients_of_a_batch_of_vectors_are_those_of_each(call, monkeypatch):
    monkeypatch.setenv("TOKENFLEX_BACKEND", "native")
    tensors = leaves(torch.float32)
    out = call(tensors)
    inputs = [t for t, g in zip(tensors, torch.autograd.grad(
        out, tensors, torch.ones_like(out), retain_graph=True, allow_unused=True
    ), strict=True) if g is not None]  # fmt: skip
    grads = torch.randn(3, *out.shape)
    batched = torch.autograd.grad(out, inputs, grads, retain_graph=True, is_grads_batched=True)
    for example, grad in enumerate(grads):
        single = torch.autograd.grad(out, inputs, grad, retain_graph=True)
        for many, one in zip(batched, single, strict=True):
            torch.testing.assert_close(many[example], one)


@pytest.mark.parametrize("call", [project, gate])
def test_second_derivatives_are_refused(call, monkeypatch):
    monkeypatch.setenv("TOKENFLEX_BACKEND", "native")
    tensors = leaves(torch.float32)
    (grad,) = torch.autograd.grad((call(tensors) ** 2).sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_plans_of_equal_values_and_other_types_are_told_apart():
    plan_pooling([(1, 2)], [(1, 1)])
    with pytest.raises(TypeError, match=r"in_grids\[0\]"):
        plan_pooling([(True, 2)], [(1, 1)])
    with pytest.raises(TypeError, match=r"in_grids\[0\]"):
        plan_pooling([(1.0, 2)], [(1, 1)])
