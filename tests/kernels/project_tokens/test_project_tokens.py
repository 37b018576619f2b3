"""`project_tokens` against the chain written out in float64, and what training keeps for it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.kernels import common
from tests.kernels.common import (
    DTYPES,
    PARAMETERS,
    SAVES,
    assert_not_less_exact,
    eager_project,
    rms_error,
    rows_of,
    together,
    wide,
)
from tokenflex_kernels import project_tokens

BIASES = tuple(name for name in PARAMETERS if name.endswith("bias"))
IN_GRIDS, OUT_GRIDS = [(5, 7), (4, 4), (2, 3)], [(2, 3), (2, 2), (3, 4)]


def parameters_of(width=6, hidden=10, text=4, dtype=torch.float64):
    return common.parameters_of(width, hidden, text, dtype)


def assert_equal_in_float64(actual, expected):
    common.assert_equal_in_float64(actual, expected, tolerance=1e-11)


def run(op, x, parameters, gradient, in_grids=IN_GRIDS, out_grids=OUT_GRIDS, **options):
    """The output and the gradients of x and of every parameter, by name."""
    op = partial(op, in_grids=in_grids, out_grids=out_grids, **options)
    return common.run(op, {"x": x, **parameters}, gradient)


@pytest.fixture
def x():
    return torch.randn(rows_of(IN_GRIDS), 6, dtype=torch.float64)


@pytest.fixture
def gradient():
    return torch.randn(rows_of(OUT_GRIDS), 4, dtype=torch.float64)


class TestValues:
    @pytest.mark.parametrize("save", SAVES)
    @pytest.mark.parametrize(
        ("mode", "in_grids", "out_grids"),
        [
            ("adaptive", IN_GRIDS, OUT_GRIDS),
            ("adaptive", [(27, 27), (6, 4)], [(8, 8), (3, 2)]),
            ("resize", IN_GRIDS, OUT_GRIDS),
        ],
    )
    def test_equals_the_written_out_chain(self, mode, in_grids, out_grids, save):
        x = torch.randn(rows_of(in_grids), 6, dtype=torch.float64)
        gradient = torch.randn(rows_of(out_grids), 4, dtype=torch.float64)
        arguments = (x, parameters_of(), gradient, in_grids, out_grids)
        ours = run(project_tokens, *arguments, mode=mode, eps=0.1, save=save)
        truth = run(eager_project, *arguments, mode=mode, eps=0.1)
        assert ours.keys() == truth.keys()
        assert ours["out"].shape == gradient.shape
        for name, expected in truth.items():
            assert_equal_in_float64(ours[name], expected)

    def test_defaults_are_adaptive_with_pytorchs_eps(self, x):
        x = 1e-3 * x  # small variance: eps carries weight
        parameters = parameters_of()
        actual = project_tokens(x, IN_GRIDS, OUT_GRIDS, **parameters)
        assert_equal_in_float64(
            actual, eager_project(x, IN_GRIDS, OUT_GRIDS, **parameters, eps=1e-5)
        )

    @pytest.mark.parametrize("save", SAVES)
    @pytest.mark.parametrize("missing", [*((name,) for name in BIASES), BIASES])
    def test_each_bias_is_optional(self, x, gradient, missing, save):
        parameters = {**parameters_of(), **dict.fromkeys(missing)}
        ours = run(project_tokens, x, parameters, gradient, save=save)
        truth = run(eager_project, x, parameters, gradient)
        assert ours.keys() == truth.keys()
        for name, expected in truth.items():
            assert_equal_in_float64(ours[name], expected)

    @pytest.mark.parametrize("save", SAVES)
    def test_no_images(self, save):
        x = torch.empty(0, 6, dtype=torch.float64)
        gradient = torch.empty(0, 4, dtype=torch.float64)
        parameters = parameters_of()
        ours = run(project_tokens, x, parameters, gradient, [], [], save=save)
        assert (ours["out"].shape, ours["x"].shape) == ((0, 4), (0, 6))
        for name, tensor in parameters.items():
            assert torch.equal(ours[name], torch.zeros_like(tensor))


class TestPrecision:
    """R1: not further from float64 than 1.2 times eager PyTorch in the same dtype."""

    @pytest.mark.parametrize("save", SAVES)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_forward_and_backward(self, dtype, save):
        in_grids, out_grids = [(12, 12), (5, 7), (9, 9)], [(8, 8), (2, 3), (5, 5)]
        draws = []
        # A bias gradient is a few numbers: only over several draws is its error more than luck.
        for _ in range(8):
            x = torch.randn(rows_of(in_grids), 48, dtype=dtype)
            parameters = parameters_of(48, 96, 40, dtype)
            gradient = torch.randn(rows_of(out_grids), 40, dtype=dtype)
            batch = x, parameters, gradient, in_grids, out_grids
            precise = x.double(), wide(parameters), gradient.double(), in_grids, out_grids
            draws.append(
                (
                    run(project_tokens, *batch, save=save),
                    run(eager_project, *batch),
                    run(eager_project, *precise),
                )
            )
        assert_not_less_exact(*map(together, zip(*draws, strict=True)))


class TestDtypes:
    @pytest.mark.parametrize("save", SAVES)
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_float32_weights_with_narrow_activations(self, x, gradient, dtype, save):
        parameters = parameters_of(dtype=torch.float32)
        ours = run(project_tokens, x.to(dtype), parameters, gradient.to(dtype), save=save)
        assert ours["out"].dtype == ours["x"].dtype == dtype
        assert all(ours[name].dtype == torch.float32 for name in PARAMETERS)

    @pytest.mark.parametrize("save", SAVES)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_autocast_gives_the_dtypes_of_linears(self, x, gradient, dtype, save):
        x, parameters = x.to(dtype), parameters_of(dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            ours = run(project_tokens, x, parameters, gradient.bfloat16(), save=save)
        assert ours["out"].dtype == torch.bfloat16
        assert ours["x"].dtype == dtype
        assert all(ours[name].dtype == torch.float32 for name in PARAMETERS)
        truth = run(eager_project, x.double(), wide(parameters), gradient)
        for name, expected in truth.items():
            # bfloat16 keeps 8 bits; a missing term or a wrong one is off by far more.
            assert rms_error(ours[name], expected) <= 0.03 * expected.square().mean().sqrt(), name


class TestWhatTrainingKeeps:
    TOKENS, HIDDEN = 3 * 64, 96

    def kept_bytes(self, save):
        """Bytes of the distinct tensors kept for backward, the leaves aside."""
        in_grids, out_grids = [(9, 9)] * 3, [(8, 8)] * 3
        x = torch.randn(rows_of(in_grids), 16, requires_grad=True)
        parameters = parameters_of(16, self.HIDDEN, 24, torch.float32)
        for tensor in parameters.values():
            tensor.requires_grad_()
        leaves = {tensor.untyped_storage().data_ptr() for tensor in (x, *parameters.values())}
        kept = {}

        def pack(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = project_tokens(x, in_grids, out_grids, **parameters, save=save)
        assert out.requires_grad
        return sum(
            tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in leaves
        )

    def test_preactivation_keeps_gate_and_up(self):
        assert self.kept_bytes("preactivation") >= 2 * self.TOKENS * self.HIDDEN * 4

    def test_input_keeps_nothing_of_the_hidden_width(self):
        two_hidden_rows = 2 * self.TOKENS * self.HIDDEN * 4
        kept = self.kept_bytes("input")
        assert 0 < kept <= self.kept_bytes("preactivation") - two_hidden_rows
        assert kept < self.TOKENS * self.HIDDEN * 4

    def test_values_and_gradients_do_not_depend_on_it(self, x, gradient):
        parameters = parameters_of()
        kept, computed_again = (
            run(project_tokens, x, parameters, gradient, save=save) for save in SAVES
        )
        for name, expected in kept.items():
            assert torch.equal(computed_again[name], expected), name

    @pytest.mark.parametrize("save", SAVES)
    def test_no_graph_without_gradients(self, x, save):
        parameters = {name: tensor.requires_grad_() for name, tensor in parameters_of().items()}
        assert not project_tokens(
            x, IN_GRIDS, OUT_GRIDS, **{k: v.detach() for k, v in parameters.items()}, save=save
        ).requires_grad
        with torch.no_grad():
            assert not project_tokens(x, IN_GRIDS, OUT_GRIDS, **parameters, save=save).requires_grad


class TestGradients:
    @pytest.mark.parametrize("save", SAVES)
    def test_gradcheck(self, save):
        in_grids, out_grids = [(2, 3), (1, 2)], [(1, 2), (2, 1)]
        inputs = [torch.randn(8, 3, dtype=torch.float64), *parameters_of(3, 4, 2).values()]

        def op(x, *parameters):
            named = dict(zip(PARAMETERS, parameters, strict=True))
            return project_tokens(x, in_grids, out_grids, **named, eps=0.1, save=save)

        assert torch.autograd.gradcheck(op, [tensor.requires_grad_() for tensor in inputs])

    @pytest.mark.parametrize("save", SAVES)
    @pytest.mark.parametrize(
        "wanted",
        [
            ("x",),
            ("norm_weight",),
            ("gate_weight",),
            ("up_bias",),
            ("down_weight",),
            ("down_bias",),
            ("x", "down_bias"),
            ("norm_bias", "up_weight"),
            ("gate_weight", "gate_bias", "up_weight", "up_bias"),
        ],
        ids="+".join,
    )
    def test_any_subset_may_require_grad(self, x, gradient, wanted, save):
        parameters = parameters_of()
        truth = run(eager_project, x, parameters, gradient)
        inputs = {"x": x, **parameters}
        for name in wanted:
            inputs[name].requires_grad_()
        out = project_tokens(inputs["x"], IN_GRIDS, OUT_GRIDS, **parameters, save=save)
        out.backward(gradient)
        assert {name for name, tensor in inputs.items() if tensor.grad is not None} == set(wanted)
        for name in wanted:
            assert_equal_in_float64(inputs[name].grad, truth[name])

    @pytest.mark.parametrize("save", SAVES)
    def test_retain_graph_gives_the_same_again(self, x, gradient, save):
        leaves = [x, *parameters_of().values()]
        for leaf in leaves:
            leaf.requires_grad_()
        named = dict(zip(PARAMETERS, leaves[1:], strict=True))
        out = project_tokens(x, IN_GRIDS, OUT_GRIDS, **named, save=save)
        before = [tensor.detach().clone() for tensor in (*leaves, gradient, out)]
        first = torch.autograd.grad(out, leaves, gradient, retain_graph=True)
        second = torch.autograd.grad(out, leaves, gradient)
        for again, once in zip(second, first, strict=True):
            assert torch.equal(again, once)
        for tensor, copy in zip((*leaves, gradient, out), before, strict=True):
            assert torch.equal(tensor, copy)  # nothing was written in place

    @pytest.mark.parametrize("save", SAVES)
    def test_output_used_twice(self, x, save):
        parameters = parameters_of()

        def used_twice(op, **options):
            leaf = x.clone().requires_grad_()
            out = op(leaf, IN_GRIDS, OUT_GRIDS, **parameters, **options)
            (out.sin().sum() + (out * out).sum()).backward()
            return leaf.grad

        assert_equal_in_float64(used_twice(project_tokens, save=save), used_twice(eager_project))

    @pytest.mark.parametrize("save", SAVES)
    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_gradient_checkpointing(self, x, gradient, use_reentrant, save):
        parameters = parameters_of()

        def checkpointed(x, in_grids, out_grids, **parameters):
            def op(x, *values):
                named = dict(zip(PARAMETERS, values, strict=True))
                return project_tokens(x, in_grids, out_grids, **named, save=save)

            return checkpoint(op, x, *parameters.values(), use_reentrant=use_reentrant)

        ours = run_backward(checkpointed, x, parameters, gradient)
        truth = run_backward(eager_project, x, parameters, gradient)
        for name, expected in truth.items():
            assert_equal_in_float64(ours[name], expected)


def run_backward(op, x, parameters, gradient):
    """As ``run``, but by ``backward``: the reentrant checkpoint allows nothing else."""
    leaves = {name: t.clone().requires_grad_() for name, t in {"x": x, **parameters}.items()}
    named = {name: leaves[name] for name in PARAMETERS}
    op(leaves["x"], IN_GRIDS, OUT_GRIDS, **named).backward(gradient)
    return {name: leaf.grad for name, leaf in leaves.items()}


def call(**changes):
    """A call that works, but for ``changes``."""
    arguments = {
        "x": torch.randn(35, 6),
        "in_grids": [(5, 7)],
        "out_grids": [(2, 3)],
        **parameters_of(6, 10, 4, torch.float32),
        **changes,
    }
    return project_tokens(**arguments)


class TestMisuse:
    def test_the_unchanged_call_works(self):
        assert call().shape == (6, 4)

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"x": 1.0}, TypeError, r"^x must be a torch\.Tensor, got float"),
            ({"x": torch.randn(1, 35, 6)}, ValueError, r"^x .*2 dim.*\(1, 35, 6\)"),
            ({"x": torch.ones(35, 6).byte()}, TypeError, r"^x .*float.*torch\.uint8"),
            ({"x": torch.randn(34, 6)}, ValueError, r"in_grids.* 35 .*34"),
            ({"x": torch.randn(35, 7)}, ValueError, r"^norm_weight .*\(7,\).*\(6,\)"),
            ({"in_grids": [(5, 7, 1)]}, TypeError, r"^in_grids\[0\].*\(5, 7, 1\)"),
            ({"out_grids": [(2, 0)]}, ValueError, r"^out_grids\[0\].*at least 1.*\(2, 0\)"),
            ({"out_grids": []}, ValueError, r"in_grids and out_grids.* 1 and 0"),
            ({"mode": "nearest"}, ValueError, r"^mode .*adaptive, resize.*'nearest'"),
            ({"eps": 0}, ValueError, r"^eps .*positive.*0"),
            ({"eps": None}, TypeError, r"^eps .*float.*None"),
            ({"save": "everything"}, ValueError, r"^save .*preactivation, input.*'everything'"),
            ({"save": None}, ValueError, r"^save .*preactivation, input.*None"),
            ({"save": True}, ValueError, r"^save .*preactivation, input.*True"),
            ({"norm_weight": None}, TypeError, r"^norm_weight .*Tensor, got NoneType"),
            ({"norm_weight": torch.ones(5)}, ValueError, r"^norm_weight .*\(6,\).*\(5,\)"),
            ({"norm_bias": torch.ones(5)}, ValueError, r"^norm_bias .*\(6,\).*\(5,\)"),
            (
                {"gate_weight": torch.ones(10, 5)},
                ValueError,
                r"^gate_weight .*\(10, 6\).*\(10, 5\)",
            ),
            ({"up_weight": torch.ones(9, 6)}, ValueError, r"^up_weight .*\(10, 6\).*\(9, 6\)"),
            ({"gate_bias": torch.ones(9)}, ValueError, r"^gate_bias .*\(10,\).*\(9,\)"),
            ({"up_bias": torch.ones(9)}, ValueError, r"^up_bias .*\(10,\).*\(9,\)"),
            (
                {"down_weight": torch.ones(10, 4)},
                ValueError,
                r"^down_weight .*\(10, 10\).*\(10, 4\)",
            ),
            ({"down_weight": torch.ones(10)}, ValueError, r"^down_weight .*2 dim.*\(10,\)"),
            ({"down_weight": None}, TypeError, r"^down_weight .*Tensor, got NoneType"),
            ({"down_bias": torch.ones(5)}, ValueError, r"^down_bias .*\(4,\).*\(5,\)"),
            ({"down_bias": 0}, TypeError, r"^down_bias .*Tensor, got int"),
            (
                {"down_weight": torch.ones(4, 10).double()},
                TypeError,
                r"^down_weight .*torch\.float32.*torch\.float64",
            ),
            (
                {"down_bias": torch.ones(4, device="meta")},
                ValueError,
                r"^down_bias .*x, cpu.*meta",
            ),
        ],
        ids=lambda value: None if isinstance(value, type) else str(value)[:40],
    )
    def test_says_what_is_wrong(self, changes, error, message):
        with pytest.raises(error, match=message):
            call(**changes)


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize(
    "dtype", [pytest.param(dtype, marks=pytest.mark.gpu, id=str(dtype)) for dtype in DTYPES]
)
def test_cuda_is_as_close_to_float64_as_eager_cuda(dtype, save):
    in_grids, out_grids = [(27, 27)] * 3, [(8, 8), (12, 12), (16, 16)]
    x = torch.randn(rows_of(in_grids), 1152, dtype=dtype)
    parameters = parameters_of(1152, 3456, 2048, dtype)
    gradient = torch.randn(rows_of(out_grids), 2048, dtype=dtype)

    def at(device, to):
        tensors = {name: tensor.to(device, to) for name, tensor in parameters.items()}
        return x.to(device, to), tensors, gradient.to(device, to), in_grids, out_grids

    assert_not_less_exact(
        run(project_tokens, *at("cuda", dtype), save=save),
        run(eager_project, *at("cuda", dtype)),
        run(eager_project, *at("cpu", torch.float64)),
    )
