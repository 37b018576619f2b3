"""How a call is timed, and what it costs in memory.

A clock is given one call for each of several sets of buffers, and works through the sets in turn,
so that no call finds its inputs in the cache. Times are microseconds a call.

* :class:`HostClock`: ``time.perf_counter`` around several calls, the device waited for before and
  after. All there is on the CPU; on a GPU it is what a user's program sees.
* :class:`GraphClock`: the calls of one sample captured in a CUDA graph, and its replay timed by
  CUDA events: the time of the kernels, without the host. What cannot be captured is run eagerly
  between the events, and says so (``timing`` is "eager" instead of "graph").
"""

from __future__ import annotations

import ctypes
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

Calls = Sequence[Callable[[], Any]]
SAMPLE_SECONDS = 2e-3
MAX_CALLS_IN_GRAPH = 64


def percentiles(values: Sequence[float]) -> dict[int, float]:
    """The 20th, 50th and 80th percentile, each the nearest value that was measured (of two as near,
    the greater)."""
    ordered = sorted(values)
    return {share: ordered[((len(ordered) - 1) * share + 50) // 100] for share in (20, 50, 80)}


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class HostClock:
    """Wall clock on the host.

    Args:
        make_calls: one call per set of buffers. Each runs twice before anything is timed.
        device: waited for around each sample.
    """

    timing = "host"

    def __init__(self, make_calls: Callable[[], Calls], device: str = "cpu") -> None:
        self.device = device
        self.calls = make_calls()
        self.results: list[Any] = [None] * len(self.calls)
        self.samples: list[float] = []
        self._next = 0
        self.seconds = self._warm_up()
        self.inner = max(1, math.ceil(SAMPLE_SECONDS / self.seconds))

    def _warm_up(self) -> float:
        """Run every set twice; the seconds of a call, of the second time."""
        self._run(len(self.calls))
        synchronize(self.device)
        start = time.perf_counter()
        self._run(len(self.calls))
        synchronize(self.device)
        return max(1e-7, (time.perf_counter() - start) / len(self.calls))

    def _run(self, number: int) -> None:
        for _ in range(number):
            self.results[self._next] = None  # give its memory back first: results must not pile up
            self.results[self._next] = self.calls[self._next]()
            self._next = (self._next + 1) % len(self.calls)

    def sample(self) -> None:
        """Add one measurement."""
        self.samples.append(self.wall_us(self.inner))

    def wall_us(self, number: int) -> float:
        """The wall clock of a call, host and device, over ``number`` calls in a row."""
        synchronize(self.device)
        start = time.perf_counter()
        self._run(number)
        synchronize(self.device)
        return 1e6 * (time.perf_counter() - start) / number


class GraphClock(HostClock):
    """Replays of a CUDA graph.

    Args:
        make_calls: one call per set; it runs on the stream that will be captured, because autograd
            runs a backward on the stream of its forward.
        capture: False for calls that are known to wait for the device.
    """

    timing = "graph"

    def __init__(self, make_calls: Callable[[], Calls], *, capture: bool = True) -> None:
        self.stream = torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            super().__init__(make_calls, "cuda")
        self.inner = calls_in_graph(self.seconds, len(self.calls))
        self.graph: torch.cuda.CUDAGraph | None = None
        if capture:
            self._capture()
        if self.graph is None:
            self.timing = "eager"

    def _capture(self) -> None:
        before = torch.cuda.current_stream()
        graph = torch.cuda.CUDAGraph()
        self._next = 0
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                self._run(self.inner)
        except RuntimeError:
            # Where the end of a capture fails, torch.cuda.graph leaves its own stream current, and
            # what it captured so far was never computed.
            torch.cuda.set_stream(before)
            torch.cuda.synchronize()
            self._next = 0
            with torch.cuda.stream(self.stream):
                self._run(len(self.calls))
        else:
            self.graph = graph
            with torch.cuda.stream(self.stream):
                graph.replay()  # what is captured is not computed: now the results are there
            torch.cuda.synchronize()

    def sample(self) -> None:
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(self.stream):
            start.record()
            if self.graph is None:
                self._run(self.inner)
            else:
                self.graph.replay()
            end.record()
        end.synchronize()
        self.samples.append(1e3 * start.elapsed_time(end) / self.inner)

    def wall_us(self, number: int) -> float:
        with torch.cuda.stream(self.stream):
            return super().wall_us(number)


def calls_in_graph(seconds: float, sets: int) -> int:
    """How many calls a graph holds: whole rounds through the sets, some milliseconds in all."""
    rounds = math.ceil(SAMPLE_SECONDS / (seconds * sets))
    return sets * max(1, min(rounds, MAX_CALLS_IN_GRAPH // sets))


def sample_in_turn(
    clocks: Mapping[str, HostClock], samples: int, seconds: float
) -> dict[str, Exception]:
    """Sample the clocks A B C A B C .., so that a drift of the machine meets them all.

    Stops after ``samples`` rounds, or after ``seconds`` once there are three.

    Returns:
        The errors of the clocks that failed; the others go on without them.
    """
    failed: dict[str, Exception] = {}
    start = time.perf_counter()
    for done in range(samples):
        if done >= 3 and time.perf_counter() - start > seconds:
            break
        for name, clock in clocks.items():
            if name in failed:
                continue
            try:
                clock.sample()
            except Exception as error:
                failed[name] = error
    return failed


def peak_bytes(call: Callable[[], Any], device: str) -> int | None:
    """How much higher memory gets during a call than it was before, the result included.

    The allocator's own count on a GPU. On the CPU the resident memory of this process, whose
    high-water mark Linux can reset; None where it cannot.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    else:
        try:
            ctypes.CDLL(None).malloc_trim(0)  # else freed memory would serve the call unseen
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except (OSError, AttributeError):
            return None
        before = _resident("VmRSS")
        result = call()
        peak = _resident("VmHWM")
    del result
    return max(0, peak - before)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (kib,) = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return 1024 * int(kib)


def synchronisations(call: Callable[[], Any], device: str) -> int | None:
    """How often PyTorch waits for the device during a call; None on the CPU.

    PyTorch knows of its own waiting only. What others do shows when a graph cannot capture it.
    """
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    torch.cuda.synchronize()
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def saved_bytes(forward: Callable[[], Any], given: Sequence[torch.Tensor]) -> int:
    """Bytes that autograd keeps between a forward and its backward, each storage counted once.

    ``given``, the inputs and weights that the caller holds anyway, are left out.
    """
    held = {tensor.untyped_storage().data_ptr() for tensor in given}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        plain = tensor.detach().values() if tensor.is_nested else tensor.detach()
        address = plain.untyped_storage().data_ptr()
        if address not in held:
            kept[address] = plain  # alive, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del result
    return total
