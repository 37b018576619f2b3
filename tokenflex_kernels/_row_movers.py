"""Calls into the extension's row movers, on host and device memory alike.

The extension takes addresses, byte strides and sizes (no torch at its build), so this is where
tensors become those: rows of any stride, elements of a row next to each other. A mover copies bytes
and never looks at a dtype. Callers have checked shapes, dtypes, devices and row numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from tokenflex_kernels._backend import extension


def pack_rows(
    table: torch.Tensor, vision: torch.Tensor, source: torch.Tensor, packed: torch.Tensor
) -> None:
    """packed[r] = table[source[r]] if source[r] >= 0 else vision[~source[r]]; one launch."""
    table, vision = _contiguous_rows(table), _contiguous_rows(vision)
    mover = _mover("pack_rows", packed)
    mover(*_rows(table), *_rows(vision), *_rows(packed), source.data_ptr(), *_extent(packed))


def gather_rows(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """[R, D], int32 [n] -> [n, D] = rows[index]."""
    rows = _contiguous_rows(rows)
    gathered = rows.new_empty(index.shape[0], rows.shape[1])
    mover = _mover("gather_rows", gathered)
    mover(*_rows(rows), *_rows(gathered), index.data_ptr(), *_extent(gathered))
    return gathered


def scatter_rows_(target: torch.Tensor, index: torch.Tensor, rows: torch.Tensor) -> None:
    """target[index] = rows, in place; the int32 ``index`` [n] holds no row twice."""
    rows = _contiguous_rows(rows)
    mover = _mover("scatter_rows", target)
    mover(*_rows(rows), *_rows(target), index.data_ptr(), *_extent(rows))


def _contiguous_rows(rows: torch.Tensor) -> torch.Tensor:
    """``rows`` with the elements of each row next to each other; the row stride may be anything."""
    return rows if rows.shape[1] <= 1 or rows.stride(1) == 1 else rows.contiguous()


def _rows(rows: torch.Tensor) -> tuple[int, int]:
    return rows.data_ptr(), rows.stride(0) * rows.element_size()


def _mover(name: str, tensor: torch.Tensor) -> Callable[..., None]:
    """The extension's mover for the memory of ``tensor``, waiting for the rows and their size."""
    compiled = extension()
    mover: Callable[..., None] = getattr(compiled, f"{name}_cuda" if tensor.is_cuda else name)
    return mover


def _extent(rows: torch.Tensor) -> tuple[int, int, int] | tuple[int, int, int, int]:
    """How much to move, and by what: host threads, or the device and its current stream."""
    size = rows.shape[0], rows.shape[1] * rows.element_size()
    if rows.is_cuda:
        stream = torch.cuda.current_stream(rows.device)
        return *size, rows.device.index, stream.cuda_stream
    return *size, torch.get_num_threads()
