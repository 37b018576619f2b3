"""What a run measures: groups of cases, for the GPU or the CPU, the full set or the quick one.

Each suite runs in a process of its own, so that a failure of the device, or a peer that tunes for
ever, ends that suite and no other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from benchmarks import end_to_end, host_cost
from benchmarks.environment import clocks
from benchmarks.harness import (
    COLUMNS,
    NO_TIME,
    Case,
    Deadline,
    DeviceLostError,
    Effort,
    Row,
    Variant,
    Work,
    clock_for,
    empty_row,
    measure,
    reason,
    times,
)
from benchmarks.packing_cases import (
    FLASH_ATTN,
    Prompts,
    forward_case,
    frozen_table_case,
    has_flash_attn,
    merge_case,
    trained_table_case,
)
from benchmarks.peers import load_peers
from benchmarks.projector_cases import (
    as_many,
    gate_up_case,
    mixed,
    pooling_case,
    projector_case,
    square,
)
from benchmarks.timing import sample_in_turn

DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}


def effort(device: str, quick: bool) -> Effort:
    if quick:
        return Effort(samples=15, seconds=0.2)
    return Effort(samples=50, seconds=1.0)


# ---- the ceilings


def ceilings(device: str, quick: bool, _: Deadline) -> Iterator[Row]:
    """How fast this device copies and multiplies: what everything else is a share of."""
    dtype = DTYPES[device]
    copied = (2**31 if device == "cuda" else 2**28) // (4 if quick else 1)
    side = {"cuda": 8192, "cpu": 1024}[device]
    source = torch.randn(copied // 4, device=device)
    target = torch.empty_like(source)
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(left)
    copy = partial(target.copy_, source)
    matmul = partial(torch.mm, left, right, out=product)
    for name, size, call, work in (
        ("copy", f"{copied / 2**30:g} GiB", copy, Work(bytes=2 * source.nbytes)),
        ("matmul", f"{side}^3", matmul, Work(flops=2 * side**3)),
    ):
        clock = clock_for(device, partial(list, [call]))
        sample_in_turn({name: clock}, 20, 0.5 if quick else 3.0)
        row: Row = dict.fromkeys(COLUMNS, "") | {
            "op": "ceiling",
            "case": size,
            "mode": "forward",
            "variant": name,
            "status": "ok",
            "dtype": str(source.dtype if name == "copy" else dtype).removeprefix("torch."),
            "sets": 1,
            "note": f"clocks right after: {found}" if (found := clocks(device)) else "",
        }
        yield row | times(clock, 0, work) | {"tokens_per_s": ""}


# ---- the projector. `peers` are all there are, `eager` those that do not compile or tune for a
# minute at every size: these come last, as time may run out on them.

Peers = Sequence[Variant]


def pooling_cases(device: str, quick: bool, peers: Peers, eager: Peers) -> Iterator[Case]:
    if device == "cpu":
        for n in () if quick else (12, 8):
            yield pooling_case(f"4 images, n={n}", square(4, n), eager)
        tens = 1
    else:
        for n in (16,) if quick else (16, 12, 8):
            yield pooling_case(f"128 images, n={n}", square(128, n), peers)
        tens = 4 if quick else 16
    if device == "cuda" or not quick:
        yield pooling_case(f"{10 * tens} images, mixed", mixed(tens), eager)
        yield pooling_case(f"{10 * tens} images, uniform", as_many(tens), eager)
    if device == "cpu":
        yield pooling_case("4 images, n=16", square(4, 16), peers)
    else:
        for n in (16,) if quick else (16, 8):
            yield pooling_case(f"1 image, n={n}", square(1, n), eager)


def gate_up_cases(device: str, quick: bool, peers: Peers, eager: Peers) -> Iterator[Case]:
    if device == "cpu":
        for tokens in (64,) if quick else (64, 256):
            yield gate_up_case(tokens, peers if tokens == 256 else eager)
        return
    for tokens in (256,) if quick else (4096, 16384, 1024, 512, 256, 64):
        yield gate_up_case(tokens, eager)
    for tokens in (8192,) if quick else (8192, 32768, 2048):
        yield gate_up_case(tokens, peers)


def whole_cases(device: str, quick: bool, peers: Peers, eager: Peers) -> Iterator[Case]:
    if device == "cpu":
        if not quick:
            yield projector_case("1 image, n=16", square(1, 16), eager)
        yield projector_case("1 image, n=8", square(1, 8), peers)
        return
    tens = 4 if quick else 16
    yield projector_case(f"{10 * tens} images, mixed", mixed(tens), eager)
    yield projector_case(f"{10 * tens} images, uniform", as_many(tens), eager)
    yield projector_case("1 image, n=16", square(1, 16), eager)
    if not quick:
        yield projector_case("1 image, n=8", square(1, 8), eager)
        for images in (16, 64, 4, 2):
            yield projector_case(f"{images} images, n=16", square(images, 16), eager)
        yield projector_case("32 images, n=16", square(32, 16), eager, width=3584)
    for images in (32,) if quick else (32, 128, 8):
        yield projector_case(f"{images} images, n=16", square(images, 16), peers)


def projector_suite(
    op: str,
    cases: Callable[[str, bool, Peers, Peers], Iterator[Case]],
    device: str,
    quick: bool,
    deadline: Deadline,
) -> Iterator[Row]:
    """The cases of one op, against whichever peers are installed."""
    found, missing = load_peers(compiling=not quick)
    for peer, why in missing.items():
        yield dict.fromkeys(COLUMNS, "") | {"op": op, "variant": peer, "status": why}
    peers = [variants[op] for variants in found if op in variants]
    eager = [peer for peer in peers if not peer.slow_start]
    yield from run_cases(cases(device, quick, peers, eager), device, quick, deadline)


# ---- packing


def packing_cases(device: str, quick: bool) -> Iterator[Case]:
    """On a CPU the dearest last, so that a busy one misses the fewest; on a GPU what matters most
    first. The table's gradient takes longest."""
    vocabulary = {"cuda": 151_936, "cpu": 32_000}[device]
    main = Prompts(64 if device == "cuda" else 16, 220, 2048, vocabulary)
    others: list[Prompts] = []
    if quick and device == "cpu":
        main = Prompts(4, 64, 2048, 1_000)
    elif device == "cpu":
        others = [
            Prompts(2, 4, 64, 1_000, count=4),
            Prompts(16, 16, 64, 1_000, count=16),
            Prompts(1, 64, 2048, vocabulary),
            Prompts(4, 64, 2048, vocabulary),
            Prompts(16, 500, 2048, vocabulary, count=0),
        ]
    elif not quick:
        others = [
            Prompts(256, 220, 2048, vocabulary),
            Prompts(64, 220, 3584, vocabulary),
            Prompts(16, 220, 2048, vocabulary),
            Prompts(1, 220, 2048, vocabulary),
        ]
    for prompts in (*others, main) if device == "cpu" else (main, *others):
        yield forward_case(prompts)
        yield frozen_table_case(prompts)
        yield merge_case(prompts)
    yield trained_table_case(main, sparse=True)
    yield trained_table_case(main)


def packing(device: str, quick: bool, deadline: Deadline) -> Iterator[Row]:
    """`pack_embeddings` and `merge_vision` against what other models do."""
    if not has_flash_attn():
        why = "not installed: no module flash_attn"
        row = {"op": "pack_embeddings", "variant": FLASH_ATTN.name, "status": why}
        yield dict.fromkeys(COLUMNS, "") | row
    yield from run_cases(packing_cases(device, quick), device, quick, deadline)


def run_cases(cases: Iterator[Case], device: str, quick: bool, deadline: Deadline) -> Iterator[Row]:
    """Measure one case after the other until time runs out; what is left out gets a row too."""
    for case in cases:
        if deadline.left <= 0:
            yield from (empty_row(case, mode, "") | {"status": NO_TIME} for mode in case.modes)
            continue
        start = time.perf_counter()
        try:
            yield from measure(case, DTYPES[device], device, effort(device, quick), deadline)
        except DeviceLostError:
            raise
        except Exception as error:  # a batch that does not fit into memory, say
            yield from (
                empty_row(case, mode, "") | {"status": reason(error)} for mode in case.modes
            )
        print(f"  {case.op}, {case.name}: {time.perf_counter() - start:.1f} s", flush=True)


Suite = Callable[[str, bool, Deadline], Iterator[Row]]

# Each with its share of the time, for a GPU and for a CPU.
SUITES: dict[str, tuple[Suite, dict[str, float]]] = {
    "ceilings": (ceilings, {"cuda": 1, "cpu": 1}),
    "host": (host_cost.suite, {"cuda": 2, "cpu": 3}),
    "packing": (packing, {"cuda": 2.5, "cpu": 6}),
    "pooling": (
        partial(projector_suite, "pool_norm", pooling_cases),
        {"cuda": 2, "cpu": 2},
    ),
    "projector": (
        partial(projector_suite, "project_tokens", whole_cases),
        {"cuda": 5, "cpu": 2.5},
    ),
    "gate_up": (partial(projector_suite, "swiglu", gate_up_cases), {"cuda": 3, "cpu": 1.5}),
    "end_to_end": (end_to_end.suite, {"cuda": 2, "cpu": 2}),
}
