"""One case, every variant: numerics checked, times, memory, rows for the CSV.

A case has batches to work on and its own truth in float64; a variant is one way to compute it. All
variants get the same buffers; their results are compared with the truth, they are sampled in turn,
and the results in the very buffers that were timed are compared again. What fails or computes
something else becomes a row that says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from benchmarks.environment import last_level_cache
from benchmarks.timing import (
    Calls,
    GraphClock,
    HostClock,
    peak_bytes,
    percentiles,
    sample_in_turn,
    saved_bytes,
    synchronisations,
)
from tokenflex_kernels._backend import select_backend

MODES = ("forward", "backward", "forward+backward")
SEED = 0
MAX_SETS = 256
NO_TIME = "not run: no time left"
LOST = "not run: the device failed"

# The largest relative error (2-norm) against float64 that is taken for the same computation.
LIMITS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4, torch.float64: 1e-10}

Leaves = dict[str, torch.Tensor]
Row = dict[str, Any]

COLUMNS = (
    "op",
    "case",
    "tokens",
    "mode",
    "variant",
    "status",
    "backend",
    "dtype",
    "timing",
    "p20_us",
    "p50_us",
    "p80_us",
    "eager_us",
    "samples",
    "sets",
    "tokens_per_s",
    "ideal_bytes",
    "gb_per_s",
    "share_of_copy",
    "flops",
    "tflop_per_s",
    "share_of_matmul",
    "share_of_sheet",
    "peak_bytes",
    "saved_bytes",
    "synchronisations",
    "error",
    "seed",
    "note",
)


@dataclass
class Batch:
    """What one call works on.

    Attributes:
        leaves: the tensors that can be differentiated, by name.
        grad: the gradient of the result.
        fixed: the rest: grids, a plan.
    """

    leaves: Leaves
    grad: torch.Tensor
    fixed: Any


Call = Callable[[Leaves, Any], torch.Tensor]


@dataclass(frozen=True)
class Variant:
    """One way to compute a case.

    Attributes:
        call: (leaves, fixed) -> result.
        op: the op of ours that it calls, for the ``backend`` column; None for other packages'.
        prepare: brings the leaves into the layout that a package keeps its weights in, untimed.
            It must be linear: gradients are compared in that layout too.
        without: leaves that it cannot take; its truth is computed without them.
        truth: its own, where it is not to compute the case's result.
        modes: those it can run.
        waits: modes in which it waits for the device, so that they cannot be captured.
        slow_start: whether it compiles or tunes for long at every new size.
    """

    name: str
    call: Call
    op: str | None = None
    prepare: Callable[[Leaves], Leaves] = lambda leaves: leaves
    without: tuple[str, ...] = ()
    truth: Call | None = None
    modes: Collection[str] = MODES
    waits: Collection[str] = ()
    slow_start: bool = False

    def leaves(self, batch: Batch) -> Leaves:
        return self.prepare(
            {name: leaf for name, leaf in batch.leaves.items() if name not in self.without}
        )


@dataclass(frozen=True)
class Work:
    """What one call must move and compute at least."""

    bytes: int = 0
    flops: int = 0


@dataclass(frozen=True)
class Case:
    """One op at one size.

    Attributes:
        tokens: rows of the result.
        batch: (dtype, device, seed, the first batch or None) -> a batch of random numbers.
        truth: the result, computed with leaves in float64.
        variants: all but those of peers that are not installed.
        work: (bytes of a number) -> work, by mode.
        trained: leaves that require a gradient; all if None.
        shared: leaves that all batches have in common, as a model has.
        limits: the error that a result ("result" or a leaf's gradient) may have; ``LIMITS`` else.
    """

    op: str
    name: str
    tokens: int
    batch: Callable[[torch.dtype, str, int, Batch | None], Batch]
    truth: Call
    variants: Sequence[Variant]
    work: Callable[[int], Mapping[str, Work]]
    trained: tuple[str, ...] | None = None
    shared: tuple[str, ...] = ()
    modes: Sequence[str] = MODES
    limits: Mapping[str, float] = field(default_factory=dict)

    def batches(self, dtype: torch.dtype, device: str, cache_bytes: int) -> list[Batch]:
        """As many batches as exceed the cache three times, and at least two."""
        first = self.batch(dtype, device, SEED, None)
        rotating = [leaf for name, leaf in first.leaves.items() if name not in self.shared]
        size = sum(tensor.nbytes for tensor in (*rotating, first.grad))
        more = range(1, number_of_sets(size, cache_bytes))
        return [first, *(self.batch(dtype, device, SEED + i, first) for i in more)]


def number_of_sets(bytes_per_set: int, cache_bytes: int) -> int:
    """Sets of buffers that together are at least three times the cache.

    At least two; and no more than ``MAX_SETS``, since batches of a few kilobytes measure what a
    call costs, wherever its inputs are.
    """
    return min(MAX_SETS, max(2, -(-3 * cache_bytes // bytes_per_set)))


@dataclass(frozen=True)
class Effort:
    """How long to measure: rounds of samples, and seconds after which three rounds are enough."""

    samples: int
    seconds: float


class Deadline:
    """Seconds from now until measuring must end."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self._end - time.monotonic()


class DeviceLostError(RuntimeError):
    """The GPU fails whatever it is asked: nothing more can be measured in this process."""


def measure(
    case: Case, dtype: torch.dtype, device: str, effort: Effort, deadline: Deadline
) -> Iterator[Row]:
    """The rows of one case, mode by mode: one of every variant.

    Raises:
        DeviceLostError: an error of the device that stays.
    """
    batches = case.batches(dtype, device, last_level_cache(device))
    truths = Truths(case, batches)
    for mode in case.modes:
        if deadline.left <= 0:
            yield empty_row(case, mode, "") | {"status": NO_TIME}
            continue
        yield from _measure_mode(case, mode, batches, truths, dtype, device, effort)
        if lost := _device_failure(device):
            raise DeviceLostError(lost)


def _measure_mode(
    case: Case,
    mode: str,
    batches: Sequence[Batch],
    truths: Truths,
    dtype: torch.dtype,
    device: str,
    effort: Effort,
) -> list[Row]:
    clocks: dict[str, HostClock] = {}
    rows: dict[str, Row] = {}
    for variant in case.variants:
        if mode not in variant.modes:
            continue
        row = rows[variant.name] = empty_row(case, mode, variant.name)
        row |= {"dtype": str(dtype).removeprefix("torch."), "sets": len(batches)}
        row["backend"] = select_backend(variant.op, device) if variant.op else ""
        try:
            row |= costs(case, variant, mode, batches[0], device)
            make_calls = partial(calls_of, case, variant, mode, batches)
            clocks[variant.name] = clock_for(device, make_calls, capture=mode not in variant.waits)
        except Exception as error:
            row["status"] = reason(error)
            if _device_failure(device):
                for unfinished in rows.values():
                    unfinished["status"] = unfinished["status"] or LOST
                return list(rows.values())
    for variant in case.variants:  # what computes something else is not timed at all
        if variant.name in clocks:
            try:
                truths.worst_error(variant, mode, clocks[variant.name].results)
            except Exception as error:
                rows[variant.name]["status"] = reason(error)
                del clocks[variant.name]
    failed = sample_in_turn(clocks, effort.samples, effort.seconds)
    for variant in case.variants:
        if variant.name not in clocks:
            continue
        clock, row = clocks[variant.name], rows[variant.name]
        try:
            if variant.name in failed:
                raise failed[variant.name]
            row["error"] = truths.worst_error(variant, mode, clock.results)
            row |= times(clock, case.tokens, case.work(dtype.itemsize)[mode])
            row["status"] = "ok"
        except Exception as error:
            row["status"] = reason(error)
    return list(rows.values())


def empty_row(case: Case, mode: str, variant: str) -> Row:
    row: Row = dict.fromkeys(COLUMNS, "")
    return row | {
        "op": case.op,
        "case": case.name,
        "tokens": case.tokens,
        "mode": mode,
        "variant": variant,
        "seed": SEED,
    }


def times(clock: HostClock, tokens: int, work: Work) -> Row:
    """The columns of a clock that has sampled; rates are those of the median."""
    p20, p50, p80 = (round(value, 3) for value in percentiles(clock.samples).values())
    row: Row = {
        "timing": clock.timing,
        "p20_us": p20,
        "p50_us": p50,
        "p80_us": p80,
        "samples": len(clock.samples),
        "tokens_per_s": round(1e6 * tokens / p50),
    }
    if isinstance(clock, GraphClock):
        number = round(0.1 / clock.seconds)
        row["eager_us"] = round(clock.wall_us(min(50, max(3, number))), 3)
    if work.bytes:
        row |= {"ideal_bytes": work.bytes, "gb_per_s": round(1e-3 * work.bytes / p50, 3)}
    if work.flops:
        row |= {"flops": work.flops, "tflop_per_s": round(1e-6 * work.flops / p50, 5)}
    return row


def reason(error: BaseException) -> str:
    """One line for the ``status`` column."""
    lines = str(error).strip().splitlines() or [""]
    return f"failed: {type(error).__name__}: {lines[0]}"[:200]


def clock_for(device: str, make_calls: Callable[[], Calls], *, capture: bool = True) -> HostClock:
    """The clock that tells most about a call on ``device``."""
    if device == "cuda":
        return GraphClock(make_calls, capture=capture)
    return HostClock(make_calls, device)


def _device_failure(device: str) -> str | None:
    """What the device says if it fails from now on."""
    if device != "cuda":
        return None
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        return reason(error)
    return None


# ---- calls


def calls_of(
    case: Case, variant: Variant, mode: str, batches: Sequence[Batch]
) -> list[Callable[[], Any]]:
    """A call for each batch; results are a tensor (forward), or gradients in the leaves' order."""
    calls: list[Callable[[], Any]] = []
    for batch in batches:
        leaves = variant.leaves(batch)
        if mode == "forward":
            calls.append(partial(_forward, variant.call, leaves, batch.fixed))
            continue
        leaves, trained = require_grad(case, variant, leaves)
        if mode == "backward":
            result = variant.call(leaves, batch.fixed)
            calls.append(
                partial(torch.autograd.grad, result, trained, batch.grad, retain_graph=True)
            )
        else:
            calls.append(
                partial(_forward_backward, variant.call, leaves, batch.fixed, trained, batch.grad)
            )
    return calls


def require_grad(
    case: Case, variant: Variant, leaves: Leaves
) -> tuple[Leaves, tuple[torch.Tensor, ...]]:
    """The same memory as leaves of a new graph, and those that require a gradient."""
    names = trained_names(case, leaves)
    fresh = {name: leaf.detach().requires_grad_(name in names) for name, leaf in leaves.items()}
    return fresh, tuple(fresh[name] for name in names)


def trained_names(case: Case, leaves: Leaves) -> list[str]:
    return [name for name in leaves if case.trained is None or name in case.trained]


@torch.no_grad()
def _forward(call: Call, leaves: Leaves, fixed: Any) -> torch.Tensor:
    return call(leaves, fixed)


def _forward_backward(
    call: Call, leaves: Leaves, fixed: Any, trained: Sequence[torch.Tensor], grad: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(call(leaves, fixed), trained, grad)


def costs(case: Case, variant: Variant, mode: str, batch: Batch, device: str) -> Row:
    """What a call costs besides time: its peak of memory, what autograd keeps in training, and how
    often it waits for the device."""
    call = calls_of(case, variant, mode, [batch])[0]
    call()  # code, tables and thread pools are no part of it
    row: Row = {
        "peak_bytes": peak_bytes(call, device),
        "synchronisations": synchronisations(call, device),
    }
    if mode == "forward+backward":
        leaves, _ = require_grad(case, variant, variant.leaves(batch))
        given = [*leaves.values(), batch.grad]
        row["saved_bytes"] = saved_bytes(partial(variant.call, leaves, batch.fixed), given)
    return row


# ---- numerics


class Truths:
    """Results in float64 of the first and the last batch, computed once."""

    def __init__(self, case: Case, batches: Sequence[Batch]) -> None:
        self.case, self.batches = case, batches
        self.checked = sorted({0, len(batches) - 1})
        self._known: dict[Any, Leaves] = {}

    def worst_error(self, variant: Variant, mode: str, results: Sequence[Any]) -> float:
        """The largest relative error among the results of the batches that are checked.

        Raises:
            ValueError: an error is above its limit, or not a number.
        """
        worst = 0.0
        for index in self.checked:
            wanted = self._wanted(variant, mode, index)
            for name, actual in self._named(variant, mode, index, results[index]).items():
                error = relative_error(actual, wanted[name])
                limit = self.case.limits.get(name, LIMITS[self.batches[0].grad.dtype])
                if not error <= limit:
                    raise ValueError(
                        f"{name} of set {index} is off by {error:.2g} (2-norm, relative to "
                        f"float64), expected at most {limit:.2g}"
                    )
                worst = max(worst, error)
        return float(f"{worst:.3g}")

    def _named(self, variant: Variant, mode: str, index: int, result: Any) -> Leaves:
        if mode == "forward":
            return {"result": result}
        names = trained_names(self.case, variant.leaves(self.batches[index]))
        return dict(zip(names, result, strict=True))

    def _wanted(self, variant: Variant, mode: str, index: int) -> Leaves:
        key = (variant.truth, variant.without, mode == "forward", index)
        if key not in self._known:
            self._known[key] = self._compute(variant, mode, self.batches[index])
        known = self._known[key]
        return known if mode == "forward" else variant.prepare(known)

    def _compute(self, variant: Variant, mode: str, batch: Batch) -> Leaves:
        truth = variant.truth or self.case.truth
        leaves = {
            name: leaf.detach().double()
            for name, leaf in batch.leaves.items()
            if name not in variant.without
        }
        if mode == "forward":
            with torch.no_grad():
                return {"result": truth(leaves, batch.fixed)}
        names = trained_names(self.case, leaves)
        trained = [leaves[name].requires_grad_() for name in names]
        grads = torch.autograd.grad(truth(leaves, batch.fixed), trained, batch.grad.double())
        return dict(zip(names, grads, strict=True))


def relative_error(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    """||actual - wanted|| / ||wanted||; 0 where both are empty or zero."""
    if actual.shape != wanted.shape:
        raise ValueError(f"result must have shape {tuple(wanted.shape)}, got {tuple(actual.shape)}")
    dense = actual.to_dense() if actual.is_sparse else actual
    difference = (dense.double() - wanted).norm().item()
    norm = wanted.norm().item()
    return difference / norm if norm else difference


def shares(
    rows: Sequence[Row],
    copy_gb_per_s: float | None,
    matmul_tflop_per_s: float | None,
    sheet: tuple[float, float] | None,
) -> None:
    """Fill in the shares of the ceilings that were measured, and of those in the data sheet.

    Args:
        sheet: GB/s and TFLOP/s that the vendor states; None if unknown.
    """
    for row in rows:
        if row["gb_per_s"] != "":
            if copy_gb_per_s:
                row["share_of_copy"] = round(row["gb_per_s"] / copy_gb_per_s, 4)
            if sheet:
                row["share_of_sheet"] = round(row["gb_per_s"] / sheet[0], 4)
        if row["tflop_per_s"] != "":
            if matmul_tflop_per_s:
                row["share_of_matmul"] = round(row["tflop_per_s"] / matmul_tflop_per_s, 4)
            if sheet:
                row["share_of_sheet"] = round(row["tflop_per_s"] / sheet[1], 4)
