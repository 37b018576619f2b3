"""Clocks, memory and waiting; CUDA and Triton are replaced by fakes."""

from __future__ import annotations

import math
import time
import warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import costs, harness
from benchmarks.cases import Variant
from benchmarks.costs import (
    GraphClock,
    HostClock,
    calls_in_graph,
    peak_bytes,
    saved_bytes,
    synchronisations,
)
from benchmarks.harness import Entry, Work, sample_in_turn
from benchmarks.results import new_row
from tests.benchmarks.small import product, rows_of, run_of, square_case


def test_percentiles_are_values_that_were_measured():
    clock = HostClock(lambda: [lambda: None])
    for samples, percentiles in (
        (list(range(10, -1, -1)), (2, 5, 8)),
        ([7.0], (7, 7, 7)),
        ([1, 2, 3], (1, 2, 3)),
        ([1, 2, 3, 4], (2, 3, 3)),
    ):
        clock.samples = samples
        row = harness.times(clock, "", Work())
        assert (row["p20_us"], row["p50_us"], row["p80_us"]) == percentiles


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


def test_calls_that_take_long_run_once_before_they_are_timed(monkeypatch):
    monkeypatch.setattr(costs, "LONG_SECONDS", 0.0)
    calls = []
    assert HostClock(lambda: [lambda: calls.append(1)]).seconds > 0
    assert len(calls) == 1


def test_wall_clock_is_microseconds_a_call(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(torch.utils.benchmark, "timer", lambda: next(now) / 1e3)  # 1 ms a look
    monkeypatch.setattr(costs, "SAMPLE_SECONDS", 5e-3)
    clock = HostClock(lambda: [lambda: None])
    assert clock.wall_us(4) == pytest.approx(250)
    assert clock.inner == math.ceil(5e-3 / 1e-3)


def test_one_thread_is_timed_by_what_it_computes():
    clock = HostClock(lambda: [lambda: time.sleep(0.02)], cpu_time=True)
    clock.sample()
    assert clock.timing == "cpu"
    assert clock.samples[0] < 5e3


@pytest.mark.parametrize(
    ("seconds", "sets", "calls"),
    [(1e-3, 2, 2), (1e-4, 2, 20), (1e-6, 3, 63), (1e-6, 100, 100), (1.0, 2, 2)],
)
def test_a_graph_holds_whole_rounds_of_the_sets(seconds, sets, calls, monkeypatch):
    monkeypatch.setattr(costs, "SAMPLE_SECONDS", 2e-3)
    assert calls_in_graph(seconds, sets) == calls


def test_clocks_take_turns_and_one_that_fails_drops_out():
    order, begun = [], []

    def sample(name):
        order.append(name)
        if name == "b":
            raise RuntimeError("gone")

    pairs = []
    for name in "abc":
        clock = SimpleNamespace(timing="host", sample=lambda name=name: sample(name))
        pairs.append((Entry(new_row(variant=name), list, Work()), clock))
    run = run_of()
    run.begin = lambda row: begun.append(row["variant"])
    sample_in_turn(pairs, run, seconds=0)
    # Forth and back, eight rounds at least, then time is up.
    assert order == begun == list("abc" + "caac" * 3 + "ca")
    statuses = [entry.row["status"] for entry, _ in pairs]
    assert statuses == ["", "failed: RuntimeError: gone", ""]


class Fake:
    """CUDA's streams and graphs and Triton's timing, as far as the clock uses them."""

    def __init__(self, monkeypatch, capture_fails=False):
        self.capture_fails = capture_fails
        self.capturing = False
        self.current = "default"
        self.replays = 0
        replaced = {
            "Stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
            "CUDAGraph": lambda: SimpleNamespace(replay=self.replay),
            "graph": lambda graph, stream: self,
            "stream": lambda stream: nullcontext(),
            "current_stream": lambda: self.current,
            "set_stream": lambda stream: setattr(self, "current", stream),
            "synchronize": lambda: None,
        }
        for name, value in replaced.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr("triton.testing.do_bench", self.do_bench)

    def replay(self):
        self.replays += 1

    def __enter__(self):
        self.capturing, self.before, self.current = True, self.current, "capturing"

    def __exit__(self, *error):
        self.capturing = False
        if self.capture_fails:  # as PyTorch does it: its own stream stays current
            raise RuntimeError("operation not permitted when stream is capturing")
        self.current = self.before

    def do_bench(self, call, warmup, rep, return_mode):
        assert return_mode == "all"
        call()
        return [1.5, 2.5]


@pytest.mark.parametrize("outcome", ["graph", "capture fails", "not tried"])
def test_graph_clock(monkeypatch, outcome):
    fake = Fake(monkeypatch, capture_fails=outcome == "capture fails")
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
    assert clock.samples == pytest.approx([1500 / clock.inner, 2500 / clock.inner])
    assert clock.timing == ("graph" if outcome == "graph" else "eager")
    # Once right after the capture, which computes nothing, and once for the sample.
    assert fake.replays == (2 if outcome == "graph" else 0)
    assert fake.current == "default"
    assert clock.wall_us(4) > 0


@pytest.mark.parametrize("waits", [(), ("backward",)])
def test_a_case_goes_through_graphs(monkeypatch, waits):
    """As on a GPU: each mode is captured, but where the variant waits for the device."""
    Fake(monkeypatch)
    monkeypatch.setattr(
        harness,
        "_clock",
        lambda entry, run: GraphClock(entry.calls, capture=entry.timing == "graph"),
    )
    rows = rows_of(square_case(Variant("first", product, waits=waits), Variant("other", product)))
    assert {row["status"] for row in rows} == {"ok"}
    assert all(row["eager_us"] > 0 for row in rows)
    eager = [(row["variant"], row["mode"]) for row in rows if row["timing"] == "eager"]
    assert eager == [("first", mode) for mode in waits]


@pytest.mark.parametrize(("seconds", "calls"), [(1e-3, 50), (5e-3, 20), (1.0, 3)])
def test_the_wall_clock_of_a_call_on_a_gpu_is_over_a_tenth_of_a_second(monkeypatch, seconds, calls):
    Fake(monkeypatch)
    clock = GraphClock(lambda: [lambda: None])
    clock.sample()
    clock.seconds = seconds
    monkeypatch.setattr(clock, "wall_us", lambda number: float(number))
    row = harness.times(clock, 6, Work(bytes=3000, flops=5))
    assert row["eager_us"] == calls
    assert row["gb_per_s"] == pytest.approx(3 / row["p50_us"], abs=1e-3)


# ---- memory and waiting


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


@pytest.mark.skipif(not Path("/proc").exists(), reason="Linux")
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
