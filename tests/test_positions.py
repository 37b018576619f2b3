"""Positions of cells in their image, and the projector's term of that, against the formula."""

from __future__ import annotations

import copy
from math import cos, pi, sin

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from tokenflex import TokenAdaptiveProjector
from tokenflex.positions import NUM_FEATURES, cell_positions, shared_image_positions
from tokenflex_kernels import plan_pooling, project_tokens

C, D, H = 6, 5, 10


def features_of(grid):
    """[h*w, NUM_FEATURES], one number at a time."""
    rows = []
    for i in range(grid[0]):
        for j in range(grid[1]):
            row = []
            for index, cells in ((i, grid[0]), (j, grid[1])):
                start, end = index / cells, (index + 1) / cells
                waves = [2**k * pi for k in range(4)]
                # The integrals of sin and cos over the cell, by its length.
                row += [(cos(w * start) - cos(w * end)) / (w * (end - start)) for w in waves]
                row += [(sin(w * end) - sin(w * start)) / (w * (end - start)) for w in waves]
            rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def positions_of(*grids, in_grid=(7, 7)):
    plan = plan_pooling([in_grid] * len(grids), grids)
    return cell_positions(plan, torch.float64, torch.device("cpu"))


def projector_of(**options):
    """In float64, with a term of positions that is not zero."""
    torch.manual_seed(0)
    options = {"hidden_width": H, "position": "normalized", **options}
    projector = TokenAdaptiveProjector(C, D, **options).double()
    if projector.position is not None:
        nn.init.normal_(projector.position.weight)
    return projector


def without_position(projector):
    plain = copy.deepcopy(projector)
    plain.position = None
    return plain


@pytest.fixture
def patches():
    torch.manual_seed(1)
    return torch.randn(3, 49, C, dtype=torch.float64)


class TestCellPositions:
    @pytest.mark.parametrize(
        "grids", [[(4, 4)], [(2, 3)], [(3, 2)] * 2, [(1, 5), (2, 2), (2, 2), (16, 16), (1, 5)]]
    )
    def test_is_the_formula_for_each_image_in_turn(self, grids):
        expected = torch.cat([features_of(grid) for grid in grids])
        torch.testing.assert_close(positions_of(*grids), expected, rtol=0, atol=1e-12)

    def test_no_images(self):
        assert positions_of().shape == (0, NUM_FEATURES)

    def test_does_not_depend_on_the_patches(self):
        assert torch.equal(positions_of((2, 3)), positions_of((2, 3), in_grid=(4, 9)))

    @pytest.mark.parametrize(("coarse", "fine"), [((2, 3), (4, 9)), ((1, 1), (5, 2))])
    def test_a_cell_is_the_mean_of_its_parts(self, coarse, fine):
        parts = positions_of(fine).T.unflatten(1, fine)
        pooled = nn.functional.adaptive_avg_pool2d(parts, coarse).flatten(1).T
        torch.testing.assert_close(positions_of(coarse), pooled)

    def test_no_two_cells_are_alike(self):
        everywhere = positions_of(*[(n, n) for n in (1, 2, 3, 4, 5, 8, 16)])
        distances = torch.cdist(everywhere, everywhere).fill_diagonal_(1)
        assert distances.min() > 0.05

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_is_rounded_to_the_dtype(self, dtype):
        plan = plan_pooling([(7, 7)], [(3, 5)])
        positions = cell_positions(plan, dtype, torch.device("cpu"))
        assert positions.dtype == dtype
        rounding = {"rtol": torch.finfo(dtype).eps, "atol": 1e-9}
        torch.testing.assert_close(positions.double(), features_of((3, 5)), **rounding)

    def test_first_use_under_inference_mode_does_not_hinder_training(self):
        plan = plan_pooling([(7, 7)], [(13, 11)])
        with torch.inference_mode():
            cell_positions(plan, torch.float64, torch.device("cpu"))
        projector = projector_of()
        projector(torch.randn(1, 49, C, dtype=torch.float64), plan=plan).sum().backward()
        assert projector.position.weight.grad.abs().sum() > 0


class TestProjector:
    @pytest.mark.parametrize("num_tokens", [16, (2, 5), [4, (2, 5), 9], [(3, 1)] * 3], ids=str)
    @pytest.mark.parametrize("has_hook", [False, True], ids=["fused", "by modules"])
    def test_adds_a_linear_map_of_the_positions(self, patches, num_tokens, has_hook):
        projector = projector_of()
        if has_hook:
            projector.gate.register_forward_hook(lambda *_: None)
        each = num_tokens if isinstance(num_tokens, list) else [num_tokens] * 3
        grids = {16: (4, 4), 4: (2, 2), 9: (3, 3)}
        positions = torch.cat([features_of(grids.get(one, one)) for one in each])
        plain = without_position(projector)(patches, num_tokens)
        expected = plain.flatten(0, -2) + positions @ projector.position.weight.T
        tokens = projector(patches, num_tokens)
        assert tokens.shape == plain.shape
        torch.testing.assert_close(tokens.flatten(0, -2), expected)

    def test_by_a_plan_and_for_any_grid_of_patches(self):
        projector, grids = projector_of(), [(4, 6), (5, 3)]
        rows = torch.randn(39, C, dtype=torch.float64)
        plan = plan_pooling(grids, [(2, 3), (4, 4)])
        expected = projector(rows, [(2, 3), 16], grids)
        assert torch.equal(projector(rows, plan=plan), expected)
        added = expected - without_position(projector)(rows, plan=plan)
        torch.testing.assert_close(
            added,
            torch.cat([features_of((2, 3)), features_of((4, 4))]) @ projector.position.weight.T,
        )

    def test_no_images(self):
        assert projector_of()(torch.zeros(0, C).double(), [], []).shape == (0, D)

    def test_begins_as_if_it_were_not_there(self, patches):
        projector = TokenAdaptiveProjector(C, D, hidden_width=H, position="normalized").double()
        plain = without_position(projector)
        assert torch.equal(projector(patches, [4, 9, 16]), plain(patches, [4, 9, 16]))

    def test_off_leaves_the_state_dict_alone_and_on_adds_one_weight(self):
        off = projector_of(position=None).state_dict()
        on = projector_of().state_dict()
        assert set(on) - set(off) == {"position.weight"}
        assert set(off) <= set(on)
        assert not any("position" in name for name in off)
        assert on["position.weight"].shape == (D, NUM_FEATURES)

    def test_reset_parameters_takes_it_back_to_zero(self):
        projector = projector_of()
        projector.reset_parameters()
        assert not projector.position.weight.any()

    def test_learns(self, patches):
        projector = projector_of()
        projector(patches, [4, 9, 16]).sum().backward()
        positions = positions_of((2, 2), (3, 3), (4, 4))
        expected = positions.sum(0).expand(D, -1)
        torch.testing.assert_close(projector.position.weight.grad, expected)

    def test_the_rest_still_runs_as_one_op(self, patches, monkeypatch):
        calls = []

        def spy(*arguments, **options):
            calls.append(1)
            return project_tokens(*arguments, **options)

        monkeypatch.setattr("tokenflex.projector.project_tokens", spy)
        projector_of()(patches, [4, 9, 16])
        assert calls == [1]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_keeps_the_dtype(self, patches, dtype):
        projector = projector_of()
        truth = projector(patches, [4, 9, 16])
        tokens = projector.to(dtype)(patches.to(dtype), [4, 9, 16])
        assert tokens.dtype == dtype
        error = (tokens.double() - truth).square().mean().sqrt() / truth.square().mean().sqrt()
        assert error < 8 * torch.finfo(dtype).eps

    def test_float32_weights_serve_half_features(self, patches):
        projector = projector_of().float()
        assert projector(patches.bfloat16(), 9).dtype == torch.bfloat16

    def test_autocast(self, patches):
        projector = projector_of().float()
        with torch.autocast("cpu", torch.bfloat16):
            tokens = projector(patches.float(), 9)
        assert tokens.dtype == torch.bfloat16
        tokens.sum().backward()
        assert projector.position.weight.grad.dtype == torch.float32

    @pytest.mark.filterwarnings("ignore:Dynamo detected a call:UserWarning")
    def test_compiles_once_for_any_number_of_images(self, patches):
        projector, counter = projector_of(), CompileCounter()
        compiled = torch.compile(projector, backend=counter, fullgraph=True, dynamic=True)
        for num_images in (2, 3, 5):
            batch = patches[:1].expand(num_images, -1, -1)
            torch.testing.assert_close(compiled(batch, 9), projector(batch, 9))
        assert counter.frame_count <= 2

    @pytest.mark.filterwarnings("ignore:Dynamo detected a call:UserWarning")
    def test_compiles_for_mixed_counts(self, patches):
        projector = projector_of()
        compiled = torch.compile(projector, backend="eager", fullgraph=True)
        counts = [4, (2, 5), 16]
        torch.testing.assert_close(compiled(patches, counts), projector(patches, counts))

    def test_an_unknown_choice_is_refused(self):
        with pytest.raises(ValueError, match=r"^position must be None or 'normalized', got 'sine'"):
            projector_of(position="sine")


class TestSharedImagePositions:
    @pytest.mark.parametrize(
        ("position_ids", "rows", "images", "expected"),
        [
            ([0, 1, 2, 3, 4], [1, 2, 3], [0, 0, 0], [0, 3, 3, 3, 4]),
            # Two tiles side by side; two images with text between them.
            ([0, 1, 2, 3, 4], [1, 2, 3, 4], [0, 0, 1, 1], [0, 2, 2, 4, 4]),
            ([0, 1, 2, 3, 4], [0, 1, 3, 4], [0, 0, 1, 1], [1, 1, 2, 4, 4]),
            # The same image in two sequences; the next sequence begins with an image.
            ([0, 1, 2, 0, 1, 2], [0, 1, 3, 4], [0, 0, 0, 0], [1, 1, 2, 1, 1, 2]),
            ([0, 1, 2, 0, 1, 2], [1, 2, 3, 4], [0, 0, 1, 1], [0, 2, 2, 1, 1, 2]),
            ([0, 1], [], [], [0, 1]),
        ],
    )
    def test_an_image_stands_where_its_last_token_stood(self, position_ids, rows, images, expected):
        positions = torch.tensor(position_ids)
        given = torch.tensor(rows, dtype=torch.int32), torch.tensor(images, dtype=torch.int64)
        assert shared_image_positions(positions, *given).tolist() == expected
        assert positions.tolist() == position_ids  # the plan's own stay as they are
