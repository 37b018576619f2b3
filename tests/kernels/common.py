"""PyTorch's own ops to compare with, and the errors that are allowed."""

from __future__ import annotations

import os
from itertools import accumulate, product
from math import ceil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.selection import ALL
from tokenflex_kernels.pool_norm.axis_weights import MODES as MODES

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Of every file of kernel tests.
ON_TRITON = pytest.mark.usefixtures("device", "kernel_environment")
SAVES = ("preactivation", "input")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NORM = ("weight", "bias")
GATED = ("gate_weight", "up_weight", "gate_bias", "up_bias")
PARAMETERS = (
    "norm_weight",
    "norm_bias",
    "gate_weight",
    "gate_bias",
    "up_weight",
    "up_bias",
    "down_weight",
    "down_bias",
)
# Square, non-square, prime, upsampled, single-cell and single-patch images side by side.
IN_GRIDS = [(5, 4), (1, 1), (3, 4), (3, 4), (2, 1)]
OUT_GRIDS = [(2, 3), (1, 1), (2, 2), (2, 2), (3, 2)]
# Enough to show overlapping windows and more cells than patches, where each second counts.
FEW_IN_GRIDS, FEW_OUT_GRIDS = [(3, 4), (2, 2)], [(2, 2), (3, 1)]
# Vectors whose elements do not lie next to each other.
SPREADS = [
    pytest.param(lambda vector: vector.repeat_interleave(2)[::2], id="every-other"),
    pytest.param(lambda vector: torch.stack([vector, vector + 1], 1)[:, 0], id="column"),
    pytest.param(lambda vector: vector[:1].expand(len(vector)), id="expanded"),
]


def sampled(number, *axes):
    """Return combinations of a value of each axis for ``parametrize``; of one axis, its values.

    They are all on a GPU and in ``make test-release``. Triton interprets a kernel in the time of
    a thousand launches, so there are ``number`` of them then; a value of the first axis meets
    others of the rest at each turn.
    """
    if len(axes) == 1:
        return [*axes[0]][: None if ALL or not INTERPRETED else number]
    if ALL or not INTERPRETED:
        return [*product(*axes)]
    # Two thirds of them, but each value of the first axis.
    number = max(min(number, len(axes[0])), -(-2 * number // 3))
    turns = [divmod(i, len(axes[0])) for i in range(number)]
    return [
        tuple(axis[(step + place * turn) % len(axis)] for place, axis in enumerate(axes))
        for turn, step in turns
    ]


def rows_of(grids) -> int:
    return sum(height * width for height, width in grids)


def pool_image(image, out_grid, mode):
    """[1, C, H, W] -> [1, C, h, w] by PyTorch's own pooling."""
    if mode == "adaptive":
        return F.adaptive_avg_pool2d(image, out_grid)
    windows = tuple(ceil(image.shape[2 + axis] / out_grid[axis]) for axis in (0, 1))
    multiple = tuple(window * cells for window, cells in zip(windows, out_grid, strict=True))
    if multiple != tuple(image.shape[2:]):
        image = F.interpolate(image, size=multiple, mode="bilinear", align_corners=True)
    return F.avg_pool2d(image, windows)


def dense_map(axis, size):
    """The weights of an axis map [cells, size], zeros and all, before division."""
    matrix = np.zeros((len(axis.first), size))
    for row, first, count, start in zip(matrix, axis.first, axis.counts, axis.starts, strict=True):
        row[first : first + count] = axis.values[start : start + count]
    return matrix


def windows_of(in_grid, out_grid, mode):
    """Return whether each cell sees each patch, bool [h * w, H * W], by PyTorch's own weights."""
    patches = in_grid[0] * in_grid[1]
    image = torch.eye(patches, dtype=torch.float64).reshape(1, patches, *in_grid)
    return pool_image(image, out_grid, mode).flatten(2)[0].T > 1e-9


def eager_pool_norm(x, in_grids, out_grids, mode="adaptive", weight=None, bias=None, eps=1e-5):
    """In float64 the truth, in the dtype of ``x`` the peer to match."""
    ends = accumulate(height * width for height, width in in_grids)
    pooled = []
    for (height, width), out_grid, end in zip(in_grids, out_grids, ends, strict=True):
        rows = x[end - height * width : end]
        image = rows.reshape(1, height, width, -1).permute(0, 3, 1, 2)
        pooled.append(pool_image(image, out_grid, mode).flatten(2)[0].T)
    pooled = torch.cat(pooled)
    return pooled if weight is None else F.layer_norm(pooled, (x.shape[1],), weight, bias, eps)


def eager_swiglu(x, gate_weight, up_weight, gate_bias=None, up_bias=None):
    return F.silu(F.linear(x, gate_weight, gate_bias)) * F.linear(x, up_weight, up_bias)


def eager_project(x, in_grids, out_grids, *, mode="adaptive", eps=1e-5, save=None, **parameters):
    p = {name: parameters.get(name) for name in PARAMETERS}
    tokens = eager_pool_norm(x, in_grids, out_grids, mode, p["norm_weight"], p["norm_bias"], eps)
    product = eager_swiglu(tokens, p["gate_weight"], p["up_weight"], p["gate_bias"], p["up_bias"])
    return F.linear(product, p["down_weight"], p["down_bias"])


def parameters_of(width, hidden, text, dtype=torch.float32, device="cpu", missing=()):
    """Random weights of the projector by name; products of unit scale."""
    shapes = [(width,)] * 2 + [(hidden, width), (hidden,)] * 2 + [(text, hidden), (text,)]
    return {
        name: None
        if name in missing
        else (torch.randn(shape) / (shape[-1] ** 0.5 if len(shape) > 1 else 1)).to(device, dtype)
        for name, shape in zip(PARAMETERS, shapes, strict=True)
    }


def gated_of(width, hidden, dtype=torch.float32, device="cpu", missing=()):
    """Random weights of the gated unit, in the order of ``GATED``."""
    parameters = parameters_of(width, hidden, 1, dtype, device, missing)
    return [parameters[name] for name in GATED]


def run(op, inputs, gradient, wanted=None):
    """The output of ``op(**inputs)``, and the gradients by name.

    Args:
        op: takes the inputs by name.
        inputs: tensors or None.
        gradient: of the output.
        wanted: names that require grad; all tensors if None.
    """
    wanted = [name for name in inputs if inputs[name] is not None] if wanted is None else wanted
    leaves = {
        name: tensor.detach().requires_grad_() if name in wanted else tensor
        for name, tensor in inputs.items()
    }
    out = op(**leaves)
    gradients = torch.autograd.grad(out, [leaves[name] for name in wanted], gradient)
    return {"out": out.detach(), **dict(zip(wanted, gradients, strict=True))}


def wide(inputs):
    """The same numbers in float64, on the CPU: what the truth is computed from."""
    return {
        name: None if tensor is None else tensor.detach().cpu().double()
        for name, tensor in inputs.items()
    }


def rms(tensor) -> float:
    return tensor.detach().cpu().double().square().mean().sqrt().item()


def rms_error(actual, truth) -> float:
    return rms(actual.detach().cpu().double() - truth)


def assert_equal_in_float64(actual, expected, tolerance=1e-12):
    assert actual.dtype == expected.dtype == torch.float64
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def assert_not_less_exact(ours, peer, truth):
    """R1 to the letter, where no rounding has to be allowed; results by name."""
    assert ours.keys() == peer.keys() == truth.keys()
    for name, expected in truth.items():
        assert ours[name].dtype == peer[name].dtype, name
        assert ours[name].device == peer[name].device, name
        assert rms_error(ours[name], expected) <= 1.2 * rms_error(peer[name], expected), name


def assert_as_close_as_eager(ours, peer, truth, *, ulps=4):
    """R1: error against float64 at most 1.2 times that of eager PyTorch in the same dtypes.

    Where eager happens to be closer than rounding the truth to the dtype of the result, that
    rounding is what counts: no result of the dtype is closer on average. And where a result is a
    few numbers, the order of a float32 sum alone decides its last bits: ``ulps`` of float32 are
    always allowed.
    """
    assert ours.keys() == peer.keys() == truth.keys()
    for name, expected in truth.items():
        result, allowed = ours[name], peer[name]
        assert result.shape == expected.shape, name
        assert result.dtype == allowed.dtype, name
        assert result.device == allowed.device, name
        assert bool(result.isfinite().all()), name
        if expected.numel() == 0:
            continue
        rounding = rms(expected.to(result.dtype).double() - expected)
        error = rms_error(result, expected)
        last_bits = ulps * torch.finfo(torch.float32).eps * rms(expected)
        limit = max(1.2 * max(rms_error(allowed, expected), rounding), last_bits)
        assert error <= limit, f"{name}: error {error:.3g}, allowed {limit:.3g}"


def check(op, peer, inputs, gradient, wanted=None, *, ulps=4):
    """Values and gradients of ``op`` on ``inputs``, as close to float64 as those of ``peer``.

    ``inputs`` and ``gradient`` may be lists of several draws: errors are then taken over all,
    since that of a few numbers is luck.
    """
    draws = [(inputs, gradient)] if isinstance(inputs, dict) else zip(inputs, gradient, strict=True)
    results = [
        (
            run(op, values, grad, wanted),
            run(peer, values, grad, wanted),
            run(peer, wide(values), grad.detach().cpu().double(), wanted),
        )
        for values, grad in draws
    ]
    assert_as_close_as_eager(*map(together, zip(*results, strict=True)), ulps=ulps)
    return results[0][0]


def together(results):
    """The results of several draws as one."""
    return {name: torch.stack([result[name] for result in results]) for name in results[0]}
