"""The kernels as torch.library ops: opcheck, torch.compile, and which backend a call takes."""

from __future__ import annotations

import random

import pytest
import torch
import torch._dynamo.testing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from tests.kernels.common import (
    GATED,
    ON_TRITON,
    PARAMETERS,
    SAVES,
    gated_of,
    parameters_of,
    run,
    sampled,
)
from tokenflex_kernels import plan_pooling, pool_norm, project_tokens, swiglu
from tokenflex_kernels.backend import select_backend
from tokenflex_kernels.pool_norm.stages import MAX_WIDTH

pytestmark = ON_TRITON

OPS = torch.ops.tokenflex
WIDTH, HIDDEN, TEXT = 6, 10, 4
IN_GRIDS, OUT_GRIDS = [(3, 2), (1, 2)], [(2, 2), (1, 3)]
PLAN = plan_pooling(IN_GRIDS, OUT_GRIDS)
PATCHES, CELLS = PLAN.num_patches, PLAN.num_cells
POOLED = PLAN.grids, CELLS


@pytest.fixture
def rows(device):
    """``rows(4, 6)``: random numbers of that shape, that require grad if the test says so."""

    def make(*shape, requires_grad=False, dtype=torch.float32):
        return torch.randn(shape).to(device, dtype).requires_grad_(requires_grad)

    return make


class TestOpcheck:
    """Schema, fake, autograd registration and AOT dispatch, as PyTorch checks them."""

    @pytest.mark.parametrize(
        ("parameters", "requires_grad", "mode"),
        sampled(6, [0, 1, 2], [False, True], ["adaptive", "resize"]),
    )
    def test_pool_norm(self, rows, requires_grad, parameters, mode):
        norm = [rows(WIDTH, requires_grad=requires_grad) for _ in range(parameters)]
        norm += [None] * (2 - parameters)
        x = rows(PATCHES, WIDTH, requires_grad=requires_grad)
        torch.library.opcheck(OPS.pool_norm.default, (x, *norm, *POOLED, mode, 1e-5))

    @pytest.mark.parametrize("requires_grad", [False, True])
    @pytest.mark.parametrize("has_bias", [False, True])
    def test_swiglu(self, device, rows, requires_grad, has_bias):
        weights = gated_of(WIDTH, HIDDEN, device=device, missing=() if has_bias else GATED[2:])
        x = rows(7, WIDTH, requires_grad=requires_grad)
        for weight in weights:
            if weight is not None:
                weight.requires_grad_(requires_grad)
        torch.library.opcheck(OPS.swiglu.default, (x, *weights))

    @pytest.mark.parametrize("wanted", [(), ("x", *PARAMETERS)])
    @pytest.mark.parametrize("save", SAVES)
    def test_project_tokens(self, device, rows, wanted, save):
        parameters = parameters_of(WIDTH, HIDDEN, TEXT, device=device)
        for name in wanted[1:]:
            parameters[name].requires_grad_()
        x = rows(PATCHES, WIDTH, requires_grad="x" in wanted)
        torch.library.opcheck(
            OPS.project_tokens.default, (x, *parameters.values(), *POOLED, "adaptive", 1e-5, save)
        )

    def test_project_tokens_without_biases(self, device, rows):
        missing = [name for name in PARAMETERS if name.endswith("bias")]
        parameters = parameters_of(WIDTH, HIDDEN, TEXT, device=device, missing=missing)
        x = rows(PATCHES, WIDTH, requires_grad=True)
        arguments = (x, *parameters.values(), *POOLED, "adaptive", 1e-5, "preactivation")
        torch.library.opcheck(OPS.project_tokens.default, arguments)

    @pytest.mark.parametrize(
        ("parameters", "save", "dtype"),
        sampled(6, [0, 1, 2], [False, True], [torch.float32, torch.bfloat16]),
    )
    def test_pool_norm_forward(self, rows, save, parameters, dtype):
        norm = [rows(WIDTH) for _ in range(parameters)] + [None] * (2 - parameters)
        arguments = (rows(PATCHES, WIDTH), *norm, *POOLED, "adaptive", 1e-5, dtype, save)
        torch.library.opcheck(OPS.pool_norm_forward.default, arguments)

    @pytest.mark.parametrize(
        ("dtype", "wanted"),
        sampled(
            6,
            [None, torch.float32, torch.bfloat16],
            [(True, True), (True, False), (False, True)],
        ),
    )
    def test_pool_norm_backward(self, rows, dtype, wanted):
        saved = rows(CELLS, WIDTH), rows(CELLS, WIDTH), rows(CELLS).abs(), rows(WIDTH)
        torch.library.opcheck(
            OPS.pool_norm_backward.default,
            (*saved, PLAN.grids, PATCHES, "resize", dtype, *wanted),
        )

    def test_pool_norm_backward_without_norm(self, rows):
        arguments = (rows(CELLS, WIDTH), rows(0, WIDTH), rows(0), None, PLAN.grids, PATCHES)
        wanted = "adaptive", torch.float32, False, False
        torch.library.opcheck(OPS.pool_norm_backward.default, (*arguments, *wanted))

    @pytest.mark.parametrize("has_bias", [False, True])
    def test_scale_shift(self, rows, has_bias):
        arguments = (rows(CELLS, WIDTH), rows(WIDTH), rows(WIDTH) if has_bias else None)
        torch.library.opcheck(OPS.scale_shift.default, arguments)

    @pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
    @pytest.mark.parametrize("has_bias", [False, True])
    def test_gate_up(self, device, rows, wanted, has_bias):
        weights = gated_of(WIDTH, HIDDEN, device=device, missing=() if has_bias else GATED[2:])
        torch.library.opcheck(OPS.gate_up.default, (rows(7, WIDTH), *weights, *wanted))

    @pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True), (False, False)])
    @pytest.mark.parametrize("has_weight", [False, True])
    def test_down_gradient(self, rows, wanted, has_weight):
        dy = rows(7, TEXT if has_weight else HIDDEN)
        weight = rows(TEXT, HIDDEN) if has_weight else None
        arguments = (dy, weight, rows(7, HIDDEN), rows(7, HIDDEN), *wanted)
        torch.library.opcheck(OPS.down_gradient.default, arguments)

    def test_input_gradient(self, rows):
        arguments = (rows(7, 2 * HIDDEN), rows(HIDDEN, WIDTH), rows(HIDDEN, WIDTH))
        torch.library.opcheck(OPS.input_gradient.default, arguments)

    @pytest.mark.parametrize(
        "op",
        ["pool_norm", "swiglu", "project_tokens", "pool_norm_forward", "gate_up"],
    )
    def test_shapes_of_an_empty_batch(self, device, rows, op):
        parameters = parameters_of(WIDTH, HIDDEN, TEXT, device=device)
        weights = gated_of(WIDTH, HIDDEN, device=device)
        x, batch = rows(0, WIDTH), (plan_pooling([], []).grids, 0, "adaptive", 1e-5)
        arguments = {
            "pool_norm": (x, None, None, *batch),
            "swiglu": (x, *weights),
            "project_tokens": (x, *parameters.values(), *batch, "input"),
            "pool_norm_forward": (x, rows(WIDTH), None, *batch, x.dtype, True),
            "gate_up": (x, *weights, True, True),
        }[op]
        torch.library.opcheck(getattr(OPS, op).default, arguments)


def calls(device):
    """Each public op as a function of its leaves and a batch of grids, and how to make leaves."""
    parameters = list(parameters_of(WIDTH, HIDDEN, TEXT, device=device).values())

    def pool(in_grids, out_grids, x, weight, bias):
        return pool_norm(x, in_grids, out_grids, weight=weight, bias=bias)

    def gated(in_grids, out_grids, x, *weights):
        return swiglu(x, *weights)

    def project(save):
        def call(in_grids, out_grids, x, *values):
            named = dict(zip(PARAMETERS, values, strict=True))
            return project_tokens(x, in_grids, out_grids, **named, save=save)

        return call

    return {
        "pool_norm": (pool, parameters[:2]),
        "swiglu": (gated, gated_of(WIDTH, HIDDEN, device=device)),
        "project_tokens": (project("preactivation"), parameters),
        "project_tokens input": (project("input"), parameters),
    }


def outcome(op, in_grids, out_grids, leaves):
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = op(in_grids, out_grids, *leaves)
    return out.detach(), *torch.autograd.grad(out.square().sum(), leaves)


@pytest.mark.parametrize(
    "name", sampled(3, ["pool_norm", "swiglu", "project_tokens", "project_tokens input"])
)
class TestCompile:
    @pytest.fixture(autouse=True)
    def _fresh_compiler(self):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    def test_whole_graph_equals_eager(self, device, name):
        op, parameters = calls(device)[name]
        compiled = torch.compile(op, fullgraph=True, dynamic=True, backend="aot_eager")
        x = torch.randn(PATCHES, WIDTH, device=device)
        arguments = (IN_GRIDS, OUT_GRIDS, [x, *parameters])
        for got, expected in zip(
            outcome(compiled, *arguments), outcome(op, *arguments), strict=True
        ):
            torch.testing.assert_close(got, expected)

    def test_whole_graph_without_gradients(self, device, name):
        op, parameters = calls(device)[name]
        compiled = torch.compile(op, fullgraph=True, dynamic=True, backend="aot_eager")
        arguments = (IN_GRIDS, OUT_GRIDS, torch.randn(PATCHES, WIDTH, device=device))
        with torch.no_grad():
            got, expected = compiled(*arguments, *parameters), op(*arguments, *parameters)
        torch.testing.assert_close(got, expected)

    def test_at_most_two_compilations_over_many_lengths(self, device, name):
        op, parameters = calls(device)[name]
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(op, fullgraph=True, dynamic=True, backend=counter)
        # First a size that no other tensor has, and never 1: PyTorch specialises both.
        for length in sampled(6, [21, 20, 2, 7, 12, 3, *range(4, 20)]):
            grids = [(1, length)], [(1, 1 + length // 2)]
            x = torch.randn(length, WIDTH, device=device)
            got = outcome(compiled, *grids, [x, *parameters])
            if length in (2, 7, 21):
                expected = outcome(op, *grids, [x, *parameters])
                for ours, theirs in zip(got, expected, strict=True):
                    torch.testing.assert_close(ours, theirs)
        assert counter.frame_count <= 2


@pytest.mark.parametrize("name", sampled(1, ["project_tokens", "pool_norm"]))
def test_a_compiled_plan_takes_any_number_of_images(device, name):
    torch._dynamo.reset()
    op, parameters = calls(device)[name]
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(op, fullgraph=True, dynamic=True, backend=counter)
    draw = random.Random(0)
    for images in (6, 5, 2, 1, 3):
        in_grids, out_grids = (
            [(draw.randint(1, 2), draw.randint(2, 3)) for _ in range(images)] for _ in range(2)
        )
        plan = plan_pooling(in_grids, out_grids)
        x = torch.randn(plan.num_patches, WIDTH, device=device)
        got = outcome(compiled, plan, None, [x, *parameters])
        if images < 3:
            expected = outcome(op, in_grids, out_grids, [x, *parameters])
            for ours, theirs in zip(got, expected, strict=True):
                torch.testing.assert_close(ours, theirs)
    assert counter.frame_count <= 2
    torch._dynamo.reset()


class TestModes:
    """A mode sees what was made under it: the plan's tensor was not."""

    def test_fake_tensors(self, device):
        plan = plan_pooling(IN_GRIDS, OUT_GRIDS)
        with FakeTensorMode():
            x = torch.empty(PATCHES, WIDTH, device=device)
            assert pool_norm(x, plan).shape == (CELLS, WIDTH)

    def test_counting(self, device):
        x = torch.randn(PATCHES, WIDTH, device=device)
        with FlopCounterMode(display=False):
            got = pool_norm(x, PLAN)
        torch.testing.assert_close(got, pool_norm(x, PLAN))


class TestBackend:
    def calls(self, device, dtype, width=WIDTH):
        x = torch.randn(PATCHES, width).to(device, dtype)
        parameters = parameters_of(width, HIDDEN, TEXT, dtype, device)
        gated = {name: parameters[name] for name in GATED}
        grids = IN_GRIDS, OUT_GRIDS
        return {
            "pool_norm": lambda: pool_norm(x, *grids, weight=parameters["norm_weight"]),
            "swiglu": lambda: swiglu(x, **gated),
            "project_tokens": lambda: project_tokens(x, *grids, **parameters),
        }

    def test_auto_takes_triton_here(self, device, launched):
        kernels = {"pool_norm": 1, "swiglu": 1, "project_tokens": 2}
        for op, call in self.calls(device, torch.float32).items():
            assert select_backend(op, device) == "triton"
            launched.clear()
            call()
            assert len(launched) == kernels[op]

    def test_reference_launches_nothing(self, device, launched, monkeypatch):
        monkeypatch.setenv("TOKENFLEX_BACKEND", "reference")
        for call in self.calls(device, torch.float32).values():
            call()
        assert launched == []

    def test_float64_takes_the_reference(self, device, launched):
        for call in self.calls(device, torch.float64).values():
            assert call().dtype == torch.float64
        assert launched == []

    def test_rows_beyond_a_program_take_the_reference(self, device, launched):
        x = torch.randn(2, MAX_WIDTH + 1, device=device)
        out = pool_norm(x, [(1, 2)], [(1, 1)])
        torch.testing.assert_close(out, x.mean(0, keepdim=True))
        assert launched == []
        pool_norm(x[:, :-1], [(1, 2)], [(1, 1)])
        assert launched == ["pool_norm_forward"]

    @pytest.mark.parametrize("op", ["pool_norm", "swiglu", "project_tokens"])
    def test_triton_asked_for_refuses_float64(self, device, monkeypatch, op):
        monkeypatch.setenv("TOKENFLEX_BACKEND", "triton")
        with pytest.raises(ValueError, match=rf"TOKENFLEX_BACKEND=triton.*{op}.*float64"):
            self.calls(device, torch.float64)[op]()

    @pytest.mark.parametrize("op", ["pool_norm", "project_tokens"])
    def test_triton_asked_for_refuses_wide_rows(self, device, monkeypatch, op):
        monkeypatch.setenv("TOKENFLEX_BACKEND", "triton")
        with pytest.raises(
            ValueError, match=rf"TOKENFLEX_BACKEND=triton.*{op}.*more than {MAX_WIDTH}"
        ):
            self.calls(device, torch.float32, MAX_WIDTH + 1)[op]()

    @pytest.mark.parametrize("save", SAVES)
    def test_kernels_and_reference_agree(self, device, monkeypatch, save):
        inputs = {
            "x": torch.randn(PATCHES, WIDTH, device=device),
            **parameters_of(WIDTH, HIDDEN, TEXT, device=device),
        }
        gradient = torch.randn(CELLS, TEXT, device=device)

        def project(x, **parameters):
            return project_tokens(x, IN_GRIDS, OUT_GRIDS, **parameters, save=save)

        results = []
        for backend in ("triton", "reference"):
            monkeypatch.setenv("TOKENFLEX_BACKEND", backend)
            results.append(run(project, inputs, gradient))
        for name, expected in results[1].items():
            torch.testing.assert_close(results[0][name], expected, rtol=1e-4, atol=1e-4)

    def test_forward_mode_is_refused(self, device):
        x = torch.randn(PATCHES, WIDTH, device=device)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            with pytest.raises((RuntimeError, NotImplementedError), match="jvp"):
                pool_norm(dual, IN_GRIDS, OUT_GRIDS)
