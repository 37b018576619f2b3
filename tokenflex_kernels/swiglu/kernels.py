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

`gate_up_pair` does the same for many rows on GPUs with a copy engine. One descriptor holds both
weights, as [2, H, C] with the distance between them as its first stride, so that a single matrix
instruction multiplies a tile of x by the tiles of both. It is persistent: each program walks over
tiles, and loads the next one's operands while it computes and writes the results of the last.

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

Backward to the input, `input_gradient`: one product whose inner side is 2H long.

    d x = d gate Wg + d up Wu            [d gate, d up]: [T, 2H], Wg and Wu: [H, C] -> [T, C]

Reads the gradients and both weights, writes C a row; two products of their own would write and read
the first one's result in between, rounded.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokenflex_kernels.tiles import load_tile, nth_tile_position, store_tile, term, tile_position


@triton.jit
def activation(gate, PTX: tl.constexpr = False):
    """SiLU of float32 values.

    With PTX in NVIDIA's instructions that flush denormal numbers to zero. Triton's own do not, and
    scale their operands for it: eight more instructions an element, and no other result above
    1e-36. Triton's interpreter has no PTX.
    """
    if PTX:
        return tl.inline_asm_elementwise(
            """{
                .reg .f32 s;
                mul.f32 s, $1, 0fBFB8AA3B;
                ex2.approx.ftz.f32 s, s;
                add.f32 s, s, 0f3F800000;
                rcp.approx.ftz.f32 s, s;
                mul.f32 $0, $1, s;
            }""",  # exp(-gate) = 2^(-gate log2 e), s = 1 / (1 + exp(-gate))
            "=f,f", [gate], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return gate * tl.sigmoid(gate)


@triton.jit
def activation_derivative(gate):
    """The derivative of SiLU. Call it late: held in registers before, it makes kernels spill."""
    s = tl.sigmoid(gate)
    return s + gate * s * (1.0 - s)


@triton.jit
def _store_gated(
    g, u, gate_bias, up_bias, product, gate, up,
    m, n, rows, hidden,
    GATE_BIAS: tl.constexpr, UP_BIAS: tl.constexpr, PRODUCT: tl.constexpr, SAVE: tl.constexpr,
    TMA: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """All that follows from the float32 tiles of both products without bias."""
    column = tl.arange(0, g.shape[1])
    in_hidden = n + column < hidden
    if GATE_BIAS:
        g += tl.load(gate_bias + n + column, mask=in_hidden, other=0.0).to(tl.float32)[None, :]
    if UP_BIAS:
        u += tl.load(up_bias + n + column, mask=in_hidden, other=0.0).to(tl.float32)[None, :]
    # Stores by descriptors share a buffer: the activation is computed while gate is on its way.
    if SAVE:
        store_tile(gate, g, m, n, rows, hidden, hidden, TMA)
    if PRODUCT:
        store_tile(product, activation(g, PTX) * u, m, n, rows, hidden, hidden, TMA)
    if SAVE:
        store_tile(up, u, m, n, rows, hidden, hidden, TMA)


@triton.jit(do_not_specialize=["rows"])
def gate_up_kernel(
    x, gate_weight, up_weight, gate_bias, up_bias, product, gate, up,
    rows, hidden, width, x_stride, gate_stride, up_stride,
    GATE_BIAS: tl.constexpr, UP_BIAS: tl.constexpr, PRODUCT: tl.constexpr, SAVE: tl.constexpr,
    WHOLE_K: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    m, n = tile_position(rows, hidden, BLOCK_M, BLOCK_N, GROUP_M)
    g = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    u = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, width, BLOCK_K):
        a = load_tile(x, m, k, rows, width, x_stride, BLOCK_M, BLOCK_K, WHOLE_K, False)
        b = load_tile(
            gate_weight, n, k, hidden, width, gate_stride, BLOCK_N, BLOCK_K, WHOLE_K, False
        )
        g = tl.dot(a, b.T, g, input_precision=PRECISION)
        b = load_tile(up_weight, n, k, hidden, width, up_stride, BLOCK_N, BLOCK_K, WHOLE_K, False)
        u = tl.dot(a, b.T, u, input_precision=PRECISION)
    _store_gated(
        g, u, gate_bias, up_bias, product, gate, up, m, n, rows, hidden,
        GATE_BIAS, UP_BIAS, PRODUCT, SAVE, False, False,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def gate_up_pair_kernel(
    x, weights, gate_bias, up_bias, product, gate, up,
    rows, hidden, width,
    UP_FIRST: tl.constexpr, PTX: tl.constexpr, GATE_BIAS: tl.constexpr, UP_BIAS: tl.constexpr,
    PRODUCT: tl.constexpr, SAVE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # All but the biases are descriptors. UP_FIRST: of the two weights, up's lies first in memory.
    tl.assume(width > 0)  # spares a second epilogue for sums of nothing
    tiles = tl.cdiv(rows, BLOCK_M) * tl.cdiv(hidden, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        m, n = nth_tile_position(tile, rows, hidden, BLOCK_M, BLOCK_N, GROUP_M)
        both = tl.zeros((BLOCK_M, 2 * BLOCK_N), tl.float32)
        for k in range(0, width, BLOCK_K):
            a = x.load([m, k])
            b = weights.load([0, n, k]).reshape(2 * BLOCK_N, BLOCK_K)
            both = tl.dot(a, b.T, both, input_precision=PRECISION)
        halves = tl.permute(tl.reshape(both, (BLOCK_M, 2, BLOCK_N)), (0, 2, 1))
        if UP_FIRST:
            u, g = tl.split(halves)
        else:
            g, u = tl.split(halves)
        _store_gated(
            g, u, gate_bias, up_bias, product, gate, up, m, n, rows, hidden,
            GATE_BIAS, UP_BIAS, PRODUCT, SAVE, True, PTX,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def gated_product_kernel(
    gate, up, product,
    rows, hidden,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    m, n = tile_position(rows, hidden, BLOCK_M, BLOCK_N, GROUP_M)
    g = load_tile(gate, m, n, rows, hidden, hidden, BLOCK_M, BLOCK_N, False, False).to(tl.float32)
    u = load_tile(up, m, n, rows, hidden, hidden, BLOCK_M, BLOCK_N, False, False).to(tl.float32)
    store_tile(product, activation(g) * u, m, n, rows, hidden, hidden, False)


@triton.jit
def _store_gradients(
    dp, gate, up, grads, product, partial_bias,
    m, n, rows, hidden,
    PRODUCT: tl.constexpr, BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    num_warps: tl.constexpr,
):  # fmt: skip
    """All that follows from one float32 tile of d product, [BLOCK_M, BLOCK_N]."""
    g = load_tile(gate, m, n, rows, hidden, hidden, BLOCK_M, BLOCK_N, False, False).to(tl.float32)
    value = activation(g)
    u = load_tile(up, m, n, rows, hidden, hidden, BLOCK_M, BLOCK_N, False, False).to(tl.float32)
    if PRODUCT:
        store_tile(product, value * u, m, n, rows, hidden, hidden, False)
    # A lane reads 16 bytes at once: up to eight columns of one row.
    alone: tl.constexpr = 32 * num_warps * 8 >= BLOCK_M * BLOCK_N
    du = term(dp, value, alone)
    dg = term(dp * u, activation_derivative(g), alone)
    store_tile(grads, dg, m, n, rows, hidden, 2 * hidden, False)
    store_tile(grads + hidden, du, m, n, rows, hidden, 2 * hidden, False)
    if BIAS:  # rows beyond the last have gate = up = 0 and add nothing
        column = tl.arange(0, BLOCK_N)
        in_hidden = n + column < hidden
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
    BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, PARTS: tl.constexpr, num_warps: tl.constexpr,
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
            PRODUCT, BIAS, BLOCK_M, BLOCK_N // PARTS, num_warps,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def gate_gradient_kernel(
    dp, gate, up, grads, product, partial_bias,
    rows, hidden, dp_stride,
    PRODUCT: tl.constexpr, BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr, num_warps: tl.constexpr,
):  # fmt: skip
    m, n = tile_position(rows, hidden, BLOCK_M, BLOCK_N, GROUP_M)
    tile = load_tile(dp, m, n, rows, hidden, dp_stride, BLOCK_M, BLOCK_N, False, False)
    _store_gradients(
        tile.to(tl.float32), gate, up, grads, product, partial_bias, m, n, rows, hidden,
        PRODUCT, BIAS, BLOCK_M, BLOCK_N, num_warps,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def input_gradient_kernel(
    grads, gate_weight, up_weight, grad_x,
    rows, hidden, width, gate_stride, up_stride,
    WHOLE_K: tl.constexpr, WHOLE_N: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    m, n = tile_position(rows, width, BLOCK_M, BLOCK_N, GROUP_M)
    dx = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    steps = tl.cdiv(hidden, BLOCK_K)
    for step in range(0, 2 * steps):
        in_gate = step < steps
        k = tl.where(in_gate, step, step - steps) * BLOCK_K
        half = grads + tl.where(in_gate, 0, hidden)
        a = load_tile(half, m, k, rows, hidden, 2 * hidden, BLOCK_M, BLOCK_K, WHOLE_K, False)
        weight = tl.where(in_gate, gate_weight, up_weight)
        stride = tl.where(in_gate, gate_stride, up_stride)
        b = load_tile(weight, k, n, hidden, width, stride, BLOCK_K, BLOCK_N, WHOLE_N, False)
        dx = tl.dot(a, b, dx, input_precision=PRECISION)
    store_tile(grad_x, dx, m, n, rows, width, width, False)


@triton.jit(do_not_specialize=["rows"])
def input_gradient_pair_kernel(
    grads, weights, grad_x,
    rows, hidden, width,
    UP_FIRST: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    m, n = tile_position(rows, width, BLOCK_M, BLOCK_N, GROUP_M)
    dx = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    steps = tl.cdiv(hidden, BLOCK_K)
    for step in range(0, 2 * steps):
        part = step // steps  # of the gradients: 0 is gate's
        k = step % steps * BLOCK_K
        # A tile that reaches from gate's gradients into up's meets zeros beyond the weight's rows.
        a = grads.load([m, part * hidden + k])
        b = weights.load([1 - part if UP_FIRST else part, k, n]).reshape(BLOCK_K, BLOCK_N)
        dx = tl.dot(a, b, dx, input_precision=PRECISION)
    grad_x.store([m, n], dx.to(grad_x.dtype))
