"""``python -m benchmarks``: its arguments, its processes, and the host costs as a smoke test."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks.environment import ROOT, read_csv
from benchmarks.harness import COLUMNS, Deadline, DeviceLostError
from benchmarks.host_cost import rows_of_report
from benchmarks.suites import SUITES
from benchmarks.test_host_cost import OPS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "pooling,speed"], "--only must be of ceilings, .*, got speed"),
        (["--seconds", "0"], "--seconds must be positive, got 0"),
        (["--report", "nowhere.csv"], "--report must be a CSV .*, got nowhere.csv"),
    ],
)
def test_misuse_is_one_clear_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        command.main(arguments)
    assert error.value.code == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there(capsys):
    with pytest.raises(SystemExit):
        command.main(["--device", "cuda"])
    assert "needs a CUDA device, and PyTorch sees none" in capsys.readouterr().err


def test_host_costs_end_to_end(tmp_path):
    """Every op once, timed by pytest-benchmark in processes of their own; no time is asserted."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--quick", "--only", "host", "--out", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*-quick.csv")
    rows = read_csv(path)
    assert {row["status"] for row in rows} == {"ok"}, rows
    costs = {(row["variant"], row["case"]): float(row["p50_us"]) for row in rows}
    assert costs.keys() >= {(op, grad) for op in OPS for grad in ("grad", "no grad")}
    assert {"plan_packing", "bin_pack", "balance_bins"} <= {variant for variant, _ in costs}
    assert min(costs.values()) > 0
    assert "targets:" in done.stdout


def test_report_becomes_rows():
    entry = {
        "name": "test_host_cost[pack_embeddings-no grad]",
        "params": {"op": "pack_embeddings", "requires_grad": False},
        "stats": {"data": [3e-6, 1e-6, 2e-6]},
        "extra_info": {"bins": 7},
    }
    (row,) = rows_of_report({"benchmarks": [entry]}, "cpu")
    assert tuple(row) == COLUMNS
    assert (row["variant"], row["case"], row["note"]) == ("pack_embeddings", "no grad", "bins 7")
    assert (row["p20_us"], row["p50_us"], row["p80_us"], row["samples"]) == (1, 2, 2, 3)


def fake_suites(monkeypatch, **suites):
    monkeypatch.setattr(
        command, "SUITES", {name: (suite, {"cpu": 1.0}) for name, suite in suites.items()}
    )


def test_rows_before_a_failure_of_the_device_stay(monkeypatch, tmp_path):
    path = tmp_path / "rows.jsonl"

    def suite(device, quick, deadline):
        yield {"op": "first"}
        assert path.read_text()  # even if this process is killed now
        raise DeviceLostError("illegal memory access")

    fake_suites(monkeypatch, suite=suite)
    assert command.run_one("suite", "cpu", False, 10, path) == 1
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"op": "first"}]


class Process:
    """Stands in for a suite's process: writes a row, ends as it is told."""

    def __init__(self, arguments, **_):
        path = arguments[arguments.index("--rows") + 1]
        name = arguments[arguments.index("--suite") + 1]
        self.pid, self.returncode = -1, 3 if name == "failing" else 0
        self.hangs = name == "hanging"
        with open(path, "w", encoding="utf-8") as file:
            file.write(json.dumps({"op": name, "status": "ok"}) + "\n")

    def poll(self):
        return None if self.hangs else self.returncode

    def wait(self, timeout=None):
        if self.hangs and timeout:
            raise subprocess.TimeoutExpired("suite", timeout)
        return self.returncode


def test_no_single_failure_ends_the_run(monkeypatch):
    fake_suites(monkeypatch, failing=None, hanging=None, last=None)
    killed = []
    monkeypatch.setattr(subprocess, "Popen", Process)
    monkeypatch.setattr(os, "killpg", lambda pid, signal: killed.append(pid))
    rows = command.run(["failing", "hanging", "last"], "cpu", True, 60)
    assert [(row["op"], row["status"].split(" after ")[0]) for row in rows] == [
        ("failing", "ok"),
        ("failing suite", "failed: the process ended with 3"),
        ("hanging", "ok"),
        ("hanging suite", "stopped"),
        ("last", "ok"),
    ]
    assert killed == [-1]


def test_without_time_nothing_runs(monkeypatch):
    fake_suites(monkeypatch, first=None)
    (row,) = command.run(["first"], "cpu", True, 0.5)
    assert (row["op"], row["status"]) == ("first suite", "not run: no time left")


def test_every_suite_has_a_share_on_both_devices():
    assert all(weights.keys() == {"cuda", "cpu"} for _, weights in SUITES.values())
    assert Deadline(5).left > 4
