"""The stages of `swiglu` on host memory: PyTorch's matrix products, and the rest by the extension.

A 16-bit product of few rows with wide weights is faster the other way round, W x^T: its library
packs the second factor before it multiplies, and not the first. But its result must be turned,
which takes more time where there are many rows, and in training, where backward turns it again.
Inference computes gate and up in blocks of rows that stay in the cache until they are multiplied,
but not in 16 bits, where products of fewer rows are slower.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch

from tokenflex_kernels.backend import compiled_extension
from tokenflex_kernels.layout import neighbours

Triple = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]

BLOCK = 2**20  # elements of gate, and of up, that are computed at a time
SMALL_WEIGHT, LARGE_WEIGHT = 2**16, 2**20  # elements
FEW_ROWS = 32  # rows are few where a product has this many times as many columns
LARGE_RESULT = 2**22  # bytes


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
    """Compute product, gate and up, [T, H]; those of no rows are not wanted."""
    if len(gate) > 0:
        _linear_into(gate, x, gate_weight, gate_bias)
        _linear_into(up, x, up_weight, up_bias)
        if len(product) > 0:
            _multiply(gate, up, product, by_columns=False)
        return
    blocks = max(1, product.numel() // BLOCK) if x.element_size() > 2 else 1
    for part, rows in zip(product.chunk(blocks), x.chunk(blocks), strict=True):
        by_columns = _are_few(rows, gate_weight)
        gate, up = part.new_empty((2, *(reversed(part.shape) if by_columns else part.shape)))
        for out, weight, bias in ((gate, gate_weight, gate_bias), (up, up_weight, up_bias)):
            _linear_into(out, rows, weight, bias, by_columns=by_columns)
        _multiply(gate, up, part, by_columns=by_columns)


def down_gradient(
    grad: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    grads: torch.Tensor,
    product: torch.Tensor,
    sums: torch.Tensor,
) -> None:
    """Compute the gradients from that of the product, [T, H]; see the stage of this name.

    ``product`` and ``sums``, which is zero, may be of no rows.
    """
    grad, gate, up = neighbours(grad), gate.contiguous(), up.contiguous()
    compiled_extension().gate_gradients(
        *(gate.data_ptr(), up.data_ptr(), *gate.shape),
        *(grad.data_ptr(), grad.stride(0) * grad.element_size(), grads.data_ptr()),
        *(product.data_ptr(), sums.data_ptr(), *_options(grads)),
    )


def gate_up_at_once(
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    up_weight: torch.Tensor,
    gate_bias: torch.Tensor | None,
    up_bias: torch.Tensor | None,
    *,
    save: bool,
) -> Triple:
    """Return product, gate and up of an eager call, of ordinary tensors; the last two if saved."""
    in_blocks = x.element_size() > 2 and x.shape[0] * gate_weight.shape[0] >= 2 * BLOCK
    if not save and (in_blocks or _are_few(x, gate_weight)):
        product = x.new_empty(x.shape[0], gate_weight.shape[0])
        gate_up(x, gate_weight, up_weight, gate_bias, up_bias, product, product[:0], product[:0])
        return product, None, None
    gate = product_of(x, gate_weight.t(), gate_bias)
    up = product_of(x, up_weight.t(), up_bias)
    product = compiled_extension().gated_product_tensors(gate, up, save, torch.get_num_threads())
    return (product, gate, up) if save else (product, None, None)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return x W^T + b."""
    if not _are_few(x, weight):
        return product_of(x, weight.t(), bias)
    x = x.t()
    columns = weight @ x if bias is None else torch.addmm(bias[:, None], weight, x)
    return transposed(columns)


def linear_into(
    out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> None:
    """Write x W^T + b into ``out``, [T, D] and contiguous, on any device."""
    if not (x.is_cpu and _are_few(x, weight)):
        _linear_into(out, x, weight, bias)
        return
    columns = x.new_empty(len(weight), len(x))
    _linear_into(columns, x, weight, bias, by_columns=True)
    _transpose_into(out, columns)


def gate_gradients_at_once(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, *, product: bool, sums: bool
) -> Triple | None:
    """Return grads, product and sums as the stage ``down_gradient``, from that of the product.

    The last two are None where they are not wanted. All is None where a tensor is not ordinary.
    """
    results: Triple | None = compiled_extension().gate_gradient_tensors(
        neighbours(grad), gate, up, product, sums, torch.get_num_threads()
    )
    return results


def weight_gradients_at_once(
    grads: torch.Tensor,
    sums: torch.Tensor | None,
    x: torch.Tensor | None,
    needs: Sequence[bool],
) -> list[torch.Tensor | None]:
    """Return the gradients of gate weight, up weight, gate bias and up bias; None if not needed."""
    results: list[torch.Tensor | None] = [None] * 4
    if x is not None and needs[0] and needs[1]:
        results[:2] = transposed_product(grads, x).chunk(2)  # one product for both
    elif x is not None and (needs[0] or needs[1]):
        at = 0 if needs[0] else 1
        results[at] = transposed_product(grads.chunk(2, dim=1)[at], x)
    if sums is not None:
        biases = sums.to(grads.dtype).chunk(2)
        results[2:] = [bias if need else None for bias, need in zip(biases, needs[2:], strict=True)]
    return results


def input_gradient(
    grads: torch.Tensor, gate_weight: torch.Tensor, up_weight: torch.Tensor
) -> torch.Tensor:
    """Return d gate Wg + d up Wu, [T, C].

    A product of 16-bit numbers takes 25 us to begin: more than to put small weights together.
    """
    if grads.element_size() == 2 and gate_weight.numel() <= SMALL_WEIGHT:
        return grads @ torch.cat((gate_weight, up_weight))
    grad_gate, grad_up = grads.chunk(2, dim=1)
    first = grad_gate @ gate_weight
    if grads.element_size() > 2:  # of few rows, a product that adds to its result is slower
        return first.add_(grad_up @ up_weight)
    return torch.addmm(first, grad_up, up_weight)


def transposed_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return left^T right.

    On processors with AMX, the library's product of 16-bit numbers takes twice the time where its
    first factor is transposed: for large weights, more than to transpose it beforehand.
    """
    is_large = left.shape[1] * right.shape[1] >= LARGE_WEIGHT
    turns = left.element_size() == 2 and is_large and _has_tiles()
    return product_of(transposed(left) if turns else left.t(), right)


def product_of(
    left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Return left right, plus ``bias`` in each row.

    The extension allocates large results, which the system then maps in larger pages: to map the
    memory of a wide weight's gradient can take as long as to compute it from few rows.
    """
    rows, columns = left.shape[0], right.shape[1]
    out: torch.Tensor | None = None
    if rows * columns * left.element_size() >= LARGE_RESULT:
        out = compiled_extension().new_rows(left, rows, columns)
    if bias is None:
        return torch.mm(left, right, out=out)
    return torch.addmm(bias, left, right, out=out)


def transposed(matrix: torch.Tensor) -> torch.Tensor:
    """Return the transpose of a matrix, contiguous."""
    result = matrix.new_empty(matrix.shape[1], matrix.shape[0])
    _transpose_into(result, neighbours(matrix))
    return result


def _transpose_into(result: torch.Tensor, matrix: torch.Tensor) -> None:
    compiled_extension().transpose(
        *(matrix.data_ptr(), matrix.stride(0) * matrix.element_size()),
        *(result.data_ptr(), *matrix.shape, *_options(matrix)),
    )


@cache
def _has_tiles() -> bool:
    return torch.cpu._is_amx_tile_supported()


def _are_few(x: torch.Tensor, weight: torch.Tensor) -> bool:
    # Measured: 1.1 to 1.5 times as fast in bfloat16, and slower in float32 and for more rows.
    return x.element_size() == 2 and x.shape[0] * FEW_ROWS <= weight.shape[0]


def _linear_into(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    by_columns: bool = False,
) -> None:
    """Write x W^T + b, [rows, H], or its transpose, into ``out``."""
    left, right = (weight, x.t()) if by_columns else (x, weight.t())
    if bias is None:
        torch.mm(left, right, out=out)
    else:
        torch.addmm(bias[:, None] if by_columns else bias, left, right, out=out)


def gated_product(gate: torch.Tensor, up: torch.Tensor, product: torch.Tensor) -> None:
    """Compute silu(gate) * up into ``product``, all contiguous [T, H]."""
    _multiply(gate, up, product, by_columns=False)


def _multiply(
    gate: torch.Tensor, up: torch.Tensor, product: torch.Tensor, *, by_columns: bool
) -> None:
    compiled_extension().gated_product(
        *(gate.data_ptr(), up.data_ptr(), *product.shape, by_columns),
        *(product.data_ptr(), *_options(product)),
    )


def _options(rows: torch.Tensor) -> tuple[str, int]:
    return str(rows.dtype).removeprefix("torch."), torch.get_num_threads()
