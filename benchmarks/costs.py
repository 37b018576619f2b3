"""The costs of a call: time, memory, and waiting for the device.

A clock gets one call for each set of buffers and works through the sets in turn, so that no call
finds its inputs in the cache. Times are microseconds per call. The loops are those of ``timeit``,
``torch.utils.benchmark`` and ``triton.testing``; a clock adds that clocks can take turns, and that
it keeps the results, which are then checked.
"""

from __future__ import annotations

import ctypes
import math
import time
import timeit
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.utils.benchmark

Calls = Sequence[Callable[[], Any]]
SAMPLE_SECONDS = 2e-3
LONG_SECONDS = 0.3
MAX_CALLS_IN_GRAPH = 64
TURN_MS = 10  # replays of a graph in one turn


class HostClock:
    """The wall clock of ``torch.utils.benchmark``, which waits for the GPU before each reading.

    Args:
        make_calls: Returns one call per set of buffers. Each runs twice before anything is timed,
            once if they take long.
        cpu_time: Time that the process computes, all threads together, instead of the wall clock:
            others on the machine do not add to it, and work that moves to another thread counts.
    """

    def __init__(self, make_calls: Callable[[], Calls], *, cpu_time: bool = False) -> None:
        self.timing = "cpu" if cpu_time else "host"
        self.calls = make_calls()
        self.results: list[Any] = [None] * len(self.calls)
        self.samples: list[float] = []
        self.turns: list[float] = []  # a value for each turn
        self._next = 0
        timer = time.process_time if cpu_time else torch.utils.benchmark.timer
        self._timer = timeit.Timer(self._call_next, timer=timer)
        self.seconds = self.wall_us(len(self.calls)) / 1e6
        if self.seconds * len(self.calls) < LONG_SECONDS:  # else the first round is warm enough
            self.seconds = max(1e-7, self.wall_us(len(self.calls)) / 1e6)
        self.inner = math.ceil(SAMPLE_SECONDS / self.seconds)

    def _call_next(self) -> None:
        self.results[self._next] = None  # frees its memory: results must not pile up
        self.results[self._next] = self.calls[self._next]()
        self._next = (self._next + 1) % len(self.calls)

    def wall_us(self, number: int) -> float:
        """Return the clock's time of a call, host and device, over ``number`` calls in a row."""
        return 1e6 * self._timer.timeit(number) / number

    def sample(self) -> None:
        """Add the measurements of one turn to ``samples``, and their median to ``turns``."""
        samples = self._turn()
        self.samples += samples
        self.turns.append(median(samples))

    def _turn(self) -> list[float]:
        return [self.wall_us(self.inner)]


class GraphClock(HostClock):
    """The GPU's own clock: ``triton.testing.do_bench`` of a CUDA graph of the calls.

    The replay of a graph is the time of the kernels, without the host. Calls that cannot be
    captured run one by one between the GPU's events; ``timing`` is then "eager", not "graph".

    Args:
        make_calls: As for :class:`HostClock`. It runs on the stream that will be captured, because
            autograd runs a backward on the stream of its forward.
        capture: False for calls that are known to wait for the device.
    """

    def __init__(self, make_calls: Callable[[], Calls], *, capture: bool = True) -> None:
        self.stream = torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            super().__init__(make_calls)
        self.inner = calls_in_graph(self.seconds, len(self.calls))
        graph = self._captured() if capture else None
        self.timing = "graph" if graph else "eager"
        self._run = graph.replay if graph else self._run_calls

    def _run_calls(self) -> None:
        for _ in range(self.inner):
            self._call_next()

    def _captured(self) -> torch.cuda.CUDAGraph | None:
        before = torch.cuda.current_stream()
        graph = torch.cuda.CUDAGraph()
        self._next = 0
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                self._run_calls()
        except RuntimeError:
            # Where the end of a capture fails, torch.cuda.graph leaves its own stream current, and
            # nothing that was captured so far has been computed.
            torch.cuda.set_stream(before)
            torch.cuda.synchronize()
            self._next = 0
            self.wall_us(len(self.calls))
            return None
        with torch.cuda.stream(self.stream):
            graph.replay()  # capturing computes nothing; now the results exist
        torch.cuda.synchronize()
        return graph

    def wall_us(self, number: int) -> float:
        with torch.cuda.stream(self.stream):
            return super().wall_us(number)

    def _turn(self) -> list[float]:
        from triton.testing import do_bench  # which platforms without a GPU may lack

        with torch.cuda.stream(self.stream):
            times = do_bench(self._run, warmup=0, rep=TURN_MS, return_mode="all")
        return [1e3 * milliseconds / self.inner for milliseconds in times]


def calls_in_graph(seconds: float, sets: int) -> int:
    """Return the calls that a graph holds: whole rounds of the sets, a few milliseconds in all."""
    rounds = math.ceil(SAMPLE_SECONDS / (seconds * sets))
    return sets * max(1, min(rounds, MAX_CALLS_IN_GRAPH // sets))


# ---- memory and waiting


def peak_bytes(call: Callable[[], Any], device: str) -> int | None:
    """Return how far memory rises above its level before the call, the result included.

    On a GPU the allocator counts. On the CPU it is the resident memory of this process, whose
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
            ctypes.CDLL(None).malloc_trim(0)  # freed memory would serve the call unseen
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except (OSError, AttributeError):
            return None
        before = _resident_bytes("VmRSS")
        result = call()
        peak = _resident_bytes("VmHWM")
    del result
    return max(0, peak - before)


def _resident_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (kib,) = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return 1024 * int(kib)


def synchronisations(call: Callable[[], Any], device: str) -> int | None:
    """Count how often PyTorch waits for the device during a call; None on the CPU.

    PyTorch counts its own waiting only. Waiting by others shows when a graph cannot capture it.
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
    """Return the bytes that autograd keeps from forward to backward, each storage counted once.

    Args:
        forward: Computes the result.
        given: Inputs and weights, which the caller holds in any case and which are left out.
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
