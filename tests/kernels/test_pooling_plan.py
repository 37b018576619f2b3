"""The tables that the pooling kernels read, rebuilt into the maps they were made from."""

from __future__ import annotations

import random
from itertools import pairwise, product

import numpy as np
import pytest
import torch

from tokenflex_kernels import pooling_plan as plans
from tokenflex_kernels.axis_weights import axis_map
from tokenflex_kernels.pooling_plan import (
    CACHED_PLANS,
    build_tables,
    grid_runs,
    pooling_plan,
    runs_of,
)

MODES = ("adaptive", "resize")
CPU = torch.device("cpu")
SIZES, CELLS = (1, 2, 3, 7, 12, 16, 27), (1, 2, 3, 8, 12, 16, 29)
IN_GRIDS = [(27, 27), (5, 7), (5, 7), (1, 1), (7, 5), (27, 27), (4, 9)]
OUT_GRIDS = [(8, 8), (2, 3), (2, 3), (1, 1), (3, 2), (12, 16), (6, 4)]


def plan_of(in_grids, out_grids, mode="adaptive"):
    return pooling_plan(grid_runs(in_grids, out_grids), mode, CPU)


@pytest.fixture(autouse=True)
def _no_plans(monkeypatch):
    monkeypatch.setattr(plans, "_plans", type(plans._plans)())
    monkeypatch.setattr(plans, "_captured", {})


class Axis:
    """One axis of one image, as a kernel finds it."""

    def __init__(self, plan, image, windows, covers, size, cells):
        at_windows, at_covers = (plan.images[image, field].item() for field in (windows, covers))
        self.size, self.cells = size, cells
        self.windows = plan.axes[at_windows : at_windows + 4 * cells].view(cells, 4).tolist()
        self.covers = plan.axes[at_covers : at_covers + 2 * size].view(size, 2).tolist()
        self.weights = plan.weights.tolist()

    def dense(self):
        """The map [cells, size], its divisors aside, from the windows."""
        matrix = np.zeros((self.cells, self.size))
        for cell, (first, count, _, at) in enumerate(self.windows):
            matrix[cell, first : first + count] = self.weights[at : at + count]
        return matrix

    @property
    def divisors(self):
        return tuple(divisor for _, _, divisor, _ in self.windows)


def axes_of(plan, image):
    in_h, in_w, out_h, out_w = plan.images[image, [1, 2, 4, 5]].tolist()
    return Axis(plan, image, 6, 8, in_h, out_h), Axis(plan, image, 7, 9, in_w, out_w)


class TestTables:
    @pytest.mark.parametrize("mode", MODES)
    def test_windows_are_the_axis_map(self, mode):
        for size, cells in product(SIZES, CELLS):
            axis, _ = axes_of(plan_of([(size, 1)], [(cells, 1)], mode), 0)
            truth = axis_map(size, cells, mode)
            np.testing.assert_array_equal(
                axis.dense(), np.float32(truth.weights), str((size, cells))
            )
            assert axis.divisors == truth.divisors

    @pytest.mark.parametrize("mode", MODES)
    def test_covers_are_the_inverse_of_windows(self, mode):
        for size, cells in product(SIZES, CELLS):
            axis, _ = axes_of(plan_of([(size, 1)], [(cells, 1)], mode), 0)
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
            axis, _ = axes_of(plan_of([(size, 1)], [(cells, 1)], mode), 0)
            for cell, (first, count, _, at) in enumerate(axis.windows):
                assert 0 <= first < first + count <= size
                assert axis.weights[at] != 0
                cover, covers = axis.covers[first]
                assert cover <= cell < cover + covers

    @pytest.mark.parametrize("mode", MODES)
    def test_a_mixed_batch_holds_each_image_and_where_it_lies(self, mode):
        plan = plan_of(IN_GRIDS, OUT_GRIDS, mode)
        patch = cell = 0
        for image, (in_grid, out_grid) in enumerate(zip(IN_GRIDS, OUT_GRIDS, strict=True)):
            assert plan.images[image, [0, 3]].tolist() == [patch, cell]
            assert tuple(plan.images[image, [1, 2]].tolist()) == in_grid
            assert tuple(plan.images[image, [4, 5]].tolist()) == out_grid
            for axis, size, cells in zip(axes_of(plan, image), in_grid, out_grid, strict=True):
                truth = axis_map(size, cells, mode)
                np.testing.assert_array_equal(axis.dense(), np.float32(truth.weights))
                assert axis.divisors == truth.divisors
            patch += in_grid[0] * in_grid[1]
            cell += out_grid[0] * out_grid[1]
        assert (plan.num_images, plan.num_patches, plan.num_cells) == (len(IN_GRIDS), patch, cell)
        assert set(plan.in_grids) == set(IN_GRIDS)
        assert set(plan.out_grids) == set(OUT_GRIDS)

    def test_dtypes_and_shapes(self):
        plan = plan_of(IN_GRIDS, OUT_GRIDS)
        assert plan.images.shape == (len(IN_GRIDS), plans.IMAGE_FIELDS)
        assert plan.images.dtype == plan.axes.dtype == torch.int32
        assert plan.weights.dtype == torch.float32
        assert plan.images.is_contiguous()

    def test_axes_of_one_kind_are_stored_once(self):
        one = plan_of([(5, 7)], [(2, 3)])
        many = plan_of([(5, 7)] * 40 + [(7, 5)], [(2, 3)] * 40 + [(3, 2)])
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
        assert plan_of([in_grid], [out_grid], mode).weighted is weighted


class TestRuns:
    def test_equal_neighbours_merge(self):
        assert grid_runs([(5, 7)] * 3, [(2, 3)] * 3) == [3, 5, 7, 2, 3]
        assert grid_runs([(5, 7), (5, 7)], [(2, 3), (3, 2)]) == [1, 5, 7, 2, 3, 1, 5, 7, 3, 2]
        assert grid_runs([(5, 7), (7, 5), (5, 7)], [(1, 1)] * 3)[::5] == [1, 1, 1]
        assert grid_runs([], []) == []

    def test_they_say_the_same_as_the_lists(self):
        draw = random.Random(0)
        sides = [(1, 1), (1, 2), (2, 1)]
        for _ in range(100):
            images = draw.randint(0, 12)
            in_grids, out_grids = ([draw.choice(sides) for _ in range(images)] for _ in range(2))
            runs = runs_of(grid_runs(in_grids, out_grids))
            spread = [grids for count, *grids in runs for _ in range(count)]
            assert spread == [[*a, *b] for a, b in zip(in_grids, out_grids, strict=True)]
            assert all(a[1:] != b[1:] for a, b in pairwise(runs))

    @pytest.mark.parametrize("mode", MODES)
    def test_merging_changes_no_table(self, mode):
        merged = [(3, 5, 7, 2, 3), (1, 4, 4, 2, 2)]
        apart = [(1, 5, 7, 2, 3)] * 3 + [(1, 4, 4, 2, 2)]
        for a, b in zip(build_tables(merged, mode), build_tables(apart, mode), strict=True):
            np.testing.assert_array_equal(a, b)


class TestCache:
    def test_the_same_batch_is_the_same_plan(self):
        assert plan_of(IN_GRIDS, OUT_GRIDS) is plan_of(list(IN_GRIDS), tuple(OUT_GRIDS))

    def test_another_order_mode_or_device_is_another_plan(self):
        first = plan_of([(5, 7), (7, 5)], [(2, 3), (3, 2)])
        swapped = plan_of([(7, 5), (5, 7)], [(3, 2), (2, 3)])
        assert swapped is not first
        assert not torch.equal(swapped.images, first.images)
        assert plan_of([(5, 7), (7, 5)], [(2, 3), (3, 2)], "resize") is not first
        runs = grid_runs([(5, 7), (7, 5)], [(2, 3), (3, 2)])
        assert pooling_plan(runs, "adaptive", torch.device("meta")).images.device.type == "meta"
        assert pooling_plan(runs, "adaptive", CPU) is first

    def test_the_least_recently_used_plan_goes_first(self):
        def plan(height):
            return plan_of([(height, 1)], [(1, 1)])

        oldest, second = plan(1), plan(2)
        for height in range(3, CACHED_PLANS + 1):
            plan(height)
        assert len(plans._plans) == CACHED_PLANS
        assert plan(1) is oldest  # now the most recent
        plan(CACHED_PLANS + 1)
        assert len(plans._plans) == CACHED_PLANS
        assert plan(1) is oldest
        assert plan(2) is not second

    def test_a_plan_of_inference_mode_serves_training(self):
        with torch.inference_mode():
            first = plan_of([(41, 3)], [(2, 3)])
        assert plan_of([(41, 3)], [(2, 3)]) is first


class TestLimits:
    @pytest.mark.parametrize(
        ("runs", "name"),
        [([2, 2**15, 2**15, 1, 1], "in_grids"), ([2, 1, 1, 2**15, 2**15], "out_grids")],
    )
    def test_more_rows_than_int32_counts_are_refused(self, runs, name):
        with pytest.raises(ValueError, match=rf"^{name} must hold at most 2147483647 .*2147483648"):
            pooling_plan(runs, "adaptive", CPU)
        assert len(plans._plans) == 0
