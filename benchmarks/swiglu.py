"""`swiglu`: silu(x Wg + bg) * (x Wu + bu). Bound by arithmetic."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from benchmarks import plain
from benchmarks.cases import Case, Leaves, Variant, fast, projector_modes, run_cases
from benchmarks.harness import Run
from benchmarks.peers import load_peers
from benchmarks.results import NO_BIASES
from tokenflex_kernels import swiglu

SHARES = {"cuda": 3, "cpu": 4.5}  # of a run's time

WEIGHTS = ("gate_weight", "up_weight", "gate_bias", "up_bias")


def ours(leaves: Leaves, _: object) -> torch.Tensor:
    weights = leaves["gate_weight"], leaves["up_weight"]
    return swiglu(leaves["x"], *weights, leaves.get("gate_bias"), leaves.get("up_bias"))


OURS = Variant("tokenflex", ours, ours=True)


def case(
    tokens: int, peers: Sequence[Variant], widths: tuple[int, int, int] = plain.WIDTHS
) -> Case:
    vision, hidden, _ = widths
    shapes: plain.Shapes = {"x": (tokens, vision), "grad": (tokens, hidden)}
    shapes |= {name: plain.weight_shapes(*widths)[name] for name in WEIGHTS}
    flops = 2 * tokens * vision * 2 * hidden
    own = [OURS]
    if any(peer.without for peer in peers):  # beside a peer that takes no biases, ours without
        own.append(replace(OURS, name=NO_BIASES, without=plain.BIASES))
    return Case(
        op="swiglu",
        name=f"T={tokens}",
        tokens=tokens,
        batch=plain.random_batches(shapes),
        truth=plain.swiglu,
        variants=[*own, *peers],
        flops=(flops, 2 * flops),
    )


def cases(run: Run, peers: Sequence[Variant]) -> Iterator[Case]:
    if run.device == "cpu":  # a bound for kernels that fuse the rest into the product
        peers = [peer for peer in peers if peer.name != "bare product"]
    few, quick = fast(peers), run.quick
    if run.device == "cpu":
        for tokens in (64,) if quick else (16, 64, 144, 512):
            yield case(tokens, few)
        if not quick:
            yield case(256, peers)
        return
    for tokens in (256,) if quick else (4096, 16384, 1024, 512, 256, 64):
        yield case(tokens, few)
    for tokens in (8192,) if quick else (8192, 32768, 2048):
        yield case(tokens, peers)


def suite(run: Run) -> None:
    some = cases(run, load_peers("swiglu", run))
    run_cases((replace(case, modes=projector_modes(run)) for case in some), run)
