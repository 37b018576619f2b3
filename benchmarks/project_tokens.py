"""`project_tokens`: the whole projector, from patches to tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch

from benchmarks import plain
from benchmarks.cases import TRAINING, Batch, Case, Leaves, Variant, run_cases, work_by_mode
from benchmarks.harness import Run, Work
from benchmarks.peers import fast, load_peers
from benchmarks.plain import Grid, Grids, Widths, mixed, square, uniform
from benchmarks.results import LEAN, NO_BIASES
from tokenflex_kernels import project_tokens


def ours(leaves: Leaves, grids: Grids, save: str = "preactivation") -> torch.Tensor:
    parameters = {name: leaves.get(name) for name in plain.RELEASED.weights}
    return project_tokens(
        leaves["x"], grids.inputs, grids.outputs, **parameters, eps=plain.EPS, save=save
    )


OURS = Variant("tokenflex", ours, ours=True)


def case(
    name: str, grids: Sequence[Grid], peers: Sequence[Variant], widths: Widths = plain.RELEASED
) -> Case:
    tokens = plain.number_of_tokens(grids)
    shapes = {"x": (len(grids) * plain.SIDE**2, widths.vision), "grad": (tokens, widths.text)}
    shapes |= widths.weights

    def batch(dtype: torch.dtype, device: str, seed: int, _: Batch | None) -> Batch:
        return plain.random_batch(shapes, plain.grids_of(grids, device), dtype, device, seed)

    variants = [OURS, replace(OURS, name=LEAN, call=partial(ours, save="input"), modes=TRAINING)]
    if any(peer.without for peer in peers):  # beside a peer that takes no biases, ours without
        variants.append(replace(OURS, name=NO_BIASES, without=plain.BIASES))
    flops = 2 * tokens * (widths.vision * 2 * widths.hidden + widths.hidden * widths.text)
    return Case(
        op="project_tokens",
        name=name,
        tokens=tokens,
        batch=batch,
        truth=plain.true_project_tokens,
        variants=[*variants, *peers],
        work=lambda _: work_by_mode(Work(flops=flops), Work(flops=2 * flops)),
    )


def cases(run: Run, peers: Sequence[Variant]) -> Iterator[Case]:
    few, quick = fast(peers), run.quick
    if run.device == "cpu":
        if not quick:
            yield case("1 image, n=16", square(1, 16), few)
        yield case("1 image, n=8", square(1, 8), peers)
        return
    tens = 4 if quick else 16
    yield case(f"{10 * tens} images, mixed", mixed(tens), few)
    yield case(f"{10 * tens} images, uniform", uniform(tens), few)
    yield case("1 image, n=16", square(1, 16), few)
    if not quick:
        yield case("1 image, n=8", square(1, 8), few)
        for images in (16, 64, 4, 2):
            yield case(f"{images} images, n=16", square(images, 16), few)
        yield case("32 images, n=16, D=3584", square(32, 16), few, Widths(text=3584))
    for images in (32,) if quick else (32, 128, 8):
        yield case(f"{images} images, n=16", square(images, 16), peers)


def suite(run: Run) -> None:
    run_cases(cases(run, load_peers("project_tokens", run)), run)
