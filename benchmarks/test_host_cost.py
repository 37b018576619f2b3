"""What one call costs on the host, by pytest-benchmark; ``python -m benchmarks`` writes the rows.

The ops get next to nothing to compute or move; on a GPU a call returns before its kernels have run.
The host's own work, planning and bin packing, is timed at real sizes. No figure is asserted here.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.host_cost import OPS
from benchmarks.packing_cases import IMAGE, Prompts
from tokenflex_kernels import (
    balance_bins,
    bin_pack,
    merge_vision,
    pack_embeddings,
    plan_packing,
    pool_norm,
    project_tokens,
    swiglu,
    unpack_vision,
)

DEVICE = os.environ.get("TOKENFLEX_BENCHMARK_DEVICE", "cpu")
WIDTH = 16


@pytest.fixture(autouse=True)
def _report(benchmark):
    """A line of JSON as soon as a test has ended: time may run out on the others."""
    yield
    path = os.environ.get("TOKENFLEX_BENCHMARK_REPORT")
    if path and benchmark.stats:
        with Path(path).open("a", encoding="utf-8") as file:
            entry = {
                "name": benchmark.name,
                "op": (benchmark.params or {}).get("op"),
                "seconds": benchmark.stats.stats.data,
                "note": benchmark.extra_info,
            }
            file.write(json.dumps(entry) + "\n")


def calls(requires_grad: bool) -> dict:
    """Each op with small arguments: one image of 4 x 4 patches to 2 x 2, four rows to pack."""

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=DEVICE, requires_grad=requires_grad)

    plan = plan_packing([[1, IMAGE, 3]], [2], IMAGE).to(DEVICE)
    patches, norm, weight = tensor(16, WIDTH), tensor(WIDTH), tensor(WIDTH, WIDTH)
    table, vision, packed = tensor(5, WIDTH), tensor(2, WIDTH), tensor(4, WIDTH)
    grids = ([(4, 4)], [(2, 2)])
    parameters = {
        "norm_weight": norm,
        "norm_bias": norm,
        "gate_weight": weight,
        "gate_bias": norm,
        "up_weight": weight,
        "up_bias": norm,
        "down_weight": weight,
        "down_bias": norm,
    }
    return {
        "pool_norm": lambda: pool_norm(patches, *grids, weight=norm, bias=norm),
        "swiglu": lambda: swiglu(patches, weight, weight, norm, norm),
        "project_tokens": lambda: project_tokens(patches, *grids, **parameters),
        "pack_embeddings": lambda: pack_embeddings(table, vision, plan),
        "unpack_vision": lambda: unpack_vision(packed, plan),
        "merge_vision": lambda: merge_vision(packed, vision, plan.vision_rows),
    }


@pytest.mark.parametrize("requires_grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("op", OPS)
def test_host_cost(benchmark, op, requires_grad):
    result = benchmark(calls(requires_grad)[op])
    assert result.requires_grad is requires_grad


@pytest.mark.parametrize(
    "prompts",
    [Prompts(16, 500, 0, 32_000), Prompts(1600, 500, 0, 32_000)],
    ids=lambda prompts: prompts.name,
)
def test_plan_packing(benchmark, prompts):
    plan = benchmark(plan_packing, *prompts.arguments(), IMAGE)
    assert plan.num_tokens == prompts.tokens


def lengths(samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and tiles: one to six tiles of 64, 144 or 256 (2 : 3 : 5), log-normal text of 220."""
    generator = np.random.default_rng(0)
    tiles = generator.integers(1, 7, 100_000)
    counts = generator.choice([64, 144, 256], 100_000, p=[0.2, 0.3, 0.5])
    text = generator.lognormal(np.log(220) - 0.32, 0.8, 100_000).clip(1, 2000).astype(int)
    return (text + counts * tiles)[:samples], tiles[:samples]


def test_bin_pack(benchmark):
    tokens, _ = lengths(100_000)
    bins = benchmark(bin_pack, tokens, 8192)
    assert sum(map(len, bins)) == len(tokens)


@pytest.mark.parametrize("samples", [2_000, 100_000])
def test_balance_bins(benchmark, samples):
    tokens, tiles = lengths(samples)
    bins = benchmark(
        balance_bins, tokens, tiles, max_tokens=8192, max_tiles=48, tile_cost=51, multiple_of=8
    )
    costs = np.array([(tokens[i] + 51 * tiles[i]).sum() for i in bins])
    benchmark.extra_info["bins"] = len(bins)
    benchmark.extra_info["max/mean cost"] = round(float(costs.max() / costs.mean()), 4)
