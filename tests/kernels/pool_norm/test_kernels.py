"""The pooling and LayerNorm kernels, forward and backward, against PyTorch's own in float64."""

from __future__ import annotations

import random
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from tests.kernels.common import (
    DTYPES,
    FEW_IN_GRIDS,
    FEW_OUT_GRIDS,
    IN_GRIDS,
    INTERPRETED,
    MODES,
    ON_TRITON,
    OUT_GRIDS,
    SPREADS,
    assert_as_close_as_eager,
    check,
    eager_pool_norm,
    rows_of,
    run,
    sampled,
    wide,
    windows_of,
)
from tokenflex_kernels import pool_norm
from tokenflex_kernels.launch_configs import INTERPRETER, launch_config

pytestmark = ON_TRITON

NORMS = [(), ("weight",), ("weight", "bias")]
SUBSETS = [flags for flags in product([False, True], repeat=3) if any(flags)]


def norm_of(width, parameters, dtype, device):
    """``parameters`` of weight and bias, by name, the others None."""
    return {
        name: torch.randn(width).to(device, dtype) if name in parameters else None
        for name in ("weight", "bias")
    }


def ours_and_peer(in_grids, out_grids, **options):
    """`pool_norm` and PyTorch's, as functions of x, weight and bias by name."""

    def ours(x, weight=None, bias=None):
        return pool_norm(x, in_grids, out_grids, weight=weight, bias=bias, **options)

    def peer(x, weight=None, bias=None):
        if weight is not None:  # where dtypes differ, PyTorch has no LayerNorm on every device
            weight = weight.to(x.dtype)
            bias = None if bias is None else bias.to(x.dtype)
        return eager_pool_norm(x, in_grids, out_grids, weight=weight, bias=bias, **options)

    return ours, peer


def check_batch(
    device, in_grids, out_grids, width, dtype, parameters=("weight", "bias"), ulps=4, **options
):
    x = torch.randn(rows_of(in_grids), width).to(device, dtype)
    inputs = {"x": x, **norm_of(width, parameters, dtype, device)}
    gradient = torch.randn(rows_of(out_grids), width).to(device, dtype)
    return check(*ours_and_peer(in_grids, out_grids, **options), inputs, gradient, ulps=ulps)


@pytest.mark.first
class TestAgainstFloat64:
    @pytest.mark.parametrize(("parameters", "mode", "dtype"), sampled(6, NORMS, MODES, DTYPES))
    def test_mixed_batch(self, device, dtype, mode, parameters):
        check_batch(device, IN_GRIDS, OUT_GRIDS, 96, dtype, parameters, ulps=1, mode=mode)

    @pytest.mark.parametrize(("width", "mode"), sampled(4, [1, 2, 7, 33], MODES))
    def test_odd_widths(self, device, width, mode):
        # Two features alone leave a LayerNorm of signs: eps keeps its gradient from vanishing.
        check_batch(device, IN_GRIDS, OUT_GRIDS, width, torch.float32, mode=mode, eps=0.1)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_width_of_the_model(self, device, dtype):
        check_batch(device, [(3, 4), (2, 2)], [(2, 3), (1, 1)], 1152, dtype)

    @pytest.mark.parametrize(
        ("in_grid", "out_grid", "mode"),
        [
            ((1, 1), (1, 1), "adaptive"),
            ((1, 1), (3, 2), "adaptive"),
            ((1, 1), (3, 2), "resize"),
            ((1, 8), (1, 3), "adaptive"),
            ((8, 1), (3, 1), "resize"),
            ((13, 17), (5, 7), "adaptive"),
            ((11, 7), (3, 5), "resize"),
            ((4, 6), (2, 3), "adaptive"),
            ((3, 5), (7, 6), "adaptive"),
            ((3, 4), (5, 6), "resize"),
            ((6, 4), (6, 4), "adaptive"),
        ],
    )
    def test_one_image(self, device, in_grid, out_grid, mode):
        check_batch(device, [in_grid], [out_grid], 7, torch.float32, mode=mode)

    @pytest.mark.parametrize("mode", sampled(1, MODES))
    def test_released_grids_in_one_batch(self, device, mode):
        # One axis at a time has the windows of 27 -> 8, 12 and 16 at a fraction of the cells.
        in_grids = [(27, 3), (3, 27), (27, 2), (2, 27), (27, 1)]
        out_grids = [(8, 1), (1, 12), (16, 1), (1, 16), (12, 1)]
        check_batch(device, in_grids, out_grids, 5, torch.float32, mode=mode)

    @pytest.mark.skipif(INTERPRETED, reason="its windows are those of the batch above")
    def test_a_whole_released_image(self, device):
        check_batch(device, [(27, 27)], [(8, 8)], 3, torch.float32, eps=0.1)

    @pytest.mark.parametrize("seed", sampled(5, range(10)))
    def test_random_ragged_batches(self, device, seed):
        draw = random.Random(seed)
        grids = [
            [(draw.randint(1, 7), draw.randint(1, 6)) for _ in range(images)]
            for images in [draw.randint(1, 4)] * 2
        ]
        parameters = draw.choice([(), ("weight",), ("weight", "bias")])
        options = {"mode": draw.choice(MODES), "eps": draw.choice([1e-6, 1e-3, 1.0])}
        width, dtype = draw.randint(3, 40), draw.choice(DTYPES)
        check_batch(device, *grids, width, dtype, parameters, **options)

    # Rows, cells, patches, channels and unrolled steps of a program.
    @pytest.mark.parametrize(
        ("config", "mode"), sampled(3, [(9, 9, 16, 8, 3), (1, 1, 1, 4, 1), (2, 2, 4, 1, 4)], MODES)
    )
    def test_any_config_gives_the_same(self, device, use_config, mode, config):
        grids = [(5, 7), (4, 3)], [(2, 3), (2, 4)]
        x = torch.randn(47, 6, device=device, requires_grad=True)
        weight, bias = (torch.randn(6, device=device, requires_grad=True) for _ in range(2))
        leaves = [x, weight, bias]

        def outcome():
            out = pool_norm(x, *grids, mode=mode, weight=weight, bias=bias)
            return out.detach(), *torch.autograd.grad(out.sin().sum(), leaves)

        expected = outcome()
        rows, cells, patches, channels, unroll = config
        table = launch_config("pool_norm_forward", 1, torch.float32, INTERPRETER)
        shared = table._replace(rows=rows, unroll=unroll, channels=channels)
        use_config(
            pool_norm_forward=shared._replace(columns=cells),
            pool_norm_backward=shared._replace(columns=patches),
            norm_gradient=shared,
        )
        for got, wanted in zip(outcome(), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


class TestNumerics:
    def test_eps_is_of_the_average_and_not_of_the_sum(self, device):
        # Small values in large windows: eps decides, and it scales with the area squared.
        in_grids, out_grids = [(9, 9)], [(1, 2)]
        inputs = {
            "x": 1e-3 * torch.randn(81, 16, device=device),
            **norm_of(16, ("weight", "bias"), torch.float32, device),
        }
        gradient = torch.randn(2, 16, device=device)
        check(*ours_and_peer(in_grids, out_grids, eps=1e-6), inputs, gradient)

    @pytest.mark.parametrize("mode", MODES)
    def test_a_far_mean_loses_no_digits(self, device, mode):
        # A one-pass variance E[x^2] - E[x]^2 in float32 fails here.
        ours, peer = ours_and_peer([(5, 7)], [(2, 3)], mode=mode)
        x = torch.randn(35, 64, device=device) + 3000.0
        weight = torch.ones(64, device=device)
        truth = peer(x.cpu().double(), weight.cpu().double())
        error = (ours(x, weight).cpu().double() - truth).square().mean().sqrt()
        assert error < 1e-2

    def test_constant_rows_give_the_bias_and_no_gradient(self, device):
        x = torch.full((6, 5), 2.0, device=device, requires_grad=True)
        weight, bias = torch.randn(2, 5, device=device)
        out = pool_norm(x, [(2, 3)], [(1, 2)], weight=weight, bias=bias)
        torch.testing.assert_close(out.detach(), bias.expand(2, 5))
        out.backward(torch.ones_like(out) / weight)  # a gradient that LayerNorm projects away
        torch.testing.assert_close(x.grad, torch.zeros_like(x), rtol=0, atol=1e-2)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_rounds_only_once(self, device, dtype):
        x = torch.randn(rows_of(IN_GRIDS), 24).to(device, dtype)
        weight, bias = torch.randn(2, 24, device=device)
        actual = pool_norm(x, IN_GRIDS, OUT_GRIDS, weight=weight, bias=bias)
        truth = eager_pool_norm(
            *(x.cpu().double(), IN_GRIDS, OUT_GRIDS),
            weight=weight.cpu().double(),
            bias=bias.cpu().double(),
        ).to(dtype)
        # A float32 result may land on the other side of a rounding boundary now and then.
        assert (actual.cpu() != truth).double().mean() < 0.02

    def test_nan_and_inf_stay_in_the_cells_that_see_them(self, device):
        x = torch.zeros(16, 4, device=device)
        x[0], x[15] = torch.nan, torch.inf
        out = pool_norm(x, [(4, 4)], [(2, 2)])
        assert out[0].isnan().all()
        assert torch.equal(out[3], torch.full((4,), torch.inf, device=device))
        assert torch.equal(out[1:3], torch.zeros(2, 4, device=device))

    @pytest.mark.filterwarnings("ignore:invalid value")
    @pytest.mark.parametrize(
        ("grids", "has_norm", "mode"),
        sampled(
            4, [((5, 4), (2, 3)), ((4, 4), (1, 1)), ((2, 3), (3, 3))], [True, False], MODES[::-1]
        ),
    )
    def test_a_bad_patch_or_gradient_spoils_what_shares_its_window(
        self, device, grids, has_norm, mode
    ):
        in_grid, out_grid = grids
        windows = windows_of(in_grid, out_grid, mode).to(device)
        cells, patches = windows.shape
        norm = {"weight": torch.ones(3, device=device)} if has_norm else {}
        channels = slice(None) if has_norm else 2  # the norm mixes a cell's channels

        def pool(x):
            return pool_norm(x, [in_grid] * 2, [out_grid] * 2, mode=mode, **norm)

        def assert_spoilt(rows, expected):
            spoilt = torch.zeros_like(rows, dtype=torch.bool)
            spoilt[: len(expected), channels] = expected[:, None] if has_norm else expected
            assert torch.equal(~rows.isfinite(), spoilt)

        for patch, bad in ((0, torch.nan), (patches // 2, torch.inf), (patches - 1, torch.nan)):
            x = torch.randn(2 * patches, 3, device=device)
            x[patch, 2] = bad
            assert_spoilt(pool(x), windows[:, patch])
        for cell, bad in ((0, torch.nan), (cells // 2, torch.inf), (cells - 1, torch.nan)):
            x = torch.randn(2 * patches, 3, device=device, requires_grad=True)
            gradient = torch.randn(2 * cells, 3, device=device)
            gradient[cell, 2] = bad
            assert_spoilt(torch.autograd.grad(pool(x), x, gradient)[0], windows[cell])


class TestDtypes:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_float32_parameters_with_narrow_rows(self, device, dtype):
        inputs = {
            "x": torch.randn(rows_of(IN_GRIDS), 24).to(device, dtype),
            **norm_of(24, ("weight", "bias"), torch.float32, device),
        }
        gradient = torch.randn(rows_of(OUT_GRIDS), 24).to(device, dtype)
        ours = check(*ours_and_peer(IN_GRIDS, OUT_GRIDS), inputs, gradient)
        assert ours["out"].dtype == ours["x"].dtype == dtype
        assert ours["weight"].dtype == ours["bias"].dtype == torch.float32

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("norm_dtype", DTYPES, ids=str)
    def test_each_result_has_its_own_tensors_dtype(self, device, dtype, norm_dtype):
        x = torch.randn(6, 4).to(device, dtype).requires_grad_()
        weight = torch.ones(4, device=device, dtype=norm_dtype, requires_grad=True)
        out = pool_norm(x, [(2, 3)], [(1, 2)], weight=weight)
        out.sum().backward()
        assert (out.dtype, x.grad.dtype, weight.grad.dtype) == (dtype, dtype, norm_dtype)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_autocast_changes_nothing(self, device, dtype):
        x = torch.randn(6, 4).to(device, dtype)
        weight = torch.randn(4, device=device)
        expected = pool_norm(x, [(2, 3)], [(1, 2)], weight=weight)
        with torch.autocast(device, torch.bfloat16):
            actual = pool_norm(x, [(2, 3)], [(1, 2)], weight=weight)
        assert actual.dtype == dtype
        assert torch.equal(actual, expected)


LAYOUTS = [
    lambda x: torch.cat([x, x + 1], 1)[:, : x.shape[1]],  # left part of rows
    lambda x: torch.cat([x + 1, x], 1)[:, x.shape[1] :],  # right part of rows
    lambda x: x.repeat_interleave(2, 0)[::2],  # every other row
    lambda x: x.T.contiguous().T,  # transposed
    lambda x: x.repeat_interleave(2, 1)[:, ::2],  # every other column
    lambda x: F.pad(x.flatten(), (1, 0))[1:].view_as(x),  # unaligned
]


class TestLayouts:
    @pytest.mark.parametrize(("lay_out", "dtype"), sampled(6, LAYOUTS, DTYPES[::2]))
    def test_any_memory_layout_of_rows_and_gradient(self, device, lay_out, dtype):
        x = torch.randn(rows_of(FEW_IN_GRIDS), 10).to(device, dtype)
        gradient = torch.randn(rows_of(FEW_OUT_GRIDS), 10).to(device, dtype)
        inputs = {"x": x, **norm_of(10, ("weight", "bias"), dtype, device)}
        op, _ = ours_and_peer(FEW_IN_GRIDS, FEW_OUT_GRIDS)
        assert torch.equal(lay_out(x), x)
        expected = run(op, inputs, gradient)
        laid_out = {
            "x": lay_out(x),
            "weight": F.pad(inputs["weight"], (1, 0))[1:],
            "bias": F.pad(inputs["bias"], (3, 0))[3:],
        }
        for name, result in run(op, laid_out, lay_out(gradient)).items():
            assert torch.equal(result, expected[name]), name

    @pytest.mark.parametrize("spread", SPREADS)
    @pytest.mark.parametrize("name", ["weight", "bias"])
    def test_strided_parameters(self, device, spread, name):
        inputs = {
            "x": torch.randn(rows_of(FEW_IN_GRIDS), 10, device=device),
            **norm_of(10, ("weight", "bias"), torch.float32, device),
        }
        inputs[name] = spread(inputs[name])
        gradient = torch.randn(rows_of(FEW_OUT_GRIDS), 10, device=device)
        check(*ours_and_peer(FEW_IN_GRIDS, FEW_OUT_GRIDS), inputs, gradient)

    @pytest.mark.parametrize("lay_out", [*LAYOUTS, None])
    def test_any_memory_layout_of_the_gradient_without_that_of_rows(self, device, lay_out):
        gradient = torch.randn(rows_of(FEW_OUT_GRIDS), 10, device=device)
        laid_out = lay_out(gradient) if lay_out else gradient[:1].expand_as(gradient)
        inputs = {
            "x": torch.randn(rows_of(FEW_IN_GRIDS), 10, device=device),
            **norm_of(10, ("weight", "bias"), torch.float32, device),
        }
        op, _ = ours_and_peer(FEW_IN_GRIDS, FEW_OUT_GRIDS)
        expected = run(op, inputs, laid_out.contiguous(), ["weight", "bias"])
        for name, result in run(op, inputs, laid_out, ["weight", "bias"]).items():
            assert torch.equal(result, expected[name]), name

    @pytest.mark.parametrize("parameters", [(), ("weight", "bias")], ids="+".join)
    @pytest.mark.parametrize("dims", ["rows", "columns", "both"])
    def test_expanded_gradient_equals_a_dense_one(self, device, dims, parameters):
        shape = {"rows": (1, 10), "columns": (rows_of(FEW_OUT_GRIDS), 1), "both": (1, 1)}[dims]
        gradient = torch.randn(shape, device=device).expand(rows_of(FEW_OUT_GRIDS), 10)
        x = torch.randn(rows_of(FEW_IN_GRIDS), 10, device=device)
        inputs = {"x": x, **norm_of(10, parameters, torch.float32, device)}
        op, _ = ours_and_peer(FEW_IN_GRIDS, FEW_OUT_GRIDS)
        expected = run(op, inputs, gradient.contiguous())
        for name, result in run(op, inputs, gradient).items():
            assert torch.equal(result, expected[name]), name

    def test_expanded_rows(self, device):
        row = torch.randn(1, 5, device=device)
        out = pool_norm(row.expand(35, 5), [(5, 7)], [(2, 3)])
        torch.testing.assert_close(out, row.expand(6, 5))

    def test_rows_of_a_wider_tensor_without_a_copy(self, device):
        # Every other token of a batch of features, say without a class token: one view, no copy.
        features = torch.randn(2, 1 + 6, 8, device=device)
        x = features.flatten(0, 1)[1:7]
        actual = pool_norm(x, [(2, 3)], [(1, 3)])
        torch.testing.assert_close(actual, eager_pool_norm(x, [(2, 3)], [(1, 3)]))


class TestGradients:
    @pytest.mark.parametrize("wanted", SUBSETS)
    def test_any_subset_of_inputs(self, device, wanted):
        names = [name for name, flag in zip(("x", "weight", "bias"), wanted, strict=True) if flag]
        inputs = {
            "x": torch.randn(16, 9, device=device),
            **norm_of(9, ("weight", "bias"), torch.float32, device),
        }
        gradient = torch.randn(7, 9, device=device)
        check(*ours_and_peer(FEW_IN_GRIDS, FEW_OUT_GRIDS), inputs, gradient, names)

    def test_a_frozen_encoder_runs_no_gather(self, device, launched):
        weight, bias = (torch.randn(9, device=device, requires_grad=True) for _ in range(2))
        out = pool_norm(
            torch.randn(6, 9, device=device), [(2, 3)], [(1, 2)], weight=weight, bias=bias
        )
        out.sum().backward()
        assert launched == ["pool_norm_forward", "norm_gradient"]

    def test_forward_is_one_launch_and_backward_of_a_norm_two(self, device, launched):
        x = torch.randn(rows_of(FEW_IN_GRIDS), 9, device=device, requires_grad=True)
        weight = torch.randn(9, device=device, requires_grad=True)
        pool_norm(x, FEW_IN_GRIDS, FEW_OUT_GRIDS, weight=weight).sum().backward()
        assert launched == ["pool_norm_forward", "norm_gradient", "pool_norm_backward"]
        launched.clear()
        pool_norm(x, FEW_IN_GRIDS, FEW_OUT_GRIDS).sum().backward()
        assert launched == ["pool_norm_forward", "pool_norm_backward"]

    def test_no_graph_where_nothing_requires_grad(self, device):
        x = torch.randn(6, 4, device=device)
        assert not pool_norm(x, [(2, 3)], [(1, 2)]).requires_grad
        with torch.no_grad():
            assert not pool_norm(x.requires_grad_(), [(2, 3)], [(1, 2)]).requires_grad

    def test_nothing_is_written_in_place_and_retain_graph_gives_the_same_again(self, device):
        leaves = [
            torch.randn(rows_of(FEW_IN_GRIDS), 6, device=device, requires_grad=True),
            *(torch.randn(6, device=device, requires_grad=True) for _ in range(2)),
        ]
        gradient = torch.randn(rows_of(FEW_OUT_GRIDS), 6, device=device)
        saved: list[tuple[torch.Tensor, torch.Tensor]] = []

        def pack(tensor):
            saved.append((tensor, tensor.detach().clone()))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = pool_norm(
                leaves[0], FEW_IN_GRIDS, FEW_OUT_GRIDS, weight=leaves[1], bias=leaves[2]
            )
        before = [(tensor, tensor.detach().clone()) for tensor in (*leaves, gradient, out)]
        first = torch.autograd.grad(out, leaves, gradient, retain_graph=True)
        second = torch.autograd.grad(out, leaves, gradient)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert len(saved) >= 2
        for tensor, copy in before + saved:
            assert torch.equal(tensor, copy)

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_gradient_checkpointing(self, device, use_reentrant):
        x = torch.randn(rows_of(FEW_IN_GRIDS), 6, device=device)
        weight = torch.randn(6, device=device)

        def gradients(op):
            leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
            op(*leaves).sin().sum().backward()
            return [leaf.grad for leaf in leaves]

        op, _ = ours_and_peer(FEW_IN_GRIDS, FEW_OUT_GRIDS)
        plain = gradients(op)
        again = gradients(lambda *inputs: checkpoint(op, *inputs, use_reentrant=use_reentrant))
        assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))

    def test_output_used_twice(self, device):
        ours, peer = ours_and_peer(FEW_IN_GRIDS, FEW_OUT_GRIDS)
        inputs = {"x": torch.randn(rows_of(FEW_IN_GRIDS), 6, device=device)}

        def twice(op):
            def used(x):
                out = op(x)
                return out.sin() + out * out

            return used

        gradient = torch.randn(rows_of(FEW_OUT_GRIDS), 6, device=device)
        results = (run(twice(op), inputs, gradient) for op in (ours, peer))
        truth = run(twice(peer), wide(inputs), gradient.cpu().double())
        assert_as_close_as_eager(*results, truth)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
    def test_forward_and_backward_repeat_bitwise(self, device, dtype):
        x = torch.randn(rows_of(FEW_IN_GRIDS), 33).to(device, dtype).requires_grad_()
        weight = torch.randn(33, device=device, requires_grad=True)

        def outcome():
            out = pool_norm(x, FEW_IN_GRIDS, FEW_OUT_GRIDS, weight=weight)
            return out, *torch.autograd.grad(out.float().square().sum(), [x, weight])

        for first, second in zip(outcome(), outcome(), strict=True):
            assert torch.equal(first, second)


class TestEmpty:
    @pytest.mark.parametrize("wanted", [("x",), ("weight", "bias"), ("x", "weight", "bias")])
    @pytest.mark.parametrize("mode", MODES)
    def test_no_images_launch_nothing(self, device, launched, mode, wanted):
        inputs = {
            "x": torch.empty(0, 4, device=device),
            **norm_of(4, ("weight", "bias"), torch.float32, device),
        }
        op, _ = ours_and_peer([], [], mode=mode)
        results = run(op, inputs, torch.empty(0, 4, device=device), wanted)
        assert launched == []
        assert results["out"].shape == (0, 4)
        for name in wanted:
            assert torch.equal(results[name], torch.zeros_like(inputs[name]))

    def test_no_features_launch_nothing(self, device, launched):
        x = torch.empty(6, 0, device=device, requires_grad=True)
        out = pool_norm(x, [(2, 3)], [(1, 2)])
        out.sum().backward()
        assert (out.shape, x.grad.shape, launched) == ((2, 0), (6, 0), [])


class TestUnevenBatches:
    def test_one_large_grid_among_small_ones(self, device):
        leaves = [
            torch.randn(shape, device=device, requires_grad=True)
            for shape in ((141, 5), (5,), (5,))
        ]
        in_grids = [(11, 11)] + [(1, 2)] * 10
        out = pool_norm(leaves[0], in_grids, [(1, 1)] * 11, weight=leaves[1], bias=leaves[2])
        out.sum().backward()
        truths = [leaf.detach().double().requires_grad_() for leaf in leaves]
        pool_norm(
            truths[0], in_grids, [(1, 1)] * 11, weight=truths[1], bias=truths[2]
        ).sum().backward()
        for leaf, truth in zip(leaves, truths, strict=True):
            torch.testing.assert_close(leaf.grad.double(), truth.grad, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("mean", [-30, 1000])
    @pytest.mark.parametrize("mode", ["adaptive", "resize"])
    def test_float32_with_a_mean_is_as_close_as_eager(self, device, mode, mean):
        x = torch.randn(2 * 35, 130, device=device) + mean
        weight = torch.ones(130, device=device)
        grids = [(5, 7)] * 2, [(2, 3)] * 2
        truth = eager_pool_norm(x.double(), *grids, mode, weight.double())
        results = (
            pool_norm(x, *grids, mode=mode, weight=weight),
            eager_pool_norm(x, *grids, mode, weight),
        )
        errors = [(result.double() - truth).square().mean().sqrt().item() for result in results]
        assert errors[0] <= 1.2 * errors[1]
