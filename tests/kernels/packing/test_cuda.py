"""The row movers on a GPU: the values of the CPU, and what only a device can get wrong."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch

from tokenflex_kernels import merge_vision, pack_embeddings, plan_packing, unpack_vision

pytestmark = pytest.mark.gpu

IMAGE = -200
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def ragged_plan(samples=4):
    """Text, several images of several sizes, samples of no rows, of no text and of no image."""
    prompts = [[1, IMAGE, 2, 3, IMAGE, 4] * 20, [], [IMAGE] * 3, [5, 0] * 40] * samples
    images = sum(prompt.count(IMAGE) for prompt in prompts)
    return plan_packing(prompts, [(7, 64, 0, 16)[i % 4] for i in range(images)], IMAGE)


def training_step(table, vision, plan, grad):
    """Every op, forward and backward."""
    packed = pack_embeddings(table, vision * 2, plan)
    merged = merge_vision(packed, unpack_vision(packed, plan) + 1, plan.vision_rows)
    packed = pack_embeddings(table, vision, plan, sparse_grad=True)
    (sparse,) = torch.autograd.grad(packed, table, grad)
    return merged, *torch.autograd.grad(merged, (table, vision), grad), sparse.values()


def inputs(plan, width=2048, dtype=torch.float32, device="cuda"):
    table = torch.randn(6, width, dtype=dtype, device=device, requires_grad=True)
    vision = torch.randn(
        plan.vision_rows.shape[0], width, dtype=dtype, device=device, requires_grad=True
    )
    return table, vision, torch.randn(plan.num_tokens, width, dtype=dtype, device=device)


@pytest.mark.first
@pytest.mark.parametrize(("dtype", "width"), list(itertools.product(DTYPES, (2048, 1155, 2, 1))))
def test_values_are_those_of_the_cpu(dtype, width):
    """Wide rows and rows of odd widths, forward and backward."""
    plan = ragged_plan()
    table, vision, grad = inputs(plan, width, dtype, "cpu")
    on_device = [value.detach().cuda().requires_grad_() for value in (table, vision)]
    results = training_step(*on_device, plan.to("cuda"), grad.cuda())
    for ours, theirs in zip(results, training_step(table, vision, plan, grad), strict=True):
        assert torch.equal(ours.cpu(), theirs)  # sums too, which are made in one order everywhere


@pytest.mark.parametrize("offset", [0, 1, 2, 4])
@pytest.mark.parametrize("vision_offset", [0, 1, 4])
@pytest.mark.parametrize("row_gap", [0, 1, 4, 8])
@pytest.mark.parametrize("width", [3, 100, 1155, 1160])
def test_strided_and_unaligned_rows(offset, vision_offset, row_gap, width):
    """Rows of every split into head, body and tail; a table, vision rows and packed rows that lie
    each in another way."""
    plan = ragged_plan().to("cuda")

    def rows(number, offset):
        memory = torch.randn(number * (width + row_gap) + offset, device="cuda").bfloat16()
        return memory[offset:].view(number, width + row_gap)[:, :width]

    table, vision = rows(6, offset), rows(plan.vision_rows.shape[0], vision_offset)
    plain = pack_embeddings(table.contiguous(), vision.contiguous(), plan)
    assert torch.equal(pack_embeddings(table, vision, plan), plain)
    base = rows(plan.num_tokens, offset)
    wanted = base.clone().index_copy_(0, plan.vision_rows.long(), vision)
    assert torch.equal(merge_vision(base, vision, plan.vision_rows), wanted)
    assert torch.equal(unpack_vision(base, plan), base[plan.vision_rows.long()])
    expanded = torch.randn(1, width, device="cuda").bfloat16().expand(vision.shape[0], -1)
    assert torch.equal(
        unpack_vision(pack_embeddings(table, expanded, plan), plan), expanded.contiguous()
    )


def test_a_training_step_never_synchronises_and_follows_the_stream():
    plan = ragged_plan(30).to("cuda")
    table, vision, grad = inputs(plan)
    wanted = training_step(table, vision, plan, grad)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # work on another stream would overtake this
            late = torch.empty_like(vision).copy_(vision).requires_grad_()
            actual = training_step(table, late, plan, grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    for ours, theirs in zip(actual, wanted, strict=True):
        assert torch.equal(ours, theirs)


def test_a_training_step_can_be_captured_and_replayed():
    plan = ragged_plan().to("cuda")
    table, vision, grad = inputs(plan)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # warm up off the default stream, as capture asks
        training_step(table, vision, plan, grad)
    torch.cuda.current_stream().wait_stream(stream)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = training_step(table, vision, plan, grad)
    for _ in range(2):
        with torch.no_grad():
            table.normal_()
            vision.normal_()
        grad.normal_()
        graph.replay()
        for ours, theirs in zip(captured, training_step(table, vision, plan, grad), strict=True):
            assert torch.equal(ours, theirs)


def test_results_repeat_bit_by_bit_where_pytorch_promises_determinism():
    plan = ragged_plan(40).to("cuda")
    torch.use_deterministic_algorithms(True)
    try:
        for dtype in DTYPES:
            step = inputs(plan, 130, dtype)
            first = training_step(*step[:2], plan, step[2])
            for _ in range(3):
                again = training_step(*step[:2], plan, step[2])
                assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("number", [0, 1, 255, 256, 257, 5000])
def test_the_map_of_a_merge_is_made_on_the_device(number, index_dtype):
    """Rows in any order, strided too; more and fewer than a block has threads."""
    base = torch.randn(3, 2000, 8, device="cuda")
    rows = torch.randperm(6000, device="cuda").to(index_dtype)[: 2 * number].repeat_interleave(2)
    rows = rows[::2][:number]
    vision = torch.randn(number, 8, device="cuda")
    wanted = base.flatten(0, 1).index_copy(0, rows.long(), vision)
    assert torch.equal(merge_vision(base, vision, rows).flatten(0, 1), wanted)


@pytest.mark.parametrize("row", [6, -1, 2**32])
def test_a_merge_into_no_row_fails_as_indexing_does(row):
    """In a process of its own: a failed assertion ends a device's context."""
    merge = (
        "import torch\n"
        "from tokenflex_kernels import merge_vision\n"
        "base, vision = torch.ones(6, 4, device='cuda'), torch.ones(1, 4, device='cuda')\n"
        f"merge_vision(base, vision, torch.tensor([{row}], device='cuda'))\n"
        "torch.cuda.synchronize()\n"
    )
    done = subprocess.run([sys.executable, "-c", merge], capture_output=True, text=True)
    assert done.returncode != 0
    assert "vision_rows must be rows of inputs_embeds" in done.stderr


@pytest.mark.slow
def test_tensors_beyond_two_to_the_31_elements():
    """Some 15 GB: 1.1 million rows of 2048 bfloat16 numbers, the last ones past 2^31."""
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GB of free device memory")
    rows, width = 2**20 + 50_000, 2048
    plan = plan_packing([[1, IMAGE, 2]], [rows - 2], IMAGE).to("cuda")
    assert plan.num_tokens * width > 2**31
    table = torch.randn(3, width, device="cuda", dtype=torch.bfloat16)
    vision = torch.randn(rows - 2, width, device="cuda", dtype=torch.bfloat16)
    packed = pack_embeddings(table, vision, plan)
    assert torch.equal(packed[1:-1], vision)
    assert torch.equal(packed[-1], table[2])
    assert torch.equal(unpack_vision(packed, plan), vision)
    merged = merge_vision(packed, vision[:1], plan.vision_rows[-1:])
    assert torch.equal(merged[-2], vision[0])
    assert torch.equal(merged[-1], table[2])


@pytest.mark.slow
@pytest.mark.parametrize("sparse_grad", [False, True])
def test_a_table_and_its_gradient_beyond_two_to_the_31_elements(sparse_grad):
    """Some 25 GB: each of 1.1 million ids once, from the last to the first, so that every row of
    sums is a row of the gradient, bit by bit."""
    if torch.cuda.mem_get_info()[0] < 32 * 2**30:
        pytest.skip("needs 32 GB of free device memory")
    rows, width = 2**20 + 50_000, 2048
    plan = plan_packing([torch.arange(rows).flip(0)], [], IMAGE).to("cuda")
    table = torch.empty(rows, width, device="cuda", dtype=torch.bfloat16).normal_()
    vision = table.new_empty(0, width)
    packed = pack_embeddings(table.requires_grad_(), vision, plan, sparse_grad=sparse_grad)
    assert torch.equal(packed, table.detach().flip(0))
    grad = torch.empty_like(packed).normal_()
    (sums,) = torch.autograd.grad(packed, table, grad)
    assert torch.equal(sums.values() if sparse_grad else sums, grad.flip(0))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_of_another_device_than_the_current_one():
    plan = ragged_plan()
    table, vision, grad = inputs(plan, device="cuda:1")
    actual = training_step(table, vision, plan.to("cuda:1"), grad)
    assert torch.cuda.current_device() == 0
    host = [value.detach().cpu().requires_grad_() for value in (table, vision)]
    assert torch.equal(actual[0].cpu(), training_step(*host, plan, grad.cpu())[0])
