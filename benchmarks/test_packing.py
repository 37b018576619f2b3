"""Packing on the CPU. `python -m benchmarks.packing_cpu` runs this and writes the CSV."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.packing_cases import (
    MERGERS,
    PACKERS,
    SPARSE_PACKERS,
    Batch,
    Case,
    forward_backward,
)
from tokenflex_kernels import (
    balance_bins,
    bin_pack,
    merge_vision,
    pack_embeddings,
    plan_packing,
    unpack_vision,
)

THREADS = 2

# From a language model's training batch down to sizes where fixed costs are all there is.
CASES = [
    Case(samples=16, text=220, width=2048, vocabulary=32_000),
    Case(samples=64, text=220, width=2048, vocabulary=32_000),
    Case(samples=4, text=64, width=2048, vocabulary=32_000),
    Case(samples=1, text=64, width=2048, vocabulary=32_000),
    Case(samples=16, text=500, width=2048, vocabulary=32_000, count=0),
    Case(samples=16, text=16, width=64, vocabulary=1_000, count=16),
    Case(samples=2, text=4, width=64, vocabulary=1_000, count=4),
    Case(samples=1, text=2, width=8, vocabulary=100, count=2),
]
by_name = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.fixture(autouse=True)
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


def batch_of(case: Case) -> Batch:
    return case.batch(torch.float32, "cpu")


# ---- moving rows


@by_name
@pytest.mark.parametrize("variant", PACKERS)
def test_pack_forward(benchmark, case, variant):
    batch = batch_of(case)
    result = benchmark(PACKERS[variant], batch)
    assert torch.equal(result, PACKERS["pack_embeddings"](batch))


@by_name
@pytest.mark.parametrize("variant", PACKERS)
def test_pack_forward_and_backward_frozen_table(benchmark, case, variant):
    batch = batch_of(case)
    batch.vision.requires_grad_()
    (grad,) = benchmark(forward_backward, PACKERS[variant], batch)
    assert torch.equal(grad, batch.grad[batch.plan.vision_rows.long()])


@pytest.mark.parametrize("case", CASES[:1], ids=lambda case: case.name)
@pytest.mark.parametrize("variant", PACKERS)
def test_pack_forward_and_backward(benchmark, case, variant):
    batch = batch_of(case)
    batch.vision.requires_grad_()
    batch.table.requires_grad_()
    actual = benchmark(forward_backward, PACKERS[variant], batch)
    torch.testing.assert_close(actual, forward_backward(PACKERS["pack_embeddings"], batch))


@pytest.mark.parametrize("case", CASES[:1], ids=lambda case: case.name)
@pytest.mark.parametrize("variant", SPARSE_PACKERS)
def test_pack_forward_and_backward_sparse_table(benchmark, case, variant):
    batch = batch_of(case)
    batch.vision.requires_grad_()
    batch.table.requires_grad_()
    table, vision = benchmark(forward_backward, SPARSE_PACKERS[variant], batch)
    wanted_table, wanted_vision = forward_backward(PACKERS["pack_embeddings"], batch)
    torch.testing.assert_close(table.to_dense(), wanted_table)
    assert torch.equal(vision, wanted_vision)


@by_name
@pytest.mark.parametrize("variant", MERGERS)
def test_merge_forward(benchmark, case, variant):
    batch = batch_of(case)
    result = benchmark(MERGERS[variant], batch)
    assert torch.equal(result, MERGERS["merge_vision"](batch))


# ---- the cost of a call: 4 rows of 8 numbers, next to nothing to move


@pytest.mark.parametrize("requires_grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("variant", ["pack_embeddings", "unpack_vision", "merge_vision"])
def test_host_cost(benchmark, variant, requires_grad):
    plan = plan_packing([[1, 0, 3]], [2], 0)
    table = torch.randn(5, 8, requires_grad=requires_grad)
    vision = torch.randn(2, 8, requires_grad=requires_grad)
    packed = torch.randn(4, 8, requires_grad=requires_grad)
    benchmark(
        *{
            "pack_embeddings": (pack_embeddings, table, vision, plan),
            "unpack_vision": (unpack_vision, packed, plan),
            "merge_vision": (merge_vision, packed, vision, plan.vision_rows),
        }[variant]
    )


# ---- planning


@pytest.mark.parametrize(
    "case",
    [
        Case(samples=16, text=500, width=0, vocabulary=32_000),
        Case(samples=1600, text=500, width=0, vocabulary=32_000),
    ],
    ids=lambda case: case.name,
)
def test_plan(benchmark, case):
    prompts, counts = case.prompts()
    plan = benchmark(plan_packing, prompts, counts, 0)
    assert plan.num_tokens == case.samples * case.text + sum(counts)


# ---- bins


def hundred_thousand_samples() -> tuple[np.ndarray, np.ndarray]:
    """One to six tiles of 64, 144 or 256 tokens (2 : 3 : 5), log-normal text of 220 on average."""
    generator = np.random.default_rng(0)
    tiles = generator.integers(1, 7, 100_000)
    counts = generator.choice([64, 144, 256], 100_000, p=[0.2, 0.3, 0.5])
    text = generator.lognormal(np.log(220) - 0.32, 0.8, 100_000).clip(1, 2000).astype(int)
    return text + counts * tiles, tiles


def test_bin_pack(benchmark):
    tokens, _ = hundred_thousand_samples()
    bins = benchmark(bin_pack, tokens, 8192)
    assert sum(map(len, bins)) == 100_000


@pytest.mark.parametrize("samples", [2_000, 100_000])
def test_balance_bins(benchmark, samples):
    tokens, tiles = (sizes[:samples] for sizes in hundred_thousand_samples())
    bins = benchmark(
        balance_bins, tokens, tiles, max_tokens=8192, max_tiles=48, tile_cost=51, multiple_of=8
    )
    costs = np.array([(tokens[i] + 51 * tiles[i]).sum() for i in bins])
    benchmark.extra_info["max/mean cost"] = round(float(costs.max() / costs.mean()), 4)
