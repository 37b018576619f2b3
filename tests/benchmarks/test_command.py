"""``python -m benchmarks``: its arguments, its processes, and the host costs as a smoke test."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import host_cost
from benchmarks.environment import ROOT, read_csv
from benchmarks.harness import COLUMNS, Deadline, DeviceLostError
from benchmarks.host_cost import OPS, row_of_report
from benchmarks.suites import SUITES


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "pooling,speed"], "--only must be of ceilings, .*, got speed"),
        (["--only", "", "--out", "x"], "--only must be of ceilings, .*, got ''"),
        (["--only", "pooling"], "--only measures a part, .* with --out"),
        (["--seconds", "0"], "--seconds must be positive and finite, got 0"),
        (["--seconds", "nan"], "--seconds must be positive and finite, got nan"),
        (["--seconds", "inf"], "--seconds must be positive and finite, got inf"),
        (["--report", "nowhere.csv"], "--report must be a CSV .*nowhere.csv"),
        (["--report", "README.md"], "--report must be a CSV .*, got none called op"),
    ],
)
def test_misuse_is_one_clear_line(arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(command, "_measure", lambda *_: pytest.fail("measured"))
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
        "op": "pack_embeddings",
        "seconds": [3e-6, 1e-6, 2e-6],
        "note": {"bins": 7},
    }
    row = row_of_report(entry, "cpu")
    assert tuple(row) == COLUMNS
    assert (row["variant"], row["case"], row["note"]) == ("pack_embeddings", "no grad", "bins 7")
    assert (row["p20_us"], row["p50_us"], row["p80_us"], row["samples"]) == (1, 2, 3, 3)


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
    rows = [
        row for more in command.run(["failing", "hanging", "last"], "cpu", True, 60) for row in more
    ]
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
    ((row,),) = command.run(["first"], "cpu", True, 0.5)
    assert (row["op"], row["status"]) == ("first suite", "not run: no time left")


def test_every_suite_has_a_share_on_both_devices():
    assert all(weights.keys() == {"cuda", "cpu"} for _, weights in SUITES.values())
    assert Deadline(5).left > 4


# ---- a whole run, its suites replaced


def measured(op, variant, **values):
    fields = dict.fromkeys(COLUMNS, "") | {"op": op, "variant": variant, "status": "ok"}
    return fields | {"timing": "host", "p20_us": 1.0, "p50_us": 1.0, "p80_us": 1.0} | values


CEILINGS = [
    measured("ceiling", "copy", gb_per_s=200.0),
    measured("ceiling", "matmul", tflop_per_s=4.0),
]


@pytest.fixture
def suites_return(monkeypatch):
    """(rows or an exception of each suite) -> they are what ``python -m benchmarks`` runs."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TOKENFLEX_COMMIT", "abc")

    def install(**outcomes):
        fake_suites(monkeypatch, **outcomes)

        def run_suite(name, *_):
            if isinstance(outcomes[name], BaseException):
                raise outcomes[name]
            return [dict(row) for row in outcomes[name]]

        monkeypatch.setattr(command, "_run_suite", run_suite)

    return install


def run_into(folder, *arguments):
    status = command.main(["--device", "cpu", "--out", str(folder), *arguments])
    return status, {path.name for path in folder.iterdir()}


def test_shares_of_the_ceilings_are_in_the_csv(suites_return, tmp_path):
    suites_return(
        ceilings=CEILINGS,
        packing=[measured("pack_embeddings", "tokenflex", gb_per_s=50.0, tokens=8)],
        gate_up=[measured("swiglu", "tokenflex", tflop_per_s=3.0, tokens=8)],
    )
    status, names = run_into(tmp_path / "new" / "folder")
    (csv_name,) = [name for name in names if name.endswith(".csv")]
    assert (status, csv_name.endswith("cores.csv")) == (0, True)
    *_, pack, gate_up = read_csv(tmp_path / "new" / "folder" / csv_name)
    assert (pack["share_of_copy"], gate_up["share_of_matmul"]) == ("0.25", "0.75")


@pytest.mark.parametrize(
    ("row", "status"),
    [
        (measured("swiglu", "liger-kernel", status="failed: RuntimeError: no"), 0),
        (measured("swiglu", "", status="not run: no time left"), 0),
        (measured("swiglu", "tokenflex", status="failed: ValueError: result is off"), 1),
        (measured("swiglu", "tokenflex, no biases", status="failed: ValueError: off"), 1),
        (measured("end_to_end", "packed", status="failed: ValueError: loss"), 1),
        (measured("gate_up suite", "", status="stopped after 3 s"), 1),
    ],
)
def test_exit_status(suites_return, tmp_path, row, status):
    suites_return(ceilings=CEILINGS, gate_up=[row])
    assert run_into(tmp_path)[0] == status


def test_an_interrupted_run_keeps_its_rows_and_the_results_of_the_last(
    suites_return, tmp_path, capsys
):
    suites_return(ceilings=CEILINGS)
    _, before = run_into(tmp_path)
    (name,) = [name for name in before if name.endswith(".csv")]
    published = (tmp_path / name).read_bytes()
    suites_return(ceilings=[*CEILINGS, *CEILINGS], packing=KeyboardInterrupt())
    status, after = run_into(tmp_path)
    assert status == 130
    assert (tmp_path / name).read_bytes() == published
    unfinished = f"{name}.unfinished"
    assert after - before == {unfinished}
    assert len(read_csv(tmp_path / unfinished)) == 4
    assert f"interrupted: 4 rows in {tmp_path / unfinished}" in capsys.readouterr().err


def test_an_interrupted_suite_gives_what_it_has_written_and_ends_the_run(monkeypatch):
    class Interrupted(Process):
        def wait(self, timeout=None):
            if timeout:
                raise KeyboardInterrupt
            return -9

        def poll(self):
            return None

    fake_suites(monkeypatch, first=None, second=None)
    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    killed = []
    monkeypatch.setattr(os, "killpg", lambda pid, signal: killed.append(pid))
    runs = command.run(["first", "second"], "cpu", True, 60)
    assert [row["status"] for row in next(runs)] == ["ok", "not run: interrupted"]
    assert killed == [-1]
    with pytest.raises(KeyboardInterrupt):
        next(runs)


def test_a_row_torn_by_the_end_of_its_process_is_left_out(monkeypatch, tmp_path):
    path = tmp_path / "first.jsonl"

    class Torn(Process):
        def __init__(self, arguments, **_):
            super().__init__(arguments)
            with open(path, "a", encoding="utf-8") as file:
                file.write('{"op": "half')

    monkeypatch.setattr(subprocess, "Popen", Torn)
    assert [row["op"] for row in command._run_suite("first", "cpu", True, 9, path)] == ["first"]


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_measured(
    suites_return, tmp_path, capsys
):
    suites_return(ceilings=pytest.fail.Exception("measured"))
    (tmp_path / "file").write_text("taken", encoding="utf-8")
    with pytest.raises(SystemExit) as error:
        run_into(tmp_path / "file")
    assert error.value.code == 2
    assert "--out must be a folder to write to, got" in capsys.readouterr().err


@pytest.mark.parametrize(("given", "threads"), [(None, "1"), ("2", "2")])
def test_a_cpu_is_measured_by_one_thread_unless_told(
    suites_return, monkeypatch, tmp_path, given, threads
):
    suites_return(ceilings=CEILINGS)
    torch.set_num_threads(2)  # the fixture of this folder puts it back
    monkeypatch.delenv("OMP_NUM_THREADS")
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    _, names = run_into(tmp_path)
    assert os.environ["OMP_NUM_THREADS"] == threads
    (name,) = [name for name in names if name.endswith(".csv")]
    assert {row["threads"] for row in read_csv(tmp_path / name)} == {threads}


def test_time_is_that_of_the_promise():
    """Under two minutes (quick) and under eight, a suite that hangs included."""
    assert command.SECONDS[True] + command.GRACE_SECONDS < 120
    assert command.SECONDS[False] + command.GRACE_SECONDS < 480


# ---- host costs that do not come to an end


def test_without_pytest_benchmark_the_row_names_it_and_the_extra(monkeypatch, tmp_path):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name == "pytest_benchmark" else found(name),
    )
    path = tmp_path / "rows.jsonl"
    assert command.run_one("host", "cpu", True, 10, path) == 0
    (row,) = [json.loads(line) for line in path.read_text().splitlines()]
    assert row["op"] == "host suite"
    assert row["status"] == (
        "not run: pytest-benchmark is not installed (pip install 'tokenflex[bench]')"
    )
    assert command.failed(row)


ENTRY = {"name": "test_bin_pack", "op": None, "seconds": [1e-3], "note": {}}


@pytest.mark.parametrize(
    ("end", "status"),
    [
        (lambda: subprocess.CompletedProcess([], 4, "rootdir: /somewhere", ""), "ended with 4"),
        (lambda: (_ for _ in ()).throw(subprocess.TimeoutExpired("pytest", 1)), "no time left"),
    ],
)
def test_host_costs_measured_before_a_failure_stay(monkeypatch, end, status):
    def run(arguments, env, timeout, **_):
        assert timeout <= 7
        with open(env["TOKENFLEX_BENCHMARK_REPORT"], "a", encoding="utf-8") as file:
            file.write(json.dumps(ENTRY) + "\n")
        return end()

    monkeypatch.setattr(subprocess, "run", run)
    first, last = host_cost.suite("cpu", True, Deadline(7))
    assert (first["variant"], first["status"], first["p50_us"]) == ("bin_pack", "ok", 1000)
    assert last["status"].endswith(status)
    assert "/" not in last["status"]
