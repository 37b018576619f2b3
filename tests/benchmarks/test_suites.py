"""The suites of ceilings and of host costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks import ceilings, host_cost
from benchmarks.harness import NO_TIME, Deadline, Run
from benchmarks.host_cost import OPS
from benchmarks.results import ROOT


def rows_of(suite, **options):
    rows = []
    suite(Run("cpu", True, options.pop("deadline", Deadline(60)), rows.extend, **options))
    return rows


def test_ceilings_count_what_they_move_and_multiply():
    copy, matmul = rows_of(ceilings.suite)
    assert copy["case"] == "0.03125 GiB"
    assert copy["ideal_bytes"] == 2 * 2**25  # read and written
    assert matmul["case"] == "1024^3"
    assert matmul["flops"] == 2 * 1024**3
    assert matmul["tflop_per_s"] == pytest.approx(2e-6 * 1024**3 / matmul["p50_us"], rel=1e-3)


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(
        host_cost, "Prompts", lambda samples, *sizes: _Prompts(min(samples, 16), *sizes)
    )
    sizes = host_cost.sample_sizes
    monkeypatch.setattr(host_cost, "sample_sizes", lambda samples: sizes(samples // 1000))


_Prompts = host_cost.Prompts


@pytest.mark.usefixtures("few")
def test_every_op_has_a_cost_with_and_without_gradients():
    rows = rows_of(host_cost.suite)
    assert {row["status"] for row in rows} == {"ok"}
    costs = {(row["variant"], row["case"]): row for row in rows}
    assert costs.keys() >= {(op, grad) for op in OPS for grad in ("grad", "no grad")}
    assert {"plan_packing", "bin_pack", "balance_bins"} <= {op for op, _ in costs}
    assert all(row["p50_us"] > 0 and row["timing"] == "host" for row in rows)
    assert all(row["backend"] for row in rows)
    assert costs["balance_bins", "2000"]["note"].startswith("bins 8; max/mean cost ")


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("requires_grad", [False, True])
def test_an_op_is_called_as_it_is_named(requires_grad):
    for op, call in host_cost.op_calls("cpu", requires_grad).items():
        result = call()
        assert result.requires_grad is requires_grad
        assert (op, result.shape[1]) == (op, host_cost.WIDTH)


@pytest.mark.usefixtures("few")
def test_host_costs_go_on_where_a_process_died_and_stop_in_time():
    groups = [*host_cost.groups("cpu"), *host_cost.stubbed_groups()]
    done = {("host_cost", case, "forward") for case, _ in groups} - {
        ("host_cost", "grad", "forward")
    }
    rows = rows_of(host_cost.suite, done=done, deadline=Deadline(-1))
    assert [(row["variant"], row["case"], row["status"]) for row in rows] == [
        (op, "grad", NO_TIME) for op in OPS
    ]


def test_host_costs_run_under_pytest_benchmark():
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    options = ["benchmarks/test_host_cost.py", "-k", "merge_vision", "--benchmark-disable"]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)
    assert "2 passed" in done.stdout, done.stdout + done.stderr
