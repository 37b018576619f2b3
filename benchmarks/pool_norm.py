"""`pool_norm`: each image's patches pooled to its own grid, and normalised. Bound by memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from benchmarks import plain
from benchmarks.cases import Case, Leaves, Variant, fast, run_cases
from benchmarks.harness import Run
from benchmarks.peers import load_peers
from benchmarks.plain import Grid, Grids, mixed, square, uniform
from tokenflex_kernels import pool_norm

SHARES = {"cuda": 2, "cpu": 2}  # of a run's time


def ours(leaves: Leaves, grids: Grids) -> torch.Tensor:
    weight, bias = leaves["norm_weight"], leaves["norm_bias"]
    arguments = (leaves["x"], grids.inputs, grids.outputs)
    return pool_norm(*arguments, weight=weight, bias=bias, eps=plain.EPS)


def case(
    name: str, grids: Sequence[Grid], peers: Sequence[Variant], width: int = plain.WIDTHS[0]
) -> Case:
    tokens, patches = plain.number_of_tokens(grids), len(grids) * plain.SIDE**2
    shapes: plain.Shapes = {"x": (patches, width), "grad": (tokens, width)}
    shapes |= {"norm_weight": (width,), "norm_bias": (width,)}
    return Case(
        op="pool_norm",
        name=name,
        tokens=tokens,
        batch=plain.random_batches(shapes, grids),
        truth=plain.pool_norm,
        variants=[Variant("tokenflex", ours, ours=True), *peers],
        # Forward reads patches and writes tokens; backward reads the tokens' gradient and the
        # normalised rows, and writes the patches' gradient.
        numbers=((patches + tokens) * width, (patches + 2 * tokens) * width),
    )


def cases(run: Run, peers: Sequence[Variant]) -> Iterator[Case]:
    few, quick = fast(peers), run.quick
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
