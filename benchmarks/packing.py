"""`pack_embeddings` and `merge_vision`: text and vision rows in one buffer. Bound by memory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import torch
import torch.nn.functional as F

from benchmarks.cases import TRAINING, Batch, Case, Leaves, Variant, run_cases, work_by_mode
from benchmarks.harness import SEED, Run, Work
from benchmarks.peers import SPARSE_GRADIENT, load_peers
from benchmarks.prompts import IMAGE, Packed, Prompts
from benchmarks.results import SPARSE
from tokenflex_kernels import merge_vision, pack_embeddings

MOVED = ("result", "vision", "embeds")  # must come out bit by bit
Peers = Sequence[Variant]


def pack(leaves: Leaves, packed: Packed) -> torch.Tensor:
    return pack_embeddings(leaves["table"], leaves["vision"], packed.plan)


def pack_sparse(leaves: Leaves, packed: Packed) -> torch.Tensor:
    return pack_embeddings(leaves["table"], leaves["vision"], packed.plan, sparse_grad=True)


def true_pack(leaves: Leaves, packed: Packed) -> torch.Tensor:
    text = F.embedding(packed.plan.input_ids, leaves["table"])
    return text.index_copy(0, packed.rows, leaves["vision"])


def merge(leaves: Leaves, packed: Packed) -> torch.Tensor:
    return merge_vision(leaves["embeds"], leaves["vision"], packed.plan.vision_rows)


def true_merge(leaves: Leaves, packed: Packed) -> torch.Tensor:
    return leaves["embeds"].index_copy(0, packed.rows, leaves["vision"])


OURS = Variant("tokenflex", pack, ours=True)
OURS_SPARSE = Variant(SPARSE, pack_sparse, ours=True)


def forward_case(prompts: Prompts, peers: Peers) -> Case:
    """No gradient at all."""
    return _pack_case(prompts, prompts.name, [OURS, *peers], ("forward",), ())


def frozen_table_case(prompts: Prompts, peers: Peers) -> Case:
    """The vision rows alone need a gradient: what training a projector asks for."""
    name = f"{prompts.name}, frozen table"
    return _pack_case(prompts, name, [OURS, *peers], TRAINING, ("vision",))


def trained_table_case(prompts: Prompts, peers: Peers) -> Case:
    """The table's gradient too."""
    name = f"{prompts.name}, trained table"
    return _pack_case(prompts, name, [OURS, *peers], TRAINING[1:], ("table", "vision"))


def sparse_gradient_case(prompts: Prompts, peers: Peers) -> Case:
    """The same, as a sparse tensor."""
    name = f"{prompts.name}, sparse table gradient"
    return _pack_case(prompts, name, [OURS_SPARSE, *peers], TRAINING[1:], ("table", "vision"))


def _pack_case(
    prompts: Prompts,
    name: str,
    variants: Peers,
    modes: Sequence[str],
    trained: Collection[str],
) -> Case:
    def batch(dtype: torch.dtype, device: str, seed: int, first: Batch | None) -> Batch:
        packed = prompts.packed(device, seed)
        rows = _rows(prompts.width, dtype, device, seed)
        table = rows(prompts.vocabulary) if first is None else first.leaves["table"]
        vision = rows(len(packed.rows))
        return Batch({"table": table, "vision": vision}, rows(prompts.tokens), packed)

    ids = torch.cat(prompts.arguments(SEED)[0])
    return Case(
        op="pack_embeddings",
        name=name,
        tokens=prompts.tokens,
        batch=batch,
        truth=true_pack,
        variants=variants,
        work=lambda itemsize: pack_work(
            prompts, ids[ids != IMAGE].unique().numel(), itemsize, "table" in trained
        ),
        trained=trained,
        shared=("table",),
        modes=modes,
        exact=MOVED,
    )


def _rows(width: int, dtype: torch.dtype, device: str, seed: int) -> Callable[[int], torch.Tensor]:
    """Return a source of random rows."""
    generator = torch.Generator(device).manual_seed(seed)
    options = {"generator": generator, "device": device, "dtype": dtype}
    return lambda number: torch.randn(number, width, **options)


def pack_work(
    prompts: Prompts, distinct_ids: int, itemsize: int, trained_table: bool
) -> dict[str, Work]:
    """Return the bytes that must move: no cache helps, nothing moves twice, row maps left out.

    Forward reads and writes every row. Backward reads and writes the vision rows' gradient; with a
    trained table it also reads the text rows' gradient and writes a row of sums for each id in use.
    (The zeros in the rest of a dense [V, D] gradient, which every variant writes, are not counted.)
    """
    row_bytes, vision = prompts.width * itemsize, sum(prompts.counts)
    backward = 2 * vision
    if trained_table:
        backward += prompts.tokens - vision + distinct_ids
    return work_by_mode(Work(2 * prompts.tokens * row_bytes), Work(backward * row_bytes))


def merge_case(prompts: Prompts, peers: Peers) -> Case:
    """Embeddings and vision rows both need a gradient."""

    def batch(dtype: torch.dtype, device: str, seed: int, _: Batch | None) -> Batch:
        packed = prompts.packed(device, seed)
        rows = _rows(prompts.width, dtype, device, seed)
        leaves = {"embeds": rows(prompts.tokens), "vision": rows(len(packed.rows))}
        return Batch(leaves, rows(prompts.tokens), packed)

    def work(itemsize: int) -> dict[str, Work]:
        # Backward reads every row of the gradient; it writes the vision rows' and, with zeros in
        # their place, that of the embeddings.
        forward, backward = 2 * prompts.tokens, 2 * prompts.tokens + sum(prompts.counts)
        row_bytes = prompts.width * itemsize
        return work_by_mode(Work(forward * row_bytes), Work(backward * row_bytes))

    return Case(
        op="merge_vision",
        name=prompts.name,
        tokens=prompts.tokens,
        batch=batch,
        truth=true_merge,
        variants=[Variant("tokenflex", merge, ours=True), *peers],
        work=work,
        exact=MOVED,
    )


def sizes(run: Run) -> list[Prompts]:
    """Return the batches. On a CPU the largest is last, so that a busy one misses the fewest; on a
    GPU it is first."""
    if run.device == "cuda":
        largest = Prompts(64, 220, 2048, 151_936)
        shapes = ((256, 220, 2048), (64, 220, 3584), (16, 220, 2048), (1, 220, 2048))
        return [largest, *(Prompts(*shape, 151_936) for shape in shapes if not run.quick)]
    if run.quick:
        return [Prompts(4, 64, 2048, 1_000)]
    return [
        Prompts(2, 4, 64, 1_000, count=4),
        Prompts(16, 16, 64, 1_000, count=16),
        Prompts(1, 64, 2048, 32_000),
        Prompts(4, 64, 2048, 32_000),
        Prompts(16, 500, 2048, 32_000, count=0),
        Prompts(16, 220, 2048, 32_000),
    ]


def cases(run: Run, packers: Peers, sparse_packers: Peers, mergers: Peers) -> Iterator[Case]:
    batches = sizes(run)
    for prompts in batches:
        yield forward_case(prompts, packers)
        yield frozen_table_case(prompts, packers)
        yield merge_case(prompts, mergers)
    largest = batches[0 if run.device == "cuda" else -1]
    yield sparse_gradient_case(largest, sparse_packers)  # a table's gradient takes longest
    yield trained_table_case(largest, packers)


def suite(run: Run) -> None:
    ops = ("pack_embeddings", SPARSE_GRADIENT, "merge_vision")
    run_cases(cases(run, *(load_peers(op, run) for op in ops)), run)
