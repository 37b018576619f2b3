"""Clocks, and the GPU's one with everything of CUDA replaced."""

from __future__ import annotations

import math
import warnings
from contextlib import nullcontext

import pytest
import torch

from benchmarks import harness, timing
from benchmarks.harness import Variant, Work
from benchmarks.timing import (
    GraphClock,
    HostClock,
    calls_in_graph,
    peak_bytes,
    percentiles,
    sample_in_turn,
    saved_bytes,
    synchronisations,
)
from tests.benchmarks.small import product, rows_of, square_case


def test_percentiles_are_values_that_were_measured():
    assert percentiles(list(range(10, -1, -1))) == {20: 2, 50: 5, 80: 8}
    assert percentiles([7.0]) == {20: 7.0, 50: 7.0, 80: 7.0}
    assert percentiles([1, 2, 3]) == {20: 1, 50: 2, 80: 3}
    assert percentiles([1, 2, 3, 4]) == {20: 2, 50: 3, 80: 3}


def test_a_clock_works_through_its_sets_in_turn():
    order = []
    clock = HostClock(lambda: [lambda at=at: order.append(at) or at for at in range(3)])
    assert order == [0, 1, 2, 0, 1, 2]
    clock.inner = 2
    clock.sample()
    clock.sample()
    assert order[6:] == [0, 1, 2, 0]
    assert clock.results == [0, 1, 2]
    assert len(clock.samples) == 2


@pytest.mark.parametrize(
    ("seconds", "sets", "calls"),
    [(1e-3, 2, 2), (1e-4, 2, 20), (1e-6, 3, 63), (1e-6, 100, 100), (1.0, 2, 2)],
)
def test_a_graph_holds_whole_rounds_of_the_sets(seconds, sets, calls):
    assert calls_in_graph(seconds, sets) == calls


class Named:
    def __init__(self, name, order, fails=False):
        self.name, self.order, self.fails = name, order, fails

    def sample(self):
        self.order.append(self.name)
        if self.fails:
            raise RuntimeError("gone")


def test_clocks_take_turns_and_one_that_fails_drops_out():
    order = []
    clocks = {name: Named(name, order, fails=name == "b") for name in "abc"}
    failed = sample_in_turn(clocks, samples=4, seconds=0)
    assert order == list("abcacac")  # three rounds at least, then time is up
    assert list(failed) == ["b"]


class Fake:
    """CUDA's streams, events and graphs, as far as the clock uses them."""

    def __init__(self, capture_fails=False):
        self.capture_fails = capture_fails
        self.capturing = False
        self.current = "default"
        self.replays = 0

    def install(self, monkeypatch):
        fake = self

        class Stream:
            def wait_stream(self, other):
                pass

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            record = synchronize = lambda self: None

            def elapsed_time(self, other):
                return 1.5

        class Graph:
            def replay(self):
                fake.replays += 1

        class Capture:
            def __init__(self, graph, stream):
                assert isinstance(stream, Stream)

            def __enter__(self):
                fake.capturing, fake.before = True, fake.current
                fake.current = "capturing"

            def __exit__(self, *error):
                fake.capturing = False
                if fake.capture_fails:  # as PyTorch does it: its own stream stays current
                    raise RuntimeError("operation not permitted when stream is capturing")
                fake.current = fake.before

        replaced = {
            "Stream": Stream,
            "Event": Event,
            "CUDAGraph": Graph,
            "graph": Capture,
            "stream": lambda stream: nullcontext(),
            "current_stream": lambda: fake.current,
            "set_stream": lambda stream: setattr(fake, "current", stream),
            "synchronize": lambda: None,
        }
        for name, value in replaced.items():
            monkeypatch.setattr(torch.cuda, name, value)
        return self


@pytest.mark.parametrize("outcome", ["graph", "capture fails", "not tried"])
def test_graph_clock(monkeypatch, outcome):
    fake = Fake(capture_fails=outcome == "capture fails").install(monkeypatch)
    captured = []

    def call(at):
        captured.append((at, fake.capturing))
        return at

    clock = GraphClock(
        lambda: [lambda at=at: call(at) for at in range(3)], capture=outcome != "not tried"
    )
    assert clock.inner % 3 == 0
    assert clock.results == [0, 1, 2]
    in_graph = [at for at, capturing in captured if capturing]
    if outcome != "not tried":
        assert in_graph == [0, 1, 2] * (clock.inner // 3)
    clock.sample()
    assert clock.samples == [pytest.approx(1500 / clock.inner)]
    assert clock.timing == ("graph" if outcome == "graph" else "eager")
    # Once right after the capture, which computes nothing, and once for the sample.
    assert fake.replays == (2 if outcome == "graph" else 0)
    assert fake.current == "default"
    assert clock.wall_us(4) > 0


@pytest.mark.parametrize("waits", [(), ("backward",)])
def test_a_case_goes_through_graphs(monkeypatch, waits):
    """What a GPU would run: each mode captured, but where the variant waits for the device."""
    Fake().install(monkeypatch)
    monkeypatch.setattr(harness, "last_level_cache", lambda device: 100)
    monkeypatch.setattr(
        harness, "clock_for", lambda _, calls, *, capture=True: GraphClock(calls, capture=capture)
    )
    rows = rows_of(square_case(Variant("first", product, waits=waits), Variant("other", product)))
    assert {row["status"] for row in rows} == {"ok"}
    assert all(row["eager_us"] > 0 for row in rows)
    eager = [(row["variant"], row["mode"]) for row in rows if row["timing"] == "eager"]
    assert eager == [("first", mode) for mode in waits]


def test_wall_clock_is_microseconds_a_call(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(now) / 1e3)  # 1 ms a look
    clock = HostClock(lambda: [lambda: None])
    assert clock.wall_us(4) == pytest.approx(250)
    assert clock.inner == math.ceil(timing.SAMPLE_SECONDS / 1e-3)


@pytest.mark.parametrize(("seconds", "calls"), [(1e-3, 50), (5e-3, 20), (1.0, 3)])
def test_the_wall_clock_of_a_call_on_a_gpu_is_over_a_tenth_of_a_second(monkeypatch, seconds, calls):
    Fake().install(monkeypatch)
    clock = GraphClock(lambda: [lambda: None])
    clock.sample()
    clock.seconds = seconds
    monkeypatch.setattr(clock, "wall_us", lambda number: float(number))
    row = harness.times(clock, 6, Work(bytes=3000, flops=5))
    assert row["eager_us"] == calls
    assert row["gb_per_s"] == pytest.approx(3 / row["p50_us"], abs=1e-3)


def test_waiting_for_the_device_is_counted(monkeypatch):
    modes = ["default"]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def call():
        assert modes[-1] == "warn"
        for _ in range(2):  # at one line: as a filter would have it, one warning
            warnings.warn("called a synchronizing CUDA operation", UserWarning, stacklevel=1)
        warnings.warn("something else", UserWarning, stacklevel=1)

    assert synchronisations(call, "cuda") == 2
    assert modes[-1] == 0
    assert synchronisations(call, "cpu") is None


def test_saved_bytes_count_each_storage_once_and_no_input():
    x = torch.randn(100, requires_grad=True)

    def forward():
        y = x.exp()  # keeps its result, 400 bytes
        return y * y  # which the product keeps twice

    assert saved_bytes(forward, [x]) == 400
    assert saved_bytes(lambda: x * x, [x]) == 0


@pytest.mark.skipif(
    not torch.cuda.is_available() and not timing.Path("/proc").exists(), reason="Linux"
)
def test_peak_bytes_see_what_is_given_back_before_the_call_ends():
    size = 64 * 2**20

    def call():
        lost = torch.ones(size, dtype=torch.uint8)
        kept = torch.ones(size // 2, dtype=torch.uint8)
        del lost
        return kept

    for _ in range(2):  # freed memory of the first call is not to hide the second's
        peak = peak_bytes(call, "cpu")
        if peak is None:
            pytest.skip("this kernel does not reset the high-water mark")
        assert 1.4 * size < peak < 1.7 * size
