"""The protocol: truth, then time, then truth again.

Each entry runs and its results are compared with what they must be. Right entries are timed, in
turns; then the results in the very buffers that were timed are compared again. An entry that fails
or is wrong becomes a row with the reason.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.comparisons import counterpart
from benchmarks.costs import Calls, GraphClock, HostClock
from benchmarks.intervals import paired_ratio
from benchmarks.results import NewRow

SEED = 0
NO_TIME = "not run: no time left"
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}  # of a study's inputs and weights
ROUNDS = 30
ROUNDS_OF_GRAPHS = 10  # of several samples each
LEAST_ROUNDS = {"cuda": 3, "cpu": 8}  # fewer values have no interval


class Deadline:
    """Seconds from now until measuring must end."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self._end - time.monotonic()


def ignore(_: NewRow) -> None:
    """Do nothing with a row that is about to be measured."""


@dataclass
class Run:
    """The settings of a suite, and the functions that its rows go to."""

    device: str  # "cuda" or "cpu"
    quick: bool  # a few cases, for a short time
    deadline: Deadline
    emit: Callable[[list[NewRow]], object]  # takes rows as soon as they are measured
    # Takes the row that is about to be measured: the parent process then knows what this process
    # was doing if it hangs or dies.
    begin: Callable[[NewRow], object] = ignore
    done: set[tuple[str, str, str]] = field(default_factory=set)  # (op, case, mode) of rows so far
    banned: dict[str, NewRow] = field(default_factory=dict)  # variants that hung or ended a process
    dtype: torch.dtype = torch.float32  # of inputs and weights
    threads: int | None = None  # that PyTorch is set to; None for its own choice
    for_targets: bool = False  # measure one case for each target, and no others

    @property
    def compiles(self) -> bool:
        """True in the settings that torch.compile takes part in: it takes up to a minute an op."""
        threads = 1 if self.dtype == torch.float32 else 2
        return self.device == "cuda" or self.threads in (None, threads)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


class Work(NamedTuple):
    """Bytes and operations that one call needs at least."""

    bytes: int = 0
    flops: int = 0


@dataclass
class Entry:
    """One row that is to be measured."""

    row: NewRow  # its first columns; the others are filled in
    calls: Callable[[], Calls]  # returns one call per set of buffers
    work: Work
    # (results of all sets) -> the largest error; raises ValueError if it is too large
    check: Callable[[Sequence[Any]], float | str] = lambda results: ""
    costs: Callable[[], NewRow] = dict  # columns that are measured outside the clock
    # "graph" for a CUDA graph, where there is a GPU; "eager" for calls that wait for the device and
    # cannot be captured; "host" for the wall clock. On the CPU, one thread is timed by its "cpu"
    # time, several by the wall clock
    timing: str = "graph"


def measure(entries: Sequence[Entry], run: Run, seconds: float = 0.7) -> list[NewRow]:
    """Return a row for each entry: checked, timed in turns, and checked again.

    Args:
        entries: The calls to compare with each other.
        run: Device, and whether to be quick.
        seconds: Time to sample for; a quick run takes a fifth.
    """
    pairs: list[tuple[Entry, HostClock]] = []
    for entry in entries:
        if failure := run.banned.get(entry.row["variant"]):
            why, where = failure["status"], (failure["case"], failure["mode"])
            if where != (entry.row["case"], entry.row["mode"]):
                why = f"not run: {why} ({', '.join(where)})"
            entry.row["status"] = why
            continue
        run.begin(entry.row)
        with failure_in(entry.row, run):
            entry.row |= entry.costs()
            clock = _clock(entry, run)
            entry.check(clock.results)  # a wrong result is not timed
            pairs.append((entry, clock))
    sample_in_turn(pairs, run, seconds)
    clocks = {e.row["variant"]: clock for e, clock in pairs if not e.row["status"]}
    for entry, clock in pairs:
        if entry.row["status"]:
            continue
        with failure_in(entry.row, run):
            entry.row["error"] = entry.check(clock.results)
            entry.row |= times(clock, entry.row["tokens"], entry.work)
            other = clocks.get(counterpart(entry.row), clock)
            if other is not clock and other.timing == clock.timing:
                entry.row |= compared(clock, other)
            entry.row["status"] = "ok"
    return [entry.row for entry in entries]


def _clock(entry: Entry, run: Run) -> HostClock:
    if run.device == "cpu" or entry.timing == "host":
        return HostClock(entry.calls, cpu_time=run.device == "cpu" and run.threads == 1)
    return GraphClock(entry.calls, capture=entry.timing == "graph")


def compared(clock: HostClock, other: HostClock) -> NewRow:
    """Return the columns of a clock's time over that of another, which took turns with it."""
    columns = ("over_ours", "over_ours_low", "over_ours_high")
    ratio = paired_ratio(clock.turns, other.turns)
    return dict(zip(columns, (float(f"{value:.4g}") for value in ratio), strict=True))


def sample_in_turn(pairs: Sequence[tuple[Entry, HostClock]], run: Run, seconds: float) -> None:
    """Sample clocks A B C, C B A, A B C .., so that all of them meet the same drift of the machine.

    The status of an entry whose clock fails says why; the others go on without it.

    Args:
        pairs: The entries with their clocks.
        run: As for :func:`measure`.
        seconds: Time after which the least number of rounds is enough.
    """
    of_host = all(clock.timing in ("host", "cpu") for _, clock in pairs)
    rounds, least = ROUNDS if of_host else ROUNDS_OF_GRAPHS, LEAST_ROUNDS[run.device]
    if run.quick:
        rounds, seconds = max(least, rounds * 3 // 10), seconds / 5
    start = time.perf_counter()
    for turn in range(rounds):
        if turn >= least and time.perf_counter() - start > seconds:
            break
        for entry, clock in pairs[:: -1 if turn % 2 else 1]:
            if not entry.row["status"]:
                run.begin(entry.row)
                with failure_in(entry.row, run):
                    clock.sample()


@contextmanager
def failure_in(row: NewRow, run: Run) -> Iterator[None]:
    """Turn an exception into the row's status.

    If the GPU has failed for good, synchronising raises again and ends this process; the next
    process goes on without the variant.
    """
    try:
        yield
    except Exception as error:
        row["status"] = reason(error)
        if run.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


def reason(error: BaseException) -> str:
    """Return one line for the ``status`` column."""
    lines = str(error).strip().splitlines() or [""]
    return f"failed: {type(error).__name__}: {lines[0]}"[:200]


def times(clock: HostClock, tokens: int | str, work: Work) -> NewRow:
    """Return the columns of a clock that has sampled; rates are those of the median."""
    percentiles = np.percentile(clock.samples, (20, 50, 80), method="nearest")
    p20, p50, p80 = (round(float(value), 3) for value in percentiles)
    row: NewRow = {"timing": clock.timing, "p20_us": p20, "p50_us": p50, "p80_us": p80}
    row["samples"] = len(clock.samples)
    if tokens != "":
        row["tokens_per_s"] = round(1e6 * int(tokens) / p50)
    if clock.timing not in ("host", "cpu"):  # the wall clock too, over a tenth of a second
        row["eager_us"] = round(clock.wall_us(min(50, max(3, round(0.1 / clock.seconds)))), 3)
    if work.bytes:
        row |= {"ideal_bytes": work.bytes, "gb_per_s": round(1e-3 * work.bytes / p50, 3)}
    if work.flops:
        row |= {"flops": work.flops, "tflop_per_s": round(1e-6 * work.flops / p50, 5)}
    return row
