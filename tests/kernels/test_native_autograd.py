"""Native ops under what PyTorch does with graphs: checkpoints, hooks, retained graphs."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from tokenflex_kernels import pool_norm, project_tokens, swiglu
from tokenflex_kernels.backend import extension

pytestmark = pytest.mark.skipif(extension() is None, reason="needs the extension")

WIDTH, HIDDEN, TEXT = 24, 40, 16
GRIDS = [(5, 3), (4, 4)], [(2, 2), (3, 1)]
PATCHES = sum(height * width for height, width in GRIDS[0])


@pytest.fixture(autouse=True)
def _native(monkeypatch):
    monkeypatch.setenv("TOKENFLEX_BACKEND", "native")


def pool(x):
    return pool_norm(x, *GRIDS)


def norm(x, weight, bias):
    return pool_norm(x, *GRIDS, weight=weight, bias=bias)


def project(save):
    def op(x, norm_weight, gate_weight, up_weight, down_weight):
        named = {
            "norm_weight": norm_weight,
            "gate_weight": gate_weight,
            "up_weight": up_weight,
            "down_weight": down_weight,
        }
        biases = dict.fromkeys(("norm_bias", "gate_bias", "up_bias", "down_bias"))
        return project_tokens(x, *GRIDS, **named, **biases, save=save)

    return op


UNIT = [(HIDDEN, WIDTH)] * 2
OPS = {
    "pool": (pool, [(PATCHES, WIDTH)]),
    "pool and norm": (norm, [(PATCHES, WIDTH), (WIDTH,), (WIDTH,)]),
    "swiglu": (swiglu, [(7, WIDTH), *UNIT]),
    **{
        f"project, {save}": (
            project(save),
            [(PATCHES, WIDTH), (WIDTH,), *UNIT, (TEXT, HIDDEN)],
        )
        for save in ("preactivation", "input")
    },
}


@pytest.fixture(params=OPS)
def op(request):
    return OPS[request.param][0]


@pytest.fixture
def leaves(request, op):
    shapes = next(shapes for function, shapes in OPS.values() if function is op)
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def gradients(out, leaves, **options):
    return torch.autograd.grad(out.sin().sum(), leaves, **options)


def assert_same(results, expected):
    for result, value in zip(results, expected, strict=True):
        assert torch.equal(result, value)


LOSSES = {
    "dense gradient": lambda out: out.sin().sum(),
    "expanded gradient": torch.sum,
    "turned gradient": lambda out: out.t().contiguous().sin().sum(),
}


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_a_checkpoint_gives_the_same_gradients(op, leaves, loss, use_reentrant):
    expected = torch.autograd.grad(loss(op(*leaves)), leaves)
    loss(checkpoint(op, *leaves, use_reentrant=use_reentrant)).backward()
    assert_same([leaf.grad for leaf in leaves], expected)


def test_saved_tensors_may_pass_hooks(op, leaves):
    expected = gradients(op(*leaves), leaves)
    with save_on_cpu():
        out = op(*leaves)
    assert_same(gradients(out, leaves), expected)


def test_a_graph_can_be_retained(op, leaves):
    out = op(*leaves)
    assert_same(gradients(out, leaves, retain_graph=True), gradients(out, leaves))


def test_anomaly_mode_changes_nothing(op, leaves):
    expected = gradients(op(*leaves), leaves)
    with torch.autograd.detect_anomaly(check_nan=True):
        assert_same(gradients(op(*leaves), leaves), expected)


def test_inference_mode_gives_the_same_values(op, leaves):
    with torch.inference_mode():
        result = op(*leaves)
    assert torch.equal(result, op(*leaves).detach())


@pytest.mark.parametrize("op", [name for name in OPS if name != "pool"], indirect=True)
def test_a_saved_tensor_that_was_changed_is_noticed(op, leaves):
    out = op(*leaves)
    with torch.no_grad():
        leaves[-2].mul_(2)  # a weight, which the gradient of another input reads
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(out, leaves)
