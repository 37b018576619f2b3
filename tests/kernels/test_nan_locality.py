"""NaN and infinity stay in the cells whose windows hold them, and gradients in the patches."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch._dynamo

from tests.kernels.common import MODES, eager_project, parameters_of, windows_of
from tokenflex_kernels import pool_norm, project_tokens
from tokenflex_kernels.pool_norm import reference

WIDTH, CHANNEL = 4, 2
GRIDS = [
    ((8, 8), (4, 4)),
    ((5, 7), (2, 3)),
    ((9, 1), (4, 1)),
    ((3, 5), (7, 11)),
    ((4, 4), (1, 1)),
    ((2, 9), (5, 4)),
    ((6, 6), (6, 6)),
    ((1, 1), (3, 2)),
]
BAD = [float("nan"), float("inf"), -float("inf")]


@pytest.fixture(params=["automatic", "PyTorch's average", "windows"])
def every_path(request, monkeypatch):
    """By what the CPU runs, and the reference, with PyTorch's own average and as elsewhere."""
    if request.param != "automatic":
        monkeypatch.setenv("TOKENFLEX_BACKEND", "reference")
    if request.param == "windows":

        def by_windows(x, in_grid, out_grid, mode):
            bands = reference.pool_axis(
                x.reshape(-1, in_grid[0], in_grid[1] * x.shape[1]), out_grid[0], mode
            )
            cells = reference.pool_axis(
                bands.reshape(-1, in_grid[1], x.shape[1]), out_grid[1], mode
            )
            return cells.reshape(-1, x.shape[1])

        monkeypatch.setattr(reference, "_pool_alike", by_windows)


def two_images(in_grid, out_grid, mode):
    """`pool_norm` of two images of one grid, of which the second holds nothing bad."""

    def pool(x, **norm):
        return pool_norm(x, [in_grid] * 2, [out_grid] * 2, mode=mode, **norm)

    return pool


def spoilt(rows, expected_rows, channels):
    expected = torch.zeros_like(rows, dtype=torch.bool)
    expected[: len(expected_rows)][expected_rows] = True
    if channels is not None:
        others = torch.arange(rows.shape[1]) != channels
        expected[:, others] = False
    return expected


@pytest.mark.usefixtures("every_path")
class TestPoolNorm:
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize(("in_grid", "out_grid"), GRIDS)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    def test_a_bad_patch_spoils_its_cells(self, in_grid, out_grid, mode, dtype):
        windows = windows_of(in_grid, out_grid, mode)
        pool = two_images(in_grid, out_grid, mode)
        weight = torch.ones(WIDTH, dtype=dtype)
        for patch, value in product(range(windows.shape[1]), BAD):
            x = torch.randn(2 * windows.shape[1], WIDTH, dtype=dtype)
            x[patch, CHANNEL] = value
            pooled = pool(x)
            assert torch.equal(~pooled.isfinite(), spoilt(pooled, windows[:, patch], CHANNEL))
            seen = pooled[: len(windows)][windows[:, patch], CHANNEL]
            torch.testing.assert_close(seen, torch.full_like(seen, value), equal_nan=True)
            normalised = pool(x, weight=weight)
            assert torch.equal(~normalised.isfinite(), spoilt(normalised, windows[:, patch], None))

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize(("in_grid", "out_grid"), GRIDS)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    def test_a_bad_gradient_spoils_its_patches(self, in_grid, out_grid, mode, dtype):
        windows = windows_of(in_grid, out_grid, mode)
        pool = two_images(in_grid, out_grid, mode)
        x = torch.randn(2 * windows.shape[1], WIDTH, dtype=dtype, requires_grad=True)
        outputs = {CHANNEL: pool(x), None: pool(x, weight=torch.ones(WIDTH, dtype=dtype))}
        for cell, value, channel in product(range(len(windows)), BAD, outputs):
            gradient = torch.randn(outputs[channel].shape, dtype=dtype)
            gradient[cell, CHANNEL] = value
            (grad,) = torch.autograd.grad(outputs[channel], x, gradient, retain_graph=True)
            assert torch.equal(~grad.isfinite(), spoilt(grad, windows[cell], channel))

    @pytest.mark.parametrize("mode", MODES)
    def test_a_second_derivative_is_as_local(self, mode):
        windows = windows_of((5, 4), (3, 3), mode)
        x = torch.randn(2 * windows.shape[1], WIDTH, dtype=torch.float64, requires_grad=True)
        pooled = two_images((5, 4), (3, 3), mode)(x)
        gradient = torch.ones_like(pooled, requires_grad=True)
        (grad,) = torch.autograd.grad(pooled, x, gradient, create_graph=True)
        outer = torch.ones_like(grad)
        outer[7, CHANNEL] = torch.nan
        (second,) = torch.autograd.grad(grad, gradient, outer)
        assert torch.equal(~second.isfinite(), spoilt(second, windows[:, 7], CHANNEL))

    @pytest.mark.parametrize("mode", MODES)
    def test_finite_results_are_those_beside_a_bad_patch(self, mode):
        windows = windows_of((5, 7), (2, 3), mode)
        pool = two_images((5, 7), (2, 3), mode)
        x = torch.randn(70, WIDTH)
        clean = pool(x)
        x[0] = torch.nan
        others = torch.cat([~windows[:, 0], torch.ones(len(windows), dtype=torch.bool)])
        assert torch.equal(pool(x)[others], clean[others])


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_in_a_compiled_function_too(mode, compiled):
    windows = windows_of((5, 7), (2, 3), mode)
    pool = two_images((5, 7), (2, 3), mode)
    if compiled:
        torch._dynamo.reset()
        pool = torch.compile(pool, fullgraph=True, dynamic=True, backend="aot_eager")
    x = torch.randn(70, WIDTH)
    x[11, CHANNEL] = torch.nan
    pooled = pool(x.requires_grad_())
    assert torch.equal(~pooled.isfinite(), spoilt(pooled, windows[:, 11], CHANNEL))
    gradient = torch.ones_like(pooled)
    gradient[3, CHANNEL] = torch.inf
    (grad,) = torch.autograd.grad(pooled, x, gradient)
    assert torch.equal(~grad.isfinite(), spoilt(grad, windows[3], CHANNEL))


@pytest.mark.parametrize("save", ["preactivation", "input"])
@pytest.mark.parametrize("mode", MODES)
def test_a_bad_patch_spoils_the_tokens_that_see_it_and_no_others(mode, save):
    grids = [(5, 7)] * 2, [(2, 3)] * 2
    windows = windows_of((5, 7), (2, 3), mode)
    parameters = parameters_of(WIDTH, 6, 5)
    x = torch.randn(70, WIDTH)
    x[11, CHANNEL] = torch.nan
    out = project_tokens(x.requires_grad_(), *grids, mode=mode, save=save, **parameters)
    assert torch.equal(~out.isfinite(), spoilt(out, windows[:, 11], None))
    clean = eager_project(x.detach().nan_to_num(), *grids, mode=mode, **parameters)
    torch.testing.assert_close(out[out.isfinite()], clean[out.isfinite()])

    (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
    neighbours = windows[windows[:, 11]].any(0)
    assert torch.equal(~grad.isfinite(), spoilt(grad, neighbours, None))
