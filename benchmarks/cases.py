"""An op's cases: one op at one size, and every way to compute it.

A case says how to make a batch of random inputs, the result in float64, and what a call must move
and compute at least. A variant, ours or a peer's, is a function of the same inputs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.comparisons import uniform_name
from benchmarks.costs import peak_bytes, saved_bytes, synchronisations
from benchmarks.harness import NO_TIME, SEED, Entry, Run, Work, failure_in, measure
from benchmarks.results import NewRow, Row, last_level_cache, new_row
from benchmarks.targets import is_about, read_targets
from tokenflex_kernels import info

MODES = ("forward", "backward", "forward+backward")
TRAINING = ("backward", "forward+backward")
MAX_SETS = 256

# The largest relative error (2-norm) against float64 that counts as the same computation.
LIMITS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4, torch.float64: 1e-10}
OF_PEERS = 5  # times that: PyTorch's gradient of a norm's weight is off by 2 % in bfloat16

Leaves = dict[str, torch.Tensor]
Call = Callable[[Leaves, Any], torch.Tensor]


@dataclass
class Batch:
    """Inputs of one call."""

    leaves: Leaves  # the tensors that can be differentiated, by name
    grad: torch.Tensor  # the gradient of the result
    fixed: Any = None  # the rest: grids, a plan


@dataclass(frozen=True)
class Variant:
    """One way to compute a case."""

    name: str  # as in the CSV
    call: Call
    ours: bool = False  # whether it calls an op of ours
    # Brings the leaves into the layout that a package keeps its weights in, untimed. It must be
    # linear, because gradients are compared in that layout too.
    prepare: Callable[[Leaves], Leaves] = lambda leaves: leaves
    without: Collection[str] = ()  # leaves that it cannot take; its truth is computed without them
    truth: Call | None = None  # its own, if it computes something else than the case's result
    modes: Collection[str] = MODES  # those it can run
    waits: Collection[str] = ()  # modes that wait for the device, and cannot be captured
    slow_start: bool = False  # takes part at few sizes: compiles or tunes for a minute at each

    def leaves(self, batch: Batch) -> Leaves:
        taken = {name: leaf for name, leaf in batch.leaves.items() if name not in self.without}
        return self.prepare(taken)


def fast(variants: Sequence[Variant]) -> list[Variant]:
    """Return the variants that start without compiling or tuning."""
    return [variant for variant in variants if not variant.slow_start]


@dataclass(frozen=True)
class Case:
    """One op at one size."""

    op: str
    name: str
    tokens: int  # rows of the result
    # (dtype, device, seed, the first batch or None) -> a batch of random numbers
    batch: Callable[[torch.dtype, str, int, Batch | None], Batch]
    truth: Call  # the result, from leaves in float64
    variants: Sequence[Variant]  # ours, and those of peers that are installed
    numbers: tuple[int, int] = (0, 0)  # that forward and backward must read and write
    flops: tuple[int, int] = (0, 0)  # that forward and backward must compute
    trained: Collection[str] | None = None  # leaves that require a gradient; all if None
    shared: Collection[str] = ()  # leaves that all batches have in common, as a model has
    modes: Sequence[str] = MODES  # those that are measured
    exact: Collection[str] = ()  # "result" and leaves' gradients that must agree bit by bit

    def row(self, mode: str, variant: str = "") -> NewRow:
        names = {"op": self.op, "case": self.name, "mode": mode, "variant": variant}
        return new_row(**names, tokens=self.tokens, seed=SEED)

    def trained_names(self, leaves: Leaves) -> list[str]:
        return [name for name in leaves if self.trained is None or name in self.trained]

    def work(self, mode: str, itemsize: int) -> Work:
        parts = [("forward", "backward").index(part) for part in mode.split("+")]
        numbers, flops = (sum(cost[i] for i in parts) for cost in (self.numbers, self.flops))
        return Work(itemsize * numbers, flops)


def projector_modes(run: Run) -> Sequence[str]:
    """Return the modes of the projector's ops: on a CPU, the time for backward alone is saved."""
    return MODES if run.device == "cuda" else ("forward", "forward+backward")


def run_cases(cases: Iterable[Case], run: Run) -> None:
    """Measure one case after another, mode by mode; a case without time left gets a row too."""
    if run.for_targets:
        cases = list(cases)
        wanted = for_targets(cases, run.device)
    for case in cases:
        start, inputs = time.perf_counter(), None
        for mode in case.modes:
            row = case.row(mode)
            if (case.op, case.name, mode) in run.done:
                continue
            if run.for_targets and (case.name, mode) not in wanted:
                continue
            if run.deadline.left <= 0:
                run.emit([row | {"status": NO_TIME}])
                continue
            run.begin(row)
            with failure_in(row, run):  # for example a batch that does not fit into memory
                inputs = inputs or Inputs(case, run)
                run.emit(measure(inputs.entries(mode), run))
            if row["status"]:
                run.emit([row])
        if inputs:
            print(f"  {case.op}, {case.name}: {time.perf_counter() - start:.1f} s", flush=True)


def for_targets(cases: Sequence[Case], device: str) -> set[tuple[str, str]]:
    """Return the name and mode of one case for each target, of those that have its peer.

    A case that is chosen for one target serves others too. Otherwise it is the first with the least
    variants, since a peer that compiles takes a minute.
    """

    def row_of(case: Case, mode: str, variant: Variant) -> Row:
        row = case.row(mode, variant.name) | {"device": device, "backend": "", "status": "ok"}
        return {name: str(value) for name, value in row.items()}

    wanted: set[tuple[str, str]] = set()
    by_cost = sorted(cases, key=lambda case: len(case.variants))
    for target in read_targets():
        about = [
            (case, mode)
            for case in by_cost
            for mode in case.modes
            if target["peer"] in ("", *(v.name for v in case.variants if mode in v.modes))
            and any(
                mode in variant.modes and is_about(target, row_of(case, mode, variant))
                for variant in case.variants
                if variant.ours
            )
        ]
        chosen = [(case.name, mode) for case, mode in about]
        if not wanted.intersection(chosen):
            wanted.update(chosen[:1])
        if target["figure"] == "over_uniform":
            wanted |= {(uniform_name(name), mode) for name, mode in wanted.intersection(chosen)}
    return wanted


def number_of_sets(bytes_per_set: int, cache_bytes: int) -> int:
    """Return how many sets of buffers are together three times the cache.

    No more than ``MAX_SETS``: batches of a few kilobytes measure the cost of a call, in the cache
    or not.
    """
    return min(MAX_SETS, -(-3 * cache_bytes // bytes_per_set))


class Inputs:
    """A case's batches, and the truth of the first and the last, computed once."""

    def __init__(self, case: Case, run: Run) -> None:
        self.case, self.run = case, run
        first = case.batch(run.dtype, run.device, SEED, None)
        rotating = [leaf for name, leaf in first.leaves.items() if name not in case.shared]
        size = sum(tensor.nbytes for tensor in (*rotating, first.grad))
        seeds = range(SEED + 1, SEED + number_of_sets(size, last_level_cache(run.device)))
        self.batches = [first]
        self.batches += [case.batch(run.dtype, run.device, seed, first) for seed in seeds]
        self._truths: dict[Any, Leaves] = {}

    def entries(self, mode: str) -> list[Entry]:
        """Return an entry for each variant that has the mode."""
        columns = {"dtype": self.run.dtype_name, "sets": len(self.batches)}
        return [
            Entry(
                row=self.case.row(mode, variant.name)
                | {"backend": info()["ops"][self.case.op] if variant.ours else "", **columns},
                calls=partial(self._calls, variant, mode, self.batches),
                work=self.case.work(mode, self.run.dtype.itemsize),
                check=partial(self.worst_error, variant, mode),
                costs=partial(self._costs, variant, mode),
                timing="eager" if mode in variant.waits else "graph",
            )
            for variant in self.case.variants
            if mode in variant.modes
        ]

    def _calls(
        self, variant: Variant, mode: str, batches: Sequence[Batch]
    ) -> list[Callable[[], Any]]:
        """Return a call per batch; results are a tensor (forward), or the leaves' gradients."""
        calls: list[Callable[[], Any]] = []
        for batch in batches:
            leaves = self._leaves(variant, batch, mode != "forward")
            forward = partial(variant.call, leaves, batch.fixed)
            trained = [leaf for leaf in leaves.values() if leaf.requires_grad]
            gradients = partial(torch.autograd.grad, inputs=trained, grad_outputs=batch.grad)
            if mode == "forward":
                calls.append(torch.no_grad()(forward))
            elif mode == "backward":
                calls.append(partial(gradients, forward(), retain_graph=True))
            else:
                calls.append(partial(_forward_and_backward, forward, gradients))
        return calls

    def _leaves(self, variant: Variant, batch: Batch, training: bool) -> Leaves:
        """Return the variant's inputs as leaves of a new graph, in the batch's memory."""
        leaves = variant.leaves(batch)
        trained = self.case.trained_names(leaves) if training else []
        return {
            name: leaf.detach().requires_grad_(name in trained) for name, leaf in leaves.items()
        }

    def _costs(self, variant: Variant, mode: str) -> NewRow:
        batch = self.batches[0]
        (call,) = self._calls(variant, mode, [batch])
        call()  # loading code, tables and thread pools does not count
        row: NewRow = {
            "peak_bytes": peak_bytes(call, self.run.device),
            "synchronisations": synchronisations(call, self.run.device),
        }
        if mode == "forward+backward":
            leaves = self._leaves(variant, batch, True)
            forward = partial(variant.call, leaves, batch.fixed)
            row["saved_bytes"] = saved_bytes(forward, [*leaves.values(), batch.grad])
        return row

    def worst_error(self, variant: Variant, mode: str, results: Sequence[Any]) -> float:
        """Return the largest relative error in the results of the first and the last batch.

        Raises:
            ValueError: An error is above its limit, or not a number.
        """
        worst = 0.0
        for index in sorted({0, len(self.batches) - 1}):
            truth = self._truth(variant, mode == "forward", index)
            if mode != "forward":
                truth = variant.prepare(truth)
            for name, actual in self._named(variant, mode, results[index]).items():
                error = relative_error(actual, truth[name])
                limit = LIMITS[self.run.dtype] * (1 if variant.ours else OF_PEERS)
                limit = 0.0 if name in self.case.exact else limit
                if not error <= limit:
                    raise ValueError(
                        f"{name} of set {index} is off by {error:.2g} (2-norm, relative to "
                        f"float64), expected at most {limit:.2g}"
                    )
                worst = max(worst, error)
        return float(f"{worst:.3g}")

    def _truth(self, variant: Variant, forward: bool, index: int) -> Leaves:
        """Return the result, or the gradients by the names of the case's own leaves."""
        reference = Variant("truth", variant.truth or self.case.truth, without=variant.without)
        key = (reference.call, tuple(reference.without), forward, index)
        if key not in self._truths:
            batch = self.batches[index]
            leaves = {name: leaf.double() for name, leaf in batch.leaves.items()}
            mode = "forward" if forward else "forward+backward"
            (call,) = self._calls(
                reference, mode, [Batch(leaves, batch.grad.double(), batch.fixed)]
            )
            self._truths[key] = self._named(reference, mode, call())
        return self._truths[key]

    def _named(self, variant: Variant, mode: str, result: Any) -> Leaves:
        if mode == "forward":
            return {"result": result}
        names = self.case.trained_names(variant.leaves(self.batches[0]))
        return dict(zip(names, result, strict=True))


def _forward_and_backward(forward: Callable[[], Any], gradients: Callable[[Any], Any]) -> Any:
    return gradients(forward())


def relative_error(actual: torch.Tensor, truth: torch.Tensor) -> float:
    """Return ||actual - truth|| / ||truth||, or the norm itself where the truth is zero."""
    if actual.shape != truth.shape:
        raise ValueError(f"result must have shape {tuple(truth.shape)}, got {tuple(actual.shape)}")
    dense = actual.to_dense() if actual.is_sparse else actual
    difference, norm = (dense.double() - truth).norm().item(), truth.norm().item()
    return difference / norm if norm else difference
