"""`project_and_pack`: the projector's tokens in the packed buffer, by one op and by two."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from benchmarks import plain
from benchmarks.cases import Batch, Case, Leaves, Variant, projector_modes, run_cases
from benchmarks.harness import Run
from benchmarks.peers import look_up
from benchmarks.plain import Grids
from benchmarks.prompts import Packed, Prompts
from benchmarks.results import EAGER
from tokenflex_kernels import pack_embeddings, project_and_pack, project_tokens

SHARES = {"cuda": 2, "cpu": 2}  # of a run's time


@dataclass(frozen=True)
class Shown:
    """Images and the prompts that show them."""

    grids: Grids
    packed: Packed


def options_of(leaves: Leaves) -> dict[str, Any]:
    """Return the arguments of `project_tokens` beside the grids."""
    options = {name: leaf for name, leaf in leaves.items() if name not in ("x", "table")}
    return {**options, "eps": plain.EPS}


def into_packed(leaves: Leaves, shown: Shown) -> torch.Tensor:
    grids = shown.grids.inputs, shown.grids.outputs
    options = {"embedding": leaves["table"], "plan": shown.packed.plan, **options_of(leaves)}
    return project_and_pack(leaves["x"], *grids, **options)


def two_calls(leaves: Leaves, shown: Shown) -> torch.Tensor:
    grids = shown.grids.inputs, shown.grids.outputs
    tokens = project_tokens(leaves["x"], *grids, **options_of(leaves))
    return pack_embeddings(leaves["table"], tokens, shown.packed.plan)


def eager(leaves: Leaves, shown: Shown) -> torch.Tensor:
    tokens = plain.project_tokens(leaves, shown.grids)
    return look_up(leaves, shown.packed).index_put((shown.packed.rows,), tokens)


VARIANTS = (
    Variant("tokenflex", into_packed, ours=True),
    Variant("project_tokens + pack_embeddings", two_calls),
    Variant(EAGER, eager),
)


def random_batch(
    prompts: Prompts,
    vision: int,
    hidden: int,
    side: int,
    dtype: torch.dtype,
    device: str,
    seed: int,
    first: Batch | None,
) -> Batch:
    """Return random patches, and prompts; all batches share the table."""
    out_grids = [(round(count**0.5),) * 2 for count in prompts.counts]
    shapes = {
        "x": (prompts.samples * side**2, vision),
        "grad": (prompts.tokens, prompts.width),
        **plain.weight_shapes(vision, hidden, prompts.width),
    }
    if first is None:
        shapes["table"] = (prompts.vocabulary, prompts.width)
    batch = plain.random_batches(shapes, out_grids, side)(dtype, device, seed, None)
    if first is not None:
        batch.leaves["table"] = first.leaves["table"]
    batch.fixed = Shown(batch.fixed, prompts.packed(device, seed))
    return batch


def case(
    prompts: Prompts, vision: int = plain.WIDTHS[0], hidden: int = plain.WIDTHS[1], side: int = 27
) -> Case:
    """Return a case in which the projector learns, and the table does not."""
    tokens = sum(prompts.counts)
    flops = 2 * tokens * hidden * (2 * vision + prompts.width)
    return Case(
        op="project_and_pack",
        name=prompts.name,
        tokens=prompts.tokens,
        batch=partial(random_batch, prompts, vision, hidden, side),
        truth=eager,
        variants=VARIANTS,
        flops=(flops, 2 * flops),
        trained=("x", *plain.weight_shapes(1, 1, 1)),
        shared=("table",),
    )


def cases(run: Run) -> Iterator[Case]:
    if run.device == "cpu":
        yield case(Prompts(16, 16, 64, 64, count=16), 64, 128, 8)  # as the demo's
        yield case(Prompts(1, 64, 2048, 8_000, count=64))
        if not run.quick:
            yield case(Prompts(4, 64, 2048, 8_000))
            yield case(Prompts(1, 64, 2048, 8_000, count=256))
        return
    for samples in (16,) if run.quick else (16, 128, 64, 4, 1):
        yield case(Prompts(samples, 220, 2048, 151_936, count=256))


def suite(run: Run) -> None:
    run_cases((replace(case, modes=projector_modes(run)) for case in cases(run)), run)
