"""The gated unit on host memory, by the extension, against its formula in float64."""

from __future__ import annotations

import random
from itertools import product

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch.func import grad, hessian, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.common import (
    DTYPES,
    GATED,
    assert_as_close_as_eager,
    assert_equal_in_float64,
    check,
    eager_swiglu,
    gated_of,
    rms_error,
    run,
    together,
    wide,
)
from tokenflex_kernels import swiglu
from tokenflex_kernels.backend import compiled_extension, extension
from tokenflex_kernels.swiglu import native, op, stages

pytestmark = [
    pytest.mark.usefixtures("_native"),
    pytest.mark.skipif(extension() is None, reason="needs the extension"),
]

NAMES = ("x", *GATED)
# Few rows and many: in inference their products lie column by column, or row by row.
SHAPES = [(1, 7, 9), (1, 5, 100), (33, 20, 600), (70, 9, 33), (100, 3, 1), (129, 8, 64)]


@pytest.fixture
def _native(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TOKENFLEX_BACKEND", "native")


@pytest.fixture(params=[2**20, 1500], ids=["one block", "blocks"])
def blocks(request, monkeypatch):
    monkeypatch.setattr(native, "BLOCK", request.param)


def inputs_of(tokens=7, width=33, hidden=70, dtype=torch.float32, missing=()):
    x = torch.randn(tokens, width, dtype=dtype)
    return dict(zip(NAMES, [x, *gated_of(width, hidden, dtype, "cpu", missing)], strict=True))


def check_swiglu(draws, wanted=None):
    gradients = [
        torch.randn(len(draw["x"]), len(draw["gate_weight"])).to(draw["x"].dtype) for draw in draws
    ]
    check(swiglu, eager_swiglu, draws, gradients, wanted)


@pytest.mark.usefixtures("blocks")
class TestAgainstFloat64:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_forward_and_backward(self, shape, dtype):
        tokens, width, hidden = shape
        draws = max(
            2, 1000 // (tokens * hidden), 300 // (width * hidden)
        )  # of few numbers, several
        check_swiglu([inputs_of(*shape, dtype) for _ in range(draws)])

    @pytest.mark.parametrize("seed", range(8))
    def test_random_shapes_and_biases(self, seed):
        draw = random.Random(seed)
        shape = [draw.randint(1, 150) for _ in range(3)]
        missing = [name for name in GATED[2:] if draw.random() < 0.4]
        dtype = draw.choice(DTYPES)
        check_swiglu([inputs_of(*shape, dtype, missing) for _ in range(6)])

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_inference(self, shape, dtype):
        draws = [inputs_of(*shape, dtype) for _ in range(max(2, 1000 // (shape[0] * shape[2])))]
        ours, peer, truth = (
            together([{"out": op(**draw)} for draw in batch])
            for op, batch in (
                (swiglu, draws),
                (eager_swiglu, draws),
                (eager_swiglu, map(wide, draws)),
            )
        )
        assert_as_close_as_eager(ours, peer, truth)

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_float64_is_exact(self, shape):
        inputs = inputs_of(*shape, torch.float64)
        gradient = torch.randn(shape[0], shape[2], dtype=torch.float64)
        ours, truth = (run(f, inputs, gradient) for f in (swiglu, eager_swiglu))
        for name, expected in truth.items():
            assert_equal_in_float64(ours[name], expected)

    @pytest.mark.parametrize(
        "wanted", [flags for flags in product([False, True], repeat=5) if any(flags)]
    )
    def test_any_subset_of_inputs(self, wanted):
        names = [name for name, flag in zip(NAMES, wanted, strict=True) if flag]
        for tokens in (5, 50):
            check_swiglu([inputs_of(tokens, 9, 13)], names)


class TestLayouts:
    LAYOUTS = (
        lambda t: torch.cat([t, t + 1], -1)[..., : t.shape[-1]],
        lambda t: t.repeat_interleave(2, -1)[..., ::2],
        lambda t: t.T.contiguous().T,
        lambda t: F.pad(t.flatten(), (1, 0))[1:].view_as(t),
    )

    @pytest.mark.parametrize("lay_out", LAYOUTS)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", [(8, 32, 64), (80, 32, 40)], ids=str)
    def test_any_memory_layout_gives_the_same(self, lay_out, dtype, shape):
        inputs = inputs_of(*shape, dtype)
        gradient = torch.randn(shape[0], shape[2], dtype=dtype)
        laid_out = {
            name: lay_out(t) if t.ndim == 2 else t.repeat_interleave(2)[::2]
            for name, t in inputs.items()
        }
        expected = run(swiglu, inputs, gradient)
        # The library may round the products of another layout otherwise.
        close = {} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-3}
        for name, result in run(swiglu, laid_out, lay_out(gradient)).items():
            torch.testing.assert_close(result, expected[name], **close)

    @pytest.mark.parametrize("shape", [(1, 70), (7, 1), (1, 1)])
    def test_expanded_gradient_equals_a_dense_one(self, shape):
        inputs = inputs_of()
        gradient = torch.randn(shape).expand(7, 70)
        expected = run(swiglu, inputs, gradient.contiguous())
        for name, result in run(swiglu, inputs, gradient).items():
            assert torch.equal(result, expected[name]), name

    def test_no_tokens(self):
        inputs = inputs_of(0)
        results = run(swiglu, inputs, torch.empty(0, 70))
        assert results["out"].shape == (0, 70)
        for name, tensor in inputs.items():
            assert torch.equal(results[name], torch.zeros_like(tensor))


# ---- The pointwise halves by themselves.


def multiply(gate, up, by_columns=False, threads=1):
    lay_out = (lambda t: t.t().contiguous()) if by_columns else torch.Tensor.contiguous
    parts = lay_out(gate), lay_out(up)
    out = torch.empty_like(gate)
    compiled_extension().gated_product(
        *(part.data_ptr() for part in parts),
        *(*gate.shape, by_columns, out.data_ptr(), name_of(gate), threads),
    )
    return out


def differentiate(grad, gate, up, threads=1):
    rows, hidden = gate.shape
    grads, out = gate.new_empty(rows, 2 * hidden), torch.empty_like(gate)
    sums = torch.zeros(2 * hidden, dtype=torch.promote_types(gate.dtype, torch.float32))
    compiled_extension().gate_gradients(
        *(gate.data_ptr(), up.data_ptr(), rows, hidden),
        *(grad.data_ptr(), grad.stride(0) * grad.element_size()),
        *(grads.data_ptr(), out.data_ptr(), sums.data_ptr(), name_of(gate), threads),
    )
    return grads, out, sums


def name_of(tensor):
    return str(tensor.dtype).removeprefix("torch.")


class TestPointwise:
    @pytest.mark.parametrize("by_columns", [False, True])
    @pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
    @pytest.mark.parametrize("shape", [(1, 1), (31, 33), (64, 700), (300, 90)], ids=str)
    def test_any_number_of_threads_gives_the_same_bits(self, shape, dtype, by_columns):
        repeats = 1 + 2**18 // (shape[0] * shape[1])  # enough for several threads
        gate, up, grad = (torch.randn(shape[0], shape[1] * repeats).to(dtype) for _ in range(3))
        expected = multiply(gate, up), *differentiate(grad, gate, up)
        for threads in (2, 3, 7):
            actual = (
                multiply(gate, up, by_columns, threads),
                *differentiate(grad, gate, up, threads),
            )
            assert all(map(torch.equal, actual, expected))

    @pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 10.0, 80.0])
    def test_silu_is_as_exact_as_pytorchs(self, scale):
        gate = scale * torch.randn(1, 10**5)
        ones, wide = torch.ones_like(gate), gate.double().requires_grad_()
        truth = F.silu(wide)
        (slope,) = torch.autograd.grad(truth.sum(), wide)
        grads, product, _ = differentiate(ones, gate, ones)
        peer_slope = torch.ops.aten.silu_backward(ones, gate)
        for ours, peer, exact in (
            (multiply(gate, ones), F.silu(gate), truth),
            (product, F.silu(gate), truth),
            (grads[:, : gate.shape[1]], peer_slope, slope),
        ):
            assert rms_error(ours, exact.detach()) <= 1.2 * rms_error(peer, exact.detach())

    def test_large_negative_gates_keep_their_subnormal_results(self):
        gate = torch.arange(-110.0, -80.0, 0.125)[None]
        truth = F.silu(gate.double())
        assert (
            (multiply(gate, torch.ones_like(gate)) - truth).abs() <= 1e-4 * -truth + 1e-43
        ).all()

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("by_columns", [False, True])
    def test_extremes_end_where_pytorchs_do(self, by_columns, dtype):
        inf, nan = float("inf"), float("nan")
        gate = torch.tensor([inf, -inf, nan, 1e4, -1e4, 0.0, -0.0, 3e-39, -100.0]).to(dtype)
        up, grad = torch.full_like(gate, 2.0), torch.full_like(gate, 3.0)
        wide = gate.double()
        slope = torch.ops.aten.silu_backward(grad.double(), wide)
        arguments = gate[None], up[None], by_columns
        grads, product, _ = differentiate(grad[None], gate[None], up[None])
        for actual, expected in (
            (multiply(*arguments)[0], F.silu(wide) * 2),
            (product[0], F.silu(wide) * 2),
            (grads[0, : len(gate)], slope * 2),
            (grads[0, len(gate) :], F.silu(wide) * 3),
        ):
            torch.testing.assert_close(
                actual, expected.to(dtype), equal_nan=True, rtol=1e-2, atol=1e-30
            )
        zeros = multiply(*arguments)[0, [4, 6]]
        assert torch.equal(zeros, torch.zeros(2, dtype=dtype))
        assert bool(zeros.signbit().all())

    @pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
    @pytest.mark.parametrize("shape", [(1, 1), (31, 65), (100, 3), (64, 64)], ids=str)
    def test_transposed(self, shape, dtype):
        matrix = torch.randn(shape[0], 2 * shape[1]).to(dtype)
        for part in (
            matrix,
            matrix[:, : shape[1]],
            matrix[:, ::2],
            matrix[:1].expand(shape[0], -1),
        ):
            result = native.transposed(part)
            assert result.is_contiguous()
            assert torch.equal(result, part.t())

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("rows", [1, 3, 40])
    def test_linear_is_that_of_pytorch(self, rows, bias, dtype):
        x, weight = torch.randn(rows, 50).to(dtype), torch.randn(64, 50).to(dtype)
        shift = torch.randn(64).to(dtype) if bias else None
        torch.testing.assert_close(
            native.linear(x, weight, shift), F.linear(x, weight, shift), rtol=1e-2, atol=1e-2
        )


# ---- As a part of PyTorch.


class Allocations(TorchDispatchMode):
    """Records the sizes of the tensors that are made."""

    def __init__(self):
        super().__init__()
        self.elements: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if isinstance(result, torch.Tensor):
            self.elements.append(result.untyped_storage().nbytes() // result.element_size())
        return result


def test_inference_keeps_one_block_of_gate_and_up(monkeypatch):
    monkeypatch.setattr(native, "BLOCK", 32 * 64)
    inputs = inputs_of(500, 8, 64)
    product, nothing = torch.empty(500, 64), torch.empty(0)
    with Allocations() as made:
        native.gate_up(*inputs.values(), product, nothing, nothing)
    assert max(made.elements) <= max(2 * 32 * 64, product.numel())
    torch.testing.assert_close(product, eager_swiglu(**inputs))


def test_transforms_run_the_reference_by_default(monkeypatch):
    inputs = tuple(inputs_of(5, 3, 4, torch.float64).values())

    def loss(*values):
        return swiglu(*values).sin().sum()

    def transformed():
        return (
            *grad(loss, tuple(range(5)))(*inputs),
            *hessian(loss, (0, 1))(*inputs)[0],
            jvp(swiglu, inputs, tuple(value.cos() for value in inputs))[1],
            vmap(swiglu, (0, None, None, None, None))(torch.stack(inputs[:1] * 2), *inputs[1:]),
        )

    monkeypatch.setenv("TOKENFLEX_BACKEND", "auto")
    ours = transformed()
    monkeypatch.setenv("TOKENFLEX_BACKEND", "reference")
    torch.testing.assert_close(ours, transformed())


def test_a_second_derivative_is_refused_in_words():
    inputs = [value.requires_grad_() for value in inputs_of(5, 3, 4).values()]
    (first,) = torch.autograd.grad(swiglu(*inputs).sin().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("shape", [(5, 3, 8), (9, 3, 8)], ids=str)
def test_the_ops_pass_opcheck(shape):
    inputs = list(inputs_of(*shape).values())
    leaves = [value.clone().requires_grad_() for value in inputs]
    torch.library.opcheck(op.fused_swiglu.overload, leaves)
    product, gate, up = stages.gate_up(*inputs, True, True)
    torch.library.opcheck(stages.gate_up.overload, (*inputs, True, True))
    torch.library.opcheck(stages.gate_up.overload, (*inputs, True, False))
    torch.library.opcheck(stages.down_gradient.overload, (product, None, gate, up, True, True))
    torch.library.opcheck(torch.ops.tokenflex.host_linear.default, (inputs[0], *inputs[1::2]))
    torch.library.opcheck(
        torch.ops.tokenflex.host_transposed_product.default, (inputs[0], inputs[0])
    )


def test_compiled_whole_for_any_number_of_rows():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(swiglu, fullgraph=True, dynamic=True, backend=counter)
    for rows in (*range(2, 20), 90, 200):
        inputs = inputs_of(rows, 5, 64)
        gradient = torch.randn(rows, 64)
        ours, expected = run(compiled, inputs, gradient), run(swiglu, inputs, gradient)
        torch.testing.assert_close(ours, expected)
    assert counter.frame_count <= 2
