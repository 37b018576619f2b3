"""The row movers as torch.library ops: registration, torch.compile, fake tensors, training."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._inductor.config
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from tokenflex_kernels import merge_vision, pack_embeddings, plan_packing, unpack_vision
from tokenflex_kernels.packing import ops

IMAGE = -200
PLAN = plan_packing([[1, IMAGE, 2, 2], [], [IMAGE, 5, IMAGE], [3]], [3, 0, 4], IMAGE)
SHOWN_AGAIN = plan_packing(
    [[1, IMAGE, 2, 2], [], [IMAGE, 5, IMAGE], [3]], [3, 0, 4], IMAGE, image_index=[2, 0, 2]
)
TEXT_ONLY = plan_packing([[1, 2], [3]], [], IMAGE)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def rows(number, device, width=4, requires_grad=True):
    return torch.randn(number, width, device=device, requires_grad=requires_grad)


# ---- registration


def op_arguments(plan, device):
    """Arguments for each op; only the public three are differentiable."""
    plan = plan.to(device)
    total, vision = plan.num_tokens, plan.vision_rows.shape[0]
    maps = (plan.source, plan.vision_rows)
    _, merge_source = ops.merge_vision(rows(total, device), rows(vision, device), plan.vision_rows)
    return {
        ops.pack_embeddings: (rows(6, device), rows(vision, device), *maps),
        ops.merge_vision: (
            rows(total, device),
            rows(vision, device),
            plan.vision_rows,
        ),
        ops.unpack_vision: (rows(total, device), *maps),
        ops.keep_text: (rows(total, device, requires_grad=False), merge_source),
        ops.spread_vision: (rows(vision, device, requires_grad=False), plan.source),
        ops.table_gradient: (rows(total, device, requires_grad=False), plan.source, vision, 6),
        ops.sparse_table_gradient: (
            rows(total, device, requires_grad=False),
            plan.source,
            vision,
            plan.num_token_ids,
        ),
    }


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("plan", [PLAN, TEXT_ONLY], ids=["mixed", "text only"])
def test_every_op_passes_opcheck(plan, device):
    for op, arguments in op_arguments(plan, device).items():
        torch.library.opcheck(op.overload, arguments)


def strided(rows):
    return rows.repeat_interleave(2, 0)[::2]


@pytest.mark.parametrize(
    ("op", "changes", "message"),
    [
        (
            "pack_embeddings",
            {1: torch.Tensor.half},
            "vision must have the dtype and width .*float16",
        ),
        ("pack_embeddings", {1: lambda rows: rows[:, :3]}, "vision must .* and 4, got .* and 3"),
        ("pack_embeddings", {2: torch.Tensor.long}, "source must be contiguous int32, .*int64"),
        ("pack_embeddings", {2: strided}, r"source must be contiguous int32, .*\(2,\)"),
        ("merge_vision", {1: torch.Tensor.half}, "vision must have the dtype and width .*float16"),
        ("merge_vision", {1: lambda rows: rows[:, :3]}, "vision must .* and 4, got .* and 3"),
        ("merge_vision", {2: torch.Tensor.short}, "vision_rows must be int32 or int64, .*int16"),
        ("unpack_vision", {2: torch.Tensor.long}, "vision_rows must be contiguous int32, .*int64"),
        ("unpack_vision", {2: strided}, r"vision_rows must be contiguous int32, .*\(2,\)"),
        ("keep_text", {1: torch.Tensor.long}, "source must be contiguous int32, .*int64"),
        ("spread_vision", {1: strided}, r"source must be contiguous int32, .*\(2,\)"),
        ("table_gradient", {1: torch.Tensor.long}, "source must be contiguous int32, .*int64"),
        ("table_gradient", {0: lambda rows: rows[1:]}, "one row per entry of source, 12, .* 11"),
        ("sparse_table_gradient", {1: strided}, r"source must be contiguous int32, .*\(2,\)"),
        (
            "sparse_table_gradient",
            {0: lambda rows: rows[1:]},
            "one row per entry of source, 12, .* 11",
        ),
    ],
)
def test_an_op_called_on_its_own_reads_no_memory_but_its_tensors(op, changes, message):
    """Past `tokenflex_kernels.packing` and its checks, as an exported graph calls it."""
    op = getattr(ops, op)
    arguments = op_arguments(PLAN, "cpu")[op]
    arguments = [changes.get(at, lambda same: same)(value) for at, value in enumerate(arguments)]
    with pytest.raises((TypeError, ValueError), match=message):
        op.overload(*arguments)


def test_opcheck_with_one_input_that_needs_no_gradient():
    maps = (PLAN.source, PLAN.vision_rows)
    torch.library.opcheck(
        ops.pack_embeddings.overload, (rows(6, "cpu", requires_grad=False), rows(7, "cpu"), *maps)
    )
    torch.library.opcheck(
        ops.pack_embeddings.overload, (rows(6, "cpu"), rows(7, "cpu", requires_grad=False), *maps)
    )


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_with_images_that_are_shown_again(device):
    plan = SHOWN_AGAIN.to(device)
    arguments = (rows(6, device), rows(7, device), plan.source, plan.vision_rows, None, False)
    torch.library.opcheck(ops.pack_embeddings.overload, arguments)


def test_compiled_packing_of_images_that_are_shown_again():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(pack, fullgraph=True, dynamic=True, backend=counter)
    for length in range(4, 12):
        index = [place % 3 for place in range(length)]
        plan = plan_packing([[1, IMAGE]] * length, [2, length, 3], IMAGE, image_index=index)
        table, vision = rows(6, "cpu"), rows(5 + length, "cpu")
        actual = results_and_gradients(compiled, table, vision, plan)
        wanted = results_and_gradients(pack, table, vision, plan)
        for ours, theirs in zip(actual, wanted, strict=True):
            assert torch.equal(ours, theirs)
    assert counter.frame_count <= 2


def test_fake_tensors_get_shapes_and_touch_no_memory():
    """As memory estimators and exporters use them; real addresses would be read through them."""
    with FakeTensorMode() as mode:
        plan = copy.copy(PLAN)
        for name in ("source", "vision_rows"):
            vars(plan)[name] = mode.from_tensor(getattr(PLAN, name))
        table = torch.randn(6, 4, requires_grad=True)
        vision = torch.randn(7, 4, requires_grad=True)
        packed = pack_embeddings(table, vision, plan)
        merged = merge_vision(packed, unpack_vision(packed, plan), plan.vision_rows)
        assert merged.shape == (PLAN.num_tokens, 4)
        merged.sum().backward()
        assert table.grad.shape == (6, 4)


def test_a_default_device_does_not_move_the_map_of_a_merge():
    base, vision = rows(5, "cpu"), rows(2, "cpu")
    where = torch.tensor([3, 1])
    wanted = merge_vision(base, vision, where)
    with torch.device("meta"):
        assert torch.equal(merge_vision(base, vision, where), wanted)


# ---- torch.compile


def pack(table, vision, plan):
    return pack_embeddings(table, vision, plan)


def pack_sparse(table, vision, plan):
    return pack_embeddings(table, vision, plan, sparse_grad=True).cos()


def unpack(table, vision, plan):
    return unpack_vision(F.embedding(plan.source.clamp(min=0), table), plan)


def merge(table, vision, plan):
    return merge_vision(F.embedding(plan.source.clamp(min=0), table), vision, plan.vision_rows)


def everything(table, vision, plan):
    packed = pack_embeddings(table, vision.sin(), plan)
    merged = merge_vision(packed[None], vision, plan.vision_rows)
    return merged[0].cos(), unpack_vision(packed, plan) * 2


def results_and_gradients(function, table, vision, plan):
    outputs = function(table, vision, plan)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = sum((output * output.detach().sin()).sum() for output in outputs)
    grads = torch.autograd.grad(loss, (table, vision), allow_unused=True)
    if grads[0].is_sparse:
        grads = grads[0].indices(), grads[0].values(), grads[1]
    return *outputs, *(grad for grad in grads if grad is not None)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("function", [pack, pack_sparse, unpack, merge, everything])
def test_compiles_whole_and_at_most_twice_over_twenty_lengths(function, device):
    """Other numbers of rows, samples, images and vision tokens each time, and one table size."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for length in range(2, 22):
        samples = length % 5 + 1
        prompt = [1, IMAGE, 3] + [length % 7] * length
        plan = plan_packing([prompt] * samples, [length % 3 + 2] * samples, IMAGE).to(device)
        table, vision = rows(7, device), rows(plan.vision_rows.shape[0], device)
        actual = results_and_gradients(compiled, table, vision, plan)
        wanted = results_and_gradients(function, table, vision, plan)
        for ours, theirs in zip(actual, wanted, strict=True):
            assert torch.equal(ours, theirs)
    assert counter.frame_count <= 2


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "function", [everything, pytest.param(pack_sparse, marks=pytest.mark.release)]
)
# Its cache on disk does not know when the ops of a cached graph have changed.
@torch._inductor.config.patch(force_disable_caches=True)
def test_inductor_gives_the_same_forward_and_backward(function, device):
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    plan = PLAN.to(device)
    table, vision = rows(6, device), rows(7, device)
    torch.testing.assert_close(
        results_and_gradients(compiled, table, vision, plan),
        results_and_gradients(function, table, vision, plan),
    )


def test_a_compiled_function_may_read_the_facts_of_a_plan():
    """Those that are one number; reading `lengths` would tie it to a number of samples."""

    def facts(x, plan):
        return x + plan.max_seqlen + plan.num_samples + plan.num_tokens + plan.max_token_id

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(facts, fullgraph=True, dynamic=True, backend=counter)
    for length in range(2, 12):
        plan = plan_packing([[length] * length] * (length + 1), [], IMAGE)
        wanted = length + (length + 1) + length * (length + 1) + length
        assert compiled(torch.zeros(()), plan) == wanted
    assert counter.frame_count <= 2


def test_checks_hold_in_a_compiled_function():
    compiled = torch.compile(merge_vision, fullgraph=True, dynamic=True, backend="aot_eager")
    with pytest.raises(ValueError, match=r"vision_rows\[1\] .* \[0, 5\), got 5"):
        compiled(rows(5, "cpu"), rows(2, "cpu"), torch.tensor([1, 5]))


def test_compiles_under_autocast():
    def step(table, vision, plan):
        with torch.autocast("cpu", torch.bfloat16):
            return pack_embeddings(table, vision @ vision.T @ vision, plan)

    table, vision = rows(6, "cpu"), rows(7, "cpu")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    assert torch.equal(compiled(table, vision, PLAN), step(table, vision, PLAN))
    assert step(table, vision, PLAN).dtype == torch.float32


def test_a_compiler_need_not_look_into_the_question_for_autocast(monkeypatch):
    """Up to 2.11 it cannot: here, that function refuses to be traced."""
    real = torch.amp.is_autocast_available
    monkeypatch.setattr(torch.amp, "is_autocast_available", torch._dynamo.disable(real))

    def step(table, vision, plan):
        with torch.autocast("cpu", torch.bfloat16):
            return pack_embeddings(table, vision @ vision.T @ vision, plan)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    table, vision = rows(6, "cpu"), rows(7, "cpu")
    assert torch.equal(compiled(table, vision, PLAN), step(table, vision, PLAN))


def test_checkpointing_in_a_compiled_function():
    def step(table, vision, plan):
        return checkpoint(everything, table, vision, plan, use_reentrant=False)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    table, vision = rows(6, "cpu"), rows(7, "cpu")
    actual = results_and_gradients(compiled, table, vision, PLAN)
    wanted = results_and_gradients(everything, table, vision, PLAN)
    for ours, theirs in zip(actual, wanted, strict=True):
        assert torch.equal(ours, theirs)


# ---- the table's gradient in training


@pytest.mark.parametrize("device", DEVICES)
def test_the_tables_gradient_is_a_plain_tensor_of_its_own(device):
    """No view and no spare row: whatever saves, flattens or reduces gradients sees [V, D] and no
    more. Autograd keeps it as `.grad` without a copy, and adds to it the next time."""
    plan = PLAN.to(device)
    table, vision = rows(6, device), rows(7, device)
    pack_embeddings(table, vision, plan).sum().backward()
    first = table.grad
    assert first.is_contiguous()
    assert first._base is None
    assert first.untyped_storage().nbytes() == 6 * 4 * 4
    assert first.flatten().tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [1] * 4 + [0] * 4 + [1] * 4
    pack_embeddings(table, vision, plan).sum().backward()
    assert table.grad is first
    assert torch.equal(first[2], torch.full_like(first[2], 4.0))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_data_parallel_training_sums_into_its_buckets(tmp_path):
    """DDP makes `.grad` a view of its bucket: the gradient is copied there, and accumulates."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:

        class Model(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.embedding = torch.nn.Embedding(6, 4)
                self.linear = torch.nn.Linear(4, 4)

            def forward(self, vision):
                return pack_embeddings(self.embedding.weight, self.linear(vision), PLAN)

        model = Model()
        parallel = torch.nn.parallel.DistributedDataParallel(
            copy.deepcopy(model), gradient_as_bucket_view=True
        )
        vision = torch.randn(7, 4)
        for _ in range(2):
            parallel(vision).square().sum().backward()
            model(vision).square().sum().backward()
        for ours, theirs in zip(parallel.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)
    finally:
        torch.distributed.destroy_process_group()


def test_a_missing_extension_leaves_the_reference(monkeypatch, new_choices):
    monkeypatch.setattr("tokenflex_kernels.backend.extension", lambda: None)
    table, vision = rows(6, "cpu"), rows(7, "cpu")
    packed = pack_embeddings(table, vision, PLAN)
    assert torch.equal(unpack_vision(packed, PLAN), vision)
    with pytest.raises(RuntimeError, match=r"tokenflex_kernels\._C, which is not built"):
        ops.pack_embeddings(table, vision, PLAN.source, PLAN.vision_rows)
