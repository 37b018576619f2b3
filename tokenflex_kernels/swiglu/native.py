"""The stages of `swiglu` on host memory: PyTorch's matrix products, and the rest by the extension.

A product of few rows with wide weights is faster the other way round, W x^T: its library packs the
second factor before it multiplies, and leaves the first as it is. So gate and up are computed as
[H, rows] where there are fewer rows than hidden units, in blocks of rows that stay in the cache
until they are multiplied. They are kept block after block: only this file knows their order.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from tokenflex_kernels.backend import compiled_extension
from tokenflex_kernels.layout import neighbours

BLOCK = 2**20  # elements of gate, and of up, that are computed at a time
FEW_ROWS = 16  # times fewer rows than results: the product is taken the other way round


def gate_up(
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    up_weight: torch.Tensor,
    gate_bias: torch.Tensor | None,
    up_bias: torch.Tensor | None,
    product: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
) -> None:
    """Compute product [T, H], gate and up [T * H]; those that are empty are not wanted."""
    rows, hidden = x.shape[0], gate_weight.shape[0]
    is_kept = gate.numel() > 0
    if not is_kept:
        largest = max(stop - start for start, stop in _blocks(rows, hidden))
        gate, up = x.new_empty(2, largest * hidden)
    for start, stop in _blocks(rows, hidden):
        place = slice(start * hidden, stop * hidden) if is_kept else slice((stop - start) * hidden)
        parts = gate[place], up[place]
        _linear_into(x[start:stop], gate_weight, gate_bias, parts[0])
        _linear_into(x[start:stop], up_weight, up_bias, parts[1])
        if len(product) > 0:
            compiled_extension().gated_product(
                *_gate_up(*parts, stop - start, hidden),
                *(product[start:].data_ptr(), *_options(product)),
            )


def down_gradient(
    grad: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    grads: torch.Tensor,
    product: torch.Tensor,
    sums: torch.Tensor,
) -> None:
    """Compute the gradients from that of the product, [T, H]; see the stage of this name.

    ``product`` and ``sums``, which is zero, may be empty.
    """
    grad = neighbours(grad)
    rows, hidden = grad.shape
    stride = grad.stride(0) * grad.element_size()
    for start, stop in _blocks(rows, hidden):
        place = slice(start * hidden, stop * hidden)
        compiled_extension().gate_gradients(
            *_gate_up(gate[place], up[place], stop - start, hidden),
            *(grad.data_ptr() + start * stride, stride, grads[start:].data_ptr()),
            product[start:].data_ptr() if len(product) > 0 else 0,
            sums.data_ptr() if sums.numel() > 0 else 0,
            *_options(grads),
        )


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return x W^T + b."""
    if x.shape[0] * FEW_ROWS > weight.shape[0]:
        return F.linear(x, weight, bias)
    x = x.t()
    columns = weight @ x if bias is None else torch.addmm(bias[:, None], weight, x)
    return transposed(columns)


def transposed_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return left^T right.

    The library's product of 16-bit numbers takes twice the time where its first factor is
    transposed: more than to transpose it beforehand.
    """
    return (transposed(left) if left.element_size() == 2 else left.t()) @ right


def transposed(matrix: torch.Tensor) -> torch.Tensor:
    """Return the transpose of a matrix, contiguous."""
    matrix = neighbours(matrix)
    rows, columns = matrix.shape
    result = matrix.new_empty(columns, rows)
    compiled_extension().transpose(
        *(matrix.data_ptr(), matrix.stride(0) * matrix.element_size()),
        *(result.data_ptr(), rows, columns, *_options(matrix)),
    )
    return result


def _blocks(rows: int, hidden: int) -> Iterator[tuple[int, int]]:
    """Yield the first row of each block of about equal length, and that of the next."""
    blocks = max(1, -(-rows * hidden // BLOCK))
    length = -(-rows // blocks)
    for start in range(0, rows, length):
        yield start, min(start + length, rows)


def _linear_into(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
) -> None:
    """Write x W^T + b, [rows, H] or, where there are few rows, its transpose."""
    rows, hidden = x.shape[0], weight.shape[0]
    if rows < hidden:
        left, right, out = weight, x.t(), out.view(hidden, rows)
        bias = None if bias is None else bias[:, None]
    else:
        left, right, out = x, weight.t(), out.view(rows, hidden)
    if bias is None:
        torch.mm(left, right, out=out)
    else:
        torch.addmm(bias, left, right, out=out)


def _gate_up(
    gate: torch.Tensor, up: torch.Tensor, rows: int, hidden: int
) -> tuple[int, int, int, int, bool]:
    return gate.data_ptr(), up.data_ptr(), rows, hidden, rows < hidden


def _options(rows: torch.Tensor) -> tuple[str, int]:
    return str(rows.dtype).removeprefix("torch."), torch.get_num_threads()
