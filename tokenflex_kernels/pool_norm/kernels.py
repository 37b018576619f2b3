"""Pooling and LayerNorm in one pass over the patches, and both backward in one gather.

Maths, for one image with an axis map a direction (``axis_weights``), windows I_i and J_j:

    pooled[i, j] = sum_(r in I_i) sum_(c in J_j) u_i(r) v_j(c) x[r, c] / (d_i e_j)
    normalised = (pooled - mean(pooled)) * inverse_std,   inverse_std = 1 / sqrt(var(pooled) + eps)
    out = normalised * weight + bias

    with g = d out:   d weight = sum g * normalised,   d bias = sum g
    d pooled = inverse_std * (g w - mean(g w) - normalised * mean(g w * normalised))
    d x[r, c] = sum_(i: r in I_i) sum_(j: c in J_j) u_i(r) v_j(c) d pooled[i, j] / (d_i e_j)

Forward normalises the sums of the windows: with S = a * pooled and a the area d_i e_j,

    normalised = (S - mean(S)) / sqrt(var(S) + a^2 eps),   inverse_std = a / sqrt(var(S) + a^2 eps)

Traffic: forward reads every patch once from memory and writes every cell once. A program owns a
few neighbouring cells of one row of cells. It sums each column of their band once and hands the sum
of a column that two windows share from one cell to the next, so a patch is read again, from L2,
only by the row of cells below that shares its row. Backward is the same walk over patches: a
program owns a few neighbouring patches of some rows, and gathers the cells that cover them; each
column of cells is reduced once and kept for the next patch. Every patch is written, covered or not,
so nothing is filled with zeros first and nothing is added atomically.

The gradients of weight and bias come as one partial sum for each program, each cell counted by the
program that owns the first patch of its window; PyTorch adds the partial sums up, in a fixed order.
Where x needs no gradient, or most programs would have no patch, a kernel of their own reads each
row once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokenflex_kernels.pool_norm.tables import IMAGE_FIELDS

_IMAGE_FIELDS = tl.constexpr(IMAGE_FIELDS)

# Batches of every size and shape share one binary: only what belongs to the model specialises it.
_PER_BATCH = ["programs_per_image"]
_TABLES = ["images", "axes", "window_weights"]  # parts of one buffer, aligned as they fall


@triton.jit
def _column_sum(
    x,
    x_stride, first_row, row_step, count,
    weights, in_row, channels,
    WEIGHTED: tl.constexpr, UNROLL: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """sum_k u(k) x[first_row + k row_step], UNROLL loads in flight at once."""
    total = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, count, UNROLL):
        for step in tl.static_range(UNROLL):
            k = start + step
            row = (first_row + k * row_step).to(tl.int64)
            patch = tl.load(x + row * x_stride + channels, mask=in_row & (k < count), other=0.0)
            patch = patch.to(tl.float32)
            if WEIGHTED:
                patch *= tl.load(weights + k, mask=k < count, other=0.0)
            total += patch
    return total


@triton.jit(do_not_specialize=_PER_BATCH, do_not_specialize_on_alignment=_TABLES)
def pool_norm_forward_kernel(
    x, weight, bias, out, normalised, inverse_std, images, axes, window_weights,
    x_stride, width, programs_per_image,
    EPS: tl.constexpr, WEIGHTED: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr,
    SAVE: tl.constexpr, CELLS: tl.constexpr, UNROLL: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    image = images + tl.program_id(0) // programs_per_image * _IMAGE_FIELDS
    part = tl.program_id(0) % programs_per_image
    first_patch = tl.load(image)
    in_w = tl.load(image + 2)
    first_cell = tl.load(image + 3)
    out_h = tl.load(image + 4)
    out_w = tl.load(image + 5)
    windows_w = axes + tl.load(image + 7)
    parts_per_row = tl.cdiv(out_w, CELLS)
    i = part // parts_per_row
    if i >= out_h:  # the images of a batch need different numbers of programs
        return

    window_h = axes + tl.load(image + 6) + i * 4
    first_row = first_patch + tl.load(window_h) * in_w
    rows = tl.load(window_h + 1)
    divisor_h = tl.load(window_h + 2)
    weights_h = window_weights + tl.load(window_h + 3)

    channels = tl.arange(0, BLOCK_C)
    in_row = channels < width
    if NORM:
        scale = tl.load(weight + channels, mask=in_row, other=0.0).to(tl.float32)
        if BIAS:
            shift = tl.load(bias + channels, mask=in_row, other=0.0).to(tl.float32)

    summed = -1  # the column that column_sum holds
    column_sum = tl.zeros((BLOCK_C,), tl.float32)
    first_j = part % parts_per_row * CELLS
    for j in range(first_j, tl.minimum(first_j + CELLS, out_w)):
        window_w = windows_w + j * 4
        first_column = tl.load(window_w)
        columns = tl.load(window_w + 1)
        divisor_w = tl.load(window_w + 2)
        weights_w = window_weights + tl.load(window_w + 3)
        total = tl.zeros((BLOCK_C,), tl.float32)
        for k in range(0, columns):
            c = first_column + k
            if c != summed:
                column_sum = _column_sum(
                    x, x_stride, first_row + c, in_w, rows, weights_h, in_row, channels,
                    WEIGHTED, UNROLL, BLOCK_C,
                )  # fmt: skip
                summed = c
            if WEIGHTED:
                total += column_sum * tl.load(weights_w + k)
            else:
                total += column_sum

        cell = (first_cell + i * out_w + j).to(tl.int64)
        area = (divisor_h * divisor_w).to(tl.float32)
        if NORM:  # of the sums: normalising cancels the area, but for eps
            mean = tl.sum(total, 0) / width
            centred = tl.where(in_row, total - mean, 0.0)
            if out.dtype.element_ty == tl.float32:  # the mean's own rounding shows in float32
                centred = tl.where(in_row, centred - tl.sum(centred, 0) / width, 0.0)
            variance = tl.sum(centred * centred, 0) / width
            inverse = tl.rsqrt(variance + EPS * area * area)
            result = centred * inverse
            if SAVE:
                tl.store(
                    normalised + cell * width + channels,
                    result.to(normalised.dtype.element_ty),
                    mask=in_row,
                )
                tl.store(inverse_std + cell, inverse * area)
            result *= scale
            if BIAS:
                result += shift
        else:  # one exact division, as PyTorch's pooling has it; "/" is approximate in Triton
            result = tl.div_rn(total, area + tl.zeros_like(total))
        tl.store(out + cell * width + channels, result.to(out.dtype.element_ty), mask=in_row)


@triton.jit(do_not_specialize=_PER_BATCH, do_not_specialize_on_alignment=_TABLES)
def pool_norm_backward_kernel(
    grad, normalised, inverse_std, weight, grad_x, partial_weight, partial_bias, images, axes,
    window_weights,
    grad_stride, width, programs_per_image,
    WEIGHTED: tl.constexpr, NORM: tl.constexpr, GRAD_WEIGHT: tl.constexpr, GRAD_BIAS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    image = images + tl.program_id(0) // programs_per_image * _IMAGE_FIELDS
    part = tl.program_id(0) % programs_per_image
    first_patch = tl.load(image)
    in_h = tl.load(image + 1)
    in_w = tl.load(image + 2)
    first_cell = tl.load(image + 3)
    out_w = tl.load(image + 5)
    windows_h = axes + tl.load(image + 6)
    windows_w = axes + tl.load(image + 7)
    covers_h = axes + tl.load(image + 8)
    covers_w = axes + tl.load(image + 9)
    parts_per_row = tl.cdiv(in_w, COLUMNS)
    first_r = part // parts_per_row * ROWS
    first_c = part % parts_per_row * COLUMNS

    channels = tl.arange(0, BLOCK_C)
    in_row = channels < width
    if NORM:
        scale = tl.load(weight + channels, mask=in_row, other=0.0).to(tl.float32)
    weight_sum = tl.zeros((BLOCK_C,), tl.float32)
    bias_sum = tl.zeros((BLOCK_C,), tl.float32)

    # No rows for a program beyond its image: its partial sums are still written, as zeros.
    for r in range(first_r, tl.minimum(first_r + ROWS, in_h)):
        first_i = tl.load(covers_h + r * 2)
        end_i = first_i + tl.load(covers_h + r * 2 + 1)
        reduced = -1  # the column of cells that column_grad holds
        column_grad = tl.zeros((BLOCK_C,), tl.float32)
        for c in range(first_c, tl.minimum(first_c + COLUMNS, in_w)):
            total = tl.zeros((BLOCK_C,), tl.float32)
            first_j = tl.load(covers_w + c * 2)
            for j in range(first_j, first_j + tl.load(covers_w + c * 2 + 1)):
                window_w = windows_w + j * 4
                if j != reduced:
                    reduced = j
                    column_grad = tl.zeros((BLOCK_C,), tl.float32)
                    for i in range(first_i, end_i):
                        window_h = windows_h + i * 4
                        cell = (first_cell + i * out_w + j).to(tl.int64)
                        area = (tl.load(window_h + 2) * tl.load(window_w + 2)).to(tl.float32)
                        g = tl.load(grad + cell * grad_stride + channels, mask=in_row, other=0.0)
                        g = g.to(tl.float32)
                        first = (tl.load(window_h) == r) & (tl.load(window_w) == c)
                        if GRAD_BIAS and first:
                            bias_sum += g
                        if NORM:
                            z = tl.load(
                                normalised + cell * width + channels, mask=in_row, other=0.0
                            ).to(tl.float32)
                            if GRAD_WEIGHT and first:
                                weight_sum += g * z
                            g *= scale
                            mean = tl.sum(g, 0) / width
                            mean_z = tl.sum(g * z, 0) / width
                            g = (g - mean - z * mean_z) * (tl.load(inverse_std + cell) / area)
                        else:  # one exact division, as in forward
                            g = tl.div_rn(g, area + tl.zeros_like(g))
                        if WEIGHTED:
                            k = tl.load(window_h + 3) + r - tl.load(window_h)
                            g *= tl.load(window_weights + k)
                        column_grad += g
                if WEIGHTED:
                    k = tl.load(window_w + 3) + c - tl.load(window_w)
                    total += column_grad * tl.load(window_weights + k)
                else:
                    total += column_grad
            patch = (first_patch + r * in_w + c).to(tl.int64)
            tl.store(
                grad_x + patch * width + channels, total.to(grad_x.dtype.element_ty), mask=in_row
            )

    program = tl.program_id(0).to(tl.int64)
    if GRAD_WEIGHT:
        tl.store(partial_weight + program * width + channels, weight_sum, mask=in_row)
    if GRAD_BIAS:
        tl.store(partial_bias + program * width + channels, bias_sum, mask=in_row)


@triton.jit(do_not_specialize=["cells"])
def norm_gradient_kernel(
    grad, normalised, partial_weight, partial_bias,
    grad_stride, cells, width,
    GRAD_WEIGHT: tl.constexpr, GRAD_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    channels = tl.arange(0, BLOCK_C)
    in_row = channels < width
    weight_sum = tl.zeros((BLOCK_C,), tl.float32)
    bias_sum = tl.zeros((BLOCK_C,), tl.float32)
    first = tl.program_id(0) * ROWS
    for cell in range(first, tl.minimum(first + ROWS, cells)):
        row = tl.cast(cell, tl.int64)
        g = tl.load(grad + row * grad_stride + channels, mask=in_row, other=0.0).to(tl.float32)
        if GRAD_WEIGHT:
            z = tl.load(normalised + row * width + channels, mask=in_row, other=0.0)
            weight_sum += g * z.to(tl.float32)
        if GRAD_BIAS:
            bias_sum += g
    program = tl.program_id(0).to(tl.int64)
    if GRAD_WEIGHT:
        tl.store(partial_weight + program * width + channels, weight_sum, mask=in_row)
    if GRAD_BIAS:
        tl.store(partial_bias + program * width + channels, bias_sum, mask=in_row)


@triton.jit(do_not_specialize=["rows"])
def scale_shift_kernel(
    normalised, weight, bias, out,
    rows, width,
    BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    channels = tl.arange(0, BLOCK_C)
    in_row = channels < width
    scale = tl.load(weight + channels, mask=in_row, other=0.0).to(tl.float32)
    if BIAS:
        shift = tl.load(bias + channels, mask=in_row, other=0.0).to(tl.float32)
    for step in tl.static_range(ROWS):
        row = tl.program_id(0) * ROWS + step
        mask = in_row & (row < rows)
        at = row.to(tl.int64) * width + channels
        result = tl.load(normalised + at, mask=mask, other=0.0).to(tl.float32) * scale
        if BIAS:
            result += shift
        tl.store(out + at, result.to(out.dtype.element_ty), mask=mask)
