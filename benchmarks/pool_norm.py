"""`pool_norm`: each image's patches pooled to its own grid, and normalised. Bound by memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from benchmarks import plain
from benchmarks.cases import Batch, Case, Leaves, Variant, run_cases, work_by_mode
from benchmarks.harness import Run, Work
from benchmarks.peers import fast, load_peers
from benchmarks.plain import Grid, Grids, Widths, mixed, square, uniform
from tokenflex_kernels import pool_norm


def ours(leaves: Leaves, grids: Grids) -> torch.Tensor:
    return pool_norm(
        leaves["x"],
        grids.inputs,
        grids.outputs,
        weight=leaves["norm_weight"],
        bias=leaves["norm_bias"],
        eps=plain.EPS,
    )


def case(
    name: str, grids: Sequence[Grid], peers: Sequence[Variant], widths: Widths = plain.RELEASED
) -> Case:
    tokens, patches = plain.number_of_tokens(grids), len(grids) * plain.SIDE**2
    shapes = {"x": (patches, widths.vision), "grad": (tokens, widths.vision)}
    shapes |= {name: widths.weights[name] for name in ("norm_weight", "norm_bias")}

    def batch(dtype: torch.dtype, device: str, seed: int, _: Batch | None) -> Batch:
        return plain.random_batch(shapes, plain.grids_of(grids, device), dtype, device, seed)

    def work(itemsize: int) -> dict[str, Work]:
        # Forward reads patches and writes tokens; backward reads the tokens' gradient and the
        # normalised rows, and writes the patches' gradient.
        row = widths.vision * itemsize
        return work_by_mode(Work((patches + tokens) * row), Work((patches + 2 * tokens) * row))

    variants = [Variant("tokenflex", ours, ours=True), *peers]
    return Case("pool_norm", name, tokens, batch, plain.true_pool_norm, variants, work)


def cases(run: Run, peers: Sequence[Variant]) -> Iterator[Case]:
    quick, few = run.quick, fast(peers)
    if run.device == "cpu":
        if not quick:
            yield case("4 images, n=12", square(4, 12), few)
            yield case("4 images, n=8", square(4, 8), few)
            yield case("10 images, mixed", mixed(1), few)
            yield case("10 images, uniform", uniform(1), few)
        yield case("4 images, n=16", square(4, 16), peers)
        return
    for n in (16,) if quick else (16, 12, 8):
        yield case(f"128 images, n={n}", square(128, n), peers)
    tens = 4 if quick else 16
    yield case(f"{10 * tens} images, mixed", mixed(tens), few)
    yield case(f"{10 * tens} images, uniform", uniform(tens), few)
    for n in (16,) if quick else (16, 8):
        yield case(f"1 image, n={n}", square(1, n), few)


def suite(run: Run) -> None:
    run_cases(cases(run, load_peers("pool_norm", run)), run)
