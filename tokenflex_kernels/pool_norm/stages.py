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
from tokenflex_kernels.launch import cdiv, launch
from tokenflex_kernels.launch_configs import RowConfig, config_for
from tokenflex_kernels.layout import neighbours
from tokenflex_kernels.library import define_stage
from tokenflex_kernels.pool_norm import native
from tokenflex_kernels.pool_norm.native import sum_dtype
from tokenflex_kernels.pool_norm.tables import pooling_tables

Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Sums = tuple[torch.Tensor | None, torch.Tensor | None]

MAX_WIDTH = 8192  # a program of the Triton kernels holds whole rows in registers


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
    width = x.shape[1]
    programs_per_image = max(h * cdiv(w, config.columns) for h, w in tables.out_grids)
    launch(
        _kernels().pool_norm_forward_kernel,
        tables.num_images * programs_per_image,
        x,
        *(x, weight, bias, out, normalised, inverse_std),
        *(tables.images, tables.axes, tables.weights),
        *(x.stride(0), width, programs_per_image),
        EPS=eps,
        WEIGHTED=tables.weighted,
        NORM=weight is not None,
        BIAS=bias is not None,
        SAVE=len(normalised) > 0,
        CELLS=config.columns,
        UNROLL=config.unroll,
        **_row_options(config, width),
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
    if _is_native(grad):
        return native.pool_norm_backward(
            *(grad, normalised, inverse_std, weight, grids, patches, mode, dtype),
            *(grad_weight, grad_bias),
        )
    grad, weight = neighbours(grad), _vector(weight)
    width = grad.shape[1]
    grad_x = grad.new_empty(0) if dtype is None else grad.new_empty(patches, width, dtype=dtype)
    needs_sums = grad_weight or grad_bias
    partials: Sums = (None, None)
    if dtype is not None:
        config: RowConfig = config_for("pool_norm_backward", grad, patches)
        tables = pooling_tables(grids, mode, grad.device)
        # As many programs for each image as the image that needs most.
        programs_per_image = max(
            cdiv(h, config.rows) * cdiv(w, config.columns) for h, w in tables.in_grids
        )
        programs = tables.num_images * programs_per_image
        # Where most places of the programs have no patch, as of one large grid among small ones,
        # a partial sum for each program is more than a kernel of its own needs.
        if needs_sums and programs * config.rows * config.columns <= 4 * patches:
            partials = _partial_sums(grad, programs, grad_weight, grad_bias)
            needs_sums = False
        launch(
            _kernels().pool_norm_backward_kernel,
            programs,
            grad,
            *(grad, normalised, inverse_std, weight, grad_x, *partials),
            *(tables.images, tables.axes, tables.weights),
            *(grad.stride(0), width, programs_per_image),
            WEIGHTED=tables.weighted,
            NORM=weight is not None,
            GRAD_WEIGHT=partials[0] is not None,
            GRAD_BIAS=partials[1] is not None,
            ROWS=config.rows,
            COLUMNS=config.columns,
            **_row_options(config, width),
        )
    if needs_sums:
        partials = _norm_gradient(grad, normalised, grad_weight, grad_bias)
    weight_sum, bias_sum = (
        grad.new_empty(0, dtype=torch.float32) if partial is None else partial.sum(0)
        for partial in partials
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


def _norm_gradient(
    grad: torch.Tensor, normalised: torch.Tensor, grad_weight: bool, grad_bias: bool
) -> Sums:
    """Return the partial sums alone: reads each row of ``grad`` and ``normalised`` once."""
    cells, width = grad.shape
    config: RowConfig = config_for("norm_gradient", grad, cells)
    programs = cdiv(cells, config.rows) if width > 0 else 0
    partials = _partial_sums(grad, programs, grad_weight, grad_bias)
    launch(
        _kernels().norm_gradient_kernel,
        programs,
        grad,
        *(grad, normalised, *partials, grad.stride(0), cells, width),
        GRAD_WEIGHT=grad_weight,
        GRAD_BIAS=grad_bias,
        ROWS=config.rows,
        **_row_options(config, width),
    )
    return partials


def _partial_sums(grad: torch.Tensor, programs: int, grad_weight: bool, grad_bias: bool) -> Sums:
    shape = programs, grad.shape[1]
    return (
        grad.new_empty(shape, dtype=torch.float32) if grad_weight else None,
        grad.new_empty(shape, dtype=torch.float32) if grad_bias else None,
    )


def launch_scale_shift(
    normalised: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Return normalised * weight + bias, [cells, C]: LayerNorm's result from what it saved."""
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
        *(normalised, weight, bias, out, rows, width),
        BIAS=bias is not None,
        ROWS=config.rows,
        **_row_options(config, width),
    )
    return out


def _vector(parameter: torch.Tensor | None) -> torch.Tensor | None:
    return None if parameter is None else neighbours(parameter)


def _row_options(config: RowConfig, width: int) -> dict[str, int]:
    """Return the options for rows of ``width`` in registers, whose warps grow with the width.

    Never so many warps that their registers are more than a multiprocessor has. Widths that are no
    multiple of 16 are read element by element, with an address each: they get all registers.
    """
    block = 1 << (width - 1).bit_length()  # the least power of 2 that is not smaller
    warps = max(1, config.num_warps * block // 2048)
    most = 65536 // (32 * config.max_registers)
    warps = min(warps, 1 << (most.bit_length() - 1))
    registers = config.max_registers if width % 16 == 0 else min(255, 65536 // (32 * warps))
    return {"BLOCK_C": block, "num_warps": warps, "maxnreg": registers}


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
