"""The stages of `pool_norm` on host memory, by the extension.

Sums are in float32, or float64 where the rows that are written first are float64. The extension
takes any float dtypes whose sums are alike; rows of other dtypes are converted here.
"""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch

from tokenflex_kernels.backend import compiled_extension
from tokenflex_kernels.layout import neighbours
from tokenflex_kernels.pool_norm.plan import PoolPlan
from tokenflex_kernels.pool_norm.tables import PoolingTables, pooling_tables

Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

_NAMES = {
    dtype: str(dtype).removeprefix("torch.")
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
}


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that rows of ``dtype`` are added up in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def pool_norm_forward(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    grids: torch.Tensor,
    mode: str,
    eps: float,
    out: torch.Tensor,
    normalised: torch.Tensor,
    inverse_std: torch.Tensor,
) -> None:
    """Pool and normalise into the last three, which are contiguous; the last two may be empty."""
    tables = pooling_tables(grids, mode, x.device, torch.float64)
    if sum_dtype(x.dtype) != sum_dtype(out.dtype):
        x = x.to(sum_dtype(out.dtype))
    x, weight, bias = neighbours(x), _vector(weight), _vector(bias)
    compiled_extension().pool_norm_forward(
        *(*_rows(x), x.shape[1], *_parameter(weight), *_parameter(bias), eps),
        *(out.data_ptr(), normalised.data_ptr(), inverse_std.data_ptr(), _NAMES[out.dtype]),
        *_batch(tables),
    )


def pool_norm_backward(
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
    """Compute the gradients of a batch that is not empty; see the stage of this name."""
    width, sums = grad.shape[1], sum_dtype(grad.dtype)
    if dtype is None and not grad_weight:  # forward need not have saved anything
        nothing = grad.new_empty(0), grad.new_empty(0, dtype=sums)
        return *nothing, grad.sum(0, dtype=sums) if grad_bias else grad.new_empty(0, dtype=sums)
    if weight is not None and normalised.dtype != grad.dtype:
        grad, normalised = grad.to(sums), normalised.to(sums)
    # The extension writes rows that are added up as those of grad are, and both sums or none.
    written = dtype if dtype is None or sum_dtype(dtype) == sums else sums
    grad_x = grad.new_empty(0 if dtype is None else (patches, width), dtype=written)
    has_sums = grad_weight or grad_bias
    weight_sum, bias_sum = (grad.new_empty(width * has_sums, dtype=sums) for _ in range(2))

    tables = pooling_tables(grids, mode, grad.device, torch.float64)
    grad, weight, inverse_std = neighbours(grad), _vector(weight), inverse_std.to(sums)
    compiled_extension().pool_norm_backward(
        *(*_rows(grad), width),
        *(normalised.data_ptr(), inverse_std.data_ptr(), *_parameter(weight)),
        *(grad_x.data_ptr(), _NAMES[grad_x.dtype], weight_sum.data_ptr(), bias_sum.data_ptr()),
        *_batch(tables),
    )
    return (
        grad_x if dtype is None else grad_x.to(dtype),
        weight_sum if grad_weight else grad.new_empty(0, dtype=sums),
        bias_sum if grad_bias else grad.new_empty(0, dtype=sums),
    )


def norm_gradient(
    grad: torch.Tensor,
    normalised: torch.Tensor,
    weight: torch.Tensor | None,
    means: bool,
    grad_weight: bool,
    grad_bias: bool,
) -> Triple:
    """Compute the sums of ``launch_norm_gradient`` by PyTorch, on any device."""
    sums = sum_dtype(grad.dtype)
    grad, normalised = grad.to(sums), normalised.to(sums)
    empty = grad.new_empty(0)
    scaled = grad if weight is None else grad * weight.to(sums)
    return (
        torch.stack([scaled.mean(1), (scaled * normalised).mean(1)], 1) if means else empty,
        (grad * normalised).sum(0) if grad_weight else empty,
        grad.sum(0) if grad_bias else empty,
    )


def scale_shift(
    normalised: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
) -> None:
    """Write normalised * weight + bias into ``out``; both [cells, C] are contiguous."""
    weight, bias = neighbours(weight), _vector(bias)
    compiled_extension().scale_shift(
        *(normalised.data_ptr(), _NAMES[normalised.dtype], *normalised.shape),
        *(*_parameter(weight), *_parameter(bias), out.data_ptr(), torch.get_num_threads()),
    )


# ---- Eager calls, of ordinary tensors of one dtype: checked and allocated by the extension.

MOST_KEPT = 2**16  # bytes of tables that are kept as long as their plan


class HostTables(NamedTuple):
    """The tables of a batch, and what the extension is told of them."""

    arguments: tuple[int, ...]
    tables: PoolingTables  # owns the memory


_kept: WeakKeyDictionary[PoolPlan, dict[str, HostTables]] = WeakKeyDictionary()


def host_tables(plan: PoolPlan, mode: str) -> HostTables | None:
    """Return the tables of a plan with images; None where it was made for a compiler."""
    by_mode = _kept.get(plan)
    if by_mode is not None and mode in by_mode:
        return by_mode[mode]
    if plan.grids is None or not plan.runs:
        return None
    tables = pooling_tables(plan.grids, mode, plan.grids.device, torch.float64)
    result = HostTables(_batch(tables)[:-1], tables)
    if tables.num_bytes <= MOST_KEPT:
        _kept.setdefault(plan, {})[mode] = result
    return result


def pool_norm_at_once(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    tables: HostTables,
    cells: int,
    save: bool,
) -> Any:
    """Return out, or with ``save`` also normalised and inverse_std, None without a norm.

    None where a tensor is not ordinary, or does not go with the others.
    """
    return compiled_extension().pool_norm_tensors(
        x, weight, bias, eps, tables.arguments, cells, save, torch.get_num_threads()
    )


def gradients_at_once(
    grad: torch.Tensor,
    normalised: torch.Tensor | None,
    inverse_std: torch.Tensor | None,
    weight: torch.Tensor | None,
    tables: HostTables,
    needs: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, ...] | None:
    """Return the gradients of x, weight and bias, in the dtype of ``grad``; None if not needed."""
    if not needs[0] and not needs[1]:
        return None, None, grad.sum(0)
    results: tuple[torch.Tensor | None, ...] | None = (
        compiled_extension().pool_norm_gradient_tensors(
            *(neighbours(grad), normalised, inverse_std, weight, tables.arguments, *needs),
            torch.get_num_threads(),
        )
    )
    return results


def _vector(parameter: torch.Tensor | None) -> torch.Tensor | None:
    return None if parameter is None else neighbours(parameter)


def _parameter(parameter: torch.Tensor | None) -> tuple[int, str]:
    return (0, "") if parameter is None else (parameter.data_ptr(), _NAMES[parameter.dtype])


def _rows(rows: torch.Tensor) -> tuple[int, int, str]:
    return rows.data_ptr(), rows.stride(0) * rows.element_size(), _NAMES[rows.dtype]


def _batch(tables: PoolingTables) -> tuple[Any, ...]:
    """Return the tables and the number of threads, as the extension takes them."""
    return (
        *(tables.images.data_ptr(), tables.num_images, tables.axes.data_ptr()),
        *(tables.weights.data_ptr(), tables.weighted, tables.num_patches),
        torch.get_num_threads(),
    )
