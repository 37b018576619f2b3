"""Tensors whose numbers are the negative ones of those in memory, as ``conj().imag`` gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import Parameter

from tokenflex_kernels import (
    merge_vision,
    pack_embeddings,
    plan_packing,
    pool_norm,
    project_tokens,
    swiglu,
    unpack_vision,
)

GRIDS = [(4, 4)], [(2, 2)]
PLAN = plan_packing([[1, 9, 2]], [4], 9)
Tensors = list[torch.Tensor]


KINDS = ("weight", "bias")


def projected(tensors: Tensors) -> torch.Tensor:
    names = (f"{part}_{kind}" for part in ("norm", "gate", "up", "down") for kind in KINDS)
    return project_tokens(tensors[0], *GRIDS, **dict(zip(names, tensors[1:], strict=True)))


SHAPES = [(16, 8), (8,), (8,), (12, 8), (12,), (12, 8), (12,), (6, 12), (6,)]
OPS: list[tuple[Callable[[Tensors], torch.Tensor], list[tuple[int, ...]]]] = [
    (lambda t: pool_norm(t[0], *GRIDS, weight=t[1], bias=t[2]), SHAPES[:3]),
    (lambda t: swiglu(*t), [(4, 8), (12, 8), (12, 8), (12,), (12,)]),
    (projected, SHAPES),
    (lambda t: pack_embeddings(t[0], t[1], PLAN), [(10, 8), (4, 8)]),
    (lambda t: unpack_vision(t[0], PLAN), [(6, 8)]),
    (lambda t: merge_vision(t[0], t[1], PLAN.vision_rows), [(6, 8), (4, 8)]),
]


@pytest.mark.parametrize("kind", [lambda x: x, Parameter], ids=["tensor", "parameter"])
@pytest.mark.parametrize(("op", "shapes"), OPS)
def test_each_tensor_may_be_one(op, shapes, kind):
    torch.manual_seed(0)
    tensors = [torch.randn(shape) for shape in shapes]
    expected = op(tensors)
    with torch.no_grad():
        for index, tensor in enumerate(tensors):
            negative = kind(torch._neg_view(-tensor))
            assert negative.is_neg()
            changed = [*tensors[:index], negative, *tensors[index + 1 :]]
            torch.testing.assert_close(op(changed), expected)
