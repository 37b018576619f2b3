"""The benchmarks' own arithmetic, and that they run; no figure is checked here."""

from __future__ import annotations

import csv
import json
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import packing_gpu
from benchmarks.environment import ROOT, environment, percentiles, write_csv
from benchmarks.packing_cases import MERGERS, PACKERS, SPARSE_PACKERS, Case, forward_backward
from benchmarks.packing_cpu import rows_of_report

SMALL = Case(samples=3, text=5, width=8, vocabulary=20)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_the_variants_do_the_same(requires_grad):
    batch = SMALL.batch(torch.float64, "cpu")
    batch.table.requires_grad_(requires_grad)
    batch.vision.requires_grad_(requires_grad)
    packed = [pack(batch) for pack in PACKERS.values()]
    merged = [merge(batch) for merge in MERGERS.values()]
    assert all(torch.equal(other, packed[0]) for other in packed)
    assert all(torch.equal(other, merged[0]) for other in merged)
    if requires_grad:
        first, *others = [
            forward_backward(pack, batch) for pack in [*PACKERS.values(), *SPARSE_PACKERS.values()]
        ]
        for table, vision in others:
            torch.testing.assert_close((table.to_dense(), vision), tuple(first))


def test_cases_have_the_rows_that_their_names_say():
    batch = SMALL.batch(torch.float32, "cpu")
    assert batch.plan.num_tokens == 3 * 5 + 64 + 144 + 256
    assert SMALL.name == "3x(5 text + 64/144/256 vision) D=8"


def test_percentiles_are_values_that_were_measured():
    assert percentiles(list(range(10, -1, -1))) == {"p20": 2, "p50": 5, "p80": 8}
    assert percentiles([7.0]) == {"p20": 7.0, "p50": 7.0, "p80": 7.0}


def test_csv_has_the_environment_and_no_host_name(tmp_path):
    write_csv(tmp_path / "new" / "out.csv", [{"a": 1, "b": "x,y"}, {"a": 2, "b": ""}])
    with (tmp_path / "new" / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["a"], row["b"]) for row in rows] == [("1", "x,y"), ("2", "")]
    assert rows[0]["torch"] == torch.__version__
    assert list(rows[0]) == ["a", "b", *environment()]
    assert platform.node() not in rows[0].values()


def test_report_becomes_rows():
    entry = {
        "name": "test_pack_forward[pack_embeddings-2x(4 text) D=8]",
        "params": {"variant": "pack_embeddings", "case": "Case"},
        "stats": {"data": [3e-6, 1e-6, 2e-6], "rounds": 3},
        "extra_info": {"max/mean cost": 1.01},
    }
    assert rows_of_report({"benchmarks": [entry]}) == [
        {
            "benchmark": "pack_forward",
            "variant": "pack_embeddings",
            "case": "2x(4 text) D=8",
            "unit": "us",
            "p20": 1.0,
            "p50": 2.0,
            "p80": 2.0,
            "rounds": 3,
            "note": "max/mean cost 1.01",
        }
    ]


# ---- the GPU harness, as far as a CPU goes


def test_ideal_bytes_count_each_row_once():
    """10 rows, 6 of them vision, 3 different ids, 4 bytes a row."""
    sizes = [packing_gpu.ideal_bytes(10, 6, 3, 4, mode) for mode in packing_gpu.MODES]
    assert sizes == [4 * 20, 4 * (20 + 12), 4 * (20 + 12 + 4 + 3), 4 * (20 + 12 + 4 + 3)]


def test_buffers_exceed_the_cache_threefold():
    assert packing_gpu.number_of_sets(10, 100) == 30
    assert packing_gpu.number_of_sets(7, 100) == 43
    assert packing_gpu.number_of_sets(10**9, 100) == 2


def test_variants_take_turns():
    assert packing_gpu.interleaved(["a", "b"], 2) == ["a", "b", "a", "b"]


class TimedOnTheHost:
    """Stands in for the CUDA graphs: the same calls, no clock."""

    graph = None

    def __init__(self, call, batches, inner):
        self.results = [call(batch) for batch in batches]
        self.samples = []

    def sample(self):
        self.samples.append(2.0)

    def eager_us(self):
        return 3.0


@pytest.mark.parametrize("mode", packing_gpu.MODES)
def test_a_case_is_measured_and_checked(mode, monkeypatch):
    monkeypatch.setattr(packing_gpu, "DEVICE", "cpu")
    monkeypatch.setattr(packing_gpu, "Timed", TimedOnTheHost)
    for name in ("reset_peak_memory_stats", "memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=20_000)
    )
    rows = packing_gpu.measure(SMALL, mode, ceiling=1e9, repeats=5, inner=1)
    assert [row["variant"] for row in rows] == list(packing_gpu.VARIANTS[mode])
    assert {row["samples"] for row in rows} == {5}
    assert all(
        row["share_of_copy"] == pytest.approx(row["ideal_bytes"] / 2000, 1e-3) for row in rows
    )

    monkeypatch.setitem(
        packing_gpu.VARIANTS[mode], "wrong", lambda batch: PACKERS["pack_embeddings"](batch) * 2
    )
    with pytest.raises(AssertionError):
        packing_gpu.measure(SMALL, mode, ceiling=1e9, repeats=1, inner=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_the_gpu_harness_says_what_it_needs(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.packing_gpu", "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "needs a CUDA device, and PyTorch sees none" in done.stderr


# ---- what was published


def test_published_results_are_complete():
    with (ROOT / "benchmarks/results/packing-cpu.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["variant"] for row in rows} >= {
        *PACKERS,
        *SPARSE_PACKERS,
        *MERGERS,
        "plan",
        "bin_pack",
    }
    assert all(float(row["p20"]) <= float(row["p50"]) <= float(row["p80"]) for row in rows)
    assert all(row["cpu"] and row["torch"] and row["threads"] == "2" for row in rows)
    assert "/" + "tmp" not in json.dumps(rows)
