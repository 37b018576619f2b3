"""``make gpu``: every step gets its time, a failure stops no other, and another call continues."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import first_minutes
from benchmarks.first_minutes import ROOT, commit_of, main
from tokenflex_kernels.journal import UNFINISHED

FULL = ["pip", "tokenflex_kernels.smoke", "pytest", "tokenflex_kernels.tune", "benchmarks"]
FULL += ["experiments.speed.end_to_end"]
SHORT = ["pip", "tokenflex_kernels.smoke", "pytest", "benchmarks"]

# In the place of Python: prints what machine this is, or logs its call and does what the file
# do-MODULE says.
PYTHON = """#!/bin/sh
if [ "$1" = -c ]; then exec cat "{folder}/machine.json"; fi
echo "$TOKENFLEX_CUDA $TOKENFLEX_CUDA_ARCHITECTURES ${{TOKENFLEX_LAUNCH_CONFIGS:--}} $*" \
  >> "{folder}/log"
if [ -f "{folder}/do-$2" ]; then . "{folder}/do-$2"; fi
"""
MACHINE = {"gpu": "NVIDIA H200", "architecture": "90", "built_for": ["sm_90", "compute_90"]}


class Machine:
    """A machine with a GPU, as far as the steps' Python is concerned."""

    def __init__(self, folder):
        self.folder, self.out = folder, folder / "a folder"
        self.python = folder / "python"
        self.python.write_text(PYTHON.format(folder=folder), encoding="utf-8")
        self.python.chmod(0o755)
        self.has()

    def has(self, **changes):
        text = json.dumps({**MACHINE, **changes})
        (self.folder / "machine.json").write_text(text, encoding="utf-8")

    def does(self, module, script):
        (self.folder / f"do-{module}").write_text(script, encoding="utf-8")

    def run(self, seconds=540.0):
        (self.folder / "log").unlink(missing_ok=True)
        arguments = ["--out", str(self.out), "--seconds", str(seconds)]
        return main([*arguments, "--python", str(self.python)])

    @property
    def calls(self):
        log = self.folder / "log"
        return log.read_text(encoding="utf-8").splitlines() if log.exists() else []

    @property
    def modules(self):
        return [call.split(" -m ")[1].split()[0] for call in self.calls]

    @property
    def summary(self):
        with (self.out / "summary.csv").open(newline="", encoding="utf-8") as file:
            return {row["step"]: row["status"] for row in csv.DictReader(file)}


@pytest.fixture
def machine(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENFLEX_COMMIT", "abc")
    monkeypatch.delenv("TOKENFLEX_LAUNCH_CONFIGS", raising=False)
    return Machine(tmp_path)


def test_steps_run_in_order_for_the_gpu_at_hand(machine):
    assert machine.run() == 0
    assert machine.modules == FULL
    assert all(call.startswith("1 90 ") for call in machine.calls)
    pip, smoke, tests, tune, benchmarks, training = machine.calls
    assert {"--no-index", "--no-deps", "--no-build-isolation"} <= set(pip.split())
    assert f"--csv {machine.out}/smoke.csv --seconds" in smoke
    assert f"-p tests.continued --results {machine.out}/gpu-tests.csv --seconds" in tests
    assert f"--junitxml={machine.out}/gpu-tests.xml tests/kernels" in tests
    assert tests.endswith(" -m gpu")
    assert f"--table {machine.out}/launch_configs.json --csv {machine.out}/tune.csv" in tune
    assert "-m benchmarks --device cuda --seconds" in benchmarks
    assert benchmarks.endswith(f"--out {machine.out} --resume")
    assert training.endswith(f"--out {machine.out}/end-to-end")
    assert set(machine.summary.values()) == {"ok"}
    assert (machine.out / "tests.log").exists()


def test_a_short_budget_measures_the_targets_alone(machine):
    assert machine.run(seconds=240) == 0
    assert machine.modules == SHORT
    assert machine.calls[2].endswith("-m gpu and not slow")
    assert machine.calls[-1].endswith("--resume --targets")


@pytest.mark.parametrize("budget", [100, 240, 300, 540, 900])
def test_no_step_gets_more_time_than_there_is(machine, monkeypatch, budget):
    """Every step takes all of its time, and is killed at the end of it."""
    clock = [0.0]
    monkeypatch.setattr(first_minutes.time, "monotonic", lambda: clock[0])
    given = []

    def takes_all(command, seconds, environment, log):
        told = [float(word) for word in command if word.replace(".", "").isdigit()]
        given.append((command[2], seconds))
        assert all(number <= seconds for number in told)
        clock[0] += seconds + first_minutes.GRACE_SECONDS
        log.write_text("", encoding="utf-8")
        return "stopped"

    monkeypatch.setattr(first_minutes, "run", takes_all)
    assert machine.run(seconds=budget) == 1
    assert clock[0] <= budget
    if budget >= 240:
        assert min(seconds for _, seconds in given) > 5


@pytest.mark.parametrize("module", FULL)
def test_no_failure_stops_the_others_and_each_shows(machine, module, capsys):
    machine.does(module, "echo went wrong; exit 3")
    assert machine.run() == 1
    assert list(dict.fromkeys(machine.modules)) == FULL
    assert list(machine.summary.values()).count("failed: exit status 3") == 1
    assert "    went wrong\n" in capsys.readouterr().out


def test_a_build_without_cuda_follows_one_that_fails(machine):
    machine.does("pip", "exit 1")
    assert machine.run() == 1
    first, second, *_ = machine.calls
    assert (first.startswith("1 90"), second.startswith("0 90")) == (True, True)
    assert second.partition(" - ")[2] == first.partition(" - ")[2]


def test_a_step_that_hangs_is_interrupted_and_killed_with_what_it_started(machine, monkeypatch):
    monkeypatch.setattr(first_minutes, "GRACE_SECONDS", 0.3)
    monkeypatch.setattr(first_minutes, "LEAST_SECONDS", 0.0)
    pid = machine.folder / "pid"
    machine.does("pytest", f"trap '' INT; sleep 60 & echo $! > {pid}; wait; sleep 60")
    start = time.monotonic()
    assert machine.run(seconds=4.0) == 1
    assert time.monotonic() - start < 10
    assert machine.summary["quick-tests"].startswith("stopped after")
    assert machine.summary["targets"] == "ok"
    time.sleep(0.2)
    state = Path(f"/proc/{pid.read_text(encoding='utf-8').strip()}/stat")
    assert not state.exists() or " Z " in state.read_text(encoding="utf-8")


def test_a_call_that_is_ended_kills_its_step_and_the_next_one_continues(machine):
    pid = machine.folder / "pid"
    machine.does("tokenflex_kernels.smoke", f"echo $$ > {pid}.new; mv {pid}.new {pid}; sleep 60")
    command = [sys.executable, "-m", "benchmarks.first_minutes", "--python", str(machine.python)]
    call = subprocess.Popen([*command, "--out", str(machine.out)], cwd=ROOT)
    deadline = time.monotonic() + 60
    while not pid.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    call.terminate()
    assert call.wait(60) == 128 + signal.SIGTERM
    state = Path(f"/proc/{pid.read_text(encoding='utf-8').strip()}/stat")
    assert not state.exists() or " Z " in state.read_text(encoding="utf-8")
    assert machine.summary == {"build": "ok"}
    machine.does("tokenflex_kernels.smoke", "exit 0")
    assert machine.run() == 0
    assert machine.modules == FULL[1:]


class TestAnotherCall:
    def test_runs_nothing_that_is_done(self, machine):
        machine.run()
        assert machine.run() == 0
        assert machine.calls == []

    def test_repeats_what_failed_or_is_unfinished(self, machine):
        machine.does("pytest", "exit 1")
        machine.does("benchmarks", f"exit {UNFINISHED}")
        assert machine.run() == 1
        assert machine.summary["benchmarks"] == "unfinished"
        machine.does("pytest", "exit 0")
        assert machine.run() == 0
        assert machine.modules == ["pytest", "benchmarks"]

    def test_repeats_all_at_another_commit_or_on_another_gpu(self, machine, monkeypatch):
        machine.run()
        machine.has(gpu="NVIDIA H100")
        machine.run()
        assert machine.modules == FULL
        monkeypatch.setenv("TOKENFLEX_COMMIT", "def")
        machine.run()
        assert machine.modules == FULL

    @pytest.mark.parametrize("built_for", [[], ["sm_80", "compute_80"]])
    def test_builds_again_where_the_build_is_gone(self, machine, built_for):
        machine.run()
        machine.has(built_for=built_for)
        machine.run()
        assert machine.modules == ["pip"]

    def test_measures_more_than_the_targets_with_more_time(self, machine):
        machine.run(seconds=240)
        machine.run()
        assert machine.modules == FULL[2:]


def test_benchmarks_and_training_use_the_table_that_was_tuned(machine, monkeypatch):
    table = machine.out / "launch_configs.json"
    machine.does("tokenflex_kernels.tune", f"echo '{{}}' > '{table}'")
    machine.run()
    monkeypatch.setenv("TOKENFLEX_COMMIT", "def")  # the others check the table that is shipped
    machine.run()
    assert machine.modules == FULL
    calls = [call for call in machine.calls if f" {table} -m" in call]
    with_table = [call.split(" -m ")[1].split()[0] for call in calls]
    assert with_table == ["benchmarks", "experiments.speed.end_to_end"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"gpu": ""}, "there is no CUDA device"), (None, "must be one with PyTorch")],
)
def test_without_a_gpu_nothing_is_built(machine, changes, message, capsys):
    if changes is None:
        (machine.folder / "machine.json").unlink()
    else:
        machine.has(**changes)
    with pytest.raises(SystemExit) as stop:
        machine.run()
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert machine.calls == []


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (None, "it does not start, No such file or directory"),
        ("not a program", "it does not start, Exec format error"),
        ("#!/bin/sh\n", "it is no Python, and printed ''"),
        ("#!/bin/sh\necho hello\n", "it is no Python, and printed 'hello"),
        ("#!/bin/sh\nexit 3\n", "it ended with 3"),
    ],
)
def test_a_python_that_is_none_is_refused(machine, script, message, capsys):
    if script is None:
        machine.python.unlink()
    else:
        machine.python.write_text(script, encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        machine.run()
    assert stop.value.code == 2
    expected = f"--python must be one with PyTorch, got {machine.python}: {message}"
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("name", ["file", "file/inside"])
def test_a_folder_that_cannot_be_written_is_refused_before_the_probe(
    machine, name, monkeypatch, capsys
):
    (machine.folder / "file").write_text("taken", encoding="utf-8")
    machine.out = machine.folder / name
    monkeypatch.setattr(first_minutes, "probe", lambda *_: pytest.fail("probed"))
    with pytest.raises(SystemExit) as stop:
        machine.run()
    assert stop.value.code == 2
    assert f"--out must be a folder to write to, got {machine.out}" in capsys.readouterr().err


def test_a_summary_of_something_else_is_refused(machine, capsys):
    machine.out.mkdir()
    (machine.out / "summary.csv").write_text("op,case\n", encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        machine.run()
    assert stop.value.code == 2
    assert "it has the columns op, case, not step, status" in capsys.readouterr().err
    assert machine.calls == []


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
def test_a_budget_is_positive_and_finite(machine, seconds, capsys):
    with pytest.raises(SystemExit):
        machine.run(seconds)
    assert "--seconds must be positive and finite" in capsys.readouterr().err


def test_the_probe_runs_without_a_gpu():
    built = first_minutes.probe(sys.executable, {**os.environ, "PYTHONPATH": str(ROOT)})
    assert built.keys() == MACHINE.keys()


def test_a_tree_without_history_is_named_by_its_files(tmp_path, monkeypatch):
    monkeypatch.delenv("TOKENFLEX_COMMIT", raising=False)
    (tmp_path / "csrc").mkdir()
    (tmp_path / "setup.py").write_text("1", encoding="utf-8")
    source = tmp_path / "csrc" / "a.cu"
    names = set()
    for text in ("one", "two"):
        source.write_text(text, encoding="utf-8")
        names |= {commit_of(tmp_path), commit_of(tmp_path)}
        (tmp_path / "csrc" / "notes.txt").write_text(text, encoding="utf-8")
    assert len(names) == 2
    assert all(name.startswith("tree-") for name in names)
    monkeypatch.setenv("TOKENFLEX_COMMIT", "abc")
    assert commit_of(tmp_path) == "abc"


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_calls_it():
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "--dry-run", "gpu", "tune", "PYTHON=py", "OUT=a folder", "BUDGET=240"]
    command += ["TUNE_SECONDS=9"]
    done = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, check=True)
    assert 'py -m benchmarks.first_minutes --out "a folder" --seconds 240\n' in done.stdout
    assert 'py -m tokenflex_kernels.tune --table "a folder/launch_configs.json"' in done.stdout
    assert "--seconds 9" in done.stdout
