"""The pooling of a batch as three small tables on the device, beside the rows all that is read.

    images   int32 [images, 10]    where an image's patches and cells lie, and its two axes' tables
    axes     int32                 for each kind of axis: windows [cells, 4], covers [size, 2]
    weights  float32               for each kind of axis: the weights of its windows, one by one

Window i of an axis: first patch, patches, divisor, first weight. Cover p of an axis: the first cell
whose window holds patch p, and how many cells do; windows only move forward, so these cells are
neighbours. The forward kernel reads windows; the backward kernel gathers by covers, then windows.

Grids are host integers, so the tables are made on the host and copied without waiting for the
device; a batch whose grids came before finds them there already.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch

from tokenflex_kernels.axis_weights import axis_map
from tokenflex_kernels.checks import Grid
from tokenflex_kernels.pool_plan import RUN_FIELDS, count_rows

IMAGE_FIELDS = 10
CACHED_TABLES = 256  # mostly of a few kilobytes each
CACHED_BYTES = 2**26  # of all of them


class PoolingTables(NamedTuple):
    """The tables of one batch on one device, and the sizes that a launch needs."""

    images: torch.Tensor
    """int32 [images, 10]: first patch row, H, W, first cell row, h, w, then the offsets in ``axes``
    of the vertical and horizontal windows, and of the vertical and horizontal covers."""
    axes: torch.Tensor
    """int32, flat."""
    weights: torch.Tensor
    """float32, flat."""
    weighted: bool
    """Whether any weight is not 1: the adaptive mode needs no look at ``weights``."""
    in_grids: tuple[Grid, ...]
    """The different patch grids of the batch."""
    out_grids: tuple[Grid, ...]
    """The different cell grids of the batch."""
    num_images: int
    num_patches: int
    num_cells: int
    num_bytes: int
    """Of the three tables and of their key in the cache."""


class _AxisTable(NamedTuple):
    windows: np.ndarray
    covers: np.ndarray
    weights: np.ndarray


def _axis_table(size: int, cells: int, mode: str) -> _AxisTable:
    """One axis as the kernels read it, in O(size + cells); the first weights count from 0 here."""
    axis = axis_map(size, cells, mode)
    starts = np.cumsum(axis.counts) - axis.counts
    patches = np.arange(size)
    # Windows only move forward, and so do their ends.
    cover = np.searchsorted(axis.first + axis.counts, patches, side="right")
    covers = np.searchsorted(axis.first, patches, side="right") - cover
    return _AxisTable(
        np.stack([axis.first, axis.counts, axis.divisors, starts], 1).astype(np.int32),
        np.stack([np.where(covers > 0, cover, 0), covers], 1).astype(np.int32),
        axis.values.astype(np.float32),
    )


def build_tables(
    runs: Sequence[tuple[int, int, int, int, int]], mode: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``images``, ``axes`` and ``weights`` of a batch, on the host."""
    axes: list[np.ndarray] = []
    weights: list[np.ndarray] = []
    offsets: dict[tuple[int, int], tuple[int, int]] = {}  # (size, cells) -> its two tables
    num_ints = num_weights = 0
    for _, in_h, in_w, out_h, out_w in runs:
        for kind in ((in_h, out_h), (in_w, out_w)):
            if kind in offsets:
                continue
            table = _axis_table(*kind, mode)
            windows = table.windows + np.array([0, 0, 0, num_weights], np.int32)
            offsets[kind] = num_ints, num_ints + windows.size
            axes += [windows.ravel(), table.covers.ravel()]
            weights.append(table.weights)
            num_ints += windows.size + table.covers.size
            num_weights += table.weights.size

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


class _Upload(NamedTuple):
    """Tables on a CUDA device, and when they got there."""

    tables: PoolingTables
    stream: int
    done: torch.cuda.Event


# Least recently used first. Tables that a CUDA graph was captured with stay for good: the graph
# holds nothing but their address.
_Key = tuple[bytes, str, torch.device]
_cached: OrderedDict[_Key, PoolingTables | _Upload] = OrderedDict()
_captured: dict[_Key, PoolingTables | _Upload] = {}
_lock = Lock()


def pooling_tables(grids: torch.Tensor, mode: str, device: torch.device) -> PoolingTables:
    """The tables of a batch on ``device``, from the cache or made now; never waits for the device.

    Args:
        grids: int64 [5 * runs] on the host, at least one run: see :attr:`PoolPlan.grids`.
        mode: "adaptive" or "resize".
        device: where the kernels run. For CUDA, the tables are ready for the current stream.

    Raises:
        ValueError: the batch has more patches or cells than int32 counts.
        RuntimeError: a CUDA graph is being captured and these grids never ran before.
    """
    key = grids.numpy().tobytes(), mode, device
    with _lock:
        found = _cached.get(key) or _captured.get(key)
        if key in _cached:
            _cached.move_to_end(key)
    if found is None:
        found = _make(key, grids)
    if isinstance(found, PoolingTables):
        return found
    return _on_current_stream(key, found)


def _make(key: _Key, grids: torch.Tensor) -> PoolingTables | _Upload:
    _, mode, device = key
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
    tables = PoolingTables(
        *_copy(images, axes, weights, device),
        weighted=bool((weights != 1).any()),
        in_grids=tuple({(in_h, in_w) for _, in_h, in_w, _, _ in runs}),
        out_grids=tuple({(out_h, out_w) for _, _, _, out_h, out_w in runs}),
        num_images=len(images),
        num_patches=num_patches,
        num_cells=num_cells,
        num_bytes=images.nbytes + axes.nbytes + weights.nbytes + grids.nbytes,
    )
    made: PoolingTables | _Upload = tables
    if on_cuda:
        stream = torch.cuda.current_stream(device)
        made = _Upload(tables, stream.cuda_stream, stream.record_event())
    with _lock:
        _cached[key] = made
        _evict()
    return made


def _evict() -> None:
    """Drop the least recently used tables beyond the cache's bounds, but never the newest."""
    num_bytes = sum(
        (made if isinstance(made, PoolingTables) else made.tables).num_bytes
        for made in _cached.values()
    )
    while len(_cached) > CACHED_TABLES or (len(_cached) > 1 and num_bytes > CACHED_BYTES):
        _, made = _cached.popitem(last=False)
        num_bytes -= (made if isinstance(made, PoolingTables) else made.tables).num_bytes


def _copy(
    images: np.ndarray, axes: np.ndarray, weights: np.ndarray, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The tables on ``device`` by one copy; float32 weights travel as the int32 of their bits."""
    packed = np.concatenate([images.ravel(), axes, weights.view(np.int32)])
    flat = torch.from_numpy(packed)
    if device.type == "cuda":
        flat = flat.pin_memory()
    flat = flat.to(device, non_blocking=True)
    parts = flat.split([images.size, axes.size, weights.size])
    return parts[0].view(images.shape), parts[1], parts[2].view(torch.float32)


def _on_current_stream(key: _Key, upload: _Upload) -> PoolingTables:
    tables, first_stream, done = upload
    device = tables.images.device
    stream = torch.cuda.current_stream(device)
    if torch.cuda.is_current_stream_capturing():
        # A capture begins with a synchronisation: the copy is over. Waiting for an event from
        # outside would be an error.
        with _lock:
            _captured[key] = upload
    elif stream.cuda_stream != first_stream:
        stream.wait_event(done)
        tables.images.record_stream(stream)  # the three tables share its memory
    return tables
