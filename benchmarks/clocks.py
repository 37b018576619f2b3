"""Clocks: time a call over and over, through several sets of buffers.

A clock gets one call for each set and works through the sets in turn, so that no call finds its
inputs in the cache. Times are in microseconds per call. The loops are PyTorch's and Triton's;
what is added here is that clocks take turns, and that the results stay at hand to be checked.
"""

from __future__ import annotations

import math
import time
import timeit
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.utils.benchmark

Calls = Sequence[Callable[[], Any]]
SAMPLE_SECONDS = 2e-3
MAX_CALLS_IN_GRAPH = 64
TURN_MS = 10  # replays of a graph in one turn


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the 20th, 50th and 80th percentile, each the nearest value that was measured."""
    ordered = sorted(values)
    p20, p50, p80 = (ordered[((len(ordered) - 1) * share + 50) // 100] for share in (20, 50, 80))
    return p20, p50, p80


class HostClock:
    """The wall clock of ``torch.utils.benchmark``, which waits for the GPU before each reading.

    Args:
        make_calls: Returns one call per set of buffers. Each runs twice before anything is timed.
    """

    timing = "host"

    def __init__(self, make_calls: Callable[[], Calls]) -> None:
        self.calls = make_calls()
        self.results: list[Any] = [None] * len(self.calls)
        self.samples: list[float] = []
        self._next = 0
        self._timer = timeit.Timer(self._call_next, timer=torch.utils.benchmark.timer)
        self.wall_us(len(self.calls))
        self.seconds = max(1e-7, self.wall_us(len(self.calls)) / 1e6)
        self.inner = math.ceil(SAMPLE_SECONDS / self.seconds)

    def _call_next(self) -> None:
        self.results[self._next] = None  # frees its memory: results must not pile up
        self.results[self._next] = self.calls[self._next]()
        self._next = (self._next + 1) % len(self.calls)

    def wall_us(self, number: int) -> float:
        """Return the wall clock of a call, host and device, over ``number`` calls in a row."""
        return 1e6 * self._timer.timeit(number) / number

    def sample(self) -> None:
        """Add what one turn measures to ``samples``."""
        self.samples.append(self.wall_us(self.inner))


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
            graph.replay()  # capturing computes nothing; now the results are there
        torch.cuda.synchronize()
        return graph

    def wall_us(self, number: int) -> float:
        with torch.cuda.stream(self.stream):
            return super().wall_us(number)

    def sample(self) -> None:
        from triton.testing import do_bench  # which platforms without a GPU may lack

        with torch.cuda.stream(self.stream):
            times = do_bench(self._run, warmup=0, rep=TURN_MS, return_mode="all")
        self.samples += [1e3 * milliseconds / self.inner for milliseconds in times]


def calls_in_graph(seconds: float, sets: int) -> int:
    """Return the calls that a graph holds: whole rounds of the sets, a few milliseconds in all."""
    rounds = math.ceil(SAMPLE_SECONDS / (seconds * sets))
    return sets * max(1, min(rounds, MAX_CALLS_IN_GRAPH // sets))


def sample_in_turn(
    clocks: Mapping[str, HostClock],
    rounds: int,
    seconds: float,
    begin: Callable[[str], object] = lambda name: None,
) -> dict[str, Exception]:
    """Sample clocks A B C A B C .., so that all of them meet the same drift of the machine.

    Args:
        clocks: The clocks by name.
        rounds: Turns of each clock.
        seconds: Time after which three rounds are enough.
        begin: Called with the name of the clock whose turn it is.

    Returns:
        The errors of clocks that failed; the others go on without them.
    """
    failed: dict[str, Exception] = {}
    start = time.perf_counter()
    for turn in range(rounds):
        if turn >= 3 and time.perf_counter() - start > seconds:
            break
        for name, clock in clocks.items():
            if name in failed:
                continue
            begin(name)
            try:
                clock.sample()
            except Exception as error:
                failed[name] = error
    return failed
