"""The embedding table's gradient: text rows summed by token id, dense and sparse."""

from __future__ import annotations

import itertools
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F

from tokenflex_kernels import pack_embeddings, plan_packing
from tokenflex_kernels.packing import ops

IMAGE = -200
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TILE, LANES = 32, 8  # csrc/segments.h


def source_of(ids, vision, seed=0):
    """A shuffled `source` of text rows ``ids`` and of ``vision`` vision rows."""
    entries = torch.tensor([*ids, *(~v for v in range(vision))], dtype=torch.int32)
    return entries[torch.randperm(len(entries), generator=torch.Generator().manual_seed(seed))]


def random_ids(number, different, seed=0):
    return torch.randint(
        different, (number,), generator=torch.Generator().manual_seed(seed)
    ).tolist()


# Lengths of the runs of equal ids, about the ends of tiles and of the lanes' turns.
RUNS = {
    "none": [],
    "one row": [1],
    "one whole tile": [32],
    "ends with its tile": [20, 12, 5],
    "begins with its tile": [32, 33, 3],
    "a row beyond": [33],
    "all of many tiles": [32 * 40],
    "into the tile that the next begins in": [10, 60, 70, 1, 1],
    "a turn of the lanes and a row": [7, 25 + 32 * 8 + 1, 9],
    "different ids only": [1] * 150,
    "two and two": [2] * 60,
}
CASES = {
    **{
        name: [run for run, size in enumerate(sizes) for _ in range(size)]
        for name, sizes in RUNS.items()
    },
    "random": random_ids(3000, 7),
    "random over many ids": random_ids(700, 2000),
}


def sums_in_order(grad, source, num_rows):
    """Check the promises of segments.h, a row at a time."""
    precise = grad.to(torch.promote_types(grad.dtype, torch.float32))
    sums = torch.zeros(num_rows, grad.shape[1], dtype=grad.dtype)
    zero = torch.zeros(grad.shape[1], dtype=precise.dtype)
    text = sorted((entry, row) for row, entry in enumerate(source.tolist()) if entry >= 0)
    pieces = {}  # id: the sums of its rows in each tile, in order
    for tile in range(0, len(text), TILE):
        for token, members in itertools.groupby(text[tile : tile + TILE], lambda pair: pair[0]):
            piece = sum((precise[row] for _, row in members), zero)
            pieces.setdefault(token, []).append(piece)
    for token, (first, *others) in pieces.items():
        lanes = [sum(others[lane::LANES], zero) for lane in range(LANES)]
        sums[token] = sum(lanes, first).to(grad.dtype)
    return sums


def table_gradient(grad, source, num_rows):
    return ops.table_gradient(grad, source, int((source < 0).sum()), num_rows)


def sparse_table_gradient(grad, source, num_rows):
    """As a dense tensor."""
    num_ids = source[source >= 0].unique().numel()
    ids, sums = ops.sparse_table_gradient(grad, source, int((source < 0).sum()), num_ids)
    assert ids.tolist() == sorted(set(source[source >= 0].tolist()))
    return torch.zeros(num_rows, grad.shape[1], dtype=grad.dtype).index_copy(
        0, ids.cpu(), sums.cpu()
    )


# ---- values


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_sums_are_made_in_the_order_that_is_promised(case, dtype, device):
    """The same bits on every device."""
    ids = CASES[case]
    source = source_of(ids, vision=40)
    grad = torch.randn(len(source), 9).to(dtype)
    num_rows = max(ids, default=0) + 2
    wanted = sums_in_order(grad, source, num_rows)
    for gradient in (table_gradient, sparse_table_gradient):
        actual = gradient(grad.to(device), source.to(device), num_rows).cpu()
        assert actual.dtype == dtype
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", [1, 2, 3, 8, 64, 123, 1024, 1025, 2056])
def test_any_width(width, device):
    source = source_of(random_ids(200, 9), vision=30)
    grad = torch.randn(len(source), width)
    actual = table_gradient(grad.to(device), source.to(device), 9)
    assert torch.equal(actual.cpu(), sums_in_order(grad, source, 9))


def mean_error(actual, exact):
    return (actual.double() - exact).abs().mean().item()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("different", [3, 300, 20_000])
def test_errors_are_at_most_those_of_pytorch(different, dtype, device):
    source = source_of(random_ids(9000, different), vision=1000).to(device)
    grad = torch.randn(len(source), 16).to(dtype).to(device)
    text = source >= 0
    exact = torch.zeros(different, 16, dtype=torch.float64, device=device)
    exact.index_add_(0, source[text].long(), grad[text].double())
    theirs = torch.ops.aten.embedding_dense_backward(
        grad[text], source[text].long(), different, -1, False
    )
    ours = table_gradient(grad, source, different)
    assert mean_error(ours, exact) <= 1.2 * mean_error(theirs, exact) + 1e-300


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_id_a_hundred_thousand_times(dtype, device):
    """A newline that makes up most of the batch. Sums of ones are exact until they are rounded."""
    ids = [7] * 100_000 + random_ids(1000, 7)
    source = source_of(ids, vision=500).to(device)
    grad = torch.ones(len(source), 3, dtype=dtype, device=device)
    for gradient in (table_gradient, sparse_table_gradient):
        sums = gradient(grad, source, 8)
        assert torch.equal(sums[7].cpu(), torch.full((3,), 100_000.0).to(dtype))
        assert sums[:7].double().sum().item() == 3000


def test_threads_do_not_change_a_bit():
    """Enough rows for seven threads, and one id that spans many of their parts."""
    source = source_of(random_ids(3000, 500) + [3] * 2500, vision=700)
    for dtype in DTYPES:
        grad = torch.randn(len(source), 1031).to(dtype)
        results = []
        for threads in (1, 2, 3, 7):
            with patch("torch.get_num_threads", lambda threads=threads: threads):
                results.append(table_gradient(grad, source, 500))
                results.append(sparse_table_gradient(grad, source, 500))
        assert all(torch.equal(result, results[0]) for result in results)
        assert torch.equal(results[0][:, :5], sums_in_order(grad[:, :5], source, 500))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "layout",
    [
        lambda rows, device: torch.randn(rows, 8 + 3, device=device)[:, :8],
        lambda rows, device: torch.randn(rows * 8 + 1, device=device)[1:].view(rows, 8),
        lambda rows, device: torch.randn(2 * rows, 8, device=device)[::2],
        lambda rows, device: torch.randn(8, rows, device=device).T,
        lambda rows, device: torch.randn(1, 8, device=device).expand(rows, 8),
        lambda rows, device: torch.randn((), device=device).expand(rows, 8),
    ],
    ids=["row gap", "unaligned", "every other", "transposed", "one row", "one number"],
)
def test_gradients_of_any_layout(layout, device):
    source = source_of(random_ids(100, 4), vision=20)
    grad = layout(len(source), device)
    actual = table_gradient(grad, source.to(device), 4)
    assert torch.equal(actual.cpu(), sums_in_order(grad.cpu(), source, 4))


# ---- numbers of 16 bits


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_number_comes_through(dtype, device):
    """Summed alone: subnormal numbers, infinities and what is no number included."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    grad = bits.view(dtype)[:, None].to(device)
    source = torch.arange(2**16, dtype=torch.int32, device=device)
    sums = table_gradient(grad, source, 2**16)
    assert torch.equal(sums.isnan(), grad.isnan())
    assert torch.equal(sums.nan_to_num(1.0), grad.nan_to_num(1.0))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_are_rounded_as_pytorch_rounds(dtype, device):
    """To nearest, ties to even: pairs of numbers of all magnitudes, and ties among them."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**15), 2**15, (200_000, 2), generator=generator).to(torch.int16)
    # The second number is half of the first one's last place, or close to it.
    bits[::2, 1] = (bits[::2, 0] & ~0x7FFF | (bits[::2, 0] & 0x7FFF) - (11 << 10)).to(torch.int16)
    pairs = bits.view(dtype)
    pairs = torch.cat([pairs, pairs.new_tensor([[65504, 16], [65504, 15], [2048, 1], [2050, 1]])])
    source = torch.arange(len(pairs), dtype=torch.int32).repeat_interleave(2)
    actual = table_gradient(pairs.reshape(-1, 1).to(device), source.to(device), len(pairs))
    wanted = pairs.float().sum(1, keepdim=True).to(dtype)
    assert torch.equal(actual.cpu().isnan(), wanted.isnan())
    assert torch.equal(actual.cpu().nan_to_num(1.0), wanted.nan_to_num(1.0))


# ---- through the op

PLAN = plan_packing([[1, IMAGE, 2, 2], [], [IMAGE, 5, IMAGE], [3]], [3, 0, 4], IMAGE)


def pack_and_differentiate(table, vision, plan, grad, sparse_grad):
    packed = pack_embeddings(table, vision, plan, sparse_grad=sparse_grad)
    return torch.autograd.grad(packed, table, grad)[0]


@pytest.mark.parametrize("sparse_grad", [False, True])
@pytest.mark.parametrize("needs_vision", [False, True])
def test_a_frozen_table_is_no_work(sparse_grad, needs_vision):
    table = torch.randn(6, 4)
    vision = torch.randn(7, 4, requires_grad=needs_vision)
    with (
        patch("tokenflex_kernels.packing.ops._text_by_id") as sort,
        patch("tokenflex_kernels.packing.ops._sum_rows") as add,
    ):
        packed = pack_embeddings(table, vision, PLAN, sparse_grad=sparse_grad)
        assert packed.requires_grad == needs_vision
        if needs_vision:
            packed.sum().backward()
    sort.assert_not_called()
    add.assert_not_called()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sparse_gradient_has_a_row_for_each_id_of_the_batch(dtype, device):
    table = torch.randn(6, 4, device=device, dtype=dtype, requires_grad=True)
    vision = torch.randn(7, 4, device=device, dtype=dtype)
    grad = torch.randn(PLAN.num_tokens, 4, device=device, dtype=dtype)
    plan = PLAN.to(device)
    sparse = pack_and_differentiate(table, vision, plan, grad, True)
    assert sparse.layout == torch.sparse_coo
    assert sparse.is_coalesced()
    assert sparse.dtype == dtype
    assert sparse.indices().tolist() == [[1, 2, 3, 5]]
    assert plan.num_token_ids == 4
    dense = pack_and_differentiate(table, vision, plan, grad, False)
    assert torch.equal(sparse.to_dense(), dense)
    with patch.dict("os.environ", TOKENFLEX_BACKEND="reference"):
        reference = pack_and_differentiate(table, vision, plan, grad, True)
    torch.testing.assert_close(reference.to_dense(), dense)
    assert reference.layout == torch.sparse_coo


def test_the_sparse_gradient_takes_no_memory_for_other_ids():
    """A table of 2^31 - 1 rows, all of them one: its dense gradient would take 64 GiB."""
    table = torch.randn(1, 8).expand(2**31 - 1, 8).requires_grad_()
    plan = plan_packing([[2**31 - 2, 5, IMAGE, 5]], [2], IMAGE)
    grad = torch.randn(5, 8)
    sparse = pack_and_differentiate(table, torch.randn(2, 8), plan, grad, True)
    assert sparse.shape == table.shape
    assert sparse.indices().tolist() == [[5, 2**31 - 2]]
    assert torch.equal(sparse.values(), torch.stack([grad[1] + grad[4], grad[0]]))


@pytest.mark.parametrize("sparse_grad", [False, True])
@pytest.mark.parametrize(
    ("prompts", "counts"),
    [([], []), ([[]], []), ([[IMAGE]], [3]), ([[IMAGE]], [0]), ([[5, 0, 5]], []), ([[5]], [])],
)
def test_batches_without_text_or_without_vision(prompts, counts, sparse_grad):
    plan = plan_packing(prompts, counts, IMAGE)
    table = torch.randn(6, 4, requires_grad=True)
    vision = torch.randn(plan.vision_rows.shape[0], 4)
    grad = torch.randn(plan.num_tokens, 4)
    actual = pack_and_differentiate(table, vision, plan, grad, sparse_grad)
    assert actual.is_sparse == sparse_grad
    text = plan.source >= 0
    (wanted,) = torch.autograd.grad(F.embedding(plan.source[text], table), table, grad[text])
    assert torch.equal(actual.to_dense() if sparse_grad else actual, wanted)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.SparseAdam])
def test_optimizers_for_sparse_gradients_train_by_it(optimizer):
    """As they do by that of an embedding lookup. Gradients of two batches are added first."""

    def train(pack):
        torch.manual_seed(0)
        table = torch.randn(6, 4).requires_grad_()
        steps = optimizer([table], lr=0.1)
        for _ in range(3):
            for _ in range(2):
                pack(table).square().sum().backward()
            steps.step()
            steps.zero_grad()
        return table.detach()

    text = PLAN.source[PLAN.source >= 0]
    ours = train(lambda table: pack_embeddings(table, torch.ones(7, 4), PLAN, sparse_grad=True))
    theirs = train(lambda table: F.embedding(text, table, sparse=True))
    torch.testing.assert_close(ours, theirs)


def test_gradcheck():
    table = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    vision = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *rows: pack_embeddings(*rows, PLAN), (table, vision))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("value", [1, None, "yes"])
def test_a_sparse_grad_that_is_no_bool_is_refused(value, backend, monkeypatch):
    monkeypatch.setenv("TOKENFLEX_BACKEND", backend)
    with pytest.raises(TypeError, match=f"sparse_grad must be a bool, got {value!r}"):
        pack_embeddings(torch.randn(6, 4), torch.randn(7, 4), PLAN, sparse_grad=value)


# ---- maps that point nowhere


def test_maps_that_do_not_belong_together_are_refused_on_the_cpu():
    source = torch.tensor([3, ~0, 1, 3], dtype=torch.int32)
    grad = torch.randn(4, 2)
    for gradient in (ops.table_gradient, ops.sparse_table_gradient):
        with pytest.raises(
            ValueError, match="one vision row per entry of vision_rows, 2, but has 1"
        ):
            gradient(grad, source, 2, 4)
    with pytest.raises(ValueError, match=r"source must have its text rows in \[0, 3\), got 3"):
        ops.table_gradient(grad, source, 1, 3)
    for num_ids in (1, 3):
        with pytest.raises(ValueError, match=f"plan's {num_ids} different token ids, but has 2"):
            ops.sparse_table_gradient(grad, source, 1, num_ids)
