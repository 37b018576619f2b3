"""`project_and_pack` on the CPU, by the extension or the reference."""

from __future__ import annotations

import random

import pytest
import torch
import torch._dynamo.testing
from torch.utils.checkpoint import checkpoint

from tests.kernels.common import DTYPES, MODES, PARAMETERS, SAVES, assert_equal_in_float64, check
from tests.kernels.common import run as run_op
from tests.kernels.project_and_pack.batches import (
    BATCHES,
    IMAGE,
    WITHOUT_IMAGES,
    batch_of,
    gradient_of,
    inputs_of,
    ours,
    peer,
    random_batch,
)
from tokenflex_kernels import (
    pack_embeddings,
    plan_packing,
    plan_pooling,
    project_and_pack,
    project_tokens,
)
from tokenflex_kernels.backend import extension
from tokenflex_kernels.packing import ops
from tokenflex_kernels.pool_norm.plan import grids_of
from tokenflex_kernels.project_and_pack import native
from tokenflex_kernels.project_and_pack.op import fused_project_and_pack
from tokenflex_kernels.project_and_pack.stages import packed_down

NAMES = ("x", "embedding", *PARAMETERS)
BIASES = tuple(name for name in PARAMETERS if name.endswith("bias"))
needs_extension = pytest.mark.skipif(extension() is None, reason="needs the extension")


def two_calls(batch, **options):
    """The op as the two calls that it stands for."""

    def op(x, embedding, **parameters):
        tokens = project_tokens(x, batch.in_grids, batch.out_grids, **parameters, **options)
        return pack_embeddings(embedding, tokens, batch.plan)

    return op


@pytest.fixture(params=["native", "native-direct", "reference"])
def backend(request, monkeypatch):
    name, _, direct = request.param.partition("-")
    if name == "native" and extension() is None:
        pytest.skip("needs the extension")
    monkeypatch.setenv("TOKENFLEX_BACKEND", name)
    if direct:  # whatever the number of rows
        monkeypatch.setattr(native, "DIRECT_BYTES", 0)


@pytest.mark.usefixtures("backend")
class TestValues:
    @pytest.mark.parametrize("save", SAVES)
    @pytest.mark.parametrize("name", BATCHES)
    def test_equals_pytorchs_ops_in_float64(self, name, save):
        batch = BATCHES[name]
        inputs = inputs_of(batch, dtype=torch.float64)
        gradient = gradient_of(batch, dtype=torch.float64)
        actual = run_op(ours(batch, save=save, eps=0.1), inputs, gradient)
        expected = run_op(peer(batch, eps=0.1), inputs, gradient)
        for result in (*NAMES, "out"):
            assert_equal_in_float64(actual[result], expected[result], tolerance=1e-11)

    @pytest.mark.parametrize("seed", range(6))
    def test_random_shapes_are_as_close_to_float64_as_pytorch(self, seed):
        draw = random.Random(seed)
        batch = random_batch(draw)
        widths = [draw.randint(8, 70) for _ in range(3)]
        dtype, mode, save = draw.choice(DTYPES), draw.choice(MODES), draw.choice(SAVES)
        missing = [name for name in BIASES if draw.random() < 0.4]
        draws = [inputs_of(batch, *widths, dtype, missing=missing) for _ in range(6)]
        gradients = [gradient_of(batch, widths[2], dtype) for _ in draws]
        check(ours(batch, mode=mode, save=save), peer(batch, mode=mode), draws, gradients)

    @pytest.mark.parametrize("name", WITHOUT_IMAGES)
    def test_without_images_the_weights_get_zeros(self, name):
        batch = WITHOUT_IMAGES[name]
        inputs, gradient = inputs_of(batch), gradient_of(batch)
        results = run_op(ours(batch), inputs, gradient)
        assert torch.equal(results["out"], inputs["embedding"][batch.plan.source.long()])
        rows = batch.plan.source.long()
        expected = torch.zeros_like(inputs["embedding"]).index_add(0, rows, gradient)
        torch.testing.assert_close(results["embedding"], expected)
        for result in ("x", *PARAMETERS):
            assert torch.equal(results[result], torch.zeros_like(inputs[result])), result

    def test_images_that_are_shown_twice_or_never_get_the_sum_of_their_rows(self):
        batch = batch_of(
            [[IMAGE, 2], [IMAGE, 4, IMAGE]], [(2, 2), (1, 2), (1, 1)], image_index=[1, 0, 1]
        )
        inputs, gradient = inputs_of(batch), gradient_of(batch)
        actual = run_op(ours(batch), inputs, gradient)
        expected = run_op(two_calls(batch), inputs, gradient)
        assert all(torch.equal(actual[result], expected[result]) for result in expected)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("name", ["interleaved", "one image"])
    @pytest.mark.parametrize("widths", [(12, 20, 8), (9, 13, 96)])  # few rows of wide weights
    def test_equals_the_two_calls_bit_by_bit(self, name, dtype, widths):
        batch = BATCHES[name]
        inputs = inputs_of(batch, *widths, dtype)
        gradient = gradient_of(batch, widths[2], dtype)
        actual = run_op(ours(batch), inputs, gradient)
        expected = run_op(two_calls(batch), inputs, gradient)
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[result], expected[result]) for result in expected)


@pytest.mark.usefixtures("backend")
class TestGradients:
    @pytest.mark.parametrize("save", SAVES)
    @pytest.mark.parametrize(
        "wanted",
        [
            *((name,) for name in NAMES),
            ("embedding", "down_bias"),
            ("embedding", "x"),
            ("x", "down_weight"),
            ("norm_bias", "up_weight", "embedding"),
        ],
        ids="+".join,
    )
    def test_any_subset_may_require_grad(self, wanted, save):
        batch = BATCHES["interleaved"]
        inputs = inputs_of(batch, dtype=torch.float64)
        gradient = gradient_of(batch, dtype=torch.float64)
        expected = run_op(peer(batch), inputs, gradient)
        for name in wanted:
            inputs[name].requires_grad_()
        ours(batch, save=save)(**inputs).backward(gradient)
        grads = {name: tensor.grad for name, tensor in inputs.items() if tensor.grad is not None}
        assert grads.keys() == set(wanted)
        for name, grad in grads.items():
            assert_equal_in_float64(grad, expected[name], tolerance=1e-11)

    @pytest.mark.parametrize("name", ["interleaved", "one image"])
    @pytest.mark.parametrize("save", SAVES)
    def test_backward_runs_again_and_writes_into_nothing(self, name, save):
        batch = BATCHES[name]
        inputs = {name: t.requires_grad_() for name, t in inputs_of(batch).items()}
        gradient, leaves = gradient_of(batch), list(inputs.values())
        out = ours(batch, save=save)(**inputs)
        maps = batch.plan.source, batch.plan.vision_rows
        before = [(t, t.detach().clone()) for t in (*leaves, gradient, out, *maps)]
        first = torch.autograd.grad(out, leaves, gradient, retain_graph=True)
        second = torch.autograd.grad(out, leaves, gradient)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert all(torch.equal(tensor, copy) for tensor, copy in before)

    @pytest.mark.parametrize("name", ["interleaved", "one image"])
    def test_any_layout_of_the_gradient(self, name):
        batch = BATCHES[name]
        inputs = inputs_of(batch)
        dense = torch.randn(1, 8).expand(batch.plan.num_tokens, 8)
        spread = torch.randn(batch.plan.num_tokens, 16)[:, ::2]
        for gradient in (dense, spread, torch.ones(()).expand(batch.plan.num_tokens, 8)):
            actual = run_op(ours(batch), inputs, gradient)
            expected = run_op(ours(batch), inputs, gradient.contiguous())
            for result in expected:
                torch.testing.assert_close(actual[result], expected[result])

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_gradient_checkpointing(self, use_reentrant):
        batch = BATCHES["interleaved"]
        inputs, gradient = inputs_of(batch), gradient_of(batch)

        def gradients(through):
            leaves = {name: t.clone().requires_grad_() for name, t in inputs.items()}
            through(leaves).backward(gradient)
            return [leaf.grad for leaf in leaves.values()]

        def checkpointed(leaves):
            def call(*values):
                return ours(batch)(**dict(zip(leaves, values, strict=True)))

            return checkpoint(call, *leaves.values(), use_reentrant=use_reentrant)

        plain, again = gradients(lambda leaves: ours(batch)(**leaves)), gradients(checkpointed)
        assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@needs_extension
class TestNative:
    @pytest.fixture(autouse=True)
    def _native(self, monkeypatch):
        monkeypatch.setenv("TOKENFLEX_BACKEND", "native")

    def test_second_derivatives_are_refused(self):
        batch = BATCHES["one image"]
        inputs = inputs_of(batch)
        x = inputs["x"].requires_grad_()
        loss = ours(batch)(**inputs).square().sum()
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()

    def test_rows_of_one_image_are_never_copied(self, monkeypatch):
        """Neither packing nor unpacking moves a vision row."""

        def refuse(*arguments):
            raise AssertionError("vision rows were moved")

        for name in ("pack_embeddings", "unpack_vision", "pack_eagerly"):
            monkeypatch.setattr(ops, name, refuse)
        monkeypatch.setattr(native, "on_host", refuse)
        monkeypatch.setattr(native, "DIRECT_BYTES", 0)
        batch = BATCHES["one image"]
        run_op(ours(batch), inputs_of(batch), gradient_of(batch))

    @pytest.mark.parametrize("save", SAVES)
    @pytest.mark.parametrize("name", BATCHES)
    def test_opcheck(self, name, save):
        batch = BATCHES[name]
        inputs = inputs_of(batch, 6, 10, 4)
        embedding = inputs.pop("embedding")
        leaves = [tensor.requires_grad_() for tensor in (*inputs.values(), embedding)]
        pooling = plan_pooling(batch.in_grids, batch.out_grids)
        maps = grids_of(pooling), batch.plan.source, batch.plan.vision_rows
        options = pooling.num_cells, "adaptive", 1e-5, save, batch.plan.vision_start
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        arguments = (*leaves, *maps, *options)
        torch.library.opcheck(fused_project_and_pack.overload, arguments, test_utils=tests)
        if name == "interleaved":
            torch.library.opcheck(fused_project_and_pack.overload, arguments)

    @pytest.mark.parametrize("name", BATCHES)
    def test_opcheck_of_the_stage(self, name):
        plan, tokens = BATCHES[name].plan, BATCHES[name].tokens
        arguments = (torch.randn(tokens, 5), torch.randn(4, 5), torch.randn(4), torch.randn(11, 4))
        maps = plan.source, plan.vision_rows, plan.vision_start
        torch.library.opcheck(packed_down.overload, (*arguments, *maps))

    def test_the_stage_reads_and_writes_its_tensors_alone(self):
        plan = BATCHES["one image"].plan  # vision in rows 1 to 6 of 9
        maps = plan.source, plan.vision_rows
        arguments = (torch.randn(6, 5), torch.randn(4, 5), None, torch.randn(11, 4))
        with pytest.raises(ValueError, match=r"vision_start must leave 6 rows of the 9, got 4"):
            packed_down(*arguments, *maps, 4)
        for start in (1, -1):
            with pytest.raises(ValueError, match=r"source\[0\] must be in \[-6, 2\)"):
                packed_down(*arguments[:3], torch.randn(2, 4), *maps, start)


class TestCompile:
    @pytest.fixture(autouse=True)
    def _fresh_compiler(self):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    def test_at_most_two_graphs_over_lengths(self):
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

        def op(pooling, plan, x, embedding, parameters):
            return project_and_pack(x, pooling, embedding=embedding, plan=plan, **parameters)

        compiled = torch.compile(op, fullgraph=True, dynamic=True, backend=counter)
        for length in (23, 17, 14, 9, 5, 3):
            images = 1 + length % 3
            batch = batch_of([[1, *[IMAGE] * images, 2, 3]] * 1, [(1, length)] * images)
            inputs = {name: t.requires_grad_() for name, t in inputs_of(batch, 6, 10, 4).items()}
            leaves, gradient = list(inputs.values()), gradient_of(batch, 4)
            expected = run_op(ours(batch), inputs, gradient)
            x, embedding = inputs.pop("x"), inputs.pop("embedding")
            pooling = plan_pooling(batch.in_grids, batch.out_grids)
            out = compiled(pooling, batch.plan, x, embedding, inputs)
            torch.testing.assert_close(out, expected["out"])
            grads = torch.autograd.grad(out, leaves, gradient)
            for name, grad in zip(("x", "embedding", *inputs), grads, strict=True):
                torch.testing.assert_close(grad, expected[name], msg=lambda m, name=name: name + m)
        assert counter.frame_count <= 2


class TestDtypes:
    @pytest.mark.parametrize("table", [torch.float32, torch.bfloat16], ids=str)
    def test_autocast_gives_what_the_two_calls_give(self, table):
        batch = BATCHES["interleaved"]
        inputs = inputs_of(batch)
        inputs["embedding"] = inputs["embedding"].to(table)
        gradient = gradient_of(batch).to(table)
        with torch.autocast("cpu", torch.bfloat16):
            actual = run_op(ours(batch), inputs, gradient)
            expected = run_op(two_calls(batch), inputs, gradient)
        assert actual["out"].dtype == table
        for result in expected:
            assert torch.equal(actual[result], expected[result]), result

    def test_float32_weights_serve_narrow_activations(self):
        batch = BATCHES["interleaved"]
        inputs = inputs_of(batch)
        for name in ("x", "embedding"):
            inputs[name] = inputs[name].bfloat16()
        actual = run_op(ours(batch), inputs, gradient_of(batch, dtype=torch.bfloat16))
        assert actual["out"].dtype == actual["x"].dtype == torch.bfloat16
        assert actual["down_weight"].dtype == torch.float32


def call(**changes):
    """A call that works, but for ``changes``."""
    batch = BATCHES["one image"]
    arguments = {
        **inputs_of(batch),
        "in_grids": batch.in_grids,
        "out_grids": batch.out_grids,
        "plan": batch.plan,
        **changes,
    }
    return project_and_pack(**arguments)


class TestMisuse:
    def test_the_unchanged_call_works(self):
        assert call().shape == (9, 8)

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"x": 1.0}, TypeError, r"^x must be a torch\.Tensor, got float"),
            ({"in_grids": [(3, 5)]}, ValueError, r"in_grids.* 15 .*12"),
            ({"save": "all"}, ValueError, r"^save .*'all'"),
            ({"norm_weight": None}, TypeError, r"^norm_weight .*NoneType"),
            (
                {"down_weight": torch.ones(20, 8)},
                ValueError,
                r"^down_weight .*\(20, 20\).*\(20, 8\)",
            ),
            ({"plan": None}, TypeError, r"^plan must be a PackPlan, got NoneType"),
            ({"embedding": None}, TypeError, r"^embedding must be .*Tensor, got NoneType"),
            ({"embedding": torch.ones(11, 7)}, ValueError, r"^embedding .* 8, but is 7"),
            ({"embedding": torch.ones(4, 8)}, ValueError, r"^embedding .* id is 4, .* 4 rows"),
            (
                {"embedding": torch.ones(11, 8).double()},
                TypeError,
                r"^embedding .*float32, got torch.float64",
            ),
            (
                {"plan": plan_packing([[IMAGE]], [5], IMAGE)},
                ValueError,
                r"^plan .*cell of out_grids, 6, but has 5",
            ),
            (
                {"plan": BATCHES["one image"].plan.to("meta")},
                ValueError,
                r"^plan must be on .*meta",
            ),
        ],
        ids=lambda value: None if isinstance(value, type) else str(value)[:40],
    )
    def test_says_what_is_wrong(self, changes, error, message):
        with pytest.raises(error, match=message):
            call(**changes)
