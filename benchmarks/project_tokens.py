"""`project_tokens`: the whole projector, from patches to tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks import plain
from benchmarks.cases import TRAINING, Case, Leaves, Variant, fast, projector_modes, run_cases
from benchmarks.harness import Run
from benchmarks.peers import load_peers
from benchmarks.plain import Grid, Grids, mixed, square, uniform
from benchmarks.results import LEAN, NO_BIASES
from tokenflex_kernels import project_tokens

SHARES = {"cuda": 5, "cpu": 6}  # of a run's time


def project(leaves: Leaves, grids: Grids, save: str = "preactivation") -> torch.Tensor:
    options: dict[str, Any] = dict.fromkeys(plain.BIASES) | leaves
    x = options.pop("x")
    return project_tokens(x, grids.inputs, grids.outputs, **options, eps=plain.EPS, save=save)


OURS = Variant("tokenflex", project, ours=True)


def case(
    name: str,
    grids: Sequence[Grid],
    peers: Sequence[Variant],
    widths: tuple[int, int, int] = plain.WIDTHS,
    *,
    lean: bool = True,
) -> Case:
    vision, hidden, text = widths
    tokens = plain.number_of_tokens(grids)
    ours = [OURS]
    if lean:
        ours.append(replace(OURS, name=LEAN, call=partial(project, save="input"), modes=TRAINING))
    if any(peer.without for peer in peers):  # beside a peer that takes no biases, ours without
        ours.append(replace(OURS, name=NO_BIASES, without=plain.BIASES))
    shapes = {"x": (len(grids) * plain.SIDE**2, vision), "grad": (tokens, text)}
    flops = 2 * tokens * (vision * 2 * hidden + hidden * text)
    return Case(
        op="project_tokens",
        name=name,
        tokens=tokens,
        batch=plain.random_batches(shapes | plain.weight_shapes(*widths), grids),
        truth=plain.project_tokens,
        variants=[*ours, *peers],
        flops=(flops, 2 * flops),
    )


def cases(run: Run, peers: Sequence[Variant]) -> Iterator[Case]:
    few, quick = fast(peers), run.quick
    if run.device == "cpu":
        yield case("B=1, n=8", square(1, 8), few)
        if not quick:
            yield case("B=1, n=12", square(1, 12), few, lean=False)
            yield case("B=2, mixed", [(8, 8), (12, 12)], few, lean=False)
            yield case("B=4, n=16", square(4, 16), few, lean=False)
            # Last, because compiling takes longest.
            yield case("B=1, n=16", square(1, 16), peers, lean=False)
        return
    tens = 4 if quick else 16
    yield case(f"{10 * tens} images, mixed", mixed(tens), few)
    yield case(f"{10 * tens} images, uniform", uniform(tens), few)
    yield case("1 image, n=16", square(1, 16), few)
    if not quick:
        yield case("1 image, n=8", square(1, 8), few)
        for images in (16, 64, 4, 2):
            yield case(f"{images} images, n=16", square(images, 16), few)
        yield case("32 images, n=16, D=3584", square(32, 16), few, (*plain.WIDTHS[:2], 3584))
    for images in (32,) if quick else (32, 128, 8):
        yield case(f"{images} images, n=16", square(images, 16), peers)


def suite(run: Run) -> None:
    some = cases(run, load_peers("project_tokens", run))
    run_cases((replace(case, modes=projector_modes(run)) for case in some), run)
