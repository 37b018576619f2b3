"""The plan of a batch's grids: what it holds, what refuses it, and that it stands for the lists."""

from __future__ import annotations

import pickle
import random
from dataclasses import FrozenInstanceError
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tokenflex_kernels import PoolPlan, plan_pooling, pool_norm
from tokenflex_kernels.pool_norm.plan import LARGE_BATCH, plan_uniform


class TestRuns:
    def test_equal_neighbours_merge(self):
        assert plan_pooling([(5, 7)] * 3, [(2, 3)] * 3).runs == ((3, 5, 7, 2, 3),)
        apart = plan_pooling([(5, 7), (5, 7)], [(2, 3), (3, 2)])
        assert apart.runs == ((1, 5, 7, 2, 3), (1, 5, 7, 3, 2))
        assert len(plan_pooling([(5, 7), (7, 5), (5, 7)], [(1, 1)] * 3).runs) == 3
        assert plan_pooling([], []).runs == ()

    def test_they_say_the_same_as_the_lists(self):
        draw = random.Random(0)
        sides = [(1, 1), (1, 2), (2, 1)]
        for _ in range(100):
            images = draw.randint(0, 12)
            in_grids, out_grids = ([draw.choice(sides) for _ in range(images)] for _ in range(2))
            plan = plan_pooling(in_grids, out_grids)
            spread = [grids for count, *grids in plan.runs for _ in range(count)]
            assert spread == [[*a, *b] for a, b in zip(in_grids, out_grids, strict=True)]
            assert all(a[1:] != b[1:] for a, b in pairwise(plan.runs))
            assert plan.num_images == images
            assert plan.num_patches == sum(h * w for h, w in in_grids)
            assert plan.num_cells == sum(h * w for h, w in out_grids)

    def test_the_tensor_holds_the_runs(self):
        plan = plan_pooling([(5, 7), (5, 7), (2, 9)], [(2, 3), (2, 3), (1, 1)])
        assert plan.grids.dtype == torch.int64
        assert plan.grids.view(-1, 5).tolist() == [list(run) for run in plan.runs]
        assert plan_pooling([], []).grids.shape == (0,)

    def test_a_uniform_batch_is_one_run(self):
        uniform, listed = plan_uniform(3, (5, 7), (2, 3)), plan_pooling([(5, 7)] * 3, [(2, 3)] * 3)
        assert uniform.runs == listed.runs
        assert torch.equal(uniform.grids, listed.grids)


class TestPlans:
    def test_the_same_grids_are_planned_once(self):
        grids = [(5, 7), (2, 9)], [(2, 3), (1, 1)]
        assert plan_pooling(*grids) is plan_pooling(*map(tuple, grids))

    def test_what_equals_an_int_is_refused_though_the_int_came_before(self):
        plan_pooling([(1, 1)], [(1, 1)])
        for alike in (1.0, True, np.float64(1)):
            with pytest.raises(TypeError, match="in_grids"):
                plan_pooling([(1, alike)], [(1, 1)])

    def test_integers_of_numpy_are_ints(self):
        assert plan_pooling([(5, 7)], [[np.int64(2), 3]]).runs == ((1, 5, 7, 2, 3),)

    def test_fields_do_not_change(self):
        with pytest.raises(FrozenInstanceError, match="num_cells"):
            plan_pooling([(5, 7)], [(2, 3)]).num_cells = 7

    def test_goes_to_another_process(self):
        plan = plan_pooling([(5, 7), (2, 9)], [(2, 3), (1, 1)])
        other = pickle.loads(pickle.dumps(plan))
        assert other.runs == plan.runs
        assert torch.equal(other.grids, plan.grids)

    def test_made_in_inference_mode_it_serves_training(self):
        with torch.inference_mode():
            plan = plan_pooling([(43, 3)], [(2, 3)])
        assert not plan.grids.is_inference()

    def test_made_among_fake_tensors_it_serves_real_ones(self):
        with FakeTensorMode():
            plan_pooling([(47, 3)], [(2, 3)])
        assert plan_pooling([(47, 3)], [(2, 3)]).grids.tolist() == [1, 47, 3, 2, 3]

    def test_those_of_large_batches_are_not_kept(self):
        small = [(5, 7)] * 3, [(2, 3)] * 3
        assert plan_pooling(*small) is plan_pooling(*small)
        images = LARGE_BATCH + 1
        large = [(5, 1 + image % 2) for image in range(images)], [(2, 1)] * images
        assert plan_pooling(*large) is not plan_pooling(*large)
        assert plan_pooling(*large).num_images == images

    @pytest.mark.parametrize("images", [(1, 2), (2, 1), (0, 1)])
    def test_lists_of_different_lengths_are_refused(self, images):
        with pytest.raises(ValueError, match=f"per image each, got {images[0]} and {images[1]}"):
            plan_pooling([(3, 3)] * images[0], [(2, 2)] * images[1])


class TestPoolNormOfAPlan:
    def test_equals_that_of_its_lists(self):
        grids = [(5, 7), (2, 9)], [(2, 3), (1, 1)]
        x = torch.randn(53, 6)
        torch.testing.assert_close(
            pool_norm(x, plan_pooling(*grids)), pool_norm(x, *grids), rtol=0, atol=0
        )

    def test_grids_beside_a_plan_are_refused(self):
        plan = plan_pooling([(5, 7)], [(2, 3)])
        with pytest.raises(TypeError, match="out_grids must not be given beside a PoolPlan"):
            pool_norm(torch.randn(35, 6), plan, [(2, 3)])

    def test_lists_need_both(self):
        with pytest.raises(TypeError, match=r"out_grids must be a sequence .* got NoneType"):
            pool_norm(torch.randn(35, 6), [(5, 7)])

    def test_rows_that_do_not_fit_are_refused(self):
        with pytest.raises(ValueError, match="1 images hold 35 patches, but x has 34 rows"):
            pool_norm(torch.randn(34, 6), plan_pooling([(5, 7)], [(2, 3)]))

    def test_a_plan_that_was_never_checked_cannot_be_made_by_accident(self):
        with pytest.raises(TypeError):
            PoolPlan(((1, 5, 7, 2, 3),))
