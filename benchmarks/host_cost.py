"""The host's cost of a call: ops with next to nothing to do, planning and bins at real sizes.

On a GPU an op's call returns before its kernels have run. Without one, the projector's ops are
measured on a stub too, by Triton's path up to its launcher: see ``stubbed_gpu``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from benchmarks.harness import NO_TIME, Entry, Run, Work, measure
from benchmarks.prompts import IMAGE, Prompts
from benchmarks.results import new_row
from benchmarks.stubbed_gpu import stubbed_gpu
from tokenflex_kernels import (
    balance_bins,
    bin_pack,
    info,
    merge_vision,
    pack_embeddings,
    plan_packing,
    pool_norm,
    project_tokens,
    swiglu,
    unpack_vision,
)

SHARES = {"cuda": 2, "cpu": 3}  # of a run's time

KERNEL_OPS = ("pool_norm", "swiglu", "project_tokens")
OPS = (
    *KERNEL_OPS,
    *("pack_embeddings", "unpack_vision", "merge_vision"),
)
WIDTH = 16
TILE_COST = 51
TARGET_CASE = "no grad"


def op_calls(
    device: str, requires_grad: bool, dtype: torch.dtype = torch.float32
) -> dict[str, Callable[[], torch.Tensor]]:
    """Return a call of each op with small arguments: 4 x 4 patches to 2 x 2, four rows to pack."""

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=dtype, requires_grad=requires_grad)

    plan = plan_packing([[1, IMAGE, 3]], [2], IMAGE).to(device)
    patches, norm, weight = tensor(16, WIDTH), tensor(WIDTH), tensor(WIDTH, WIDTH)
    table, vision, packed = tensor(5, WIDTH), tensor(2, WIDTH), tensor(4, WIDTH)
    grids = ([(4, 4)], [(2, 2)])
    # Interned, as names in the source of a caller are: others are compared letter by letter.
    parameters: dict[str, Any] = {
        sys.intern(f"{part}_{kind}"): weight if kind == "weight" and part != "norm" else norm
        for part in ("norm", "gate", "up", "down")
        for kind in ("weight", "bias")
    }
    return {
        "pool_norm": lambda: pool_norm(patches, *grids, weight=norm, bias=norm),
        "swiglu": lambda: swiglu(patches, weight, weight, norm, norm),
        "project_tokens": lambda: project_tokens(patches, *grids, **parameters),
        "pack_embeddings": lambda: pack_embeddings(table, vision, plan),
        "unpack_vision": lambda: unpack_vision(packed, plan),
        "merge_vision": lambda: merge_vision(packed, vision, plan.vision_rows),
    }


def with_backward(call: Callable[[], torch.Tensor]) -> None:
    result = call()
    result.backward(torch.ones_like(result))


def sample_sizes(samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens and tiles: 1 to 6 tiles of 64, 144 or 256 tokens, text of 220 on average."""
    generator = np.random.default_rng(0)
    tiles = generator.integers(1, 7, 100_000)
    counts = generator.choice([64, 144, 256], 100_000, p=[0.2, 0.3, 0.5])
    text = generator.lognormal(np.log(220) - 0.32, 0.8, 100_000).clip(1, 2000).astype(int)
    return (text + counts * tiles)[:samples], tiles[:samples]


def note_of_bins(call: Callable[[], list[list[int]]]) -> dict[str, str]:
    """Return the number of bins, and the cost of the costliest bin over the mean."""
    bins = call()
    tokens, tiles = sample_sizes(100_000)
    costs = np.array([(tokens[i] + TILE_COST * tiles[i]).sum() for i in bins])
    spread = round(float(costs.max() / costs.mean()), 4)
    return {"note": f"bins {len(bins)}; max/mean cost {spread}"}


def groups(device: str) -> Iterator[tuple[str, dict[str, Callable[[], Any]]]]:
    """Yield cases, and the calls of each by op."""
    yield TARGET_CASE, op_calls(device, requires_grad=False)
    calls = op_calls(device, requires_grad=True)
    yield "grad", calls
    yield "grad, with backward", {op: partial(with_backward, call) for op, call in calls.items()}
    for prompts in (Prompts(16, 500, 0, 32_000), Prompts(1600, 500, 0, 32_000)):
        yield prompts.name, {"plan_packing": partial(plan_packing, *prompts.arguments(), IMAGE)}
    yield "", {"bin_pack": partial(bin_pack, sample_sizes(100_000)[0], 8192)}
    bounds: dict[str, Any] = {"max_tokens": 8192, "max_tiles": 48, "multiple_of": 8}
    for samples in (2_000, 100_000):
        call = partial(balance_bins, *sample_sizes(samples), **bounds, tile_cost=TILE_COST)
        yield str(samples), {"balance_bins": call}


def stubbed_groups() -> Iterator[tuple[str, dict[str, Callable[[], Any]]]]:
    """Yield cases and calls of the ops that have Triton kernels, for a stubbed GPU."""
    for grad, case in ((False, "no grad"), (True, "grad")):
        calls = op_calls("cpu", grad, torch.bfloat16)
        kernels = {op: calls[op] for op in KERNEL_OPS}
        yield f"{case}, stubbed GPU", kernels
        if grad:
            name = f"{case}, with backward, stubbed GPU"
            yield name, {op: partial(with_backward, call) for op, call in kernels.items()}


def suite(run: Run) -> None:
    backends = info()["ops"]
    for case, calls in groups(run.device):
        measure_group(case, calls, backends, run)
    if run.device == "cpu" and find_spec("triton") and os.environ.get("TRITON_INTERPRET") != "1":
        with stubbed_gpu():
            for case, calls in stubbed_groups():
                measure_group(case, calls, dict.fromkeys(calls, "triton"), run)


def measure_group(
    case: str, calls: dict[str, Callable[[], Any]], backends: dict[str, str], run: Run
) -> None:
    """Measure the calls of one case in turns.

    Not if its rows exist, or no target is about them in a run for targets.
    """
    if ("host_cost", case, "forward") in run.done or (case != TARGET_CASE and run.for_targets):
        return
    entries = []
    for op, call in calls.items():
        row = new_row(op="host_cost", case=case, mode="forward", variant=op)
        row["backend"] = backends[op]
        entry = Entry(row, partial(list, [call]), Work(), timing="host")
        if op == "balance_bins":
            entry.costs = partial(note_of_bins, call)
        entries.append(entry)
    if run.deadline.left > 0:
        run.emit(measure(entries, run))
    else:
        run.emit([entry.row | {"status": NO_TIME} for entry in entries])
