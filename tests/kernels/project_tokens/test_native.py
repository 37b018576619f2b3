"""`project_tokens` on host memory, by the extension, against the chain in float64."""

from __future__ import annotations

import random
import subprocess
import sys
from functools import partial

import pytest
import torch

from tests.kernels.common import (
    DTYPES,
    IN_GRIDS,
    MODES,
    OUT_GRIDS,
    PARAMETERS,
    SAVES,
    check,
    eager_project,
    parameters_of,
    rows_of,
)
from tokenflex_kernels import project_tokens
from tokenflex_kernels.backend import extension
from tokenflex_kernels.pool_norm.plan import grids_of, plan_pooling
from tokenflex_kernels.project_tokens.op import fused_project_tokens

pytestmark = [
    pytest.mark.usefixtures("_native"),
    pytest.mark.skipif(extension() is None, reason="needs the extension"),
]

BIASES = [name for name in PARAMETERS if name.endswith("bias")]


@pytest.fixture
def _native(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TOKENFLEX_BACKEND", "native")


def check_project(draws, widths, in_grids, out_grids, dtype, missing=(), wanted=None, **options):
    inputs = [
        {
            "x": torch.randn(rows_of(in_grids), widths[0], dtype=dtype),
            **parameters_of(*widths, dtype, missing=missing),
        }
        for _ in range(draws)
    ]
    gradients = [torch.randn(rows_of(out_grids), widths[2], dtype=dtype) for _ in inputs]
    ours, peer = (
        partial(op, in_grids=in_grids, out_grids=out_grids, **options)
        for op in (project_tokens, eager_project)
    )
    return check(ours, peer, inputs, gradients, wanted)


class TestAgainstFloat64:
    @pytest.mark.parametrize("save", SAVES)
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_forward_and_backward(self, dtype, mode, save):
        check_project(8, (33, 70, 20), IN_GRIDS, OUT_GRIDS, dtype, mode=mode, save=save)

    @pytest.mark.parametrize("seed", range(8))
    def test_random_grids_widths_and_biases(self, seed):
        draw = random.Random(seed)
        in_grids, out_grids = (
            [(draw.randint(1, 9), draw.randint(1, 9)) for _ in range(3)] for _ in range(2)
        )
        widths = [draw.randint(8, 90) for _ in range(3)]
        missing = [name for name in BIASES if draw.random() < 0.4]
        dtype, save = draw.choice(DTYPES), draw.choice(SAVES)
        check_project(8, widths, in_grids, out_grids, dtype, missing, save=save)

    @pytest.mark.parametrize("save", SAVES)
    @pytest.mark.parametrize("name", ["x", *PARAMETERS])
    def test_each_gradient_by_itself(self, name, save):
        batch = IN_GRIDS, OUT_GRIDS, torch.float32
        check_project(8, (12, 40, 18), *batch, wanted=[name], save=save)

    @pytest.mark.parametrize("save", SAVES)
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_float32_weights_with_narrow_activations(self, dtype, save):
        x, parameters = torch.randn(rows_of(IN_GRIDS), 12).to(dtype), parameters_of(12, 40, 18)
        out = project_tokens(x, IN_GRIDS, OUT_GRIDS, **parameters, save=save)
        narrow = {name: value.to(dtype) for name, value in parameters.items()}
        expected = eager_project(x, IN_GRIDS, OUT_GRIDS, **narrow)
        assert out.dtype == dtype
        torch.testing.assert_close(out, expected, rtol=0.05, atol=0.05)


def kept_bytes(op):
    """Bytes of the distinct tensors kept for backward, the leaves aside."""
    in_grids, out_grids = [(9, 9)] * 3, [(8, 8)] * 3
    x = torch.randn(rows_of(in_grids), 64, requires_grad=True)
    parameters = {
        name: value.requires_grad_() for name, value in parameters_of(64, 192, 128).items()
    }
    leaves = {tensor.untyped_storage().data_ptr() for tensor in (x, *parameters.values())}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = op(x, in_grids, out_grids, **parameters)
    assert out.requires_grad
    return sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in leaves)


@pytest.mark.parametrize(("save", "share"), [("preactivation", 0.55), ("input", 0.15)])
def test_training_keeps_a_share_of_what_eager_does(save, share):
    assert kept_bytes(partial(project_tokens, save=save)) <= share * kept_bytes(eager_project)


@pytest.mark.parametrize("save", SAVES)
def test_the_op_passes_opcheck(save):
    plan = plan_pooling(IN_GRIDS, OUT_GRIDS)
    leaves = [torch.randn(plan.num_patches, 6), *parameters_of(6, 20, 4).values()]
    options = grids_of(plan), plan.num_cells, "adaptive", 1e-5, save
    arguments = (*(leaf.requires_grad_() for leaf in leaves), *options)
    torch.library.opcheck(fused_project_tokens.overload, arguments)


@pytest.mark.parametrize("trained", [["gate_weight", "up_weight"], ["norm_weight", "down_weight"]])
@pytest.mark.parametrize("save", ["preactivation", "input"])
def test_saved_rows_may_come_back_with_other_strides(save, trained):
    """As a hook of saved tensors may give them."""
    grids = [(5, 3), (4, 4)], [(2, 2), (3, 1)]
    x, parameters = torch.randn(31, 24), parameters_of(24, 40, 16, torch.float32)
    leaves = [parameters[name].requires_grad_() for name in trained]
    out = project_tokens(x, *grids, **parameters, save=save)
    expected = torch.autograd.grad(out.square().sum(), leaves)

    def transpose(tensor):
        is_kept = tensor.dim() == 2 and tensor.shape[0] == 7
        return tensor.t().contiguous().t() if is_kept else tensor

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, transpose):
        out = project_tokens(x, *grids, **parameters, save=save)
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), leaves), expected)


WITHOUT_EXCHANGE = """
import torch
if hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
    del torch.Tensor.__dlpack_c_exchange_api__
from tests.kernels.common import parameters_of
from tokenflex_kernels import project_tokens
parameters = parameters_of(1152, 1024, 16, torch.float32)  # products of more than 4 MB
x = torch.randn(16, 1152, requires_grad=True)
parameters["gate_weight"].requires_grad_()
project_tokens(x, [(4, 4)], [(2, 2)], **parameters).sum().backward()
assert x.grad.isfinite().all() and parameters["gate_weight"].grad.isfinite().all()
"""


def test_large_products_need_no_exchange_api():
    subprocess.run([sys.executable, "-c", WITHOUT_EXCHANGE], check=True, timeout=120)
