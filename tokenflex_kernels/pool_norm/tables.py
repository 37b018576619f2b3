"""The pooling of a batch as three small tables on the device, which kernels read beside the rows.

    images   int32 [images, 10]    first rows of an image, its grids, and its axes' tables
    axes     int32                 for each kind of axis: windows [cells, 4], covers [size, 2]
    weights  float32 or float64    for each kind of axis: the weights of its windows, one by one

A window of an axis: first patch, number of patches, divisor, first weight. A cover of an axis: the
first cell whose window holds a patch, and the number of such cells, which are neighbours because
windows only move forward. The forward kernel reads windows; the backward kernel gathers by covers,
then windows.

The tables are made on the host from host integers, copied without waiting for the device, and
cached for the next batch with the same grids.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch

from tokenflex_kernels.checks import Grid
from tokenflex_kernels.pool_norm.axis_weights import axis_map
from tokenflex_kernels.pool_norm.plan import RUN_FIELDS, count_rows

IMAGE_FIELDS = 10
CACHED_TABLES = 256  # mostly of a few kilobytes each
CACHED_BYTES = 2**26  # of all of them


class PoolingTables(NamedTuple):
    """The tables of one batch on one device, and the sizes that a launch needs.

    Attributes:
        images: int32 [images, 10]: first patch row, H, W, first cell row, h, w, then the offsets in
            ``axes`` of the vertical and horizontal windows, and the vertical and horizontal covers.
        axes: int32, flat.
        weights: flat.
        weighted: whether any weight is not 1; in the adaptive mode all are.
        in_grids, out_grids: the different grids of the batch.
        num_images, num_patches, num_cells: sizes of the batch.
        num_bytes: of the three tables and of their key in the cache.
    """

    images: torch.Tensor
    axes: torch.Tensor
    weights: torch.Tensor
    weighted: bool
    in_grids: tuple[Grid, ...]
    out_grids: tuple[Grid, ...]
    num_images: int
    num_patches: int
    num_cells: int
    num_bytes: int


def _axis_table(size: int, cells: int, mode: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return windows, covers and weights of one axis, in O(size + cells)."""
    axis = axis_map(size, cells, mode)
    patches = np.arange(size)
    # Windows only move forward, and so do their ends.
    cover = np.searchsorted(axis.first + axis.counts, patches, side="right")
    covers = np.searchsorted(axis.first, patches, side="right") - cover
    return (
        np.stack([axis.first, axis.counts, axis.divisors, axis.starts], 1).astype(np.int32),
        np.stack([np.where(covers > 0, cover, 0), covers], 1).astype(np.int32),
        axis.values,
    )


def build_tables(
    runs: Sequence[tuple[int, int, int, int, int]], mode: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return ``images``, ``axes`` and ``weights``, float64, of a batch, on the host."""
    axes: list[np.ndarray] = []
    weights: list[np.ndarray] = []
    offsets: dict[tuple[int, int], tuple[int, int]] = {}  # (size, cells) -> its two tables
    num_ints = num_weights = 0
    for _, in_h, in_w, out_h, out_w in runs:
        for kind in ((in_h, out_h), (in_w, out_w)):
            if kind in offsets:
                continue
            windows, covers, axis_weights = _axis_table(*kind, mode)
            windows[:, 3] += num_weights
            offsets[kind] = num_ints, num_ints + windows.size
            axes += [windows.ravel(), covers.ravel()]
            weights.append(axis_weights)
            num_ints += windows.size + covers.size
            num_weights += axis_weights.size

    rows = []
    for _, in_h, in_w, out_h, out_w in runs:
        windows_h, covers_h = offsets[in_h, out_h]
        windows_w, covers_w = offsets[in_w, out_w]
        rows.append((0, in_h, in_w, 0, out_h, out_w, windows_h, windows_w, covers_h, covers_w))
    images = np.repeat(np.array(rows, np.int64), [run[0] for run in runs], axis=0)
    for field, (height, width) in ((0, (1, 2)), (3, (4, 5))):
        sizes = images[:, height] * images[:, width]
        images[:, field] = np.cumsum(sizes) - sizes
    return images.astype(np.int32), np.concatenate(axes), np.concatenate(weights)


class _Entry(NamedTuple):
    """Cached tables; on CUDA also the stream that copied them, and the event of the copy."""

    tables: PoolingTables
    stream: int | None = None
    done: torch.cuda.Event | None = None


# Least recently used first. Tables that a CUDA graph was captured with stay for good: the graph
# holds nothing but their address.
_Key = tuple[bytes, str, torch.device, torch.dtype]
_cached: OrderedDict[_Key, _Entry] = OrderedDict()
_captured: dict[_Key, _Entry] = {}
_lock = Lock()


def pooling_tables(
    grids: torch.Tensor, mode: str, device: torch.device, dtype: torch.dtype = torch.float32
) -> PoolingTables:
    """Return the tables of a batch, from the cache or made now, without waiting for the device.

    Args:
        grids: int64 [5 * runs] on the host, at least one run: see :attr:`PoolPlan.grids`.
        mode: "adaptive" or "resize".
        device: of the kernels. On CUDA, the tables are ready for the current stream.
        dtype: of the weights, float32 or float64.

    Raises:
        ValueError: the batch has more patches or cells than int32 counts.
        RuntimeError: a CUDA graph is being captured and these grids never ran before.
    """
    key = grids.numpy().tobytes(), mode, device, dtype
    with _lock:
        entry = _cached.get(key) or _captured.get(key)
        if key in _cached:
            _cached.move_to_end(key)
    if entry is None:
        entry = _make(key, grids)
    if entry.done is not None:
        _await_copy(key, entry, entry.done)
    return entry.tables


def _make(key: _Key, grids: torch.Tensor) -> _Entry:
    _, mode, device, dtype = key
    on_cuda = device.type == "cuda"
    if on_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "these in_grids and out_grids are new, and their tables cannot be copied while a CUDA "
            "graph is being captured: run the op on them once before the capture"
        )
    runs = grids.view(-1, RUN_FIELDS).tolist()
    num_patches, num_cells = count_rows(runs)
    for name, rows in (("in_grids", num_patches), ("out_grids", num_cells)):
        if rows > 2**31 - 1:
            raise ValueError(f"{name} must hold at most {2**31 - 1} rows in all, got {rows}")
    images, axes, weights = build_tables(runs, mode)
    parts = _copy(images, axes, weights, device, dtype)
    entry = _Entry(
        PoolingTables(
            *parts,
            weighted=bool((weights != 1).any()),
            in_grids=tuple({(in_h, in_w) for _, in_h, in_w, _, _ in runs}),
            out_grids=tuple({(out_h, out_w) for _, _, _, out_h, out_w in runs}),
            num_images=len(images),
            num_patches=num_patches,
            num_cells=num_cells,
            num_bytes=sum(part.nbytes for part in (*parts, grids)),
        )
    )
    if on_cuda:
        stream = torch.cuda.current_stream(device)
        entry = entry._replace(stream=stream.cuda_stream, done=stream.record_event())
    with _lock:
        _cached[key] = entry
        _evict()
    return entry


def _evict() -> None:
    """Drop the least recently used tables beyond the cache's bounds, but never the newest."""
    num_bytes = sum(entry.tables.num_bytes for entry in _cached.values())
    while len(_cached) > CACHED_TABLES or (len(_cached) > 1 and num_bytes > CACHED_BYTES):
        _, entry = _cached.popitem(last=False)
        num_bytes -= entry.tables.num_bytes


def _copy(
    images: np.ndarray,
    axes: np.ndarray,
    weights: np.ndarray,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Copy the tables to ``device`` at once; weights travel as int32, in front to be aligned."""
    bits = torch.from_numpy(weights).to(dtype).view(torch.int32)
    flat = torch.cat([bits, torch.from_numpy(images).flatten(), torch.from_numpy(axes)])
    if device.type == "cuda":
        flat = flat.pin_memory()
    if device.type != "meta":  # where kernels are only compiled, who counts their work reads these
        flat = flat.to(device, non_blocking=True)
    parts = flat.split([len(bits), images.size, axes.size])
    return parts[1].view(images.shape), parts[2], parts[0].view(dtype)


def _await_copy(key: _Key, entry: _Entry, done: torch.cuda.Event) -> None:
    """Make the current stream wait for the copy, if another stream made it."""
    images = entry.tables.images
    stream = torch.cuda.current_stream(images.device)
    if torch.cuda.is_current_stream_capturing():
        # A capture begins with a synchronisation, so the copy is over. Waiting for an event from
        # outside would be an error.
        with _lock:
            _captured[key] = entry
    elif stream.cuda_stream != entry.stream:
        stream.wait_event(done)
        images.record_stream(stream)  # the three tables share its memory
