"""The stages of `pool_norm`: how each runs its kernel, registered as torch.library ops.

On host memory the extension runs them (``native``), and Triton where it interprets its kernels.
A stage computes only the results that are wanted, and trusts its arguments. The grids of the batch
are a small tensor on the host (``PoolPlan.grids``), beside the number of rows that a compiler must
know, so no length is ever read back from the device.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

import torch

from tokenflex_kernels.backend import select_backend
from tokenflex_kernels.launch import cdiv, launch, register_limit
from tokenflex_kernels.launch_configs import RowConfig, config_for
from tokenflex_kernels.layout import neighbours
from tokenflex_kernels.library import define_stage
from tokenflex_kernels.pool_norm import native
from tokenflex_kernels.pool_norm.native import sum_dtype
from tokenflex_kernels.pool_norm.tables import pooling_tables

Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

MAX_WIDTH = 8192  # a program of the Triton kernels holds whole rows in registers
MAX_FEATURES = 50  # of a row in the registers of a thread, at the limits of registers in the table


def beyond_triton(x: torch.Tensor) -> str | None:
    """Return the property of ``x`` that the Triton kernels are not made for, or None."""
    if x.dtype == torch.float64:
        return "float64"
    if x.shape[1] > MAX_WIDTH:
        return f"rows of more than {MAX_WIDTH} features"
    return None


def _is_native(rows: torch.Tensor) -> bool:
    if rows.device.type != "cpu":
        return False
    return select_backend("pool_norm", "cpu", beyond_triton=beyond_triton(rows)) != "triton"


@cache
def _kernels() -> ModuleType:
    """Import the kernels with the first launch, because that imports Triton."""
    from tokenflex_kernels.pool_norm import kernels

    return kernels


def launch_pool_norm_forward(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    grids: torch.Tensor,
    cells: int,
    mode: str,
    eps: float,
    dtype: torch.dtype,
    save: bool,
) -> Triple:
    """Pool and normalise.

    Args:
        x: [patches, C], any row stride.
        weight, bias: [C] or None; without weight there is no normalisation and nothing to save.
        grids, cells, mode: of the batch.
        dtype: of the result.
        save: whether to keep what backward reads.

    Returns:
        out [cells, C]; and, saved or else of no rows, normalised [cells, C] in ``dtype`` and
        inverse_std [cells], float32 (float64 where ``dtype`` is).
    """
    out, normalised, inverse_std = results = _forward_results(x, weight, cells, dtype, save)
    if len(grids) == 0 or x.shape[1] == 0:
        return results
    if _is_native(x):
        native.pool_norm_forward(x, weight, bias, grids, mode, eps, *results)
        return results
    config: RowConfig = config_for("pool_norm_forward", x, cells)
    tables = pooling_tables(grids, mode, x.device)
    x, weight, bias = neighbours(x), _vector(weight), _vector(bias)
    programs_per_image = max(h * cdiv(w, config.columns) for h, w in tables.out_grids)
    launch(
        _kernels().pool_norm_forward_kernel,
        tables.num_images * programs_per_image,
        x,
        *(x, weight, bias, out, normalised, inverse_std),
        *(tables.images, tables.axes, tables.weights),
        *(x.stride(0), programs_per_image, config.columns),
        EPS=eps,
        WEIGHTED=tables.weighted,
        NORM=weight is not None,
        BIAS=bias is not None,
        SAVE=len(normalised) > 0,
        UNROLL=config.unroll,
        **_row_options(config, x.shape[1]),
    )
    return results


def _forward_results(
    x: torch.Tensor, weight: torch.Tensor | None, cells: int, dtype: torch.dtype, save: bool
) -> Triple:
    saved = cells if save and weight is not None else 0
    return (
        x.new_empty(cells, x.shape[1], dtype=dtype),
        x.new_empty(saved, x.shape[1], dtype=dtype),
        x.new_empty(saved, dtype=sum_dtype(dtype)),
    )


def launch_pool_norm_backward(
    grad: torch.Tensor,
    normalised: torch.Tensor,
    inverse_std: torch.Tensor,
    weight: torch.Tensor | None,
    grids: torch.Tensor,
    patches: int,
    mode: str,
    dtype: torch.dtype | None,
    grad_weight: bool,
    grad_bias: bool,
) -> Triple:
    """Compute the gradients of x, weight and bias.

    Args:
        grad: [cells, C], any strides.
        normalised, inverse_std: as forward saved them; of no rows where ``weight`` is None.
        weight, grids, mode: as in forward.
        patches: rows of x.
        dtype: of the gradient of x; None if x needs none.
        grad_weight, grad_bias: whether these are wanted.

    Returns:
        The gradients of x [patches, C] in ``dtype``, and of weight and bias [C], float32 (float64
        where ``grad`` is); those that are not wanted have no elements.
    """
    if len(grids) == 0 or grad.shape[1] == 0:
        results = _backward_shapes(
            *(grad, normalised, inverse_std, weight, grids, patches, mode, dtype),
            *(grad_weight, grad_bias),
        )
        return results[0].zero_(), results[1].zero_(), results[2].zero_()
    normalised = normalised.contiguous()  # a hook of saved tensors may have changed strides
    if _is_native(grad):
        return native.pool_norm_backward(
            *(grad, normalised, inverse_std, weight, grids, patches, mode, dtype),
            *(grad_weight, grad_bias),
        )
    grad, weight = neighbours(grad), _vector(weight)
    needs_means = dtype is not None and weight is not None
    means, weight_sum, bias_sum = launch_norm_gradient(
        *(grad, normalised, weight, needs_means, grad_weight, grad_bias)
    )
    if dtype is None:
        return grad.new_empty(0), weight_sum, bias_sum
    grad_x = launch_unpool(
        *(grad, normalised, inverse_std, means, weight, grids, patches, mode, dtype)
    )
    return grad_x, weight_sum, bias_sum


def _backward_shapes(grad: torch.Tensor, *arguments: Any) -> Triple:
    _, _, _, _, patches, _, dtype, grad_weight, grad_bias = arguments
    width = grad.shape[1]
    return (
        grad.new_empty(0) if dtype is None else grad.new_empty(patches, width, dtype=dtype),
        grad.new_empty(width if grad_weight else 0, dtype=sum_dtype(grad.dtype)),
        grad.new_empty(width if grad_bias else 0, dtype=sum_dtype(grad.dtype)),
    )


def launch_norm_gradient(
    grad: torch.Tensor,
    normalised: torch.Tensor,
    weight: torch.Tensor | None,
    means: bool,
    grad_weight: bool,
    grad_bias: bool,
) -> Triple:
    """Reduce the gradient of each cell, reading each row of ``grad`` and ``normalised`` once.

    Args:
        grad, normalised, weight: as of ``launch_pool_norm_backward``, features side by side.
        means, grad_weight, grad_bias: the results that are wanted; without any, nothing runs.

    Returns:
        float32: for each cell the means of grad * weight and of that times normalised, [cells, 2],
        and the gradients of weight and bias [C]; those that are not wanted have no elements.
    """

    def empty(*shape: int) -> torch.Tensor:
        return grad.new_empty(shape, dtype=torch.float32)

    if not (means or grad_weight or grad_bias):
        return empty(0), empty(0), empty(0)
    if _is_native(grad):
        return native.norm_gradient(grad, normalised, weight, means, grad_weight, grad_bias)
    cells, width = grad.shape
    config: RowConfig = config_for("norm_gradient", grad, cells)
    programs = cdiv(cells, config.rows)
    cell_means = empty(cells, 2) if means else empty(0)
    weight_sums = empty(programs, width) if grad_weight else empty(0)
    bias_sums = empty(programs, width) if grad_bias else empty(0)
    launch(
        _kernels().norm_gradient_kernel,
        programs,
        grad,
        *(grad, normalised, weight, cell_means, weight_sums, bias_sums),
        *(grad.stride(0), cells, config.rows),
        MEANS=means,
        GRAD_WEIGHT=grad_weight,
        GRAD_BIAS=grad_bias,
        UNROLL=config.unroll,
        **_row_options(config, width),
    )
    return (
        cell_means,
        weight_sums.sum(0) if grad_weight else weight_sums,
        bias_sums.sum(0) if grad_bias else bias_sums,
    )


def launch_unpool(
    grad: torch.Tensor,
    normalised: torch.Tensor,
    inverse_std: torch.Tensor,
    means: torch.Tensor,
    weight: torch.Tensor | None,
    grids: torch.Tensor,
    patches: int,
    mode: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return the gradient of x, [patches, C] in ``dtype``.

    The arguments are those of ``launch_pool_norm_backward``, and the ``means`` of
    ``launch_norm_gradient`` where there is a norm.
    """
    if _is_native(grad):
        batch = grids, patches, mode, dtype, False, False
        return native.pool_norm_backward(grad, normalised, inverse_std, weight, *batch)[0]
    width = grad.shape[1]
    config: RowConfig = config_for("pool_norm_backward", grad, patches)
    tables = pooling_tables(grids, mode, grad.device)
    grad_x = grad.new_empty(patches, width, dtype=dtype)
    channels = min(config.channels, _power_of_2(width))
    # As many programs for each image as the image that needs most.
    tiles = max(cdiv(h, config.rows) * cdiv(w, config.columns) for h, w in tables.in_grids)
    programs_per_image = tiles * cdiv(width, channels)
    launch(
        _kernels().pool_norm_backward_kernel,
        tables.num_images * programs_per_image,
        grad,
        *(grad, normalised, inverse_std, means, weight, grad_x),
        *(tables.images, tables.axes, tables.weights),
        *(grad.stride(0), programs_per_image, config.rows),
        WEIGHTED=tables.weighted,
        NORM=weight is not None,
        WIDTH=width,
        COLUMNS=config.columns,
        CHANNELS=channels,
        num_warps=config.num_warps,
        **register_limit(_registers(config, width, config.num_warps)),
    )
    return grad_x


def launch_scale_shift(
    normalised: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Return normalised * weight + bias, [cells, C]: LayerNorm's result from what it saved."""
    normalised = normalised.contiguous()  # a hook of saved tensors may have changed strides
    weight, bias = neighbours(weight), _vector(bias)
    rows, width = normalised.shape
    out = torch.empty_like(normalised)
    if _is_native(normalised):
        native.scale_shift(normalised, weight, bias, out)
        return out
    config: RowConfig = config_for("scale_shift", normalised, rows)
    launch(
        _kernels().scale_shift_kernel,
        cdiv(rows, config.rows) if width > 0 else 0,
        normalised,
        *(normalised, weight, bias, out, rows, config.rows),
        BIAS=bias is not None,
        **_row_options(config, width),
    )
    return out


def _vector(parameter: torch.Tensor | None) -> torch.Tensor | None:
    return None if parameter is None else neighbours(parameter)


def _row_options(config: RowConfig, width: int) -> dict[str, int | None]:
    """Return the options for rows of ``width`` in registers, whose warps grow with the width.

    Never so many warps that their registers are more than a multiprocessor has.
    """
    head = _power_of_2(cdiv(width, 2))  # the greatest power of 2 below the width
    warps = max(1, config.num_warps * _power_of_2(width) // 2048)
    most = 65536 // (32 * config.max_registers)
    warps = min(warps, 1 << (most.bit_length() - 1))
    return {
        "WIDTH": width,
        "HEAD": head,
        "TAIL": _power_of_2(max(1, width - head)),
        "num_warps": warps,
        **register_limit(_registers(config, width, warps)),
    }


def _power_of_2(number: int) -> int:
    """Return the least power of 2 that is not below ``number``, which is positive."""
    return 1 << (number - 1).bit_length()


def _registers(config: RowConfig, width: int, warps: int) -> int:
    """Return the most registers of a thread.

    Widths that are no multiple of 16 are read element by element: they get all registers, and so do
    rows of more features a thread than the configs were made for.
    """
    is_usual = width % 16 == 0 and width <= MAX_FEATURES * 32 * warps
    return config.max_registers if is_usual else min(255, 65536 // (32 * warps))


pool_norm_forward = define_stage(
    "pool_norm_forward",
    lambda x, weight, bias, grids, cells, mode, eps, dtype, save: _forward_results(
        x, weight, cells, dtype, save
    ),
    launch_pool_norm_forward,
)
pool_norm_backward = define_stage("pool_norm_backward", _backward_shapes, launch_pool_norm_backward)
scale_shift = define_stage(
    "scale_shift",
    lambda normalised, weight, bias: torch.empty_like(normalised),
    launch_scale_shift,
)
