"""The row movers: both backends against a naive loop, gradients against autograd in float64."""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from tokenflex_kernels import merge_vision, pack_embeddings, plan_packing, unpack_vision

IMAGE = -200
BACKENDS = ("reference", "auto")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@contextmanager
def backend_set_to(backend: str):
    with patch.dict("os.environ", TOKENFLEX_BACKEND=backend):
        yield


# Ways for [rows, width] to lie in memory; all hold random numbers.
def contiguous(rows, width, dtype, device):
    return torch.randn(rows, width, dtype=dtype, device=device)


def row_strided(rows, width, dtype, device):
    return torch.randn(rows, width + 3, dtype=dtype, device=device)[:, :width]


def unaligned(rows, width, dtype, device):
    return torch.randn(rows * width + 1, dtype=dtype, device=device)[1:].view(rows, width)


def every_other_row(rows, width, dtype, device):
    return torch.randn(2 * rows, width, dtype=dtype, device=device)[::2]


def transposed(rows, width, dtype, device):
    return torch.randn(width, rows, dtype=dtype, device=device).T


def one_row_expanded(rows, width, dtype, device):
    return torch.randn(1, width, dtype=dtype, device=device).expand(rows, width)


def one_number_expanded(rows, width, dtype, device):
    return torch.randn((), dtype=dtype, device=device).expand(rows, width)


LAYOUTS = (
    contiguous,
    row_strided,
    unaligned,
    every_other_row,
    transposed,
    one_row_expanded,
    one_number_expanded,
)


@st.composite
def batches(draw):
    """A plan of up to 4 samples whose text uses the ids 0 .. 5."""
    token = st.one_of(st.just(IMAGE), st.integers(0, 5))
    samples = draw(st.lists(st.lists(token, max_size=6), max_size=4))
    images = sum(sample.count(IMAGE) for sample in samples)
    if not draw(st.booleans()):
        counts = draw(st.lists(st.integers(0, 5), min_size=images, max_size=images))
        return plan_packing(samples, counts, IMAGE)
    # Images in any order, some of them shown several times and others not at all.
    counts = draw(st.lists(st.integers(0, 5), min_size=1, max_size=4))
    shown = st.integers(0, len(counts) - 1)
    index = draw(st.lists(shown, min_size=images, max_size=images))
    return plan_packing(samples, counts, IMAGE, image_index=index)


def naive_pack(table, vision, source):
    rows = [table[entry] if entry >= 0 else vision[~entry] for entry in source.tolist()]
    return torch.stack(rows) if rows else table.new_empty(0, table.shape[1])


EXAMPLE = plan_packing([[1, IMAGE, 2, 2], [], [IMAGE, 5, IMAGE], [3]], [3, 0, 4], IMAGE)


# ---- forward


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS)
@given(
    plan=batches(),
    dtype=st.sampled_from(DTYPES),
    width=st.sampled_from([0, 1, 2, 3, 7, 8, 17, 64, 123]),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
)
@settings(deadline=None, max_examples=80)
def test_packing_unpacking_and_merging_are_exact(backend, device, plan, dtype, width, layouts):
    table = layouts[0](6, width, dtype, device)
    vision = layouts[1](plan.num_vision_tokens, width, dtype, device)
    source = plan.source
    plan = plan.to(device)
    with backend_set_to(backend):
        packed = pack_embeddings(table, vision, plan)
        assert packed.dtype == dtype
        assert packed.is_contiguous()
        assert torch.equal(packed, naive_pack(table, vision, source))
        shown = vision[plan.vision_tokens()]
        assert torch.equal(unpack_vision(packed, plan), shown)

        base = layouts[0](plan.num_tokens, width, dtype, device)
        before = base.clone()
        merged = merge_vision(base, shown, plan.vision_rows)
        wanted = base.clone()
        wanted[plan.vision_rows.long()] = shown
        assert torch.equal(merged, wanted)
        assert torch.equal(base, before)
        assert torch.equal(unpack_vision(merged, plan), shown)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_unpacking_reads_any_layout(backend, layout):
    packed = layout(EXAMPLE.num_tokens, 5, torch.float32, "cpu")
    with backend_set_to(backend):
        assert torch.equal(unpack_vision(packed, EXAMPLE), packed[EXAMPLE.vision_rows.long()])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_merging_takes_batched_embeddings_and_rows_in_any_order(backend, index_dtype):
    inputs_embeds = torch.randn(2, 3, 4, 8)[:, :, 1:]
    vision = torch.randn(4, 8)
    rows = torch.tensor([17, 0, 9, 4], dtype=index_dtype)
    with backend_set_to(backend):
        merged = merge_vision(inputs_embeds, vision, rows)
    wanted = inputs_embeds.reshape(18, 8).clone()
    for row, token in zip(rows.tolist(), vision, strict=True):
        wanted[row] = token
    assert torch.equal(merged, wanted.view(2, 3, 3, 8))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_merging_reads_row_numbers_of_any_stride(backend, index_dtype):
    base = torch.randn(9, 4, requires_grad=True)
    vision = torch.randn(3, 4, requires_grad=True)
    rows = torch.tensor([8, 0, 3, 1, 5, 2], dtype=index_dtype)[::2]
    grad = torch.randn(9, 4)
    with backend_set_to(backend):
        merged = merge_vision(base, vision, rows)
        grad_base, grad_vision = torch.autograd.grad(merged, (base, vision), grad)
    assert torch.equal(merged[[8, 3, 5]], vision)
    assert torch.equal(merged[[0, 1, 2, 4, 6, 7]], base[[0, 1, 2, 4, 6, 7]])
    assert torch.equal(grad_vision, grad[[8, 3, 5]])
    assert torch.equal(grad_base, grad.index_fill(0, torch.tensor([8, 3, 5]), 0.0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(4,), (2, 4), (1, 2, 4), (2, 1, 1, 4), (2, 0), (2, 3, 0)])
@pytest.mark.parametrize("strided", [False, True])
def test_merging_keeps_every_shape_and_its_gradient(backend, shape, strided):
    base = torch.randn(*shape, dtype=torch.float64)
    base = (base.mT.contiguous().mT if strided and base.ndim > 1 else base).requires_grad_()
    vision = torch.randn(1, shape[-1], dtype=torch.float64, requires_grad=True)
    rows = torch.zeros(2, dtype=torch.int64)[::2]
    grad = torch.randn(*shape, dtype=torch.float64)
    with backend_set_to(backend):
        merged = merge_vision(base, vision, rows)
        grad_base, grad_vision = torch.autograd.grad(merged, (base, vision), grad)
    wanted, kept = base.detach().contiguous().clone(), grad.clone()
    wanted.view(-1)[: shape[-1]] = vision[0].detach()
    kept.view(-1)[: shape[-1]] = 0
    assert torch.equal(merged, wanted)
    assert torch.equal(grad_base, kept)
    assert torch.equal(grad_vision.flatten(), grad.flatten()[: shape[-1]])


def test_packing_is_an_embedding_lookup_and_a_masked_scatter():
    table, vision = torch.randn(6, 8), torch.randn(EXAMPLE.vision_rows.shape[0], 8)
    text = F.embedding(EXAMPLE.input_ids.clamp(min=0), table)
    is_image = (EXAMPLE.input_ids == IMAGE).unsqueeze(1)
    assert torch.equal(
        pack_embeddings(table, vision, EXAMPLE), text.masked_scatter(is_image, vision)
    )


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_large_moves_are_shared_between_threads(threads):
    """5 MB and more: enough for several threads, in a number of rows that they do not divide."""
    plan = plan_packing([[1, IMAGE, 2, IMAGE]] * 11, [113, 118] * 11, IMAGE)
    table = torch.randn(6, 517, requires_grad=True)
    vision = torch.randn(plan.vision_rows.shape[0], 517, requires_grad=True)
    with patch("torch.get_num_threads", lambda: threads):
        packed = pack_embeddings(table, vision, plan)
        assert torch.equal(packed, naive_pack(table, vision, plan.source))
        unpacked = unpack_vision(packed, plan)
        assert torch.equal(unpacked, vision)
        grad = torch.randn_like(unpacked)
        (grad_packed,) = torch.autograd.grad(unpacked, packed, grad, retain_graph=True)
        assert torch.equal(
            grad_packed, torch.zeros_like(packed).index_copy(0, plan.vision_rows.long(), grad)
        )
        (grad_vision,) = torch.autograd.grad(unpacked, vision, grad)
        assert torch.equal(grad_vision, grad)


# ---- backward


def gradients(function, inputs, needs, grad):
    """The gradients of those ``inputs`` of ``function`` that need one."""
    leaves = [
        value.detach().requires_grad_(need) for value, need in zip(inputs, needs, strict=True)
    ]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return torch.autograd.grad(function(*leaves), wanted, grad)


def assert_gradients_are_the_references(function, inputs, needs, grad):
    before = grad.clone()
    actual = gradients(function, inputs, needs, grad)
    assert torch.equal(grad, before)
    with backend_set_to("reference"):
        wanted = gradients(function, inputs, needs, grad)
    for ours, theirs in zip(actual, wanted, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("device", DEVICES)
@given(
    plan=batches(),
    width=st.sampled_from([0, 1, 3, 8]),
    needs=st.sampled_from([(True, True), (True, False), (False, True)]),
    layout=st.sampled_from(LAYOUTS),
)
@settings(deadline=None, max_examples=80)
def test_gradients_are_those_of_autograd(device, plan, width, needs, layout):
    """In float64, for any inputs that need one, from incoming gradients of any layout."""
    plan = plan.to(device)
    vision_rows = plan.vision_rows.shape[0]
    table = contiguous(6, width, torch.float64, device)
    base = contiguous(plan.num_tokens, width, torch.float64, device)
    vision = contiguous(plan.num_vision_tokens, width, torch.float64, device)
    shown = contiguous(vision_rows, width, torch.float64, device)
    grad = layout(plan.num_tokens, width, torch.float64, device)
    vision_grad = layout(vision_rows, width, torch.float64, device)

    def pack(table, vision):
        return pack_embeddings(table, vision, plan)

    def merge(base, vision):
        return merge_vision(base, vision, plan.vision_rows)

    def unpack(packed):
        return unpack_vision(packed, plan)

    assert_gradients_are_the_references(pack, (table, vision), needs, grad)
    assert_gradients_are_the_references(merge, (base, shown), needs, grad)
    assert_gradients_are_the_references(unpack, (base,), (True,), vision_grad)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("images", [120, 3])
def test_gradients_keep_the_dtype_and_repeat_bit_by_bit(dtype, device, images):
    """Of 120 images that are shown once, or 3 of them 40 times each."""
    index = [place % images for place in range(120)]
    prompts = [[1, 2, IMAGE, 1] * 40] * 3
    plan = plan_packing(prompts, [5] * images, IMAGE, image_index=index).to(device)
    assert plan.shown_once == (images == 120)
    inputs = (
        torch.randn(6, 9, dtype=dtype, device=device),
        torch.randn(5 * images, 9, dtype=dtype, device=device),
    )
    grad = torch.randn(plan.num_tokens, 9, dtype=dtype, device=device)

    def pack(table, vision):
        return pack_embeddings(table, vision, plan)

    first = gradients(pack, inputs, (True, True), grad)
    again = gradients(pack, inputs, (True, True), grad)
    assert [value.dtype for value in first] == [dtype, dtype]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_saved_tensors_and_plan_outlive_backward():
    """retain_graph, the same inputs used twice, and checkpointing all give the same gradients."""
    table = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    vision = torch.randn(EXAMPLE.vision_rows.shape[0], 4, dtype=torch.float64, requires_grad=True)
    source = EXAMPLE.source.clone()

    def loss(table, vision):
        packed = pack_embeddings(table, vision, EXAMPLE)
        merged = merge_vision(packed, vision.sin(), EXAMPLE.vision_rows)
        return (merged * packed).cos().sum() + unpack_vision(merged, EXAMPLE).square().sum()

    value = loss(table, vision)
    once = torch.autograd.grad(value, (table, vision), retain_graph=True)
    twice = torch.autograd.grad(value, (table, vision))
    recomputed = torch.autograd.grad(
        checkpoint(loss, table, vision, use_reentrant=False), (table, vision)
    )
    with backend_set_to("reference"):
        wanted = torch.autograd.grad(loss(table, vision), (table, vision))
    for grads in (twice, recomputed):
        assert all(torch.equal(a, b) for a, b in zip(grads, once, strict=True))
    torch.testing.assert_close(once, wanted)
    assert torch.equal(EXAMPLE.source, source)


def test_a_frozen_table_costs_no_table_gradient():
    table = torch.randn(6, 4)
    vision = torch.randn(EXAMPLE.vision_rows.shape[0], 4, requires_grad=True)
    packed = pack_embeddings(table, vision, EXAMPLE)
    with patch("tokenflex_kernels.packing.ops.table_gradient") as table_gradient:
        packed.sum().backward()
    table_gradient.assert_not_called()
    assert torch.equal(vision.grad, torch.ones_like(vision))


@pytest.mark.parametrize("op", ["pack", "pack again", "unpack", "merge"])
def test_second_derivatives_are_those_of_the_formula(op):
    function, leaves = ops_of_floats()[op]
    leaves = tuple(leaf.requires_grad_() for leaf in leaves)
    assert torch.autograd.gradgradcheck(lambda *rows: function(*rows).sin(), leaves)


def test_a_gradient_penalty_has_its_second_order_part():
    table = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    vision = torch.randn(EXAMPLE.vision_rows.shape[0], 4, dtype=torch.float64, requires_grad=True)

    def penalty():
        packed = pack_embeddings(table, vision, EXAMPLE)
        (grad,) = torch.autograd.grad(packed.pow(3).sum(), table, create_graph=True)
        return torch.autograd.grad(grad.square().sum() + table.sum(), table)[0]

    with backend_set_to("reference"):
        expected = penalty()
    torch.testing.assert_close(penalty(), expected)


def test_a_sparse_gradient_refuses_a_second_derivative():
    table = torch.randn(6, 4, requires_grad=True)
    vision = torch.randn(EXAMPLE.vision_rows.shape[0], 4, requires_grad=True)
    packed = pack_embeddings(table, vision, EXAMPLE, sparse_grad=True)
    (grad,) = torch.autograd.grad(packed.square().sum(), table, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.to_dense().square().sum().backward()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_image_that_is_shown_again_gets_the_sum_of_its_gradients(dtype, device):
    """Made in float32 (float64 for float64) and rounded once, against sums in float64."""
    index = [0, 2, 0, 0, 2]
    plan = plan_packing(
        [[IMAGE, 1], [IMAGE, IMAGE, IMAGE, 5, IMAGE]], [3, 2, 4], IMAGE, image_index=index
    ).to(device)
    table = torch.randn(6, 8, dtype=dtype, device=device)
    vision = torch.randn(9, 8, dtype=dtype, device=device, requires_grad=True)
    grad = torch.randn(plan.num_tokens, 8, dtype=dtype, device=device)
    pack_embeddings(table, vision, plan).backward(grad)
    wanted = torch.zeros(9, 8, dtype=torch.float64, device=device)
    for row, entry in enumerate(plan.source.tolist()):
        if entry < 0:
            wanted[~entry] += grad[row]
    tolerance = torch.finfo(dtype).eps
    torch.testing.assert_close(vision.grad.double(), wanted, rtol=tolerance, atol=4 * tolerance)
    assert not vision.grad[3:5].any()


def test_images_in_another_order_are_gathered():
    """Their gradient is that of images in order: a row each, and nothing to add up."""
    plan = plan_packing([[IMAGE, 1, IMAGE]], [3, 2], IMAGE, image_index=[1, 0])
    assert plan.vision_rows.tolist() == [3, 4, 5, 0, 1]
    vision = torch.randn(5, 4, requires_grad=True)
    packed = pack_embeddings(torch.randn(6, 4), vision, plan)
    with patch("tokenflex_kernels.packing.ops.table_gradient") as table_gradient:
        packed.backward(grad := torch.randn(6, 4))
    table_gradient.assert_not_called()
    assert torch.equal(vision.grad, grad[plan.vision_rows.long()])
    assert torch.equal(unpack_vision(packed, plan), vision)


SHOWN_AGAIN = plan_packing(
    [[1, IMAGE, 2], [IMAGE, 5, IMAGE]], [3, 1, 4], IMAGE, image_index=[2, 0, 2]
)


def ops_of_floats():
    """Each op as a function of its float tensors, with those tensors."""
    table = torch.randn(6, 4, dtype=torch.float64)
    base = torch.randn(EXAMPLE.num_tokens, 4, dtype=torch.float64)
    vision = torch.randn(EXAMPLE.vision_rows.shape[0], 4, dtype=torch.float64)
    return {
        "pack": (lambda table, vision: pack_embeddings(table, vision, EXAMPLE), (table, vision)),
        "pack again": (
            lambda table, vision: pack_embeddings(table, vision, SHOWN_AGAIN),
            (table, torch.randn(8, 4, dtype=torch.float64)),
        ),
        "merge": (
            lambda base, vision: merge_vision(base, vision, EXAMPLE.vision_rows),
            (base, vision),
        ),
        "unpack": (lambda base: unpack_vision(base, EXAMPLE), (base,)),
    }


@pytest.mark.parametrize("op", ["pack", "pack again", "merge", "unpack"])
def test_forward_mode_gives_the_op_of_the_tangents(op):
    """The ops are linear. Below autograd the tangents would be lost without a word."""
    function, inputs = ops_of_floats()[op]
    tangents = tuple(torch.randn_like(value) for value in inputs)
    result, tangent = torch.func.jvp(function, inputs, tangents)
    assert torch.equal(result, function(*inputs))
    assert torch.equal(tangent, function(*tangents))

    # Of the last input alone, through dual tensors.
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(inputs[-1], tangents[-1])
        tangent = forward_ad.unpack_dual(function(*inputs[:-1], dual)).tangent
    zeros = [torch.zeros_like(value) for value in inputs[:-1]]
    assert torch.equal(tangent, function(*zeros, tangents[-1]))


@pytest.mark.parametrize("op", ["pack", "pack again", "merge", "unpack"])
def test_forward_and_backward_mode_meet(op):
    """A tangent and a gradient of one call, as Hessian-vector products ask for."""
    function, inputs = ops_of_floats()[op]
    leaf = inputs[-1].requires_grad_()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(leaf, torch.ones_like(leaf))
        primal, tangent = forward_ad.unpack_dual(function(*inputs[:-1], dual))
        assert torch.count_nonzero(tangent) > 0
        (grad,) = torch.autograd.grad(primal.sum(), leaf)
    with backend_set_to("reference"):
        (wanted,) = torch.autograd.grad(function(*inputs).sum(), leaf)
    assert torch.equal(grad, wanted)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_of_another_device_casts_nothing(backend, device):
    """Meta tensors have no autocast of their own: that of the CPU is not theirs."""
    plan = EXAMPLE.to(device)
    table = torch.randn(6, 4, device=device)
    vision = torch.randn(7, 4, device=device, dtype=torch.float16)
    on_cpu = torch.autocast("cpu", torch.bfloat16, enabled=device != "cpu")
    message = "vision must have the dtype of embedding, torch.float32, but has torch.float16"
    with backend_set_to(backend), on_cpu, pytest.raises(TypeError, match=message):
        pack_embeddings(table, vision, plan)


# ---- maps that point nowhere, or are none


@pytest.mark.parametrize("entry", [6, -8, 10**9, -(2**31)])
def test_a_source_that_points_outside_is_refused_on_the_cpu(entry):
    """Of rows that are one in memory, any would be read: nothing but the check can refuse it."""
    plan = plan_packing([[1, IMAGE, 2, 2], [], [IMAGE, 5, IMAGE], [3]], [3, 0, 4], IMAGE)
    plan.source[2] = entry
    message = rf"source\[2\] must be in \[-7, 6\), for 6 table and 7 vision rows, got {entry}"
    table, vision = torch.randn(1, 4).expand(6, 4), torch.randn(1, 4).expand(7, 4)
    with pytest.raises(ValueError, match=message):
        pack_embeddings(table, vision, plan)


CHANGED_MAPS = {
    "int64 source": (
        {"source": EXAMPLE.source.long()},
        TypeError,
        "plan.source must be int32, .* got torch.int64",
    ),
    "int64 vision_rows": (
        {"vision_rows": EXAMPLE.vision_rows.long()},
        TypeError,
        "plan.vision_rows must be int32, .* got torch.int64",
    ),
    "strided source": (
        {"source": EXAMPLE.source.repeat_interleave(2)[::2]},
        ValueError,
        r"plan.source must be contiguous, .* got strides \(2,\)",
    ),
    "strided vision_rows": (
        {"vision_rows": EXAMPLE.vision_rows.repeat_interleave(3)[::3]},
        ValueError,
        r"plan.vision_rows must be contiguous, .* got strides \(3,\)",
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CHANGED_MAPS)
def test_row_maps_of_another_dtype_or_stride_are_refused(case, backend):
    """Read as int32 after int32 they would give other rows, without a word."""
    changes, error, message = CHANGED_MAPS[case]
    plan = dataclasses.replace(EXAMPLE, **changes)
    with backend_set_to(backend):
        with pytest.raises(error, match=message):
            pack_embeddings(torch.randn(6, 4), torch.randn(7, 4), plan)
        with pytest.raises(error, match=message):
            unpack_vision(torch.randn(TOTAL, 4), plan)


@pytest.mark.parametrize("entry", [10**9, EXAMPLE.num_tokens, -1])
def test_vision_rows_that_point_outside_are_refused_on_the_cpu(entry):
    plan = plan_packing([[1, IMAGE, 2, 2], [], [IMAGE, 5, IMAGE], [3]], [3, 0, 4], IMAGE)
    plan.vision_rows[3] = entry
    message = rf"vision_rows\[3\] must be a packed row, in \[0, {TOTAL}\), got {entry}"
    with pytest.raises(ValueError, match=message):
        unpack_vision(torch.randn(1, 4).expand(TOTAL, 4), plan)


# ---- empty cases

EMPTY = {
    "no samples": ([], []),
    "samples of no rows": ([[], []], []),
    "text only": ([[1, 2], [3]], []),
    "vision only": ([[IMAGE], [IMAGE, IMAGE]], [2, 1, 3]),
    "images of no tokens": ([[1, IMAGE], [IMAGE]], [0, 0]),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", EMPTY)
def test_empty_cases_have_right_shapes_and_zero_gradients(case, backend, device):
    plan = plan_packing(*EMPTY[case], IMAGE).to(device)
    vision_tokens = plan.vision_rows.shape[0]
    table = torch.randn(5, 3, device=device, requires_grad=True)
    vision = torch.randn(vision_tokens, 3, device=device, requires_grad=True)
    with backend_set_to(backend):
        packed = pack_embeddings(table, vision, plan)
        merged = merge_vision(packed, vision, plan.vision_rows)
        unpacked = unpack_vision(merged, plan)
    assert packed.shape == merged.shape == (plan.num_tokens, 3)
    assert unpacked.shape == (vision_tokens, 3)
    (merged.sum() + unpacked.sum()).backward()
    text_ids = plan.input_ids[plan.input_ids != IMAGE]
    assert torch.equal(
        table.grad,
        torch.zeros_like(table).index_add(0, text_ids, torch.ones(len(text_ids), 3, device=device)),
    )
    assert torch.equal(vision.grad, torch.full_like(vision, 2.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_vision_only_needs_no_table_rows(backend):
    plan = plan_packing([[IMAGE]], [2], IMAGE)
    table, vision = torch.randn(0, 3, requires_grad=True), torch.randn(2, 3)
    with backend_set_to(backend):
        packed = pack_embeddings(table, vision, plan)
    packed.sum().backward()
    assert torch.equal(packed, vision)
    assert table.grad.shape == (0, 3)


# ---- dtypes


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_casts_vision_to_the_embedding_dtype(backend):
    table = torch.randn(6, 4)
    vision = torch.randn(EXAMPLE.vision_rows.shape[0], 4).bfloat16().requires_grad_()
    with backend_set_to(backend), torch.autocast("cpu", torch.bfloat16):
        packed = pack_embeddings(table, vision, EXAMPLE)
        merged = merge_vision(packed, vision, EXAMPLE.vision_rows)
    assert packed.dtype == merged.dtype == torch.float32
    assert torch.equal(unpack_vision(packed, EXAMPLE), vision.float())
    merged.sum().backward()
    assert torch.equal(vision.grad, torch.ones_like(vision))


# ---- what is refused

VISION = EXAMPLE.vision_rows.shape[0]
TOTAL = EXAMPLE.num_tokens


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("embedding", "vision", "error", "message"),
    [
        (torch.randn(5, 4), torch.randn(VISION, 4), ValueError, "largest id is 5, .* has 5 rows"),
        (torch.randn(6, 4), torch.randn(8, 4), ValueError, "plan.vision_rows, 7, but has 8"),
        (torch.randn(6, 4), torch.randn(VISION, 3), ValueError, "as wide as .* 4, but is 3"),
        (torch.randn(6), torch.randn(VISION, 4), ValueError, r"embedding .* 2 dim.*\(6,\)"),
        (torch.randn(6, 4), torch.randn(4), ValueError, r"vision must have 2 dimensions.*\(4,\)"),
        (
            torch.randn(6, 4),
            torch.randn(VISION, 4).half(),
            TypeError,
            "dtype of embedding, torch.float32, but has torch.float16",
        ),
        (torch.ones(6, 4).int(), torch.randn(VISION, 4), TypeError, "embedding .* torch.int32"),
        (torch.randn(6, 4), None, TypeError, "vision must be a torch.Tensor, got NoneType"),
        (
            torch.randn(6, 4),
            torch.randn(VISION, 4, device="meta"),
            ValueError,
            "vision must be on the device of embedding, cpu, .*meta",
        ),
        (
            torch.randn(6, 4, device="meta"),
            torch.randn(VISION, 4),
            ValueError,
            r"plan .* device of embedding, meta, but is on cpu; .*plan.to\('meta'\)",
        ),
    ],
)
def test_packing_refuses(backend, embedding, vision, error, message):
    with backend_set_to(backend), pytest.raises(error, match=message):
        pack_embeddings(embedding, vision, EXAMPLE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("convert", "layout"),
    [
        (torch.Tensor.to_sparse, "torch.sparse_coo"),
        (torch.Tensor.to_sparse_csr, "torch.sparse_csr"),
        pytest.param(
            torch.Tensor.to_mkldnn,
            "torch._mkldnn",
            marks=pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no mkldnn"),
        ),
    ],
    ids=["sparse", "sparse rows", "mkldnn"],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_refuses_tensors_that_are_not_dense(backend, convert, layout):
    table, vision, packed = torch.ones(6, 4), torch.ones(VISION, 4), torch.ones(TOTAL, 4)
    rows = EXAMPLE.vision_rows

    def refuses(name, call):
        with pytest.raises(TypeError, match=f"^{name} must be a dense tensor, got layout {layout}"):
            call()

    with backend_set_to(backend):
        refuses("embedding", lambda: pack_embeddings(convert(table), vision, EXAMPLE))
        refuses("vision", lambda: pack_embeddings(table, convert(vision), EXAMPLE))
        refuses("packed", lambda: unpack_vision(convert(packed), EXAMPLE))
        refuses("inputs_embeds", lambda: merge_vision(convert(packed), vision, rows))
        refuses("vision", lambda: merge_vision(packed, convert(vision), rows))
        if convert is torch.Tensor.to_sparse:
            refuses("vision_rows", lambda: merge_vision(packed, vision, convert(rows)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_unpacking_refuses_another_number_of_rows(backend):
    with backend_set_to(backend):
        with pytest.raises(ValueError, match=f"plan's {TOTAL} rows, but has {TOTAL + 1}"):
            unpack_vision(torch.randn(TOTAL + 1, 4), EXAMPLE)
        with pytest.raises(TypeError, match="plan must be a PackPlan, got list"):
            unpack_vision(torch.randn(TOTAL, 4), [])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("vision_rows", "error", "message"),
    [
        (torch.tensor([0, 6]), ValueError, r"\[0, 6\), got 6"),
        (torch.tensor([-1, 2]), ValueError, r"\[0, 6\), got -1"),
        (torch.tensor([2**32, 2]), ValueError, rf"\[0, 6\), got {2**32}"),
        (torch.tensor([4, 4]), ValueError, r"vision_rows\[0\] and vision_rows\[1\] are both 4"),
        (torch.tensor([1]), ValueError, "vision must have one row .* vision_rows, 1, but has 2"),
        (torch.tensor([[1, 2]]), ValueError, r"vision_rows must have 1 dimensions.*\(1, 2\)"),
        (torch.tensor([1.0, 2.0]), TypeError, "vision_rows must be int32 or int64.*torch.float32"),
    ],
)
def test_merging_refuses(backend, vision_rows, error, message):
    with backend_set_to(backend), pytest.raises(error, match=message):
        merge_vision(torch.randn(2, 3, 4), torch.randn(2, 4), vision_rows)
