"""`pack_embeddings`, `merge_vision` and `unpack_vision`: text and vision rows in one buffer.

Bound by memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from benchmarks.cases import TRAINING, Batch, Case, Leaves, Variant, run_cases
from benchmarks.harness import SEED, Run
from benchmarks.peers import SPARSE_GRADIENT, load_peers, look_up
from benchmarks.prompts import IMAGE, Packed, Prompts
from benchmarks.results import SPARSE
from tokenflex_kernels import merge_vision, pack_embeddings, unpack_vision

SHARES = {"cuda": 2.5, "cpu": 7}  # of a run's time

Peers = Sequence[Variant]

# The gradients that packing computes: none, those that training a projector needs, all.
FORWARD, FROZEN_TABLE, TRAINED_TABLE = "", "frozen table", "trained table"
SPARSE_TABLE = "sparse table gradient"
KINDS: dict[str, tuple[Sequence[str], Sequence[str]]] = {  # modes, and leaves that are trained
    FORWARD: (("forward",), ()),
    FROZEN_TABLE: (TRAINING, ("vision",)),
    TRAINED_TABLE: (("forward+backward",), ("table", "vision")),
    SPARSE_TABLE: (("forward+backward",), ("table", "vision")),
}


def pack(leaves: Leaves, packed: Packed, sparse_grad: bool = False) -> torch.Tensor:
    table, vision = leaves["table"], leaves["vision"]
    return pack_embeddings(table, vision, packed.plan, sparse_grad=sparse_grad)


def merge(leaves: Leaves, packed: Packed) -> torch.Tensor:
    return merge_vision(leaves["embeds"], leaves["vision"], packed.plan.vision_rows)


def unpack(leaves: Leaves, packed: Packed) -> torch.Tensor:
    return unpack_vision(leaves["packed"], packed.plan)


def true_pack(leaves: Leaves, packed: Packed) -> torch.Tensor:
    return look_up(leaves, packed).index_copy(0, packed.rows, leaves["vision"])


def true_merge(leaves: Leaves, packed: Packed) -> torch.Tensor:
    return leaves["embeds"].index_copy(0, packed.rows, leaves["vision"])


def true_unpack(leaves: Leaves, packed: Packed) -> torch.Tensor:
    return leaves["packed"][packed.rows]


OURS = Variant("tokenflex", pack, ours=True)
OURS_SPARSE = Variant(SPARSE, partial(pack, sparse_grad=True), ours=True)


def pack_case(prompts: Prompts, kind: str, peers: Peers) -> Case:
    modes, trained = KINDS[kind]
    return Case(
        op="pack_embeddings",
        name=f"{prompts.name}, {kind}" if kind else prompts.name,
        tokens=prompts.tokens,
        batch=partial(random_batch, prompts, "table"),
        truth=true_pack,
        variants=[OURS_SPARSE if kind == SPARSE_TABLE else OURS, *peers],
        numbers=pack_numbers(prompts, distinct_ids(prompts) if "table" in trained else None),
        trained=trained,
        shared=("table",),
        modes=modes,
        exact=("result", "vision"),
    )


def merge_case(prompts: Prompts, peers: Peers) -> Case:
    """Return a case in which embeddings and vision rows both need a gradient."""
    rows, vision = 2 * prompts.tokens, sum(prompts.counts)
    return Case(
        op="merge_vision",
        name=prompts.name,
        tokens=prompts.tokens,
        batch=partial(random_batch, prompts, "embeds"),
        truth=true_merge,
        variants=[Variant("tokenflex", merge, ours=True), *peers],
        # Backward reads every row of the gradient; it writes the vision rows' and, with zeros in
        # their place, that of the embeddings.
        numbers=(rows * prompts.width, (rows + vision) * prompts.width),
        exact=("result", "vision", "embeds"),
    )


def unpack_case(prompts: Prompts, peers: Peers) -> Case:
    rows, vision = prompts.tokens, sum(prompts.counts)
    return Case(
        op="unpack_vision",
        name=prompts.name,
        tokens=vision,
        batch=partial(random_batch, prompts, "packed"),
        truth=true_unpack,
        variants=[Variant("tokenflex", unpack, ours=True), *peers],
        # Backward writes zeros where the text is.
        numbers=(2 * vision * prompts.width, (vision + rows) * prompts.width),
        exact=("result", "packed"),
    )


def random_batch(
    prompts: Prompts, text: str, dtype: torch.dtype, device: str, seed: int, first: Batch | None
) -> Batch:
    """Return random rows: of the "table", which all batches share, of "embeds" or "packed"."""
    generator = torch.Generator(device).manual_seed(seed)

    def rows(number: int) -> torch.Tensor:
        shape = (number, prompts.width)
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    if first and text == "table":
        leaves = {text: first.leaves[text]}
    else:
        leaves = {text: rows(prompts.vocabulary if text == "table" else prompts.tokens)}
    vision = rows(sum(prompts.counts))
    if text == "packed":
        return Batch(leaves, vision, prompts.packed(device, seed))
    leaves["vision"] = vision
    return Batch(leaves, rows(prompts.tokens), prompts.packed(device, seed))


def distinct_ids(prompts: Prompts) -> int:
    ids = torch.cat(prompts.arguments(SEED)[0])
    return ids[ids != IMAGE].unique().numel()


def pack_numbers(prompts: Prompts, ids: int | None) -> tuple[int, int]:
    """Return the numbers that forward and backward move, without caches, repetitions and row maps.

    Forward reads and writes every row. Backward reads and writes the vision rows' gradient; with a
    trained table it also reads the text rows' gradient and writes a row of sums for each of its
    ``ids`` in use. (The zeros in the rest of a dense [V, D] gradient do not count.)
    """
    vision = sum(prompts.counts)
    sums = 0 if ids is None else prompts.tokens - vision + ids
    return 2 * prompts.tokens * prompts.width, (2 * vision + sums) * prompts.width


def batches(run: Run) -> list[Prompts]:
    """Return the batches: on a GPU the largest first, on a CPU last, where time may run out."""
    if run.device == "cuda":
        largest = Prompts(64, 220, 2048, 151_936)
        sizes = ((256, 220, 2048), (64, 220, 3584), (16, 220, 2048), (1, 220, 2048))
        return [largest, *(Prompts(*size, 151_936) for size in sizes if not run.quick)]
    if run.quick:
        return [Prompts(2, 4, 64, 1_000, count=4), Prompts(4, 64, 2048, 1_000)]
    return [
        Prompts(2, 4, 64, 1_000, count=4),
        Prompts(16, 16, 64, 1_000, count=16),
        Prompts(1, 64, 2048, 8_000, count=64),
        Prompts(4, 64, 2048, 8_000),
        Prompts(2, 500, 2048, 8_000, count=0),
        Prompts(8, 220, 2048, 8_000),
    ]


def cases(
    run: Run, packers: Peers, sparse_packers: Peers, mergers: Peers, unpackers: Peers
) -> Iterator[Case]:
    sizes = batches(run)
    for prompts in sizes:
        yield pack_case(prompts, FORWARD, packers)
        yield pack_case(prompts, FROZEN_TABLE, packers)
        yield merge_case(prompts, mergers)
        yield unpack_case(prompts, unpackers)
    largest = sizes[0 if run.device == "cuda" else -1]
    yield pack_case(largest, SPARSE_TABLE, sparse_packers)  # a table's gradient takes longest
    yield pack_case(largest, TRAINED_TABLE, packers)


def suite(run: Run) -> None:
    ops = ("pack_embeddings", SPARSE_GRADIENT, "merge_vision", "unpack_vision")
    run_cases(cases(run, *(load_peers(op, run) for op in ops)), run)
