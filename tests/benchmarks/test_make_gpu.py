"""``make gpu``: every step runs, also after a failed one; a failure shows in the exit status."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STEPS = ("pip", "tokenflex.cli", "pytest", "benchmarks", "experiments.speed.end_to_end")

# Writes its arguments to a log, and fails at the step {fails}.
PYTHON = """#!/bin/sh
echo "$TOKENFLEX_CUDA $TOKENFLEX_CUDA_ARCHITECTURES $@" >> "{log}"
case "$*" in
  *get_device_capability*) echo 90 ;;
  *is_available*) exit {gpu} ;;
  *"-m {fails} "*) exit 3 ;;
esac
"""


@pytest.fixture
def make(tmp_path):
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    log, python = tmp_path / "log", tmp_path / "python"

    def run(fails="nothing", gpu=0):
        python.write_text(PYTHON.format(log=log, fails=fails, gpu=gpu), encoding="utf-8")
        python.chmod(0o755)
        clean = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
        done = subprocess.run(
            ["make", "gpu", f"PYTHON={python}", f"OUT={tmp_path}/a folder"],
            cwd=ROOT,
            env=clean,
            capture_output=True,
            text=True,
            check=False,
        )
        lines = log.read_text(encoding="utf-8").splitlines()
        return done, [line for line in lines if " -m " in line]

    return run


def test_every_step_runs_offline_for_the_gpu_at_hand(make, tmp_path):
    done, calls = make()
    assert done.returncode == 0, done.stderr
    assert [next(step for step in STEPS if f"-m {step} " in call) for call in calls] == list(STEPS)
    assert all(call.startswith("1 90 ") for call in calls)
    pip, _, tests, benchmarks, study = calls
    assert {"--no-index", "--no-deps", "--no-build-isolation"} <= set(pip.split())
    assert f"-m gpu --junitxml={tmp_path}/a folder/gpu-tests.xml" in tests
    assert f"--device cuda --out {tmp_path}/a folder --seconds" in benchmarks
    # Nine minutes, less the grace of the last suite and the study's limit of 75 seconds.
    assert 405 < int(benchmarks.split()[-1]) <= 425
    assert f"--device cuda --out {tmp_path}/a folder/end-to-end --seconds" in study
    assert (tmp_path / "a folder" / "benchmarks.log").exists()


@pytest.mark.parametrize("step", STEPS)
def test_no_single_failure_stops_it_and_each_shows(make, step):
    done, calls = make(fails=step)
    assert done.returncode != 0
    assert len(calls) == len(STEPS)


def test_without_a_gpu_nothing_is_built(make):
    done, calls = make(gpu=1)
    assert done.returncode != 0
    assert calls == []
