"""The extension's pooling and LayerNorm on host memory, against PyTorch's own in float64."""

from __future__ import annotations

import random
import subprocess
import sys
from functools import partial
from itertools import product
from unittest.mock import patch

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.kernels.common import (
    DTYPES,
    IN_GRIDS,
    MODES,
    OUT_GRIDS,
    assert_as_close_as_eager,
    check,
    eager_pool_norm,
    rows_of,
    run,
    wide,
)
from tokenflex_kernels import plan_pooling, pool_norm
from tokenflex_kernels.backend import extension

pytestmark = pytest.mark.skipif(extension() is None, reason="needs the extension")

ALL_DTYPES = (*DTYPES, torch.float64)


@pytest.fixture(autouse=True)
def _native(monkeypatch):
    monkeypatch.setenv("TOKENFLEX_BACKEND", "native")


def inputs_of(in_grids, width, dtype, parameters=("weight", "bias"), norm_dtype=None):
    vectors = {name: torch.randn(width, dtype=norm_dtype or dtype) for name in parameters}
    return {"x": torch.randn(rows_of(in_grids), width, dtype=dtype), **vectors}


def check_batch(in_grids, out_grids, width, dtype, parameters=("weight", "bias"), **options):
    inputs = inputs_of(in_grids, width, dtype, parameters)
    gradient = torch.randn(rows_of(out_grids), width, dtype=dtype)
    grids = {"in_grids": in_grids, "out_grids": out_grids}
    ours = partial(pool_norm, **grids, **options)
    check(ours, partial(eager_pool_norm, **grids, **options), inputs, gradient)


class TestAgainstFloat64:
    @pytest.mark.parametrize("seed", range(60))
    def test_random_ragged_batches(self, seed):
        draw = random.Random(seed)
        sides, widths = [1, 2, 3, 4, 5, 7, 12, 27], [1, 2, 15, 16, 63, 64, 65, 200]
        grids = [
            [(draw.choice(sides), draw.choice(sides)) for _ in range(images)]
            for images in [draw.randint(1, 6)] * 2
        ]
        options = {"mode": draw.choice(MODES), "eps": draw.choice([1e-6, 0.1, 1.0])}
        width, dtype = draw.choice(widths), draw.choice(ALL_DTYPES)
        # The LayerNorm of a feature or two has a gradient that vanishes, whose error says nothing.
        parameters = draw.choice([(), ("weight",), ("weight", "bias")]) if width > 2 else ()
        check_batch(*grids, width, dtype, parameters, **options)

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
    @pytest.mark.parametrize("side", [8, 12, 16])
    def test_released_grids(self, side, dtype, mode):
        check_batch([(27, 27)] * 2, [(side, side)] * 2, 130, dtype, mode=mode)

    @pytest.mark.parametrize("mode", MODES)
    def test_a_row_of_patches_may_begin_where_a_band_does(self, mode):
        check_batch([(64, 16)], [(16, 8)], 70, torch.float32, mode=mode)

    @pytest.mark.parametrize("mean", [-30, 1000])
    @pytest.mark.parametrize("mode", MODES)
    def test_a_far_mean_loses_no_digits(self, mode, mean):
        x, weight = torch.randn(2 * 35, 130) + mean, torch.ones(130)
        grids = [(5, 7)] * 2, [(2, 3)] * 2
        truth = {"out": eager_pool_norm(x.double(), *grids, mode, weight.double())}
        ours = {"out": pool_norm(x, *grids, mode=mode, weight=weight)}
        assert_as_close_as_eager(ours, {"out": eager_pool_norm(x, *grids, mode, weight)}, truth)

    @pytest.mark.parametrize("width", [97, 255, 1000])
    def test_float32_of_any_width_is_as_close_as_eager(self, width):
        """Without the last bits of a few numbers: what a row's last channels add up to counts."""
        inputs, gradient = inputs_of([(1, 1)] * 200, width, torch.float32), torch.randn(200, width)
        grids = {"in_grids": [(1, 1)] * 200, "out_grids": [(1, 1)] * 200}
        peer, truth = partial(eager_pool_norm, **grids), wide(inputs)
        ours, eager = (run(op, inputs, gradient) for op in (partial(pool_norm, **grids), peer))
        assert_as_close_as_eager(ours, eager, run(peer, truth, gradient.double()), ulps=0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_variances_of_sums_may_overflow(self, dtype):
        # Several draws: the error of the sums of two rows is luck.
        inputs = [inputs_of([(9, 9)], 70, dtype) for _ in range(8)]
        gradients = [torch.randn(2, 70, dtype=dtype) for _ in inputs]
        for draw in inputs:
            draw["x"] *= 1e18
        grids = {"in_grids": [(9, 9)], "out_grids": [(1, 2)]}
        check(partial(pool_norm, **grids), partial(eager_pool_norm, **grids), inputs, gradients)

    def test_small_values_are_normalised_with_the_eps_of_the_average(self):
        x, weight = 1e-3 * torch.randn(81, 16), torch.ones(16)
        grids = [(9, 9)], [(1, 2)]
        truth = eager_pool_norm(x.double(), *grids, weight=weight.double(), eps=1e-6)
        actual = pool_norm(x, *grids, weight=weight, eps=1e-6)
        torch.testing.assert_close(actual.double(), truth, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
    @pytest.mark.parametrize("norm_dtype", ALL_DTYPES, ids=str)
    def test_parameters_may_have_another_dtype(self, dtype, norm_dtype):
        inputs = inputs_of(IN_GRIDS, 70, dtype, norm_dtype=norm_dtype)
        gradient = torch.randn(rows_of(OUT_GRIDS), 70, dtype=dtype)
        options = {"in_grids": IN_GRIDS, "out_grids": OUT_GRIDS}
        actual = run(partial(pool_norm, **options), inputs, gradient)
        truth = run(partial(eager_pool_norm, **options), wide(inputs), gradient.double())
        for name, expected in truth.items():
            assert actual[name].dtype == inputs.get(name, inputs["x"]).dtype
            # One rounding of the result, and that of the saved rows.
            tolerance = 4 * max(torch.finfo(dtype).eps, torch.finfo(norm_dtype).eps)
            scale = expected.abs().max().item()
            torch.testing.assert_close(
                actual[name].double(), expected, rtol=0, atol=tolerance * scale
            )

    @pytest.mark.parametrize(
        "wanted", [flags for flags in product([False, True], repeat=3) if any(flags)]
    )
    def test_any_subset_of_gradients(self, wanted):
        inputs = inputs_of(IN_GRIDS, 33, torch.float32)
        gradient = torch.randn(rows_of(OUT_GRIDS), 33)
        op = partial(pool_norm, in_grids=IN_GRIDS, out_grids=OUT_GRIDS)
        names = [name for name, flag in zip(inputs, wanted, strict=True) if flag]
        expected = run(op, inputs, gradient)
        for name, result in run(op, inputs, gradient, names).items():
            torch.testing.assert_close(result, expected[name])
        # A mode must see the ops of a backward pass whose forward pass went by at once.
        leaves = {name: value.requires_grad_(name in names) for name, value in inputs.items()}
        out = op(**leaves)
        with FlopCounterMode(display=False):
            results = torch.autograd.grad(out, [leaves[name] for name in names], gradient)
        for name, result in zip(names, results, strict=True):
            torch.testing.assert_close(result, expected[name])

    @pytest.mark.parametrize("mode", MODES)
    def test_a_mode_may_see_backward_without_a_norm(self, mode):
        x = torch.randn(rows_of(IN_GRIDS), 5, requires_grad=True)
        gradient = torch.randn(rows_of(OUT_GRIDS), 5)
        (expected,) = torch.autograd.grad(pool_norm(x, IN_GRIDS, OUT_GRIDS, mode=mode), x, gradient)
        out = pool_norm(x, IN_GRIDS, OUT_GRIDS, mode=mode)
        with FlopCounterMode(display=False):
            (grad,) = torch.autograd.grad(out, x, gradient)
        torch.testing.assert_close(grad, expected)

    @pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
    @pytest.mark.parametrize("sides", [(1, 33), (6, 6), (1, 65)], ids=str)
    @pytest.mark.parametrize("mode", MODES)
    def test_windows_and_covers_of_more_rows_than_are_added_at_once(self, mode, sides, dtype):
        """One cell of all patches, and one patch below all cells."""
        for grids in ([sides], [(1, 1)]), ([(1, 1)], [sides]):
            check_batch(*grids, 90, dtype, mode=mode)


@pytest.fixture
def _without_subnormals():
    """A processor that takes subnormal floats for zero, as some set it for speed."""
    if not torch.set_flush_denormal(True):
        pytest.skip("needs a processor that can")
    yield
    torch.set_flush_denormal(False)


@pytest.mark.usefixtures("_without_subnormals")
def test_subnormal_numbers_of_float16_are_kept_as_pytorch_keeps_them():
    x = torch.arange(-1030, 1030, dtype=torch.int16).view(torch.float16)[:, None].repeat(1, 70)
    x = torch.cat([torch.where(x.isnan(), 0, x), torch.where(x.isnan(), 0, -x)])
    grids = [(1, 1)] * len(x)
    assert torch.equal(x.float().half(), x)
    assert torch.equal(pool_norm(x, grids, grids), x)


# A batch of many bands, whose parts begin within images and between them.
MANY_IN, MANY_OUT = [(27, 27), (4, 4), (9, 30), (27, 27)], [(8, 8), (7, 7), (4, 12), (16, 16)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("team", [True, False])
def test_threads_do_not_change_a_bit(team, dtype, mode):
    inputs = inputs_of(MANY_IN, 1152, dtype)
    gradient = torch.randn(rows_of(MANY_OUT), 1152, dtype=dtype)
    op = partial(pool_norm, in_grids=MANY_IN, out_grids=MANY_OUT, mode=mode)
    results = []
    extension().allow_torch_team(team)
    try:
        for threads in (1, 2, 3, 4):
            with patch("torch.get_num_threads", lambda threads=threads: threads):
                results.append(run(op, inputs, gradient))
    finally:
        extension().allow_torch_team(True)
    for result, (name, expected) in product(results[1:], results[0].items()):
        assert torch.equal(result[name], expected), name


def test_a_forked_process_pools_too():
    code = """
import os, torch, tokenflex_kernels as tk
torch.set_num_threads(2)
x, weight = torch.randn(2916, 256), torch.ones(256)
pool = lambda: tk.pool_norm(x, [(27, 27)] * 4, [(8, 8)] * 4, weight=weight)
expected = pool()
child = os.fork()
if child == 0:
    os._exit(0 if (pool().numpy() == expected.numpy()).all() else 3)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_threads_that_cannot_start_leave_their_work_to_others():
    code = """
import resource, torch, tokenflex_kernels as tk
from tokenflex_kernels.backend import extension
torch.set_num_threads(4)
x, weight = torch.randn(2916, 256), torch.ones(256)
out = torch.ones(8, 2916 * 256).mul_(2)  # memory for the allocator to reuse
pool = lambda: tk.pool_norm(x, [(27, 27)] * 4, [(8, 8)] * 4, weight=weight)
expected = pool()
extension().allow_torch_team(False)
del out
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**22, -1))  # less than a thread's stack
assert torch.equal(pool(), expected)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


class TestLayouts:
    @pytest.mark.parametrize(
        "lay_out",
        [
            pytest.param(lambda x: torch.cat([x, x + 1], 1)[:, : x.shape[1]], id="row-strided"),
            pytest.param(lambda x: x.repeat_interleave(2, 0)[::2], id="every-other-row"),
            pytest.param(lambda x: x.T.contiguous().T, id="transposed"),
            pytest.param(
                lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view_as(x), id="unaligned"
            ),
        ],
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_any_layout_of_rows_gradients_and_parameters(self, lay_out, dtype):
        inputs = inputs_of(IN_GRIDS, 70, dtype)
        gradient = torch.randn(rows_of(OUT_GRIDS), 70, dtype=dtype)
        op = partial(pool_norm, in_grids=IN_GRIDS, out_grids=OUT_GRIDS)
        expected = run(op, inputs, gradient)
        laid_out = {
            "x": lay_out(inputs["x"]),
            "weight": inputs["weight"].repeat_interleave(2)[::2],
            "bias": torch.stack([inputs["bias"]] * 2, 1)[:, 1],
        }
        for name, result in run(op, laid_out, lay_out(gradient)).items():
            assert torch.equal(result, expected[name]), name

    @pytest.mark.parametrize("shape", [(1, 70), (rows_of(OUT_GRIDS), 1), (1, 1)])
    def test_an_expanded_gradient_equals_a_dense_one(self, shape):
        inputs = inputs_of(IN_GRIDS, 70, torch.float32)
        gradient = torch.randn(shape).expand(rows_of(OUT_GRIDS), 70)
        op = partial(pool_norm, in_grids=IN_GRIDS, out_grids=OUT_GRIDS)
        expected = run(op, inputs, gradient.contiguous())
        for name, result in run(op, inputs, gradient).items():
            assert torch.equal(result, expected[name]), name

    @pytest.mark.parametrize("parameters", [(), ("weight", "bias")])
    def test_no_features_and_no_images(self, parameters):
        no_features = inputs_of([(2, 3)], 0, torch.float32, parameters)
        results = run(
            partial(pool_norm, in_grids=[(2, 3)], out_grids=[(1, 2)]),
            no_features,
            torch.empty(2, 0),
        )
        assert (results["out"].shape, results["x"].shape) == ((2, 0), (6, 0))
        no_images = inputs_of([], 4, torch.float32, parameters)
        results = run(partial(pool_norm, in_grids=[], out_grids=[]), no_images, torch.empty(0, 4))
        assert results["out"].shape == (0, 4)
        assert all(results[name].eq(0).all() for name in parameters)


class TestOps:
    """The registered stages, which compiled graphs call."""

    PLAN = plan_pooling(IN_GRIDS, OUT_GRIDS)

    @pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("parameters", [0, 1, 2])
    def test_opcheck(self, parameters, mode, dtype):
        plan = self.PLAN
        norm = [torch.randn(6, dtype=dtype, requires_grad=True) for _ in range(parameters)]
        x = torch.randn(plan.num_patches, 6, dtype=dtype, requires_grad=True)
        batch = plan.grids, plan.num_cells, mode, 1e-5
        arguments = (x, *norm, *[None] * (2 - parameters), *batch)
        torch.library.opcheck(torch.ops.tokenflex.pool_norm.default, arguments)

    @pytest.mark.parametrize("out_dtype", ALL_DTYPES, ids=str)
    @pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
    def test_stages_convert_between_dtypes(self, dtype, out_dtype):
        """As a projector does under autocast."""
        plan, ops = self.PLAN, torch.ops.tokenflex
        x, weight = torch.randn(plan.num_patches, 6, dtype=dtype), torch.randn(6, dtype=dtype)
        arguments = x, weight, None, plan.grids, plan.num_cells, "adaptive", 0.1, out_dtype, True
        torch.library.opcheck(ops.pool_norm_forward.default, arguments)
        out, normalised, inverse_std = ops.pool_norm_forward(*arguments)
        gradient = torch.randn_like(out)
        backward = (normalised, inverse_std, weight, plan.grids, len(x), "adaptive", dtype)
        torch.library.opcheck(ops.pool_norm_backward.default, (gradient, *backward, True, True))
        results = ops.pool_norm_backward(gradient, *backward, True, False)
        assert (out.dtype, results[0].dtype) == (out_dtype, dtype)

        leaves = [value.double().requires_grad_() for value in (x, weight)]
        truth = eager_pool_norm(leaves[0], IN_GRIDS, OUT_GRIDS, weight=leaves[1], eps=0.1)
        truths = torch.autograd.grad(truth, leaves, gradient.double())
        tolerance = 8 * max(torch.finfo(kind).eps for kind in (dtype, out_dtype))
        for actual, expected in zip((out, *results), (truth, *truths), strict=False):
            limit = tolerance * expected.abs().max().item()
            torch.testing.assert_close(actual.double(), expected, rtol=0, atol=limit)

    def test_scale_shift(self):
        normalised = torch.randn(50, 70).bfloat16()
        weight, bias = torch.randn(2, 70)
        actual = torch.ops.tokenflex.scale_shift(normalised, weight, bias)
        expected = (normalised.double() * weight.double() + bias.double()).bfloat16()
        torch.testing.assert_close(actual, expected)


def test_a_second_derivative_of_the_norm_is_refused_in_words():
    x = torch.randn(6, 4, requires_grad=True)
    out = pool_norm(x, [(2, 3)], [(1, 2)], weight=torch.ones(4))
    (grad,) = torch.autograd.grad(out.sin().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
