"""The Triton kernels of the gated unit.

The activation is SiLU: `activation` and `activation_derivative`. It is also in the reference and in
csrc/activation.h, and another activation is an edit of these three files.

Forward, `gate_up`: two matrix products over one reading of x, and their gate.

    gate = x Wg^T + bg,   up = x Wu^T + bu,   product = silu(gate) * up
    x: [T, C], Wg and Wu: [H, C], each a plain Linear's weight -> [T, H]

A tile of x is read once for both accumulators. Inference writes the product alone, H a row;
training also keeps gate and up, from which backward computes the product again; recomputation in
backward writes those two and no product. Everything between the products and what is stored stays
in float32.

Backward through the gate, `down_gradient`: its derivative in the epilogue of the down projection's
product. With dy the gradient of the output y = product Wd^T and s = sigmoid(gate):

    d product = dy Wd                                         dy: [T, D], Wd: [D, H] -> [T, H]
    d gate = d product * up * s * (1 + gate * (1 - s)),   d up = d product * gate * s
    product = gate * s * up, computed again: forward did not keep it
    d bg = sum_t d gate,   d bu = sum_t d up

Reads dy and Wd, gate and up; writes (d gate, d up) side by side, [T, 2H], so that the gradients of
both weights are one product, and the product if the down weight is trained. d product itself is
never stored. The sums over rows come as one partial sum a tile, for PyTorch to add up in a fixed
order. Without Wd the same epilogue runs on a given d product (`gate_gradient_kernel`).

Backward to the input, `input_gradient`: two products into one accumulator.

    d x = d gate Wg + d up Wu            [d gate, d up]: [T, 2H], Wg and Wu: [H, C] -> [T, C]

Reads the gradients and both weights, writes C a row; two products of their own would write and read
the first one's result in between, rounded.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokenflex_kernels.tiles import load_tile, tile_position


@triton.jit
def activation(gate):
    """SiLU of float32 values."""
    return gate * tl.sigmoid(gate)


@triton.jit
def activation_derivative(gate):
    """The derivative of SiLU. Call it late: held in registers before, it makes kernels spill."""
    s = tl.sigmoid(gate)
    return s + gate * s * (1.0 - s)


@triton.jit(do_not_specialize=["rows"])
def gate_up_kernel(
    x, gate_weight, up_weight, gate_bias, up_bias, product, gate, up,
    rows, hidden, width, x_stride, gate_stride, up_stride,
    GATE_BIAS: tl.constexpr, UP_BIAS: tl.constexpr, PRODUCT: tl.constexpr, SAVE: tl.constexpr,
    WHOLE_K: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    m, n = tile_position(rows, hidden, BLOCK_M, BLOCK_N, GROUP_M)
    g = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    u = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, width, BLOCK_K):
        a = load_tile(x, m, k, rows, width, x_stride, BLOCK_M, BLOCK_K, WHOLE_K, TMA)
        b = load_tile(gate_weight, n, k, hidden, width, gate_stride, BLOCK_N, BLOCK_K, WHOLE_K, TMA)
        g = tl.dot(a, b.T, g, input_precision=PRECISION)
        b = load_tile(up_weight, n, k, hidden, width, up_stride, BLOCK_N, BLOCK_K, WHOLE_K, TMA)
        u = tl.dot(a, b.T, u, input_precision=PRECISION)

    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    in_hidden = n + column < hidden
    if GATE_BIAS:
        g += tl.load(gate_bias + n + column, mask=in_hidden, other=0.0).to(tl.float32)[None, :]
    if UP_BIAS:
        u += tl.load(up_bias + n + column, mask=in_hidden, other=0.0).to(tl.float32)[None, :]
    tile = m.to(tl.int64) * hidden + n
    at = row[:, None] * hidden + column[None, :]
    inside = (m + row < rows)[:, None] & in_hidden[None, :]
    if SAVE:
        tl.store(gate + tile + at, g.to(gate.dtype.element_ty), mask=inside)
        tl.store(up + tile + at, u.to(up.dtype.element_ty), mask=inside)
    if PRODUCT:
        p = activation(g) * u
        tl.store(product + tile + at, p.to(product.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def gated_product_kernel(
    gate, up, product,
    rows, hidden,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    m, n = tile_position(rows, hidden, BLOCK_M, BLOCK_N, GROUP_M)
    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    inside = (m + row < rows)[:, None] & (n + column < hidden)[None, :]
    tile = m.to(tl.int64) * hidden + n
    at = row[:, None] * hidden + column[None, :]
    g = tl.load(gate + tile + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + tile + at, mask=inside, other=0.0).to(tl.float32)
    p = activation(g) * u
    tl.store(product + tile + at, p.to(product.dtype.element_ty), mask=inside)


@triton.jit
def _store_gradients(
    dp, gate, up, grads, product, partial_bias,
    m, n, rows, hidden,
    PRODUCT: tl.constexpr, BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """All that follows from one float32 tile of d product, [BLOCK_M, BLOCK_N]."""
    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    in_hidden = n + column < hidden
    inside = (m + row < rows)[:, None] & in_hidden[None, :]
    tile = m.to(tl.int64) * hidden + n
    at = row[:, None] * hidden + column[None, :]
    g = tl.load(gate + tile + at, mask=inside, other=0.0).to(tl.float32)
    value = activation(g)
    u = tl.load(up + tile + at, mask=inside, other=0.0).to(tl.float32)
    if PRODUCT:
        tl.store(product + tile + at, (value * u).to(product.dtype.element_ty), mask=inside)
    du = dp * value
    dg = dp * u * activation_derivative(g)
    tile_grads = grads + m.to(tl.int64) * (2 * hidden) + n
    at_grads = row[:, None] * (2 * hidden) + column[None, :]
    tl.store(tile_grads + at_grads, dg.to(grads.dtype.element_ty), mask=inside)
    tl.store(tile_grads + hidden + at_grads, du.to(grads.dtype.element_ty), mask=inside)
    if BIAS:  # rows beyond the last have gate = up = 0 and add nothing
        sums = partial_bias + (m // BLOCK_M).to(tl.int64) * (2 * hidden) + n
        tl.store(sums + column, tl.sum(dg, 0), mask=in_hidden)
        tl.store(sums + hidden + column, tl.sum(du, 0), mask=in_hidden)


@triton.jit
def _columns(tile, part: tl.constexpr, PARTS: tl.constexpr):
    """One of PARTS (1, 2 or 4) equal parts of the columns of ``tile``."""
    if PARTS == 1:
        return tile
    else:
        halves = tl.permute(tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        if part < PARTS // 2:
            return _columns(left, part, PARTS // 2)
        else:
            return _columns(right, part - PARTS // 2, PARTS // 2)


@triton.jit(do_not_specialize=["rows"])
def down_gradient_kernel(
    dy, down_weight, gate, up, grads, product, partial_bias,
    rows, hidden, text_width, dy_stride, down_stride,
    PRODUCT: tl.constexpr, BIAS: tl.constexpr, WHOLE_K: tl.constexpr, WHOLE_N: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    m, n = tile_position(rows, hidden, BLOCK_M, BLOCK_N, GROUP_M)
    dp = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, text_width, BLOCK_K):
        a = load_tile(dy, m, k, rows, text_width, dy_stride, BLOCK_M, BLOCK_K, WHOLE_K, TMA)
        b = load_tile(
            down_weight, k, n, text_width, hidden, down_stride, BLOCK_K, BLOCK_N, WHOLE_N, TMA
        )
        dp = tl.dot(a, b, dp, input_precision=PRECISION)
    # The epilogue holds five values an element: a part of the columns at a time, for the registers.
    for part in tl.static_range(PARTS):
        _store_gradients(
            _columns(dp, part, PARTS), gate, up, grads, product, partial_bias,
            m, n + part * (BLOCK_N // PARTS), rows, hidden,
            PRODUCT, BIAS, BLOCK_M, BLOCK_N // PARTS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def gate_gradient_kernel(
    dp, gate, up, grads, product, partial_bias,
    rows, hidden, dp_stride,
    PRODUCT: tl.constexpr, BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    m, n = tile_position(rows, hidden, BLOCK_M, BLOCK_N, GROUP_M)
    tile = load_tile(dp, m, n, rows, hidden, dp_stride, BLOCK_M, BLOCK_N, False, False)
    _store_gradients(
        tile.to(tl.float32), gate, up, grads, product, partial_bias, m, n, rows, hidden,
        PRODUCT, BIAS, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def input_gradient_kernel(
    grad_gate, grad_up, gate_weight, up_weight, grad_x,
    rows, hidden, width, grad_stride, gate_stride, up_stride,
    WHOLE_K: tl.constexpr, WHOLE_N: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    m, n = tile_position(rows, width, BLOCK_M, BLOCK_N, GROUP_M)
    dx = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, hidden, BLOCK_K):
        a = load_tile(grad_gate, m, k, rows, hidden, grad_stride, BLOCK_M, BLOCK_K, WHOLE_K, TMA)
        b = load_tile(gate_weight, k, n, hidden, width, gate_stride, BLOCK_K, BLOCK_N, WHOLE_N, TMA)
        dx = tl.dot(a, b, dx, input_precision=PRECISION)
    for k in range(0, hidden, BLOCK_K):
        a = load_tile(grad_up, m, k, rows, hidden, grad_stride, BLOCK_M, BLOCK_K, WHOLE_K, TMA)
        b = load_tile(up_weight, k, n, hidden, width, up_stride, BLOCK_K, BLOCK_N, WHOLE_N, TMA)
        dx = tl.dot(a, b, dx, input_precision=PRECISION)

    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    tile = grad_x + m.to(tl.int64) * width + n
    tl.store(
        tile + row[:, None] * width + column[None, :],
        dx.to(grad_x.dtype.element_ty),
        mask=(m + row < rows)[:, None] & (n + column < width)[None, :],
    )
