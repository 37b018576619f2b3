"""The GPU's clock and readings on a real device. test_costs.py uses fakes elsewhere."""

from __future__ import annotations

import pytest
import torch

from benchmarks.cases import Variant
from benchmarks.costs import GraphClock, peak_bytes, synchronisations
from benchmarks.packing import FORWARD, FROZEN_TABLE, pack_case
from benchmarks.peers import load_peers
from benchmarks.prompts import Prompts
from benchmarks.results import environment, last_level_cache
from tests.benchmarks.small import rows_of, run_of, square_case

pytestmark = pytest.mark.gpu

MIB = 2**20


def test_a_graph_is_replayed_and_its_results_are_those_of_the_call():
    numbers = [torch.full((MIB,), float(i), device="cuda") for i in range(3)]
    clock = GraphClock(lambda: [lambda x=x: x * 2 for x in numbers])
    assert clock.timing == "graph"
    for _ in range(2):  # right after the capture, and after a sample
        assert [int(result[0]) for result in clock.results] == [0, 2, 4]
        clock.sample()
    assert 0 < min(clock.samples) < 1e4
    assert clock.wall_us(3) > 0


def test_what_cannot_be_captured_is_timed_eagerly_and_the_stream_is_as_before():
    before = torch.cuda.current_stream()
    x = torch.ones(1000, device="cuda")
    clock = GraphClock(lambda: [lambda: x * x.sum().item()])
    assert clock.timing == "eager"
    assert torch.cuda.current_stream() == before
    clock.sample()
    assert clock.results[0][0].item() == 1000
    assert clock.samples[0] > 0


def test_waiting_for_the_device_is_counted():
    x = torch.ones(10, device="cuda")
    assert synchronisations(lambda: x * 2, "cuda") == 0
    once = synchronisations(lambda: x.sum().item(), "cuda")
    assert 0 < once < synchronisations(lambda: [x.sum().item(), x.sum().item()], "cuda")
    assert torch.cuda.get_sync_debug_mode() == 0


def test_peak_bytes_see_what_is_given_back_before_the_call_ends():
    def call():
        lost = torch.empty(64 * MIB, dtype=torch.uint8, device="cuda")
        kept = torch.empty(32 * MIB, dtype=torch.uint8, device="cuda")
        del lost
        return kept

    assert peak_bytes(call, "cuda") == 96 * MIB


def test_a_case_is_captured_and_right_in_every_mode():
    def call(leaves, _):
        return leaves["a"] * leaves["b"]

    case = square_case(Variant("first", call), Variant("other", call))
    rows = rows_of(case, device="cuda", dtype=torch.float32)
    assert [(row["status"], row["timing"]) for row in rows] == [("ok", "graph")] * 6
    assert all(row["synchronisations"] == 0 and row["eager_us"] > 0 for row in rows)


@pytest.mark.parametrize("kind", [FORWARD, FROZEN_TABLE])
def test_packing_waits_for_nothing_and_masked_scatter_for_its_mask(kind):
    peers = load_peers("pack_embeddings", run_of("cuda"))
    case = pack_case(Prompts(2, 20, 64, 100), kind, peers)
    rows = rows_of(case, device="cuda", dtype=torch.bfloat16)
    ours = [row for row in rows if row["variant"] == "tokenflex"]
    assert {(row["status"], row["timing"], row["synchronisations"]) for row in ours} == {
        ("ok", "graph", 0)
    }
    waiting = {row["variant"] for row in rows if row["synchronisations"]}
    assert ("embedding + masked_scatter" in waiting) is (kind == FROZEN_TABLE)


def test_the_machine_is_read():
    columns = environment("cuda")
    assert columns["gpu"] == torch.cuda.get_device_name()
    assert columns["driver"]
    assert "MHz" in str(columns["clocks"])
    assert MIB < last_level_cache("cuda") < 2**30
