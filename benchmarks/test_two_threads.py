"""Packing on two threads of a CPU, against what models do without it, by pytest-benchmark.

    python -m pytest benchmarks/test_two_threads.py --benchmark-json=runs/two-threads.json
    pytest-benchmark compare runs/two-threads.json --csv=benchmarks/results/two-threads/NAME.csv

16 samples of text and one image each, float32, D = 2048. Variants take turns and inputs rotate, so
that what else the machine does, and what its cache holds, is the same for all. No time is asserted.
"""

from __future__ import annotations

import itertools
import os

import pytest
import torch

from benchmarks.packing_cases import Prompts, index_put, masked_scatter, ours, packed

PROMPTS = Prompts(16, 220, 2048, 32_000)
VARIANTS = {"pack_embeddings": ours, "masked_scatter": masked_scatter, "index_put": index_put}
SETS = 3  # of 46 MiB packed each


@pytest.fixture(scope="module")
def batches():
    """The leaves and plan of each set, over one table, and a gradient for what is packed."""
    torch.manual_seed(0)
    table = torch.randn(PROMPTS.vocabulary, PROMPTS.width)
    vision = [torch.randn(sum(PROMPTS.counts), PROMPTS.width) for _ in range(SETS)]
    grad = torch.randn(PROMPTS.tokens, PROMPTS.width)
    plans = [packed(PROMPTS, "cpu", seed) for seed in range(SETS)]
    return [{"table": table, "vision": rows} for rows in vision], plans, grad


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("variant", VARIANTS)  # varies fastest
@pytest.mark.parametrize("mode", ["forward", "forward+backward, frozen table"])
@pytest.mark.parametrize("turn", range(3))
def test_packing(benchmark, batches, turn, mode, variant):
    leaves, plans, grad = batches
    trained = mode != "forward"
    sets = itertools.cycle(zip(leaves, plans, strict=True))

    def next_set():
        values, fixed = next(sets)
        values = {**values, "vision": values["vision"].detach().requires_grad_(trained)}
        return (values, fixed), {}

    def run(values, fixed):
        result = VARIANTS[variant](values, fixed)
        if trained:
            (result,) = torch.autograd.grad(result, values["vision"], grad)
        return result

    values, fixed = leaves[0], plans[0]
    assert torch.equal(VARIANTS[variant](values, fixed), ours(values, fixed))
    result = benchmark.pedantic(run, setup=next_set, rounds=15, warmup_rounds=2)
    assert result.shape == (values["vision"].shape if trained else grad.shape)
    benchmark.extra_info["load"] = os.getloadavg()[0]
