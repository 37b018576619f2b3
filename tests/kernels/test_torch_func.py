"""torch.func over the ops: every backend's transforms equal those of plain PyTorch."""

from __future__ import annotations

import functools
import itertools
import warnings
from unittest.mock import patch

import pytest
import torch
import torch._dynamo
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_leaves

from tests.kernels.common import MODES, eager_pool_norm
from tokenflex_kernels import (
    merge_vision,
    pack_embeddings,
    plan_packing,
    pool_norm,
    project_tokens,
    unpack_vision,
)
from tokenflex_kernels.packing import ops

IMAGE = 9
PLAN = plan_packing([[1, IMAGE, 5], [IMAGE, 7, 1]], [3, 2], IMAGE)
AGAIN = plan_packing([[1, IMAGE, 5], [IMAGE, 7, IMAGE]], [3, 2], IMAGE, image_index=[1, 0, 1])
ROWS, VISION, TABLE, WIDTH, BATCH = PLAN.num_tokens, 5, 10, 3, 2


def rows(number, *more):
    return torch.randn(number, *more, WIDTH, dtype=torch.float64)


def packing():
    """Each op as a function of its float tensors, with those tensors."""
    vision_rows = PLAN.vision_rows.long()
    return {
        "pack": (lambda table, vision: pack_embeddings(table, vision, PLAN), (TABLE, VISION)),
        "pack again": (
            lambda table, vision: pack_embeddings(table, vision, AGAIN),
            (TABLE, VISION),
        ),
        "merge": (lambda base, vision: merge_vision(base, vision, vision_rows), (ROWS, VISION)),
        "merge 3-D": (
            lambda base, vision: merge_vision(base[None], vision, PLAN.vision_rows),
            (ROWS, VISION),
        ),
        "unpack": (lambda base: unpack_vision(base, PLAN), (ROWS,)),
    }


def loss_of(op):
    """A loss whose derivatives of every order depend on where each row went."""

    def loss(*inputs):
        out = op(*inputs)
        places = torch.arange(1.0, 1 + out.numel(), dtype=out.dtype).view(out.shape)
        return (out.sin() * places).sum()

    return loss


def all_of(inputs):
    return tuple(range(len(inputs)))


def third_order(loss, inputs):
    def derivative(of):
        return lambda *values: grad(of)(*values).sin().sum()

    return grad(derivative(derivative(loss)))(*inputs)


# name -> the transform of an op and its inputs
TRANSFORMS = {
    "grad": lambda op, x: grad(loss_of(op), all_of(x))(*x),
    "grad of the first": lambda op, x: grad(loss_of(op))(*x),
    "grad of the last": lambda op, x: grad(loss_of(op), len(x) - 1)(*x),
    "vjp, called afterwards": lambda op, x: vjp(op, *x)[1](torch.ones_like(op(*x))),
    "jvp": lambda op, x: jvp(op, x, tuple(value.cos() for value in x)),
    "jacrev": lambda op, x: jacrev(op, all_of(x))(*x),
    "jacfwd": lambda op, x: jacfwd(op, all_of(x))(*x),
    "hessian": lambda op, x: hessian(loss_of(op), all_of(x))(*x),
    "reverse over reverse": lambda op, x: jacrev(grad(loss_of(op), all_of(x)), all_of(x))(*x),
    "forward over forward": lambda op, x: jacfwd(jacfwd(loss_of(op), all_of(x)), all_of(x))(*x),
    "reverse over forward": lambda op, x: jacrev(jacfwd(loss_of(op), all_of(x)), all_of(x))(*x),
    "third order": lambda op, x: third_order(loss_of(op), x),
}
# name -> the transform of an op, its inputs, some with examples in front, and their in_dims
BATCHED = {
    "vmap": lambda op, x, dims: vmap(op, dims)(*x),
    "vmap along another dimension": lambda op, x, dims: vmap(
        op, tuple(None if dim is None else 1 for dim in dims), 1
    )(*(value if dim is None else value.movedim(0, 1) for value, dim in zip(x, dims, strict=True))),
    "vmap of vmap": lambda op, x, dims: vmap(vmap(op, dims), (0, *[None] * (len(x) - 1)))(
        torch.stack([x[0], x[0].exp()]), *x[1:]
    ),
    "per-sample gradients": lambda op, x, dims: vmap(grad(loss_of(op), all_of(x)), dims)(*x),
    "grad of vmap": lambda op, x, dims: grad(
        lambda *values: vmap(loss_of(op), dims)(*values).sin().sum(), all_of(x)
    )(*x),
    "vmap of hessian": lambda op, x, dims: vmap(hessian(loss_of(op), all_of(x)), dims)(*x),
    "vmap of jvp": lambda op, x, dims: vmap(lambda *values: jvp(op, values, values), dims)(*x),
}


def on_backend(backend, call):
    with patch.dict("os.environ", TOKENFLEX_BACKEND=backend), warnings.catch_warnings():
        warnings.filterwarnings("error", message="There is a performance drop")
        return tree_leaves(call())


def assert_equals_the_reference(call):
    actual, expected = on_backend("auto", call), on_backend("reference", call)
    assert len(actual) == len(expected) > 0
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


class TestPacking:
    @pytest.mark.parametrize("transform", TRANSFORMS)
    @pytest.mark.parametrize("op", packing())
    def test_transforms_equal_those_of_the_reference(self, op, transform):
        function, sizes = packing()[op]
        inputs = tuple(map(rows, sizes))
        assert_equals_the_reference(lambda: TRANSFORMS[transform](function, inputs))

    @pytest.mark.parametrize("transform", BATCHED)
    @pytest.mark.parametrize("op", packing())
    def test_batches_equal_those_of_the_reference(self, op, transform):
        function, sizes = packing()[op]
        for dims in itertools.product([0, None], repeat=len(sizes)):
            if dims == (None,) * len(sizes):
                continue
            inputs = [
                rows(size) if dim is None else torch.stack([rows(size) for _ in range(BATCH)])
                for size, dim in zip(sizes, dims, strict=True)
            ]
            assert_equals_the_reference(
                functools.partial(BATCHED[transform], function, inputs, dims)
            )

    @pytest.mark.parametrize("op", packing())
    def test_gradients_of_tensors_that_require_grad(self, op):
        """As where parameters are handed to torch.func, and as plain autograd around a vmap."""
        function, sizes = packing()[op]

        def transformed():
            inputs = [value.requires_grad_() for value in map(rows, sizes)]
            torch.manual_seed(1)
            inner = grad(loss_of(function), all_of(sizes))(*inputs)
            batches = [torch.stack([value, value.exp()]) for value in inputs]
            outer = torch.autograd.grad(vmap(loss_of(function))(*batches).sum(), inputs)
            return [value.detach() for value in (*inner, *outer)]

        def seeded():
            torch.manual_seed(0)
            return transformed()

        assert_equals_the_reference(seeded)

    @pytest.mark.parametrize("backend", ["auto", "reference"])
    def test_examples_may_have_rows_of_their_own(self, backend, monkeypatch):
        monkeypatch.setenv("TOKENFLEX_BACKEND", backend)
        base, vision = rows(BATCH, 6), rows(BATCH, 2)
        places = torch.tensor([[0, 4], [5, 2]])
        merged = vmap(merge_vision)(base, vision, places)
        for example in range(BATCH):
            expected = merge_vision(base[example], vision[example], places[example])
            assert torch.equal(merged[example], expected)
        grads = vmap(grad(loss_of(merge_vision), (0, 1)))(base, vision, places)
        expected = grad(loss_of(merge_vision), (0, 1))(base[1], vision[1], places[1])
        assert torch.equal(grads[0][1], expected[0])
        assert torch.equal(grads[1][1], expected[1])

    def test_a_table_that_all_examples_share_is_not_copied_for_each(self, monkeypatch):
        largest = 0
        on_host = ops.on_host

        def record(table, *arguments):
            nonlocal largest
            largest = max(largest, table.untyped_storage().nbytes())
            return on_host(table, *arguments)

        monkeypatch.setattr(ops, "on_host", record)
        table = torch.randn(1000, WIDTH)
        vision = torch.randn(BATCH, VISION, WIDTH)
        vmap(lambda vision: pack_embeddings(table, vision, PLAN))(vision)
        assert largest == table.untyped_storage().nbytes()

    def test_a_sparse_gradient_is_that_of_plain_autograd(self):
        table, vision = rows(TABLE), rows(VISION)

        def loss(table):
            return pack_embeddings(table, vision, PLAN, sparse_grad=True).sin().sum()

        transformed = grad(loss)(table)
        loss(table.requires_grad_()).backward()
        assert transformed.is_sparse
        assert torch.equal(transformed.to_dense(), table.grad.to_dense())

    def test_a_sparse_gradient_refuses_a_second_derivative(self):
        table, vision = rows(TABLE), rows(VISION)

        def derivative(table):
            packed = functools.partial(pack_embeddings, vision=vision, plan=PLAN, sparse_grad=True)
            return grad(lambda table: packed(table).sin().sum())(table).to_dense().sum()

        with pytest.raises(
            RuntimeError, match=r"sparse_table_gradient has no derivative.*reference"
        ):
            grad(derivative)(table)

    @pytest.mark.parametrize(
        "transform",
        [
            pytest.param(lambda loss: grad(loss, (0, 1)), id="grad"),
            pytest.param(lambda loss: hessian(loss, 0), id="hessian of the table"),
            pytest.param(lambda loss: hessian(loss, 1), id="hessian of vision"),
            pytest.param(
                lambda loss: (
                    lambda table, vision: vmap(grad(loss, (0, 1)), (None, 0))(
                        table, torch.stack([vision, vision.exp()])
                    )
                ),
                id="per-sample gradients",
            ),
        ],
    )
    def test_compiled_whole(self, transform):
        def loss(table, vision):
            packed = pack_embeddings(table, vision, PLAN)
            merged = merge_vision(packed, vision.sin(), PLAN.vision_rows)
            return (merged * packed).sin().sum() + unpack_vision(packed, PLAN).sin().sum()

        torch._dynamo.reset()
        compiled = torch.compile(transform(loss), fullgraph=True, backend="aot_eager")
        inputs = rows(TABLE), rows(VISION)
        torch.testing.assert_close(compiled(*inputs), transform(loss)(*inputs))


class TestPooling:
    """The reference, which is what runs on the CPU, against PyTorch's own ops."""

    GRIDS = (
        ([(5, 4), (5, 4), (3, 3)], [(2, 3), (2, 3), (1, 1)]),
        ([(2, 2)], [(3, 5)]),
        ([(4, 4)], [(2, 2)]),
    )

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("grids", GRIDS, ids=str)
    @pytest.mark.parametrize("transform", [*list(TRANSFORMS)[:-1], "per-sample gradients", "vmap"])
    def test_transforms_equal_those_of_eager(self, transform, grids, mode):
        x = rows(sum(height * width for height, width in grids[0]))
        weight = torch.randn(WIDTH, dtype=torch.float64)

        def run(op):
            def pooled(x, weight):
                return op(x, *grids, mode=mode, weight=weight)

            if transform in BATCHED:
                return BATCHED[transform](pooled, (torch.stack([x, x.exp()]), weight), (0, None))
            return TRANSFORMS[transform](pooled, (x, weight))

        ours, theirs = tree_leaves(run(pool_norm)), tree_leaves(run(eager_pool_norm))
        for actual, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("grids", GRIDS, ids=str)
    def test_derivatives_of_second_order_and_in_forward_mode(self, grids, mode):
        x = rows(sum(height * width for height, width in grids[0])).requires_grad_()

        def pooled(x):
            return pool_norm(x, *grids, mode=mode)

        assert torch.autograd.gradcheck(
            pooled, [x], check_forward_ad=True, check_batched_grad=True, fast_mode=True
        )
        assert torch.autograd.gradgradcheck(pooled, [x], fast_mode=True)

    @pytest.mark.parametrize("save", ["preactivation", "input"])
    def test_the_projector_is_differentiated_whatever_it_saves(self, save):
        x, width, hidden = rows(12), WIDTH, 4

        def project(x, gate_weight, up_weight, down_weight, save=save):
            return project_tokens(
                *(x, [(4, 3)], [(2, 2)]),
                norm_weight=torch.ones(width, dtype=x.dtype),
                norm_bias=None,
                gate_weight=gate_weight,
                gate_bias=None,
                up_weight=up_weight,
                up_bias=None,
                down_weight=down_weight,
                down_bias=None,
                save=save,
            )

        shapes = (hidden, width), (hidden, width), (2, hidden)
        inputs = (x, *(torch.randn(shape, dtype=torch.float64) for shape in shapes))
        transformed = grad(loss_of(project), all_of(inputs))(*inputs)
        leaves = [value.clone().requires_grad_() for value in inputs]
        expected = torch.autograd.grad(loss_of(project)(*leaves), leaves)
        torch.testing.assert_close(transformed, expected)
