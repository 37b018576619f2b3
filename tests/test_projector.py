"""`TokenAdaptiveProjector`: shapes, the formula written out, adapters, hooks, copies and misuse."""

from __future__ import annotations

import copy
import pickle
from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter

from tokenflex import TokenAdaptiveProjector
from tokenflex_kernels import plan_pooling, project_tokens

C, D, H = 6, 5, 10
SUBMODULES = ("layernorm", "gate", "up", "down")


def projector_of(**options):
    """In float64, with LayerNorm parameters that are not the identity."""
    torch.manual_seed(0)
    projector = TokenAdaptiveProjector(C, D, **{"hidden_width": H, **options}).double()
    for parameter in projector.layernorm.parameters():
        nn.init.normal_(parameter, mean=0.5)
    return projector


def formula(projector, images, out_grids, *, resize=False):
    """Each [H, W, C] image to its own grid, through PyTorch's functional ops: flat [sum N, D]."""
    tokens = []
    for image, (height, width) in zip(images, out_grids, strict=True):
        image = image.permute(2, 0, 1)[None]
        if resize:
            windows = -(-image.shape[2] // height), -(-image.shape[3] // width)
            size = windows[0] * height, windows[1] * width
            if size != tuple(image.shape[2:]):
                image = F.interpolate(image, size, mode="bilinear", align_corners=True)
            image = F.avg_pool2d(image, windows)
        else:
            image = F.adaptive_avg_pool2d(image, (height, width))
        tokens.append(image[0].flatten(1).T)
    norm, gate, up, down = (getattr(projector, name) for name in SUBMODULES)
    tokens = F.layer_norm(torch.cat(tokens), (C,), norm.weight, norm.bias, norm.eps)
    gated = F.silu(F.linear(tokens, gate.weight, gate.bias))
    return F.linear(gated * F.linear(tokens, up.weight, up.bias), down.weight, down.bias)


def assert_equal(actual, expected):
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


@pytest.fixture
def features():
    torch.manual_seed(1)
    return torch.randn(3, 49, C, dtype=torch.float64)


@pytest.fixture
def images(features):
    return features.unflatten(1, (7, 7))


class TestForward:
    @pytest.mark.parametrize(
        ("num_tokens", "out_grids", "shape"),
        [
            (16, [(4, 4)] * 3, (3, 16, D)),
            (1, [(1, 1)] * 3, (3, 1, D)),
            (81, [(9, 9)] * 3, (3, 81, D)),
            ((2, 5), [(2, 5)] * 3, (3, 10, D)),
            ((4, 9), [(4, 9)] * 3, (3, 36, D)),
            ([4, 9, 16], [(2, 2), (3, 3), (4, 4)], (29, D)),
            ([(2, 5), 9, (4, 1)], [(2, 5), (3, 3), (4, 1)], (23, D)),
            ((4, 9, 16), [(2, 2), (3, 3), (4, 4)], (29, D)),
            (torch.tensor([4, 9, 16]), [(2, 2), (3, 3), (4, 4)], (29, D)),
            ([9, 9, 9], [(3, 3)] * 3, (27, D)),  # a sequence is flat, also when all are alike
        ],
        ids=str,
    )
    @pytest.mark.parametrize("save", ["preactivation", "input"])
    def test_batch_of_square_grids(self, features, images, num_tokens, out_grids, shape, save):
        projector = projector_of(save=save)
        tokens = projector(features, num_tokens)
        assert tokens.shape == shape
        assert_equal(tokens.reshape(-1, D), formula(projector, images, out_grids))

    @pytest.mark.parametrize(
        ("num_tokens", "out_grids"),
        [
            (16, [(4, 4)] * 3),
            ((2, 5), [(2, 5)] * 3),
            ([4, (3, 2), 1], [(2, 2), (3, 2), (1, 1)]),
        ],
        ids=str,
    )
    def test_resize_pooling(self, features, images, num_tokens, out_grids):
        projector = projector_of(pooling="resize")
        tokens = projector(features, num_tokens)
        assert_equal(tokens.reshape(-1, D), formula(projector, images, out_grids, resize=True))

    @pytest.mark.parametrize(
        "grids", [(4, 6), [(4, 6)] * 2, ((4, 6), (4, 6)), [[4, 6], [4, 6]]], ids=str
    )
    def test_batch_with_one_grid_or_one_each(self, grids):
        projector = projector_of()
        features = torch.randn(2, 24, C, dtype=torch.float64)
        tokens = projector(features, (2, 3), grids)
        assert tokens.shape == (2, 6, D)
        expected = formula(projector, features.unflatten(1, (4, 6)), [(2, 3)] * 2)
        assert_equal(tokens.flatten(0, 1), expected)

    def test_batch_whose_images_differ_in_grid(self):
        projector = projector_of()
        features = torch.randn(2, 24, C, dtype=torch.float64)
        tokens = projector(features, (2, 3), [(4, 6), (12, 2)])
        images = [features[0].unflatten(0, (4, 6)), features[1].unflatten(0, (12, 2))]
        assert_equal(tokens.flatten(0, 1), formula(projector, images, [(2, 3)] * 2))

    @pytest.mark.parametrize(
        ("num_tokens", "out_grids", "shape"),
        [
            (4, [(2, 2)] * 3, (3, 4, D)),
            ((1, 3), [(1, 3)] * 3, (3, 3, D)),
            ([4, (3, 1), 9], [(2, 2), (3, 1), (3, 3)], (16, D)),
        ],
        ids=str,
    )
    def test_flat_features_of_different_grids(self, num_tokens, out_grids, shape):
        projector = projector_of()
        grids = [(4, 6), (5, 3), (1, 2)]
        rows = [torch.randn(h * w, C, dtype=torch.float64) for h, w in grids]
        tokens = projector(torch.cat(rows), num_tokens, grids)
        images = [row.unflatten(0, grid) for row, grid in zip(rows, grids, strict=True)]
        assert tokens.shape == shape
        assert_equal(tokens.reshape(-1, D), formula(projector, images, out_grids))

    def test_flat_features_of_one_grid(self, features, images):
        projector = projector_of()
        tokens = projector(features.flatten(0, 1), 4, (7, 7))
        assert tokens.shape == (3, 4, D)
        assert_equal(tokens.flatten(0, 1), formula(projector, images, [(2, 2)] * 3))

    def test_arguments_may_be_named(self, features):
        projector = projector_of()
        named = projector(features=features, num_tokens=[4, 4, 9], grids=[(7, 7)] * 3)
        assert torch.equal(named, projector(features, [4, 4, 9]))

    @pytest.mark.parametrize("num_tokens", [9, (2, 5)])
    def test_its_own_count_is_used_when_none_is_given(self, features, num_tokens):
        projector = projector_of(num_tokens=num_tokens)
        assert torch.equal(projector(features), projector(features, num_tokens))

    def test_own_count_defaults_to_256(self, features):
        assert projector_of()(features).shape == (3, 256, D)

    @pytest.mark.parametrize("num_tokens", [[4, 4], [8, 4]])
    def test_own_count_given_as_a_list_is_a_grid_or_refused(self, num_tokens):
        # Never one count per image: the constructor knows no images. (JSON turns the tuple of a
        # saved configuration into a list.)
        features = torch.randn(2, 16, C, dtype=torch.float64)
        with suppress(TypeError):
            tokens = projector_of(num_tokens=num_tokens)(features)
            assert tokens.shape == (2, num_tokens[0] * num_tokens[1], D)

    def test_a_tensor_of_no_dimensions_is_one_count_or_refused(self, features):
        with suppress(TypeError, ValueError):
            assert projector_of()(features, torch.tensor(16)).shape == (3, 16, D)

    def test_hidden_width_defaults_to_three_times_the_vision_width(self):
        projector = TokenAdaptiveProjector(4, 5)
        assert projector.gate.weight.shape == projector.up.weight.shape == (12, 4)
        assert projector.down.weight.shape == (5, 12)

    def test_eps_is_used(self, features, images):
        projector = projector_of(eps=2.0)
        assert projector.layernorm.eps == 2.0
        tokens = projector(features, 4).flatten(0, 1)
        assert_equal(tokens, formula(projector, images, [(2, 2)] * 3))

    def test_features_of_any_layout(self, features):
        projector = projector_of()
        expected = projector(features, 4)
        channels_first = features.transpose(1, 2).contiguous().transpose(1, 2)
        assert_equal(projector(channels_first, 4), expected)
        doubled = torch.cat([features, features], 1)[:, :49]
        assert_equal(projector(doubled, 4), expected)

    @pytest.mark.parametrize(
        ("shape", "num_tokens", "grids", "expected"),
        [
            ((0, 49, C), 4, None, (0, 4, D)),
            ((0, 49, C), [], None, (0, D)),
            ((0, C), 4, [], (0, 4, D)),
            ((0, C), [], [], (0, D)),
        ],
    )
    def test_no_images(self, shape, num_tokens, grids, expected):
        projector = projector_of()
        features = torch.empty(shape, dtype=torch.float64, requires_grad=True)
        tokens = projector(features, num_tokens, grids)
        assert tokens.shape == expected
        tokens.sum().backward()
        assert features.grad.shape == shape

    @pytest.mark.parametrize("save", ["preactivation", "input"])
    def test_trains(self, features, save):
        projector = projector_of(save=save)
        leaves = [features.requires_grad_(), *projector.parameters()]
        weights = torch.randn(29, D, dtype=torch.float64)
        tokens = projector(features, [4, 9, 16])
        expected = formula(projector, features.unflatten(1, (7, 7)), [(2, 2), (3, 3), (4, 4)])
        for got, want in zip(
            torch.autograd.grad((tokens * weights).sum(), leaves),
            torch.autograd.grad((expected * weights).sum(), leaves),
            strict=True,
        ):
            assert_equal(got, want)


class LowRank(nn.Module):
    """A LoRA adapter: wraps a Linear and is the identity while ``b`` is zero."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.randn(2, base.in_features, dtype=base.weight.dtype))
        self.b = nn.Parameter(torch.zeros(base.out_features, 2, dtype=base.weight.dtype))

    def forward(self, x):
        return self.base(x) + x @ self.a.T @ self.b.T


class TestReplacedSubmodules:
    @pytest.mark.parametrize("save", ["preactivation", "input"])
    @pytest.mark.parametrize("name", ["gate", "up", "down"])
    def test_adapter_takes_part_and_zero_changes_nothing(self, features, name, save):
        projector = projector_of(save=save)
        expected = projector(features, [4, 9, 16]).detach()
        adapter = LowRank(getattr(projector, name))
        setattr(projector, name, adapter)
        tokens = projector(features, [4, 9, 16])
        assert_equal(tokens.detach(), expected)
        tokens.square().sum().backward()
        assert adapter.b.grad.abs().sum() > 0
        assert all(parameter.grad is not None for parameter in projector.parameters())
        nn.init.ones_(adapter.b)
        assert not torch.allclose(projector(features, [4, 9, 16]), expected)

    def test_adapter_keeps_the_pooling(self, features):
        projector = projector_of(pooling="resize")
        expected = projector(features, (2, 5))
        projector.gate = LowRank(projector.gate)
        assert_equal(projector(features, (2, 5)), expected)

    def test_merged_adapter_equals_the_adapter(self, features):
        projector = projector_of()
        adapter = LowRank(projector.gate)
        nn.init.normal_(adapter.b)
        merged = copy.deepcopy(projector)
        with torch.no_grad():
            merged.gate.weight += adapter.b @ adapter.a
        projector.gate = adapter
        assert_equal(projector(features, 9), merged(features, 9))

    def test_subclass_of_linear_runs_its_own_forward(self, features):
        class Halved(nn.Linear):
            def forward(self, x):
                return super().forward(x) / 2

        projector = projector_of()
        halved = Halved(H, D, dtype=torch.float64)
        halved.load_state_dict(projector.down.state_dict())
        expected = projector(features, 9) / 2
        projector.down = halved
        assert_equal(projector(features, 9), expected)

    def test_other_norm_is_used(self, features):
        projector = projector_of()
        before = projector(features, 9)
        projector.layernorm = nn.RMSNorm(C, dtype=torch.float64)
        assert not torch.allclose(projector(features, 9), before)

    @pytest.mark.parametrize("name", SUBMODULES)
    def test_forward_replaced_on_the_instance_is_called(self, features, name):
        # accelerate's hooks (CPU offload, device maps) work this way.
        projector = projector_of()
        module = getattr(projector, name)
        plain, calls = module.forward, []

        def forward(x):
            calls.append(name)
            return plain(x)

        expected = projector(features, 9)
        module.forward = forward
        assert_equal(projector(features, 9), expected)
        assert calls == [name]

    @pytest.mark.parametrize(
        "register",
        [
            "register_forward_pre_hook",
            "register_forward_hook",
            "register_full_backward_pre_hook",
            "register_full_backward_hook",
        ],
    )
    @pytest.mark.parametrize("name", SUBMODULES)
    def test_each_kind_of_hook_fires_and_changes_nothing(self, features, name, register):
        projector, fired = projector_of(), []
        features.requires_grad_()
        expected = projector(features, 9)
        handle = getattr(getattr(projector, name), register)(lambda *_: fired.append(name))
        tokens = projector(features, 9)
        tokens.sum().backward()
        assert fired == [name]
        assert_equal(tokens, expected)
        handle.remove()
        projector(features, 9).sum().backward()
        assert fired == [name]

    def test_hook_may_change_the_value(self, features):
        projector = projector_of()
        expected = projector(features, 9) * 3
        projector.down.register_forward_hook(lambda module, inputs, output: output * 3)
        assert_equal(projector(features, 9), expected)

    def test_parametrised_weight_is_used(self, features):
        class Doubled(nn.Module):
            def forward(self, weight):
                return 2 * weight

        projector = projector_of()
        expected = copy.deepcopy(projector)
        with torch.no_grad():
            expected.up.weight *= 2
        nn.utils.parametrize.register_parametrization(projector.up, "weight", Doubled())
        assert_equal(projector(features, 9), expected(features, 9))


class TestPlan:
    def test_a_plan_says_grids_and_counts_at_once(self, features):
        projector = projector_of()
        counts = [4, (2, 3), 16]
        expected = projector(features, counts)
        grids = [(7, 7)] * 3
        plan = plan_pooling(grids, [(2, 2), (2, 3), (4, 4)])
        assert_equal(projector(features, plan=plan), expected)
        assert_equal(projector(features.flatten(0, 1), plan=plan), expected)

    @pytest.mark.parametrize("beside", [{"num_tokens": 4}, {"grids": (7, 7)}])
    def test_a_plan_beside_what_it_holds_is_refused(self, features, beside):
        plan = plan_pooling([(7, 7)] * 3, [(2, 2)] * 3)
        with pytest.raises(ValueError, match="plan holds grids and counts"):
            projector_of()(features, plan=plan, **beside)

    def test_a_plan_of_another_batch_is_refused(self, features):
        with pytest.raises(ValueError, match="2 images hold 98 patches, but x has 147 rows"):
            projector_of()(features, plan=plan_pooling([(7, 7)] * 2, [(2, 2)] * 2))


class TestFusedOp:
    def test_plain_submodules_run_as_one_op(self, features, monkeypatch):
        calls = []

        def spy(*arguments, **options):
            calls.append(options["save"])
            return project_tokens(*arguments, **options)

        monkeypatch.setattr("tokenflex.projector.project_tokens", spy)
        projector_of(save="input")(features, [4, 9, 16])
        assert calls == ["input"]

    @pytest.mark.parametrize("has_adapter", [False, True])
    def test_save_input_keeps_nothing_of_the_hidden_width(self, features, has_adapter):
        def kept_widths(save):
            projector, kept = projector_of(save=save, hidden_width=37), []
            if has_adapter:
                projector.gate = LowRank(projector.gate)
            parameters = {parameter.data_ptr() for parameter in projector.parameters()}

            def pack(tensor):
                if tensor.numel() and tensor.data_ptr() not in parameters:
                    kept.append(tensor.shape[-1] if tensor.ndim else 0)
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                assert projector(features, 9).requires_grad
            return kept

        assert 37 in kept_widths("preactivation")
        assert 37 not in kept_widths("input")


class TestModule:
    def test_state_dict_names_and_shapes(self):
        shapes = {name: tuple(t.shape) for name, t in projector_of().state_dict().items()}
        assert shapes == {
            "layernorm.weight": (C,),
            "layernorm.bias": (C,),
            "gate.weight": (H, C),
            "gate.bias": (H,),
            "up.weight": (H, C),
            "up.bias": (H,),
            "down.weight": (D, H),
            "down.bias": (D,),
        }

    def test_submodules_are_plain(self):
        projector = projector_of()
        assert [type(module) for module in projector.children()] == [
            nn.LayerNorm,
            nn.Linear,
            nn.Linear,
            nn.Linear,
        ]

    def test_state_dict_carries_everything(self, features):
        projector, other = projector_of(), TokenAdaptiveProjector(C, D, hidden_width=H).double()
        assert not torch.allclose(other(features, 9), projector(features, 9))
        other.load_state_dict(projector.state_dict())
        assert torch.equal(other(features, 9), projector(features, 9))

    @pytest.mark.parametrize(
        "duplicate", [copy.deepcopy, lambda projector: pickle.loads(pickle.dumps(projector))]
    )
    def test_copies_are_equal_and_independent(self, features, duplicate):
        projector = projector_of(num_tokens=(2, 5), pooling="resize", eps=0.5, save="input")
        twin = duplicate(projector)
        expected = projector(features)
        assert torch.equal(twin(features), expected)
        with torch.no_grad():
            twin.gate.weight.zero_()
        assert torch.equal(projector(features), expected)

    def test_reset_parameters_draws_anew_and_restores_the_norm(self):
        projector = projector_of()
        before = {name: tensor.clone() for name, tensor in projector.state_dict().items()}
        projector.reset_parameters()
        after = projector.state_dict()
        assert not any(torch.equal(after[name], tensor) for name, tensor in before.items())
        assert torch.equal(after["layernorm.weight"], torch.ones(C).double())
        assert torch.equal(after["layernorm.bias"], torch.zeros(C).double())

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("num_tokens", [9, [4, 9, 16]], ids=str)
    def test_half_precision(self, features, dtype, num_tokens):
        projector = projector_of()
        truth = projector(features, num_tokens)
        tokens = projector.to(dtype)(features.to(dtype), num_tokens)
        assert tokens.dtype == dtype
        error = (tokens.double() - truth).square().mean().sqrt() / truth.square().mean().sqrt()
        assert error < 8 * torch.finfo(dtype).eps

    @pytest.mark.parametrize("has_hook", [False, True])
    def test_autocast(self, features, has_hook):
        projector = projector_of().float()
        truth = projector(features.float(), 9)
        if has_hook:  # through the modules instead of the fused op
            projector.gate.register_forward_hook(lambda *_: None)
        with torch.autocast("cpu", torch.bfloat16):
            tokens = projector(features.float(), 9)
        assert tokens.dtype == torch.bfloat16
        torch.testing.assert_close(tokens.float(), truth, rtol=0.03, atol=0.03)
        tokens.sum().backward()
        assert projector.gate.weight.grad.dtype == torch.float32

    @pytest.mark.filterwarnings("ignore:Dynamo detected a call:UserWarning")
    def test_compiles(self, features):
        projector = projector_of()
        compiled = torch.compile(projector, backend="eager", fullgraph=True)
        for num_tokens in (9, [4, 9, 16]):
            assert_equal(compiled(features, num_tokens), projector(features, num_tokens))

    @pytest.mark.filterwarnings("ignore:Dynamo detected a call:UserWarning")
    def test_compiles_once_for_any_number_of_images(self, features):
        projector = projector_of()
        counter = CompileCounter()
        compiled = torch.compile(projector, backend=counter, fullgraph=True, dynamic=True)
        for num_images in range(2, 22):
            batch = features[:1].expand(num_images, -1, -1)
            assert_equal(compiled(batch, 9), projector(batch, 9))
        assert counter.frame_count <= 2

    def test_repr_shows_the_choices(self):
        text = repr(projector_of(num_tokens=64, pooling="resize", save="input"))
        assert "num_tokens=64, pooling='resize', save='input'" in text


class TestMisuse:
    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"vision_width": 0}, ValueError, r"^vision_width .*at least 1.*0"),
            ({"vision_width": 6.0}, TypeError, r"^vision_width .*int.*6\.0"),
            ({"vision_width": True}, TypeError, r"^vision_width .*int.*True"),
            ({"text_width": -1}, ValueError, r"^text_width .*at least 1.*-1"),
            ({"text_width": "5"}, TypeError, r"^text_width .*int.*'5'"),
            ({"hidden_width": 0}, ValueError, r"^hidden_width .*at least 1.*0"),
            ({"hidden_width": 1.5}, TypeError, r"^hidden_width .*int.*1\.5"),
            ({"num_tokens": 60}, ValueError, r"^num_tokens .*perfect square.*60.*49 and 64"),
            ({"num_tokens": (0, 4)}, ValueError, r"^num_tokens .*at least 1.*\(0, 4\)"),
            ({"num_tokens": None}, TypeError, r"^num_tokens .*int.*None"),
            ({"num_tokens": [4, 9, 16]}, TypeError, r"^num_tokens .*int.*\[4, 9, 16\]"),
            ({"pooling": "max"}, ValueError, r"^pooling .*adaptive, resize.*'max'"),
            ({"save": "all"}, ValueError, r"^save .*preactivation, input.*'all'"),
            ({"eps": 0}, ValueError, r"^eps .*positive.*0"),
            ({"eps": "1e-5"}, TypeError, r"^eps .*float.*'1e-5'"),
        ],
        ids=lambda value: None if isinstance(value, type) else str(value)[:40],
    )
    def test_construction(self, options, error, message):
        with pytest.raises(error, match=message):
            TokenAdaptiveProjector(**{"vision_width": C, "text_width": D, **options})

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"features": [[1.0]]}, TypeError, r"^features .*Tensor, got list"),
            ({"features": torch.ones(3, 49, C).long()}, TypeError, r"^features .*torch\.int64"),
            ({"features": torch.ones(C)}, ValueError, r"^features .*\[B, L, C\].*\(6,\)"),
            ({"features": torch.ones(1, 7, 7, C)}, ValueError, r"^features .*\(1, 7, 7, 6\)"),
            ({"features": torch.ones(3, 49, 7)}, ValueError, r"^features .*vision_width=6.*7"),
            ({"features": torch.ones(3, 50, C)}, ValueError, r"^grids .*50 patches"),
            ({"features": torch.ones(147, C)}, ValueError, r"^grids .*flat.*None.*\(147, 6\)"),
            ({"grids": (7, 8)}, ValueError, r"^grids.*\(7, 8\).*56.*49"),
            ({"grids": [(7, 7)] * 2}, ValueError, r"^grids .*2 for 3 images"),
            ({"grids": [(7, 7), (7, 7), (7, 6)]}, ValueError, r"^grids\[2\].*\(7, 6\).*42.*49"),
            ({"grids": [(7, 7), (7, 7), (0, 7)]}, ValueError, r"^grids\[2\].*at least 1.*\(0, 7\)"),
            ({"grids": [(7, 7), (7, 7), (7.0, 7)]}, TypeError, r"^grids\[2\].*\(7\.0, 7\)"),
            ({"grids": [(7, 7), (7, 7), (7,)]}, TypeError, r"^grids\[2\].*\(7,\)"),
            ({"grids": [(7, 7), None, (7, 7)]}, TypeError, r"^grids\[1\].*None"),
            ({"grids": [7, 7]}, TypeError, r"^grids.*7"),
            ({"grids": 7.5}, TypeError, r"^grids .*float"),
            (
                {"features": torch.ones(147, C), "grids": [(7, 7)] * 2},
                ValueError,
                r"^grids .*2 images.*98.*147",
            ),
            (
                {"features": torch.ones(147, C), "grids": (10, 10)},
                ValueError,
                r"^grids.*100.*147",
            ),
            ({"num_tokens": 10}, ValueError, r"^num_tokens .*perfect square.*10.*9 and 16"),
            ({"num_tokens": 0}, ValueError, r"^num_tokens .*at least 1.*0"),
            ({"num_tokens": [4, 9]}, ValueError, r"^num_tokens .*2 entries.*3 images"),
            ({"num_tokens": [4, 9, 10]}, ValueError, r"^num_tokens\[2\].*10.*9 and 16"),
            ({"num_tokens": [4, 9, 16.0]}, TypeError, r"^num_tokens\[2\].*16\.0"),
            ({"num_tokens": 4.0}, TypeError, r"^num_tokens .*4\.0"),
            ({"num_tokens": "4"}, TypeError, r"^num_tokens .*'4'"),
        ],
        ids=lambda value: None if isinstance(value, type) else str(value)[:60],
    )
    def test_forward(self, changes, error, message):
        projector = TokenAdaptiveProjector(C, D, hidden_width=H)
        with pytest.raises(error, match=message):
            projector(**{"features": torch.ones(3, 49, C), "num_tokens": 4, **changes})

    def test_the_unchanged_call_works(self):
        projector = TokenAdaptiveProjector(C, D, hidden_width=H)
        assert projector(torch.ones(3, 49, C), 4).shape == (3, 4, D)
