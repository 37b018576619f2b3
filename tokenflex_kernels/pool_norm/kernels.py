"""Pooling and LayerNorm in one pass over the patches, and both backward in two kernels.

Maths, for one image with an axis map a direction (``axis_weights``), windows I_i and J_j:

    pooled[i, j] = sum_(r in I_i) sum_(c in J_j) u_i(r) v_j(c) x[r, c] / (d_i e_j)
    normalised = (pooled - mean(pooled)) * inverse_std,   inverse_std = 1 / sqrt(var(pooled) + eps)
    out = normalised * weight + bias

    with g = d out:   d weight = sum g * normalised,   d bias = sum g
    d pooled = inverse_std * (g w - mean(g w) - normalised * mean(g w * normalised))
    d x[r, c] = sum_(i: r in I_i) sum_(j: c in J_j) u_i(r) v_j(c) d pooled[i, j] / (d_i e_j)

Forward normalises the sums of the windows: with S = a * pooled and a the area d_i e_j,

    normalised = (S - mean(S)) / sqrt(var(S) + a^2 eps),   inverse_std = a / sqrt(var(S) + a^2 eps)

Rows: one or two warps hold a row of features, so that most instructions work on features, and sums
over a row need few exchanges. A row is two blocks whose sizes are powers of two, HEAD + TAIL. Most
widths of encoders are such a sum (1152 = 1024 + 128); rounding them up to one power of two would
leave up to half of the lanes idle. Only adds and fused multiply-adds touch features: weights of
windows are 0 or 1 in adaptive mode, but a product with a matrix of them on tensor cores would
multiply zeros by what lies outside a window, NaN and infinity included.

Traffic: forward reads every patch once from memory and writes every cell once. A program owns a
few neighbouring cells of one row of cells. It sums each column of their band once and hands the sum
of a column that two windows share from one cell to the next, so a patch is read again, from L2,
only by the row of cells below that shares its row.

Backward reduces each cell once: ``norm_gradient_kernel`` writes the two means of d pooled, 2 floats
a cell, and adds up the gradients of weight and bias, one partial sum for each program; PyTorch adds
those up in a fixed order. ``pool_norm_backward_kernel`` then has nothing to reduce. A program owns
a tile of neighbouring patches of one row times some channels, and walks down a band of rows. It
gathers what a row of cells adds to the tile, and keeps it while the walk stays in the row's window.
Every patch is written, covered or not, so nothing is filled with zeros first and nothing is added
atomically. It starts with the last image, whose rows the first kernel has just left in L2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokenflex_kernels.pool_norm.tables import IMAGE_FIELDS
from tokenflex_kernels.tiles import term

_IMAGE_FIELDS = tl.constexpr(IMAGE_FIELDS)

# Batches of every size and shape share one binary: only what belongs to the model specialises it.
# How many cells or rows a program owns is a number of the launch, so buckets share binaries too.
_TABLES = ["images", "axes", "window_weights"]  # parts of one buffer, aligned as they fall


@triton.jit
def _load_row(row, WIDTH: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """The row at ``row`` as two float32 blocks, zeros beyond its width."""
    head = tl.load(row + tl.arange(0, HEAD))
    channels = HEAD + tl.arange(0, TAIL)
    if HEAD + TAIL == WIDTH:
        tail = tl.load(row + channels)
    else:
        tail = tl.load(row + channels, mask=channels < WIDTH, other=0.0)
    return head.to(tl.float32), tail.to(tl.float32)


@triton.jit
def _store_row(row, head, tail, WIDTH: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    tl.store(row + tl.arange(0, HEAD), head.to(row.dtype.element_ty))
    channels = HEAD + tl.arange(0, TAIL)
    if HEAD + TAIL == WIDTH:
        tl.store(row + channels, tail.to(row.dtype.element_ty))
    else:
        tl.store(row + channels, tail.to(row.dtype.element_ty), mask=channels < WIDTH)


@triton.jit
def _centre_row(head, tail, WIDTH: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """The row less its mean, still with zeros beyond its width."""
    mean = (tl.sum(head, 0) + tl.sum(tail, 0)) / WIDTH
    tail -= mean
    if HEAD + TAIL != WIDTH:
        tail = tl.where(HEAD + tl.arange(0, TAIL) < WIDTH, tail, 0.0)
    return head - mean, tail


@triton.jit
def _product_sum(a, b, num_warps: tl.constexpr):
    """The sum of a * b over a block, the same bits in every lane."""
    return tl.sum(term(a, b, a.shape[0] <= 32 * num_warps), 0)


@triton.jit
def _column_sum(
    x,
    x_stride, first_row, row_step, count,
    weights,
    WEIGHTED: tl.constexpr, UNROLL: tl.constexpr,
    WIDTH: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """sum_k u(k) x[first_row + k row_step]."""
    head = tl.zeros((HEAD,), tl.float32)
    tail = tl.zeros((TAIL,), tl.float32)
    for k in tl.range(0, count, loop_unroll_factor=UNROLL):
        row = (first_row + k * row_step).to(tl.int64)
        patch_head, patch_tail = _load_row(x + row * x_stride, WIDTH, HEAD, TAIL)
        if WEIGHTED:
            u = tl.load(weights + k)
            patch_head *= u
            patch_tail *= u
        head += patch_head
        tail += patch_tail
    return head, tail


@triton.jit(
    do_not_specialize=["programs_per_image", "cells_per_program"],
    do_not_specialize_on_alignment=_TABLES,
)
def pool_norm_forward_kernel(
    x, weight, bias, out, normalised, inverse_std, images, axes, window_weights,
    x_stride, programs_per_image, cells_per_program,
    EPS: tl.constexpr, WEIGHTED: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr,
    SAVE: tl.constexpr, UNROLL: tl.constexpr,
    WIDTH: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, num_warps: tl.constexpr,
):  # fmt: skip
    image = images + tl.program_id(0) // programs_per_image * _IMAGE_FIELDS
    part = tl.program_id(0) % programs_per_image
    first_patch = tl.load(image)
    in_w = tl.load(image + 2)
    first_cell = tl.load(image + 3)
    out_h = tl.load(image + 4)
    out_w = tl.load(image + 5)
    windows_w = axes + tl.load(image + 7)
    parts_per_row = tl.cdiv(out_w, cells_per_program)
    i = part // parts_per_row
    if i >= out_h:  # the images of a batch need different numbers of programs
        return

    window_h = axes + tl.load(image + 6) + i * 4
    first_row = first_patch + tl.load(window_h) * in_w
    rows = tl.load(window_h + 1)
    divisor_h = tl.load(window_h + 2)
    weights_h = window_weights + tl.load(window_h + 3)

    summed = -1  # the column whose sum is held
    column_head = tl.zeros((HEAD,), tl.float32)
    column_tail = tl.zeros((TAIL,), tl.float32)
    first_j = part % parts_per_row * cells_per_program
    for j in range(first_j, tl.minimum(first_j + cells_per_program, out_w)):
        window_w = windows_w + j * 4
        first_column = tl.load(window_w)
        columns = tl.load(window_w + 1)
        divisor_w = tl.load(window_w + 2)
        weights_w = window_weights + tl.load(window_w + 3)
        head = tl.zeros((HEAD,), tl.float32)
        tail = tl.zeros((TAIL,), tl.float32)
        for k in range(0, columns):
            c = first_column + k
            if c != summed:
                column_head, column_tail = _column_sum(
                    x, x_stride, first_row + c, in_w, rows, weights_h,
                    WEIGHTED, UNROLL, WIDTH, HEAD, TAIL,
                )  # fmt: skip
                summed = c
            if WEIGHTED:
                v = tl.load(weights_w + k)
                head += column_head * v
                tail += column_tail * v
            else:
                head += column_head
                tail += column_tail

        cell = (first_cell + i * out_w + j).to(tl.int64)
        area = (divisor_h * divisor_w).to(tl.float32)
        if NORM:  # of the sums: normalising cancels the area, but for eps
            head, tail = _centre_row(head, tail, WIDTH, HEAD, TAIL)
            if out.dtype.element_ty == tl.float32:  # the mean's own rounding shows in float32
                head, tail = _centre_row(head, tail, WIDTH, HEAD, TAIL)
            squares = _product_sum(head, head, num_warps) + _product_sum(tail, tail, num_warps)
            variance = squares / WIDTH
            inverse = tl.rsqrt(variance + EPS * area * area)
            head *= inverse
            tail *= inverse
            if SAVE:
                _store_row(normalised + cell * WIDTH, head, tail, WIDTH, HEAD, TAIL)
                tl.store(inverse_std + cell, inverse * area)
            scale_head, scale_tail = _load_row(weight, WIDTH, HEAD, TAIL)
            head *= scale_head
            tail *= scale_tail
            if BIAS:
                shift_head, shift_tail = _load_row(bias, WIDTH, HEAD, TAIL)
                head += shift_head
                tail += shift_tail
        else:  # one exact division, as PyTorch's pooling has it; "/" is approximate in Triton
            head = tl.div_rn(head, area + tl.zeros_like(head))
            tail = tl.div_rn(tail, area + tl.zeros_like(tail))
        _store_row(out + cell * WIDTH, head, tail, WIDTH, HEAD, TAIL)


@triton.jit(do_not_specialize=["cells", "cells_per_program"])
def norm_gradient_kernel(
    grad, normalised, weight, means, partial_weight, partial_bias,
    grad_stride, cells, cells_per_program,
    MEANS: tl.constexpr, GRAD_WEIGHT: tl.constexpr, GRAD_BIAS: tl.constexpr,
    UNROLL: tl.constexpr,
    WIDTH: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, num_warps: tl.constexpr,
):  # fmt: skip
    weight_head = tl.zeros((HEAD,), tl.float32)
    weight_tail = tl.zeros((TAIL,), tl.float32)
    bias_head = tl.zeros((HEAD,), tl.float32)
    bias_tail = tl.zeros((TAIL,), tl.float32)
    first = tl.program_id(0) * cells_per_program
    end = tl.minimum(first + cells_per_program, cells)
    for cell in tl.range(first, end, loop_unroll_factor=UNROLL):
        row = tl.cast(cell, tl.int64)
        g_head, g_tail = _load_row(grad + row * grad_stride, WIDTH, HEAD, TAIL)
        if GRAD_BIAS:
            bias_head += g_head
            bias_tail += g_tail
        if MEANS or GRAD_WEIGHT:
            z_head, z_tail = _load_row(normalised + row * WIDTH, WIDTH, HEAD, TAIL)
            z_head *= g_head
            z_tail *= g_tail
        if GRAD_WEIGHT:
            weight_head += z_head
            weight_tail += z_tail
        if MEANS:
            scale_head, scale_tail = _load_row(weight, WIDTH, HEAD, TAIL)
            mean = _product_sum(g_head, scale_head, num_warps)
            mean += _product_sum(g_tail, scale_tail, num_warps)
            mean_z = _product_sum(z_head, scale_head, num_warps)
            mean_z += _product_sum(z_tail, scale_tail, num_warps)
            tl.store(means + 2 * row, mean / WIDTH)
            tl.store(means + 2 * row + 1, mean_z / WIDTH)
    program = tl.program_id(0).to(tl.int64)
    if GRAD_WEIGHT:
        _store_row(partial_weight + program * WIDTH, weight_head, weight_tail, WIDTH, HEAD, TAIL)
    if GRAD_BIAS:
        _store_row(partial_bias + program * WIDTH, bias_head, bias_tail, WIDTH, HEAD, TAIL)


@triton.jit
def _covering_cell(
    k, c, first_j, covers, windows_w, window_weights, WEIGHTED: tl.constexpr, COLUMNS: tl.constexpr
):
    """The divisor of the k-th cell that covers each patch, its weight, and their quotient."""
    covered = k < covers
    window = windows_w + (first_j + k) * 4
    divisor = tl.load(window + 2, mask=covered, other=1).to(tl.float32)
    weight = tl.full((COLUMNS,), 1.0, tl.float32)
    if WEIGHTED:
        start = tl.load(window + 3, mask=covered, other=0) - tl.load(window, mask=covered, other=0)
        weight = tl.load(window_weights + start + c, mask=covered, other=0.0)
    return divisor, weight, weight / divisor


@triton.jit
def _cell_grad(
    k, divisor, weight_w, share, divisor_h, first_j, covers, channels, inside, scale,
    grad, normalised, inverse_std, means, row, grad_stride,
    WEIGHTED: tl.constexpr, NORM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Each patch's part of the k-th cell that covers it, in one row of cells; 0 where none does."""
    covered = k < covers
    mask = covered[:, None] & inside[None, :]
    j = (first_j + k).to(tl.int64)
    at = j[:, None] * grad_stride + channels[None, :]
    g = tl.load(grad + row * grad_stride + at, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        at = j[:, None] * WIDTH + channels[None, :]
        z = tl.load(normalised + row * WIDTH + at, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(means + 2 * row + 2 * j, mask=covered, other=0.0)
        mean_z = tl.load(means + 2 * row + 1 + 2 * j, mask=covered, other=0.0)
        factor = tl.load(inverse_std + row + j, mask=covered, other=0.0)
        factor *= share * (1.0 / divisor_h)
        return (g * scale[None, :] - mean[:, None] - z * mean_z[:, None]) * factor[:, None]
    else:  # one exact division, as in forward
        g = tl.div_rn(g, (divisor * divisor_h)[:, None] + tl.zeros_like(g))
        if WEIGHTED:
            g *= weight_w[:, None]
        return g


@triton.jit(
    do_not_specialize=["programs_per_image", "rows_per_program"],
    do_not_specialize_on_alignment=_TABLES,
)
def pool_norm_backward_kernel(
    grad, normalised, inverse_std, means, weight, grad_x, images, axes, window_weights,
    grad_stride, programs_per_image, rows_per_program,
    WEIGHTED: tl.constexpr, NORM: tl.constexpr, WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    image = images + program // programs_per_image * _IMAGE_FIELDS
    part = program % programs_per_image
    first_patch = tl.load(image)
    in_h = tl.load(image + 1)
    in_w = tl.load(image + 2)
    first_cell = tl.load(image + 3)
    out_w = tl.load(image + 5)
    windows_h = axes + tl.load(image + 6)
    windows_w = axes + tl.load(image + 7)
    covers_h = axes + tl.load(image + 8)
    covers_w = axes + tl.load(image + 9)
    chunks: tl.constexpr = (WIDTH + CHANNELS - 1) // CHANNELS
    tiles_per_row = tl.cdiv(in_w, COLUMNS)
    first_r = part // chunks // tiles_per_row * rows_per_program

    channels = part % chunks * CHANNELS + tl.arange(0, CHANNELS)
    if WIDTH % CHANNELS == 0:
        inside = tl.full((CHANNELS,), True, tl.int1)
    else:
        inside = channels < WIDTH
    scale = tl.zeros((CHANNELS,), tl.float32)
    if NORM:
        scale = tl.load(weight + channels, mask=inside, other=0.0).to(tl.float32)

    # Most patches have one or two cells a row: of those, what no row changes is read once.
    c = part // chunks % tiles_per_row * COLUMNS + tl.arange(0, COLUMNS)
    in_row = c < in_w
    first_j = tl.load(covers_w + c * 2, mask=in_row, other=0)
    covers = tl.load(covers_w + c * 2 + 1, mask=in_row, other=0)
    most = tl.max(covers, 0)
    divisor_0, weight_0, share_0 = _covering_cell(
        0, c, first_j, covers, windows_w, window_weights, WEIGHTED, COLUMNS
    )
    divisor_1, weight_1, share_1 = _covering_cell(
        1, c, first_j, covers, windows_w, window_weights, WEIGHTED, COLUMNS
    )

    gathered = -1  # the row of cells that row_grad is of
    row_grad = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    # No rows for a program beyond its image.
    for r in range(first_r, tl.minimum(first_r + rows_per_program, in_h)):
        total = tl.zeros((COLUMNS, CHANNELS), tl.float32)
        first_i = tl.load(covers_h + r * 2)
        for i in range(first_i, first_i + tl.load(covers_h + r * 2 + 1)):
            window_h = windows_h + i * 4
            if i != gathered:
                gathered = i
                row = (first_cell + i * out_w).to(tl.int64)
                divisor_h = tl.load(window_h + 2).to(tl.float32)
                row_grad = _cell_grad(
                    0, divisor_0, weight_0, share_0, divisor_h, first_j, covers, channels, inside,
                    scale, grad, normalised, inverse_std, means, row, grad_stride,
                    WEIGHTED, NORM, WIDTH,
                )  # fmt: skip
                row_grad += _cell_grad(
                    1, divisor_1, weight_1, share_1, divisor_h, first_j, covers, channels, inside,
                    scale, grad, normalised, inverse_std, means, row, grad_stride,
                    WEIGHTED, NORM, WIDTH,
                )  # fmt: skip
                for k in range(2, most):
                    divisor, weight_w, share = _covering_cell(
                        k, c, first_j, covers, windows_w, window_weights, WEIGHTED, COLUMNS
                    )
                    row_grad += _cell_grad(
                        k, divisor, weight_w, share, divisor_h, first_j, covers, channels, inside,
                        scale, grad, normalised, inverse_std, means, row, grad_stride,
                        WEIGHTED, NORM, WIDTH,
                    )  # fmt: skip
            if WEIGHTED:
                k = tl.load(window_h + 3) + r - tl.load(window_h)
                total += row_grad * tl.load(window_weights + k)
            else:
                total += row_grad
        patch = (first_patch + r * in_w + c).to(tl.int64)
        tl.store(
            grad_x + patch[:, None] * WIDTH + channels[None, :],
            total.to(grad_x.dtype.element_ty),
            mask=in_row[:, None] & inside[None, :],
        )


@triton.jit(do_not_specialize=["rows", "rows_per_program"])
def scale_shift_kernel(
    normalised, weight, bias, out,
    rows, rows_per_program,
    BIAS: tl.constexpr,
    WIDTH: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    scale_head, scale_tail = _load_row(weight, WIDTH, HEAD, TAIL)
    if BIAS:
        shift_head, shift_tail = _load_row(bias, WIDTH, HEAD, TAIL)
    first = tl.program_id(0) * rows_per_program
    for row in range(first, tl.minimum(first + rows_per_program, rows)):
        at = tl.cast(row, tl.int64) * WIDTH
        head, tail = _load_row(normalised + at, WIDTH, HEAD, TAIL)
        head *= scale_head
        tail *= scale_tail
        if BIAS:
            head += shift_head
            tail += shift_tail
        _store_row(out + at, head, tail, WIDTH, HEAD, TAIL)
