"""Movers that read tensors themselves: which tensors they take, and their results."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from tokenflex_kernels import merge_vision, pack_embeddings, plan_packing, unpack_vision
from tokenflex_kernels.packing import ops

IMAGE = -200
PLAN = plan_packing([[1, IMAGE, 2, 2], [], [IMAGE, 5, IMAGE], [3]], [3, 0, 4], IMAGE)
VISION = 7


def general(table, vision):
    return ops._pack_rows(table, vision, PLAN.source)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_ordinary_tensors_are_taken(dtype):
    table, vision = torch.randn(6, 5).to(dtype), torch.randn(9, 5).to(dtype)[1:8]
    assert torch.equal(ops.on_host(table, vision, PLAN.source), general(table, vision))
    zeros = torch.zeros_like(vision)
    assert torch.equal(ops.on_host(table, None, PLAN.source), general(table, zeros))


@pytest.mark.parametrize(
    ("table", "vision"),
    [
        (torch.randn(6, 10)[:, ::2], torch.randn(VISION, 5)),
        (torch.randn(6, 5), torch.randn(VISION, 5).half()),
        (torch.randn(6, 5), torch.randn(VISION, 4)),
        (torch.randn(6, 5), torch._neg_view(torch.randn(VISION, 5))),
        (torch.randn(6, 5), torch._efficientzerotensor((VISION, 5))),
        (torch.randn(6, 5), torch.randn(VISION, 5, device="meta")),
        (torch.randn(6, 5), torch.randn(VISION, 5).to_sparse()),
        (torch.ones(6, 5, dtype=torch.int32), torch.ones(VISION, 5, dtype=torch.int32)),
    ],
)
def test_other_tensors_are_left_to_the_general_way(table, vision):
    assert ops.on_host(table, vision, PLAN.source) is None
    assert ops.merge_eagerly(table, vision, torch.arange(VISION)) is None


def test_numbers_without_memory_of_their_own_are_packed():
    table, vision = torch.randn(6, 5), torch.randn(VISION, 5)
    negative = pack_embeddings(table, torch._neg_view(vision), PLAN)
    assert torch.equal(negative, general(table, -vision))
    zeros = torch._efficientzerotensor((VISION, 5))
    assert torch.equal(pack_embeddings(table, zeros, PLAN), general(table, torch.zeros(VISION, 5)))
    rows = torch.arange(VISION, dtype=torch.int32)
    embeds = torch.randn(8, 5)
    assert torch.equal(merge_vision(embeds, torch._neg_view(vision), rows)[:VISION], -vision)


def test_a_plan_and_a_vision_that_do_not_fit_are_left_to_the_checks():
    table, vision = torch.randn(6, 5), torch.randn(VISION, 5)
    assert ops.on_host(table, vision, PLAN.source, False, VISION - 1, 0) is None
    assert ops.on_host(table, vision, PLAN.source, False, VISION, 7) is None


def test_a_table_gradient_sorts_ids_of_every_size():
    digits = torch.randint(0, 3, (3, 3000))
    ids = (digits[0] + 2**8 * digits[1] + 2**16 * digits[2]).to(torch.int32)
    grad = torch.randint(-9, 9, (3000, 2)).double()
    expected = torch.zeros(3 * 2**16, 2).double().index_add_(0, ids, grad)
    assert torch.equal(ops.table_gradient(grad, ids, 0, 3 * 2**16), expected)


def merged(dtype, numbers, shape=(3, 7, 5)):
    torch.manual_seed(0)
    embeds = torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()
    vision = torch.randn(VISION, shape[-1], dtype=torch.float64).to(dtype).requires_grad_()
    rows = torch.randperm(embeds[..., 0].numel())[:VISION].to(numbers)
    return embeds, vision, rows, merge_vision(embeds, vision, rows)


@pytest.mark.parametrize("wanted", [(0, 1), (0,), (1,)])
@pytest.mark.parametrize("numbers", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_gradients_of_a_merge_are_copies(dtype, numbers, wanted):
    *leaves, rows, out = merged(dtype, numbers)
    grad = torch.randn_like(out)
    flat = grad.flatten(0, 1)
    expected = flat.index_fill(0, rows.long(), 0).view(grad.shape), flat[rows.long()]
    leaves = [leaves[at] for at in wanted]
    at_once = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    recorded = torch.autograd.grad(out, leaves, grad, create_graph=True)
    strided = torch.stack([grad, grad], -1)[..., 0]
    generally = torch.autograd.grad(out, leaves, strided)
    for results in (at_once, recorded, generally):
        for result, at in zip(results, wanted, strict=True):
            assert torch.equal(result, expected[at])


NEIGHBOURS = {
    "none": [],
    "ascending": range(3, 3 + VISION),
    "descending": range(3 + VISION, 3, -1),
    "to both ends": [20, *range(1, VISION - 1), 0],
    "in steps": range(0, 3 * VISION, 3),
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("numbers", NEIGHBOURS.values(), ids=NEIGHBOURS)
def test_rows_that_are_neighbours_are_moved_together(numbers, threads):
    """In runs of vision rows and of text rows, which threads may cut anywhere."""
    width = 4 * 2**18 // 21
    embeds = torch.randn(21, width, requires_grad=True)
    rows = torch.tensor(list(numbers), dtype=torch.int32)
    vision = torch.randn(len(rows), width, requires_grad=True)
    grad = torch.randn(21, width)
    before = grad.clone()
    with patch("torch.get_num_threads", lambda: threads):
        out = merge_vision(embeds, vision, rows)
        of_embeds, of_vision = torch.autograd.grad(out, (embeds, vision), grad)
        spread = ops.on_host(None, vision.detach(), source_of(rows, 21))
    assert torch.equal(out, embeds.index_copy(0, rows.long(), vision))
    assert torch.equal(of_embeds, grad.index_fill(0, rows.long(), 0))
    assert torch.equal(of_vision, grad[rows])
    assert torch.equal(spread, torch.zeros(21, width).index_copy(0, rows.long(), vision.detach()))
    assert torch.equal(grad, before)


def source_of(rows, number):
    """Return the source of a merge: rows of their own number, and vision tokens."""
    tokens = ~torch.arange(len(rows), dtype=torch.int32)
    return torch.arange(number, dtype=torch.int32).index_copy(0, rows.long(), tokens)


def test_a_row_map_that_changes_before_the_backward_pass_is_an_error():
    embeds, _, rows, out = merged(torch.float32, torch.int64)
    rows.copy_(torch.arange(VISION))
    with pytest.raises(RuntimeError, match="row map of merge_vision was modified"):
        torch.autograd.grad(out.sum(), embeds)


@pytest.mark.parametrize("changed", ["source", "vision_rows"])
@pytest.mark.parametrize("name", ["pack_embeddings", "unpack_vision"])
def test_either_map_of_a_plan_that_changes_before_the_backward_pass_is_an_error(name, changed):
    plan = plan_packing([[1, IMAGE, 2]], [3], IMAGE)
    getattr(plan, changed).add_(0)  # before the call, a change is none
    if name == "pack_embeddings":
        leaf = torch.randn(6, 5, requires_grad=True)
        out = pack_embeddings(leaf, torch.randn(3, 5), plan)
    else:
        leaf = torch.randn(5, 5, requires_grad=True)
        out = unpack_vision(leaf, plan)
    assert torch.autograd.grad(out.sum(), leaf, retain_graph=True)[0].shape == leaf.shape
    getattr(plan, changed).add_(0)  # to the same numbers: versions are what tells
    with pytest.raises(RuntimeError, match=f"row map of {name} was modified"):
        torch.autograd.grad(out.sum(), leaf)


def test_a_mode_sees_the_ops_of_a_backward_pass():
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    embeds, vision, _, out = merged(torch.float32, torch.int64)
    table = torch.randn(6, 5, requires_grad=True)
    packed = pack_embeddings(table, vision, PLAN)
    with Mode():
        torch.autograd.grad(out, embeds, torch.ones_like(out))
        torch.autograd.grad(packed, (table, vision), torch.ones_like(packed))
    ops_seen = [name.split(".")[1] for name in seen if name.startswith("tokenflex.")]
    assert ops_seen == ["keep_text", "unpack_vision", "table_gradient", "unpack_vision"]


def test_tangents_of_a_backward_pass_are_kept():
    _, vision, rows, out = merged(torch.float32, torch.int64)
    grad, tangent = torch.randn_like(out), torch.randn_like(out)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(grad, tangent)
        (result,) = torch.autograd.grad(out, vision, dual)
        moved = forward_ad.unpack_dual(result).tangent
    assert torch.equal(moved, tangent.flatten(0, 1)[rows])
