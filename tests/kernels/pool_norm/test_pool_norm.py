"""`pool_norm` against PyTorch's own pooling, image by image, in float64."""

from __future__ import annotations

import time
import tracemalloc
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.kernels.common import (
    DTYPES,
    MODES,
    NORM,
    assert_equal_in_float64,
    assert_not_less_exact,
    dense_map,
    eager_pool_norm,
    rms_error,
    rows_of,
    run,
    wide,
)
from tokenflex_kernels import pool_norm
from tokenflex_kernels.pool_norm.axis_weights import LARGE_AXIS, _cached_map, axis_map

# Square, non-square, prime, upsampled, single-cell and single-patch images side by side.
IN_GRIDS = [(27, 27), (5, 7), (1, 1), (27, 27), (4, 9), (27, 27), (3, 1), (13, 11)]
OUT_GRIDS = [(8, 8), (2, 3), (1, 1), (12, 12), (6, 4), (16, 16), (1, 2), (1, 1)]


def float64(rows, width=3, **options):
    return torch.randn(rows, width, dtype=torch.float64, **options)


def ours_peer_and_truth(inputs, gradient, in_grids, out_grids, mode):
    """Outputs and gradients by name, of `pool_norm` and of PyTorch in both precisions."""
    options = {"in_grids": in_grids, "out_grids": out_grids, "mode": mode}
    ours, peer = partial(pool_norm, **options), partial(eager_pool_norm, **options)
    return (
        run(ours, inputs, gradient),
        run(peer, inputs, gradient),
        run(peer, wide(inputs), gradient.cpu().double()),
    )


class TestValues:
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize(
        ("in_grid", "out_grid"),
        [
            ((1, 1), (1, 1)),
            ((1, 1), (3, 2)),
            ((1, 8), (1, 3)),
            ((8, 1), (3, 1)),
            ((27, 27), (8, 8)),
            ((27, 27), (12, 12)),
            ((27, 27), (16, 16)),
            ((27, 27), (27, 27)),
            ((13, 17), (5, 7)),
            ((17, 13), (5, 7)),
            ((4, 6), (2, 3)),
            ((6, 4), (2, 4)),
            ((3, 5), (7, 11)),
            ((2, 9), (5, 4)),
        ],
    )
    def test_one_image_equals_pytorch(self, in_grid, out_grid, mode):
        x = float64(rows_of([in_grid]))
        actual = pool_norm(x, [in_grid], [out_grid], mode=mode)
        assert actual.shape == (rows_of([out_grid]), 3)
        assert_equal_in_float64(actual, eager_pool_norm(x, [in_grid], [out_grid], mode))

    @pytest.mark.parametrize("mode", MODES)
    @given(
        sides=st.lists(st.tuples(*[st.integers(1, 13)] * 4), min_size=1, max_size=5),
        width=st.integers(1, 5),
        seed=st.integers(0, 2**20),
    )
    @settings(max_examples=60, deadline=None)
    def test_ragged_batch_equals_pytorch(self, sides, width, seed, mode):
        torch.manual_seed(seed)
        in_grids = [side[:2] for side in sides]
        out_grids = [side[2:] for side in sides]
        x = float64(rows_of(in_grids), width)
        actual = pool_norm(x, in_grids, out_grids, mode=mode)
        assert_equal_in_float64(actual, eager_pool_norm(x, in_grids, out_grids, mode))

    @pytest.mark.parametrize("mode", MODES)
    def test_mixed_batch_equals_images_one_by_one(self, mode):
        weight, bias = float64(2)
        x = float64(rows_of(IN_GRIDS))
        batch = pool_norm(x, IN_GRIDS, OUT_GRIDS, mode=mode, weight=weight, bias=bias)
        alone = [
            pool_norm(rows, [in_grid], [out_grid], mode=mode, weight=weight, bias=bias)
            for rows, in_grid, out_grid in zip(
                x.split([rows_of([grid]) for grid in IN_GRIDS]), IN_GRIDS, OUT_GRIDS, strict=True
            )
        ]
        assert_equal_in_float64(batch, torch.cat(alone))

    def test_adaptive_is_the_default_mode(self):
        x = float64(729)
        grids = [(27, 27)], [(8, 8)]
        assert torch.equal(pool_norm(x, *grids), pool_norm(x, *grids, mode="adaptive"))
        assert not torch.allclose(pool_norm(x, *grids), pool_norm(x, *grids, mode="resize"))

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("has_bias", [False, True])
    def test_layer_norm_equals_pytorch(self, mode, has_bias):
        x = float64(rows_of(IN_GRIDS), 6)
        weight, bias = float64(2, 6)
        norm = {"weight": weight, "bias": bias if has_bias else None, "eps": 0.25}
        actual = pool_norm(x, IN_GRIDS, OUT_GRIDS, mode=mode, **norm)
        assert_equal_in_float64(actual, eager_pool_norm(x, IN_GRIDS, OUT_GRIDS, mode, **norm))

    def test_default_eps_is_that_of_pytorch(self):
        x = 1e-3 * float64(35, 6)  # small variance: eps carries weight
        weight = torch.ones(6, dtype=torch.float64)
        actual = pool_norm(x, [(5, 7)], [(2, 3)], weight=weight)
        assert_equal_in_float64(
            actual, eager_pool_norm(x, [(5, 7)], [(2, 3)], weight=weight, eps=1e-5)
        )

    def test_layer_norm_of_a_far_mean_loses_no_digits(self):
        # A one-pass variance E[x^2] - E[x]^2 in float32 fails here.
        x = (torch.randn(35, 64) + 3000.0).requires_grad_()
        weight = torch.ones(64)
        truth = eager_pool_norm(x.detach().double(), [(5, 7)], [(2, 3)], weight=weight.double())
        assert rms_error(pool_norm(x, [(5, 7)], [(2, 3)], weight=weight).detach(), truth) < 1e-2


def averages(size, cells, mode):
    axis = axis_map(size, cells, mode)
    return torch.from_numpy(dense_map(axis, size)) / torch.tensor(axis.divisors)[:, None]


class TestAxisMaps:
    SIZES = (1, 2, 3, 7, 12, 16, 27)
    CELLS = (1, 2, 3, 8, 12, 16, 27, 29)

    @pytest.mark.parametrize("mode", MODES)
    def test_rows_are_averages(self, mode):
        for size, cells in product(self.SIZES, self.CELLS):
            weights = averages(size, cells, mode)
            assert weights.shape == (cells, size)
            assert weights.dtype == torch.float64
            assert bool((weights >= 0).all()), (size, cells)
            torch.testing.assert_close(weights.sum(1), torch.ones(cells).double())

    def test_adaptive_windows_are_pytorchs(self):
        for size, cells in product(self.SIZES, self.CELLS):
            patches = torch.eye(size, dtype=torch.float64)[None]
            expected = F.adaptive_avg_pool1d(patches, cells)[0].T
            torch.testing.assert_close(averages(size, cells, "adaptive"), expected)

    def test_divisors_are_whole_and_the_weights_sum_to_them(self):
        assert axis_map(27, 8, "adaptive").divisors == (4, 4, 5, 4, 4, 5, 4, 4)
        assert axis_map(27, 12, "resize").divisors == (3,) * 12
        for size, cells, mode in product(self.SIZES, self.CELLS, MODES):
            axis = axis_map(size, cells, mode)
            sums = dense_map(axis, size).sum(1)
            assert sums == pytest.approx(axis.divisors, rel=1e-12)

    @pytest.mark.parametrize("mode", MODES)
    def test_windows_hold_the_weights_that_are_not_zero(self, mode):
        for size, cells in product(self.SIZES, self.CELLS):
            axis = axis_map(size, cells, mode)
            assert len(axis.values) == axis.counts.sum()
            assert (axis.values > 0).all()
            matrix = np.zeros((cells, size))
            matrix[axis.entries()] = axis.values
            assert np.array_equal(matrix, dense_map(axis, size))

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize(
        ("size", "cells"),
        [(8192, 4096), (65536, 1), (1, 65536), (65535, 4096), (4096, 65535), (65536, 65535)],
    )
    def test_a_long_axis_costs_time_and_memory_in_its_length_alone(self, size, cells, mode):
        tracemalloc.start()
        before = time.process_time()
        axis = axis_map(size, cells, mode)
        seconds = time.process_time() - before
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(axis.values) <= size + 2 * cells
        assert peak < 200 * (size + cells)
        assert seconds < 0.5
        assert axis.averages().sum() == pytest.approx(cells)

    def test_a_long_axis_is_not_kept(self):
        kept = _cached_map.cache_info().currsize
        axis_map(LARGE_AXIS + 1, 7, "resize")
        axis_map(7, LARGE_AXIS + 1, "resize")
        assert _cached_map.cache_info().currsize == kept
        assert axis_map(7, 5, "resize") is axis_map(7, 5, "resize")


class TestLongGrids:
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize(
        ("in_grid", "out_grid"),
        [
            ((8192, 1), (4096, 1)),
            ((8191, 1), (4096, 1)),
            ((1, 65536), (1, 256)),
            ((1, 5), (1, 65536)),
        ],
    )
    def test_equal_pytorch_in_well_under_a_second(self, in_grid, out_grid, mode):
        x = float64(rows_of([in_grid]), 2, requires_grad=True)
        before = time.process_time()
        pooled = pool_norm(x, [in_grid], [out_grid], mode=mode)
        (grad,) = torch.autograd.grad(pooled, x, torch.ones_like(pooled))
        assert time.process_time() - before < 0.9
        assert_equal_in_float64(pooled, eager_pool_norm(x, [in_grid], [out_grid], mode))
        assert grad.sum().item() == pytest.approx(2 * rows_of([out_grid]))

    def test_a_longer_side_is_refused(self):
        with pytest.raises(ValueError, match=r"^in_grids\[0\] .*at most 65536, got \(1, 65537\)"):
            pool_norm(float64(1), [(1, 65537)], [(1, 1)])


def test_meta_tensors_give_shapes():
    x = torch.empty(4 * 9, 5, device="meta", dtype=torch.bfloat16)
    pooled = pool_norm(x, [(4, 9)], [(2, 3)], weight=torch.empty(5, device="meta"))
    assert (pooled.shape, pooled.dtype, pooled.device.type) == ((6, 5), torch.bfloat16, "meta")


class TestCallOrder:
    """A call and its caches do not change a later one. Its grids occur in no other test."""

    def test_inference_mode_first_then_training(self):
        x = float64(37 * 31)
        with torch.inference_mode():
            expected = pool_norm(x, [(37, 31)], [(5, 6)]).clone()
        actual = pool_norm(x.requires_grad_(), [(37, 31)], [(5, 6)])
        actual.sum().backward()
        assert torch.equal(actual.detach(), expected)

    def test_fake_tensors_first_then_real_ones(self):
        x = float64(43 * 47)
        with FakeTensorMode():
            assert pool_norm(torch.empty(43 * 47, 3), [(43, 47)], [(5, 6)]).shape == (30, 3)
        assert_equal_in_float64(
            pool_norm(x, [(43, 47)], [(5, 6)]), eager_pool_norm(x, [(43, 47)], [(5, 6)])
        )

    def test_real_tensors_first_then_fake_ones(self):
        pool_norm(float64(53 * 59), [(53, 59)], [(5, 6)])
        with FakeTensorMode():
            assert pool_norm(torch.empty(53 * 59, 3), [(53, 59)], [(5, 6)]).shape == (30, 3)


class TestPrecision:
    """R1: not further from float64 than 1.2 times PyTorch's own ops in the same dtype."""

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("has_norm", [False, True])
    def test_forward_and_backward(self, dtype, mode, has_norm):
        inputs = {"x": torch.randn(rows_of(IN_GRIDS), 96, dtype=dtype)}
        if has_norm:
            inputs |= zip(NORM, torch.randn(2, 96, dtype=dtype), strict=True)
        gradient = torch.randn(rows_of(OUT_GRIDS), 96, dtype=dtype)
        assert_not_less_exact(*ours_peer_and_truth(inputs, gradient, IN_GRIDS, OUT_GRIDS, mode))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_rounds_only_once(self, dtype):
        x = torch.randn(rows_of(IN_GRIDS), 24, dtype=dtype)
        weight, bias = torch.randn(2, 24)
        actual = pool_norm(x, IN_GRIDS, OUT_GRIDS, weight=weight, bias=bias)
        truth = eager_pool_norm(
            x.double(), IN_GRIDS, OUT_GRIDS, weight=weight.double(), bias=bias.double()
        ).to(dtype)
        # A float32 result may land on the other side of a rounding boundary now and then.
        assert (actual != truth).double().mean() < 0.01


class TestGradients:
    IN, OUT = [(2, 3), (2, 2)], [(3, 2), (1, 2)]

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize(
        "wanted", [flags for flags in product([False, True], repeat=3) if any(flags)]
    )
    def test_gradcheck_for_any_subset_of_inputs(self, wanted, mode):
        inputs = [float64(10), *float64(2)]
        for tensor, flag in zip(inputs, wanted, strict=True):
            tensor.requires_grad_(flag)

        def op(x, weight, bias):
            return pool_norm(x, self.IN, self.OUT, mode=mode, weight=weight, bias=bias, eps=0.1)

        assert torch.autograd.gradcheck(op, inputs, fast_mode=True)
        op(*inputs).sum().backward()
        assert [tensor.grad is not None for tensor in inputs] == list(wanted)

    @pytest.mark.parametrize("mode", MODES)
    def test_gradcheck_without_norm_or_without_bias(self, mode):
        x, weight = float64(10, requires_grad=True), float64(1)[0].requires_grad_()
        assert torch.autograd.gradcheck(lambda x: pool_norm(x, self.IN, self.OUT, mode=mode), [x])
        assert torch.autograd.gradcheck(
            lambda x, weight: pool_norm(x, self.IN, self.OUT, mode=mode, weight=weight), [x, weight]
        )

    def test_no_graph_where_nothing_requires_grad(self):
        assert not pool_norm(float64(10), self.IN, self.OUT).requires_grad

    def test_expanded_gradient_equals_a_dense_one(self):
        x, weight = float64(10, requires_grad=True), float64(1)[0].requires_grad_()
        out = pool_norm(x, self.IN, self.OUT, weight=weight)
        expanded = torch.tensor(0.5, dtype=torch.float64).expand(out.shape)
        actual = torch.autograd.grad(out, [x, weight], expanded, retain_graph=True)
        dense = torch.autograd.grad(out, [x, weight], expanded.contiguous())
        for got, expected in zip(actual, dense, strict=True):
            assert_equal_in_float64(got, expected)

    def test_inputs_and_incoming_gradient_are_not_written(self):
        tensors = [float64(10, requires_grad=True), *float64(2), float64(8)]
        before = [tensor.detach().clone() for tensor in tensors]
        x, weight, bias, gradient = tensors
        out = pool_norm(x, self.IN, self.OUT, weight=weight, bias=bias)
        first = torch.autograd.grad(out, x, gradient, retain_graph=True)[0]
        second = torch.autograd.grad(out, x, gradient)[0]
        assert torch.equal(first, second)
        for tensor, copy in zip(tensors, before, strict=True):
            assert torch.equal(tensor, copy)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
    def test_forward_and_backward_repeat_bitwise(self, dtype):
        x = torch.randn(rows_of(IN_GRIDS), 33, dtype=dtype, requires_grad=True)
        weight = torch.randn(33, requires_grad=True)

        def run():
            out = pool_norm(x, IN_GRIDS, OUT_GRIDS, weight=weight)
            return out, *torch.autograd.grad(out.float().square().sum(), [x, weight])

        for first, second in zip(run(), run(), strict=True):
            assert torch.equal(first, second)


class TestLayouts:
    @pytest.mark.parametrize(
        "lay_out",
        [
            pytest.param(lambda x: torch.cat([x, x], 1)[:, : x.shape[1]], id="row-strided"),
            pytest.param(lambda x: x.repeat_interleave(2, 0)[::2], id="every-other-row"),
            pytest.param(lambda x: x.T.contiguous().T, id="transposed"),
            pytest.param(lambda x: F.pad(x.flatten(), (1, 0))[1:].view_as(x), id="unaligned"),
        ],
    )
    @pytest.mark.parametrize("mode", MODES)
    def test_any_memory_layout_gives_the_same(self, lay_out, mode):
        x = float64(rows_of(IN_GRIDS), 5)
        laid_out = lay_out(x)
        assert torch.equal(laid_out, x)
        weight = float64(5, 2)[:, 1]  # strided as well
        actual = pool_norm(laid_out, IN_GRIDS, OUT_GRIDS, mode=mode, weight=weight)
        assert_equal_in_float64(actual, eager_pool_norm(x, IN_GRIDS, OUT_GRIDS, mode, weight))

    def test_expanded_rows(self):
        row = float64(1, 5)
        actual = pool_norm(row.expand(35, 5), [(5, 7)], [(2, 3)])
        assert_equal_in_float64(actual, row.expand(6, 5))

    def test_grids_may_be_lists_tuples_and_torch_sizes(self):
        x = float64(35)
        expected = pool_norm(x, [(5, 7)], [(2, 3)])
        assert torch.equal(pool_norm(x, ([5, 7],), (torch.Size([2, 3]),)), expected)


class TestDtypes:
    @pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
    @pytest.mark.parametrize("norm_dtype", [*DTYPES, torch.float64], ids=str)
    def test_output_has_the_dtype_of_x_and_gradients_that_of_their_tensor(self, dtype, norm_dtype):
        x = torch.randn(35, 4, dtype=dtype, requires_grad=True)
        weight = torch.ones(4, dtype=norm_dtype, requires_grad=True)
        out = pool_norm(x, [(5, 7)], [(2, 3)], weight=weight)
        assert out.dtype == dtype
        out.sum().backward()
        assert (x.grad.dtype, weight.grad.dtype) == (dtype, norm_dtype)

    @pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
    def test_autocast_changes_nothing(self, dtype):
        x = torch.randn(35, 4, dtype=dtype)
        weight = torch.randn(4)
        expected = pool_norm(x, [(5, 7)], [(2, 3)], weight=weight)
        with torch.autocast("cpu", torch.bfloat16):
            actual = pool_norm(x, [(5, 7)], [(2, 3)], weight=weight)
        assert actual.dtype == dtype
        assert torch.equal(actual, expected)


class TestEmpty:
    @pytest.mark.parametrize("mode", MODES)
    def test_no_images(self, mode):
        x = torch.empty(0, 4, requires_grad=True)
        weight, bias = (torch.ones(4, requires_grad=True) for _ in range(2))
        out = pool_norm(x, [], [], mode=mode, weight=weight, bias=bias)
        assert (out.shape, out.dtype) == ((0, 4), x.dtype)
        out.sum().backward()
        assert x.grad.shape == (0, 4)
        assert torch.equal(weight.grad, torch.zeros(4))
        assert torch.equal(bias.grad, torch.zeros(4))


def call(**changes):
    """A call that works, but for ``changes``."""
    arguments = {
        "x": torch.randn(35, 4),
        "in_grids": [(5, 7)],
        "out_grids": [(2, 3)],
        "weight": torch.ones(4),
        "bias": torch.zeros(4),
        **changes,
    }
    return pool_norm(
        arguments.pop("x"), arguments.pop("in_grids"), arguments.pop("out_grids"), **arguments
    )


class TestMisuse:
    def test_the_unchanged_call_works(self):
        assert call().shape == (6, 4)

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"x": [[1.0]]}, TypeError, r"^x must be a torch\.Tensor, got list"),
            ({"x": torch.randn(1, 35, 4)}, ValueError, r"^x .*2 dim.*\(1, 35, 4\)"),
            ({"x": torch.randn(35)}, ValueError, r"^x .*2 dim.*\(35,\)"),
            ({"x": torch.ones(35, 4).int()}, TypeError, r"^x .*float.*torch\.int32"),
            ({"x": torch.ones(35, 4).cfloat()}, TypeError, r"^x .*float.*torch\.complex64"),
            ({"x": torch.randn(36, 4)}, ValueError, r"in_grids.* 35 .*36"),
            ({"in_grids": [(5, 6)]}, ValueError, r"in_grids.* 30 .*35"),
            ({"in_grids": [], "out_grids": []}, ValueError, r"in_grids.* 0 .*35"),
            ({"out_grids": [(2, 3)] * 3}, ValueError, r"in_grids and out_grids.* 1 and 3"),
            ({"in_grids": [(5, 5), (2, 5)]}, ValueError, r"in_grids and out_grids.* 2 and 1"),
            ({"in_grids": [(0, 7)]}, ValueError, r"^in_grids\[0\].*at least 1.*\(0, 7\)"),
            ({"out_grids": [(2, 0)]}, ValueError, r"^out_grids\[0\].*at least 1.*\(2, 0\)"),
            ({"out_grids": [(-2, -3)]}, ValueError, r"^out_grids\[0\].*at least 1.*\(-2, -3\)"),
            ({"in_grids": [(True, 35)]}, TypeError, r"^in_grids\[0\].*\(True, 35\)"),
            ({"in_grids": [(5.0, 7)]}, TypeError, r"^in_grids\[0\].*\(5\.0, 7\)"),
            ({"out_grids": [("2", 3)]}, TypeError, r"^out_grids\[0\].*\('2', 3\)"),
            ({"out_grids": ["23"]}, TypeError, r"^out_grids\[0\].*'23'"),
            ({"out_grids": [(2, 3, 1)]}, TypeError, r"^out_grids\[0\].*\(2, 3, 1\)"),
            ({"out_grids": [6]}, TypeError, r"^out_grids\[0\].*pair.*6"),
            ({"in_grids": (5, 7)}, TypeError, r"^in_grids\[0\].*pair.*5"),
            ({"in_grids": torch.tensor([[5, 7]])}, TypeError, r"^in_grids .*sequence.*Tensor"),
            ({"out_grids": None}, TypeError, r"^out_grids .*sequence.*NoneType"),
            ({"out_grids": [(torch.tensor(2), 3)]}, TypeError, r"^out_grids\[0\].*tensor\(2\)"),
            ({"mode": "area"}, ValueError, r"^mode .*adaptive, resize.*'area'"),
            ({"mode": None}, ValueError, r"^mode .*adaptive, resize.*None"),
            ({"eps": 0.0}, ValueError, r"^eps .*positive.*0\.0"),
            ({"eps": -1e-5}, ValueError, r"^eps .*positive.*-1e-05"),
            ({"eps": float("inf")}, ValueError, r"^eps .*finite.*inf"),
            ({"eps": float("nan")}, ValueError, r"^eps .*nan"),
            ({"eps": "1e-5"}, TypeError, r"^eps .*float.*'1e-5'"),
            ({"eps": True}, TypeError, r"^eps .*float.*True"),
            ({"weight": None}, ValueError, r"^bias needs weight"),
            ({"weight": torch.ones(5)}, ValueError, r"^weight .*\(4,\).*\(5,\)"),
            ({"bias": torch.ones(5)}, ValueError, r"^bias .*\(4,\).*\(5,\)"),
            ({"weight": torch.ones(1, 4)}, ValueError, r"^weight .*\(4,\).*\(1, 4\)"),
            ({"weight": [1.0] * 4}, TypeError, r"^weight must be a torch\.Tensor, got list"),
            ({"bias": 0.0}, TypeError, r"^bias must be a torch\.Tensor, got float"),
            ({"weight": torch.ones(4).long()}, TypeError, r"^weight .*float.*torch\.int64"),
            ({"bias": torch.ones(4).bool()}, TypeError, r"^bias .*float.*torch\.bool"),
            ({"weight": torch.ones(4, device="meta")}, ValueError, r"^weight .*x, cpu.*meta"),
        ],
        ids=lambda value: None if isinstance(value, type) else str(value)[:40],
    )
    def test_says_what_is_wrong(self, changes, error, message):
        with pytest.raises(error, match=message):
            call(**changes)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "dtype", [pytest.param(dtype, marks=pytest.mark.gpu, id=str(dtype)) for dtype in DTYPES]
)
def test_cuda_is_as_close_to_float64_as_eager_cuda(dtype, mode):
    in_grids, out_grids = [(27, 27)] * 4, [(8, 8), (12, 12), (16, 16), (8, 8)]
    shapes = {"x": (4 * 729, 1152), **dict.fromkeys(NORM, (1152,))}
    inputs = {name: torch.randn(shape, dtype=dtype).cuda() for name, shape in shapes.items()}
    gradient = torch.randn(rows_of(out_grids), 1152, dtype=dtype).cuda()
    assert_not_less_exact(*ours_peer_and_truth(inputs, gradient, in_grids, out_grids, mode))
