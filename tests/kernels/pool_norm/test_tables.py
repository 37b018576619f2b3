"""The tables that the pooling kernels read, rebuilt into the maps they were made from."""

from __future__ import annotations

import time
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.kernels.common import MODES, dense_map
from tokenflex_kernels import plan_pooling
from tokenflex_kernels.pool_norm import tables as pooling_tables
from tokenflex_kernels.pool_norm.axis_weights import axis_map
from tokenflex_kernels.pool_norm.tables import CACHED_TABLES, IMAGE_FIELDS, build_tables

CPU = torch.device("cpu")
SIZES, CELLS = (1, 2, 3, 7, 12, 16, 27), (1, 2, 3, 8, 12, 16, 29)
IN_GRIDS = [(27, 27), (5, 7), (5, 7), (1, 1), (7, 5), (27, 27), (4, 9)]
OUT_GRIDS = [(8, 8), (2, 3), (2, 3), (1, 1), (3, 2), (12, 16), (6, 4)]


def tables_of(in_grids, out_grids, mode="adaptive", device=CPU):
    grids = plan_pooling(in_grids, out_grids).grids
    return pooling_tables.pooling_tables(grids, mode, device)


@pytest.fixture(autouse=True)
def _no_tables(monkeypatch):
    monkeypatch.setattr(pooling_tables, "_cached", type(pooling_tables._cached)())
    monkeypatch.setattr(pooling_tables, "_captured", {})


class Axis:
    """One axis of one image, as a kernel finds it."""

    def __init__(self, tables, image, windows, covers, size, cells):
        at_windows, at_covers = (tables.images[image, field].item() for field in (windows, covers))
        self.size, self.cells = size, cells
        self.windows = tables.axes[at_windows : at_windows + 4 * cells].view(cells, 4).tolist()
        self.covers = tables.axes[at_covers : at_covers + 2 * size].view(size, 2).tolist()
        self.weights = tables.weights.tolist()

    def dense(self):
        """The map [cells, size], its divisors aside, from the windows."""
        matrix = np.zeros((self.cells, self.size))
        for cell, (first, count, _, at) in enumerate(self.windows):
            matrix[cell, first : first + count] = self.weights[at : at + count]
        return matrix

    @property
    def divisors(self):
        return tuple(divisor for _, _, divisor, _ in self.windows)


def axes_of(tables, image):
    in_h, in_w, out_h, out_w = tables.images[image, [1, 2, 4, 5]].tolist()
    return Axis(tables, image, 6, 8, in_h, out_h), Axis(tables, image, 7, 9, in_w, out_w)


class TestTables:
    @pytest.mark.parametrize("mode", MODES)
    def test_windows_are_the_axis_map(self, mode):
        for size, cells in product(SIZES, CELLS):
            axis, _ = axes_of(tables_of([(size, 1)], [(cells, 1)], mode), 0)
            truth = axis_map(size, cells, mode)
            np.testing.assert_array_equal(
                axis.dense(), np.float32(dense_map(truth, size)), str((size, cells))
            )
            assert axis.divisors == truth.divisors

    @pytest.mark.parametrize("mode", MODES)
    def test_covers_are_the_inverse_of_windows(self, mode):
        for size, cells in product(SIZES, CELLS):
            axis, _ = axes_of(tables_of([(size, 1)], [(cells, 1)], mode), 0)
            for patch, (first, count) in enumerate(axis.covers):
                covering = [
                    cell
                    for cell, (start, n, *_) in enumerate(axis.windows)
                    if start <= patch < start + n
                ]
                assert list(range(first, first + count)) == covering, (size, cells, patch)

    @pytest.mark.parametrize("mode", MODES)
    def test_every_window_begins_with_a_patch_that_it_weighs(self, mode):
        # The backward kernel counts a cell at the first patch of its window, and there alone.
        for size, cells in product(SIZES, CELLS):
            axis, _ = axes_of(tables_of([(size, 1)], [(cells, 1)], mode), 0)
            for cell, (first, count, _, at) in enumerate(axis.windows):
                assert 0 <= first < first + count <= size
                assert axis.weights[at] != 0
                cover, covers = axis.covers[first]
                assert cover <= cell < cover + covers

    @pytest.mark.parametrize("mode", MODES)
    def test_a_mixed_batch_holds_each_image_and_where_it_lies(self, mode):
        tables = tables_of(IN_GRIDS, OUT_GRIDS, mode)
        patch = cell = 0
        for image, (in_grid, out_grid) in enumerate(zip(IN_GRIDS, OUT_GRIDS, strict=True)):
            assert tables.images[image, [0, 3]].tolist() == [patch, cell]
            assert tuple(tables.images[image, [1, 2]].tolist()) == in_grid
            assert tuple(tables.images[image, [4, 5]].tolist()) == out_grid
            for axis, size, cells in zip(axes_of(tables, image), in_grid, out_grid, strict=True):
                truth = axis_map(size, cells, mode)
                np.testing.assert_array_equal(axis.dense(), np.float32(dense_map(truth, size)))
                assert axis.divisors == truth.divisors
            patch += in_grid[0] * in_grid[1]
            cell += out_grid[0] * out_grid[1]
        sizes = tables.num_images, tables.num_patches, tables.num_cells
        assert sizes == (len(IN_GRIDS), patch, cell)
        assert set(tables.in_grids) == set(IN_GRIDS)
        assert set(tables.out_grids) == set(OUT_GRIDS)

    def test_dtypes_and_shapes(self):
        tables = tables_of(IN_GRIDS, OUT_GRIDS)
        assert tables.images.shape == (len(IN_GRIDS), IMAGE_FIELDS)
        assert tables.images.dtype == tables.axes.dtype == torch.int32
        assert tables.weights.dtype == torch.float32
        assert tables.images.is_contiguous()

    def test_axes_of_one_kind_are_stored_once(self):
        one = tables_of([(5, 7)], [(2, 3)])
        many = tables_of([(5, 7)] * 40 + [(7, 5)], [(2, 3)] * 40 + [(3, 2)])
        assert many.axes.numel() == one.axes.numel()
        assert many.weights.numel() == one.weights.numel()

    @pytest.mark.parametrize(
        ("in_grid", "out_grid", "mode", "weighted"),
        [
            ((27, 27), (8, 8), "adaptive", False),
            ((27, 27), (8, 8), "resize", True),
            ((27, 27), (9, 9), "resize", False),  # divides: plain averages
            ((1, 1), (1, 1), "resize", False),
        ],
    )
    def test_weighted_tells_whether_weights_differ_from_1(self, in_grid, out_grid, mode, weighted):
        assert tables_of([in_grid], [out_grid], mode).weighted is weighted

    @pytest.mark.parametrize("mode", MODES)
    def test_merging_changes_no_table(self, mode):
        merged = [(3, 5, 7, 2, 3), (1, 4, 4, 2, 2)]
        apart = [(1, 5, 7, 2, 3)] * 3 + [(1, 4, 4, 2, 2)]
        for a, b in zip(build_tables(merged, mode), build_tables(apart, mode), strict=True):
            np.testing.assert_array_equal(a, b)


class TestCache:
    def test_the_same_batch_has_the_same_tables(self):
        assert tables_of(IN_GRIDS, OUT_GRIDS) is tables_of(list(IN_GRIDS), tuple(OUT_GRIDS))

    def test_another_order_mode_or_device_has_others(self):
        first = tables_of([(5, 7), (7, 5)], [(2, 3), (3, 2)])
        swapped = tables_of([(7, 5), (5, 7)], [(3, 2), (2, 3)])
        assert swapped is not first
        assert not torch.equal(swapped.images, first.images)
        assert tables_of([(5, 7), (7, 5)], [(2, 3), (3, 2)], "resize") is not first
        elsewhere = tables_of([(5, 7), (7, 5)], [(2, 3), (3, 2)], device=torch.device("meta"))
        assert elsewhere is not first
        assert tables_of([(5, 7), (7, 5)], [(2, 3), (3, 2)]) is first

    def test_the_least_recently_used_go_first(self):
        def tables(height):
            return tables_of([(height, 1)], [(1, 1)])

        oldest, second = tables(1), tables(2)
        for height in range(3, CACHED_TABLES + 1):
            tables(height)
        assert len(pooling_tables._cached) == CACHED_TABLES
        assert tables(1) is oldest  # now the most recent
        tables(CACHED_TABLES + 1)
        assert len(pooling_tables._cached) == CACHED_TABLES
        assert tables(1) is oldest
        assert tables(2) is not second

    def test_those_of_inference_mode_serve_training(self):
        with torch.inference_mode():
            first = tables_of([(41, 3)], [(2, 3)])
        assert tables_of([(41, 3)], [(2, 3)]) is first

    def test_their_memory_is_bounded(self, monkeypatch):
        monkeypatch.setattr(pooling_tables, "CACHED_BYTES", 20_000)
        small = tables_of([(5, 7)], [(2, 3)])
        assert tables_of([(5, 7)], [(2, 3)]) is small
        large = tables_of([(2000, 1)], [(50, 1)])
        assert large.num_bytes > 20_000
        assert tables_of([(2000, 1)], [(50, 1)]) is large  # the newest stays, whatever its size
        assert tables_of([(5, 7)], [(2, 3)]) is not small
        assert len(pooling_tables._cached) == 1

    def test_their_size_is_what_they_take(self):
        tables = tables_of(IN_GRIDS, OUT_GRIDS)
        parts = (tables.images, tables.axes, tables.weights)
        grids = plan_pooling(IN_GRIDS, OUT_GRIDS).grids
        assert tables.num_bytes == sum(part.nbytes for part in (*parts, grids))


class TestLongAxes:
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize(
        ("size", "cells"), [(8192, 4096), (8191, 4096), (65536, 1), (1, 65536), (3, 65536)]
    )
    def test_cost_time_and_memory_in_their_length_alone(self, size, cells, mode):
        before = time.process_time()
        tables = tables_of([(size, 1)], [(cells, 1)], mode)
        assert time.process_time() - before < 0.5
        assert tables.num_bytes < 64 * (size + cells)
        axis, _ = axes_of(tables, 0)
        assert axis.windows[0][0] == 0
        assert axis.windows[-1][0] + axis.windows[-1][1] == size
        for patch in (0, size // 2, size - 1):
            first, count = axis.covers[patch]
            held = [start <= patch < start + n for start, n, *_ in axis.windows]
            assert held[first : first + count] == [True] * count == [True] * sum(held)


class TestLimits:
    @pytest.mark.parametrize(
        ("in_grid", "out_grid", "name"),
        [((2**15, 2**15), (1, 1), "in_grids"), ((1, 1), (2**15, 2**15), "out_grids")],
    )
    def test_more_rows_than_int32_counts_are_refused(self, in_grid, out_grid, name):
        with pytest.raises(ValueError, match=rf"^{name} must hold at most 2147483647 .*2147483648"):
            tables_of([in_grid] * 2, [out_grid] * 2)
        assert len(pooling_tables._cached) == 0


class Stream:
    """A CUDA stream that records its waits."""

    def __init__(self, number):
        self.cuda_stream = number
        self.waited = []

    def record_event(self):
        return f"event of {self.cuda_stream}"

    def wait_event(self, event):
        self.waited.append(event)


@pytest.fixture
def cuda(monkeypatch):
    """A CUDA device that is none: `cuda.stream` is current, `cuda.capturing` says what it does."""
    fake = SimpleNamespace(stream=Stream(7), capturing=False, kept_for=[], copies=0)

    def copy(images, axes, weights, device, dtype):
        fake.copies += 1
        on_device = SimpleNamespace(
            device=device, nbytes=images.nbytes, record_stream=fake.kept_for.append
        )
        return on_device, torch.from_numpy(axes), torch.from_numpy(weights)

    monkeypatch.setattr(pooling_tables, "_copy", copy)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: fake.stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: fake.capturing)
    return fake


def on_cuda(height=27):
    return tables_of([(height, 5)], [(8, 2)], device=torch.device("cuda", 0))


class TestOnCuda:
    def test_the_stream_that_copied_them_does_not_wait(self, cuda):
        assert on_cuda() is on_cuda()
        assert cuda.copies == 1
        assert (cuda.stream.waited, cuda.kept_for) == ([], [])

    def test_another_stream_waits_for_the_copy_and_keeps_the_memory(self, cuda):
        tables = on_cuda()
        cuda.stream = other = Stream(8)
        assert on_cuda() is tables
        assert other.waited == ["event of 7"]
        assert cuda.kept_for == [other]

    def test_new_grids_in_a_capture_are_refused_with_the_way_out(self, cuda):
        cuda.capturing = True
        with pytest.raises(RuntimeError, match=r"in_grids and out_grids are new.*before the cap"):
            on_cuda()
        assert cuda.copies == 0
        cuda.capturing = False
        assert on_cuda().num_cells == 16

    def test_known_grids_in_a_capture_wait_for_nothing_from_outside(self, cuda):
        tables = on_cuda()
        cuda.stream, cuda.capturing = Stream(8), True
        assert on_cuda() is tables
        assert (cuda.stream.waited, cuda.kept_for) == ([], [])

    def test_those_of_a_capture_outlive_the_cache_and_no_others(self, cuda):
        captured, other = on_cuda(1), on_cuda(2)
        cuda.capturing = True
        on_cuda(1)
        cuda.capturing = False
        for height in range(3, 3 + CACHED_TABLES):
            on_cuda(height)
        copies = cuda.copies
        assert on_cuda(1) is captured
        assert cuda.copies == copies
        assert on_cuda(2) is not other
