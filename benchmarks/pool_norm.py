"""`pool_norm`: each image's patches pooled to its own grid, and normalised. Bound by memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from benchmarks import plain
from benchmarks.cases import Case, Leaves, Variant, fast, projector_modes, run_cases
from benchmarks.harness import Run
from benchmarks.peers import load_peers
from benchmarks.plain import Grid, Grids, mixed, square, uniform
from tokenflex_kernels import pool_norm

SHARES = {"cuda": 2, "cpu": 5}  # of a run's time


def ours(leaves: Leaves, grids: Grids) -> torch.Tensor:
    weight, bias = leaves["norm_weight"], leaves["norm_bias"]
    arguments = (leaves["x"], grids.inputs, grids.outputs)
    return pool_norm(*arguments, weight=weight, bias=bias, eps=plain.EPS)


def case(
    name: str,
    grids: Sequence[Grid],
    peers: Sequence[Variant],
    width: int = plain.WIDTHS[0],
    side: int = plain.SIDE,
) -> Case:
    tokens, patches = plain.number_of_tokens(grids), len(grids) * side**2
    shapes: plain.Shapes = {"x": (patches, width), "grad": (tokens, width)}
    shapes |= {"norm_weight": (width,), "norm_bias": (width,)}
    return Case(
        op="pool_norm",
        name=name,
        tokens=tokens,
        batch=plain.random_batches(shapes, grids, side),
        truth=plain.pool_norm,
        variants=[Variant("tokenflex", ours, ours=True), *peers],
        # Forward reads patches and writes tokens; backward reads the tokens' gradient and the
        # normalised rows, and writes the patches' gradient.
        numbers=((patches + tokens) * width, (patches + 2 * tokens) * width),
    )


def cases(run: Run, peers: Sequence[Variant]) -> Iterator[Case]:
    few, quick = fast(peers), run.quick
    if run.device == "cpu":
        yield case("B=4, 8 x 8 patches, n=2, C=64", square(4, 2), few, 64, 8)
        if not quick:
            yield case("B=1, 8 x 8 patches, n=3, C=64", square(1, 3), few, 64, 8)
            for images, n in ((1, 8), (1, 16), (2, 8), (2, 16)):
                yield case(f"B={images}, n={n}", square(images, n), few)
            yield case("B=10, mixed", mixed(1), few)
        yield case("B=2, n=12", square(2, 12), peers)  # last: compiling takes longest
        return
    for n in (16,) if quick else (16, 12, 8):
        yield case(f"128 images, n={n}", square(128, n), peers)
    tens = 4 if quick else 16
    yield case(f"{10 * tens} images, mixed", mixed(tens), few)
    yield case(f"{10 * tens} images, uniform", uniform(tens), few)
    for n in (16,) if quick else (16, 8):
        yield case(f"1 image, n={n}", square(1, n), few)


def suite(run: Run) -> None:
    some = cases(run, load_peers("pool_norm", run))
    run_cases((replace(case, modes=projector_modes(run)) for case in some), run)
