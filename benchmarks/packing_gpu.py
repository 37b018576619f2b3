"""Packing on a GPU against the peers: ``python -m benchmarks.packing_gpu --out DIR``.

Protocol (one CSV per run):

* Every variant is captured in a CUDA graph of ``--inner`` calls. Each call works on the next of
  several sets of buffers, which together are at least three times the L2 cache, so that no call
  finds its rows there. One sample is the time of one replay, by CUDA events, over its calls. A
  variant that cannot be captured is timed eagerly, and one known to wait for the device is not
  even tried: see ``timing``.
* Variants take turns, A B C A B C, so that a drift of the clocks meets them all.
* The results in the very buffers that were timed are compared with plain PyTorch afterwards.
* The ceiling is a copy of ``--copy-gib`` GiB by ``Tensor.copy_``, timed the same way, same run. The
  share of it counts ideal bytes: each row that must move read once and written once.
* Forward is timed alone, and forward + backward with a frozen table (vision rows alone need a
  gradient), with a trained one, and with a trained one whose gradient is sparse.
* ``eager_us`` is the wall clock of one call without a graph, host included.

Losing rows are written like all others.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import percentiles, write_csv
from benchmarks.packing_cases import PACKERS, SPARSE_PACKERS, Batch, Case, forward_backward

DEVICE = "cuda"
DTYPE = torch.bfloat16
SEED = 0
CASES = [
    Case(samples=samples, text=220, width=width, vocabulary=151_936)
    for samples, width in itertools.product((1, 16, 64, 256), (2048, 3584))
]
MODES = (
    "forward",
    "forward+backward, frozen table",
    "forward+backward",
    "forward+backward, sparse table gradient",
)
VARIANTS = dict.fromkeys(MODES, PACKERS) | {MODES[3]: SPARSE_PACKERS}

# masked_scatter's gradient counts the mask's ones, and waits for that count.
WAITING = {("embedding + masked_scatter", mode) for mode in MODES[1:3]}


@dataclass(frozen=True)
class Call:
    """What is timed: a variant in a mode; ``waits`` where it is known to wait for the device."""

    pack: Callable[[Batch], torch.Tensor]
    mode: str
    waits: bool

    def __call__(self, batch: Batch) -> Any:
        return self.pack(batch) if self.mode == MODES[0] else forward_backward(self.pack, batch)


def ideal_bytes(rows: int, vision_rows: int, distinct_ids: int, row_bytes: int, mode: str) -> int:
    """Bytes that must move: no cache helps, nothing moves twice, row maps left out.

    Forward reads and writes every row. Backward reads and writes the vision rows' gradient; with a
    trained table it also reads the text rows' gradient and writes a row of sums for each id in use.
    (The zeros in the rest of a dense [V, D] gradient, which every variant writes, are not counted.)
    """
    forward = 2 * rows
    frozen = 2 * vision_rows
    table = rows - vision_rows + distinct_ids
    trained = forward + frozen + table
    moved = dict(zip(MODES, (forward, forward + frozen, trained, trained), strict=True))
    return moved[mode] * row_bytes


def number_of_sets(bytes_per_set: int, l2_bytes: int) -> int:
    """Sets of buffers that together are at least three times the L2 cache; at least two."""
    return max(2, -(-3 * l2_bytes // bytes_per_set))


def interleaved(names: Sequence[str], repeats: int) -> list[str]:
    """A B C A B C .."""
    return list(names) * repeats


class Timed:
    """A call on each of several sets of buffers, captured in one CUDA graph where that can be."""

    def __init__(self, call: Callable[[Any], object], batches: Sequence[Any], inner: int) -> None:
        self.call, self.batches, self.inner = call, batches, inner
        self.samples: list[float] = []
        self.results: list[object] = [None] * len(batches)
        self.graph: torch.cuda.CUDAGraph | None = None
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._run(len(batches))
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        if not getattr(call, "waits", False):
            self._capture()

    def _capture(self) -> None:
        before = torch.cuda.current_stream()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._run(self.inner)
        except RuntimeError:
            # Where the end of a capture fails, torch.cuda.graph leaves its own stream current, and
            # what it captured so far was never computed.
            torch.cuda.set_stream(before)
            torch.cuda.synchronize()
            self._run(len(self.batches))
        else:
            self.graph = graph

    def _run(self, calls: int) -> None:
        for index in range(calls):
            at = index % len(self.batches)
            self.results[at] = None  # give its memory back first: buffers are not to pile up
            self.results[at] = self.call(self.batches[at])

    def sample(self) -> None:
        """Add one measurement, in microseconds a call."""
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        if self.graph is None:
            self._run(self.inner)
        else:
            self.graph.replay()
        end.record()
        end.synchronize()
        self.samples.append(1e3 * start.elapsed_time(end) / self.inner)

    def eager_us(self, calls: int = 20) -> float:
        """The wall clock of one call, host and device."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        for index in range(calls):
            self.call(self.batches[index % len(self.batches)])
        torch.cuda.synchronize()
        return 1e6 * (time.perf_counter() - start) / calls


def copy_ceiling(gib: float, repeats: int) -> float:
    """Bytes a second, read and written together, of a large device copy."""
    source = torch.randn(int(gib * 2**30) // 4, device=DEVICE)
    target = torch.empty_like(source)
    timed = Timed(lambda _: target.copy_(source), [None], inner=4)
    for _ in range(repeats):
        timed.sample()
    assert torch.equal(source, target)
    return 2 * source.nbytes / (1e-6 * statistics.median(timed.samples))


def check(mode: str, batch: Batch, result: Any) -> None:
    """``result``, as timed, is what indexing gives; sums of table rows to bfloat16's precision."""
    rows = batch.plan.vision_rows.long()
    text = batch.plan.source >= 0
    if mode == MODES[0]:
        wanted = batch.table.detach()[batch.plan.input_ids].index_copy(0, rows, batch.vision)
        assert torch.equal(result, wanted)
        return
    *table_grads, vision_grad = result
    assert torch.equal(vision_grad, batch.grad[rows])
    for grad in table_grads:
        grad = grad.to_dense() if grad.is_sparse else grad
        # The peers look the placeholder's id up too, but it is given zeros: all variants agree.
        sums = torch.zeros(grad.shape, device=grad.device)
        sums.index_add_(0, batch.plan.input_ids[text], batch.grad[text].float())
        torch.testing.assert_close(grad.float(), sums, rtol=1e-2, atol=1e-2)


def measure(case: Case, mode: str, ceiling: float, repeats: int, inner: int) -> list[dict]:
    """The rows of the CSV for one case and mode."""
    first = case.batch(DTYPE, DEVICE, SEED)
    row_bytes = first.grad.shape[1] * first.grad.element_size()
    bytes_per_set = 2 * first.grad.nbytes
    if mode == MODES[2]:
        bytes_per_set += first.table.nbytes  # its gradient
    trained = mode in MODES[2:]
    l2_bytes = torch.cuda.get_device_properties(DEVICE).L2_cache_size
    sets = number_of_sets(bytes_per_set, l2_bytes)
    # One table, as in a model; every set picks other rows of it.
    first.table.requires_grad_(trained)
    more = (case.batch(DTYPE, DEVICE, SEED + index, first.table) for index in range(1, sets))
    batches = [first, *more]
    for batch in batches:
        batch.vision.requires_grad_(mode != MODES[0])
    inner = max(inner, sets)

    timed = {}
    for name, pack in VARIANTS[mode].items():
        call = Call(pack, mode, waits=(name, mode) in WAITING)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(first)
        peak = torch.cuda.max_memory_allocated() - before
        timed[name] = (Timed(call, batches, inner), peak)
    for name in interleaved(list(timed), repeats):
        timed[name][0].sample()

    distinct = first.plan.input_ids[first.plan.source >= 0].unique().numel()
    moved = ideal_bytes(
        first.plan.num_tokens, first.plan.vision_rows.shape[0], distinct, row_bytes, mode
    )
    rows = []
    for name, (variant, peak) in timed.items():
        for batch, result in zip(batches, variant.results, strict=True):
            check(mode, batch, result)
        times = percentiles(variant.samples)
        rows.append(
            {
                "mode": mode,
                "variant": name,
                "case": case.name,
                "dtype": str(DTYPE).removeprefix("torch."),
                "timing": "eager" if variant.graph is None else "graph",
                **{f"{key}_us": round(value, 2) for key, value in times.items()},
                "eager_us": round(variant.eager_us(), 2),
                "ideal_bytes": moved,
                "share_of_copy": round(moved / (1e-6 * times["p50"]) / ceiling, 4),
                "copy_gb_per_s": round(ceiling / 1e9, 1),
                "peak_bytes": peak,
                "sets": sets,
                "samples": len(variant.samples),
                "seed": SEED,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.packing_gpu")
    parser.add_argument("--out", type=Path, required=True, help="folder for packing-gpu.csv")
    parser.add_argument("--repeats", type=int, default=50, help="samples of each variant")
    parser.add_argument("--inner", type=int, default=20, help="calls in one CUDA graph")
    parser.add_argument("--copy-gib", type=float, default=2.0, help="size of the ceiling's copy")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device, and PyTorch sees none")
    ceiling = copy_ceiling(arguments.copy_gib, arguments.repeats)
    rows = []
    for case, mode in itertools.product(CASES, MODES):
        rows += measure(case, mode, ceiling, arguments.repeats, arguments.inner)
        torch.cuda.empty_cache()
        for row in rows[-len(VARIANTS[mode]) :]:
            print(
                f"{row['case']:48} {row['mode']:40} {row['variant']:28} "
                f"{row['p50_us']:10.1f} us {100 * row['share_of_copy']:6.1f} % of copy"
            )
    write_csv(arguments.out / "packing-gpu.csv", rows)


if __name__ == "__main__":
    main()
