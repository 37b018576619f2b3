"""Processes that are signalled, killed or started twice: the last whole step is never lost."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from tests.selection import ALL
from tests.training.processes import (
    children_of,
    end_of,
    is_alive,
    last_step,
    start,
    start_two,
    steps_logged,
    wait_for,
    wait_for_steps,
)
from tests.training.runs import metrics, stage, temporary_files, tiny_values, write_config
from tokenflex.interruption import ECHO, Interruption
from tokenflex.models.loading import load_checkpoint
from tokenflex.training.config import load_config
from tokenflex.training.loop import TrainingRun
from tokenflex.training.states import load_state

STEPS = 400
LONG = {
    "stages": [stage(steps=STEPS, schedule="constant")],
    "encoder_warm_up": None,
    "evaluation": None,
    "save_every": 100_000,
    "workers": 2,
}
EVALUATED = {
    "data": {"name": "digits", "split": "test", "size": 400, "questions": 1},
    "counts": [4],
    "batch_size": 2,
    "every": 3,
    "samples": 400,
    "at_stage_end": False,
}


def configured(tmp_path: Path, name: str = "run", **changes) -> Path:
    values = tiny_values(tmp_path / name, **{**LONG, **changes})
    return write_config(tmp_path / f"{name}.yaml", values)


def train(config: Path) -> None:
    TrainingRun(load_config(config)).run()
    AcceleratorState._reset_state(reset_partial_state=True)


# ---- signals to all processes at once


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "number", "changes"),
    [
        (1, signal.SIGTERM, {}),
        (1, signal.SIGINT, {"evaluation": EVALUATED}),
        pytest.param(
            *(2, signal.SIGTERM, {"workers": 1, "sharding": "full"}), marks=pytest.mark.release
        ),
    ],
)
def test_a_signal_to_the_group_saves_the_last_whole_step(tmp_path, ranks, number, changes):
    output = tmp_path / "run"
    process = start(configured(tmp_path, **changes), ranks=ranks)
    wait_for_steps(process, output, 3)
    family = children_of(process.pid)
    assert len(family) >= 2  # the workers
    for one in [process.pid, *family]:  # ranks have process groups of their own
        os.kill(one, number)
    code, said = end_of(process)
    assert code != 0
    assert (output / "state.pt").exists(), said
    if ranks == 1:
        assert (code, said.split(";")[0]) == (2, "tokenflex: interrupted")
    assert load_state(output / "state.pt")["step"] == last_step(output)
    assert not [one for one in family if is_alive(one)]
    assert temporary_files(output) == []


def test_a_second_signal_ends_at_once_unless_it_echoes_the_first(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    now = [10.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGTERM)
        now[0] += ECHO / 2
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.requested
        now[0] += ECHO
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)


def test_the_signal_that_torchrun_passes_on_may_be_late(monkeypatch):
    now = [10.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with Interruption() as interruption:
        for _ in ("to all processes", "passed on"):
            os.kill(os.getpid(), signal.SIGTERM)
            now[0] += 10 * ECHO
        assert interruption.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_lost_terminal_stops_a_run_unless_it_is_ignored_already():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with Interruption() as interruption:
            os.kill(os.getpid(), signal.SIGHUP)
        assert interruption.requested
        assert signal.signal(signal.SIGHUP, signal.SIG_IGN) is signal.SIG_DFL
        with Interruption() as interruption:  # as nohup starts it
            os.kill(os.getpid(), signal.SIGHUP)
        assert not interruption.requested
    finally:
        signal.signal(signal.SIGHUP, before)


# ---- workers


@pytest.mark.slow
@pytest.mark.parametrize("evaluating", [False, True])
def test_a_killed_worker_stops_the_run_with_its_last_step_saved(tmp_path, evaluating):
    output = tmp_path / "run"
    changes = {"evaluation": EVALUATED} if evaluating else {}
    config = configured(tmp_path, **changes)
    process = start(config)
    before = 2 if evaluating else 0
    wait_for_steps(process, output, 3)
    wait_for(process, lambda: len(children_of(process.pid)) >= before + 2)
    os.kill(children_of(process.pid)[-1], signal.SIGKILL)
    code, said = end_of(process)
    assert code == 2
    assert "a data-loader worker ended" in said
    assert "Killed" in said or "exited unexpectedly" in said
    assert load_state(output / "state.pt")["step"] == last_step(output)


@pytest.mark.slow
def test_workers_end_with_a_main_process_that_was_killed(tmp_path):
    process = start(configured(tmp_path))
    wait_for_steps(process, tmp_path / "run", 2)
    workers = children_of(process.pid)
    assert len(workers) == 2
    process.kill()
    end_of(process)
    deadline = time.monotonic() + 5
    while any(map(is_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_alive, workers))


@pytest.mark.slow
def test_a_killed_worker_of_one_rank_stops_both_ranks_with_a_state(tmp_path):
    output = tmp_path / "run"
    ranks = start_two(configured(tmp_path, workers=1))
    wait_for_steps(ranks[0], output, 3)
    (worker,) = children_of(ranks[1].pid)
    os.kill(worker, signal.SIGKILL)
    assert [end_of(rank)[0] for rank in ranks] == [2, 2]
    assert load_state(output / "state.pt")["step"] == last_step(output)


# ---- killed at any moment


@pytest.mark.slow
def test_kills_at_random_moments_change_no_number(tmp_path):
    changes = {"stages": [stage(steps=60)], "save_every": 1, "workers": 1, "keep_states": 3}
    whole, killed = (configured(tmp_path, name, **changes) for name in ("whole", "killed"))
    output, moments = tmp_path / "killed", random.Random(0)
    for _ in range(3 if ALL else 2):
        before = steps_logged(output)
        process = start(killed)
        wait_for(process, lambda b=before: steps_logged(output) not in (0, b))
        time.sleep(moments.uniform(0, 0.1))
        process.kill()
        end_of(process)
    assert last_step(output) < 60
    train(killed)
    train(whole)
    assert metrics(output) == metrics(tmp_path / "whole")
    weights = [load_checkpoint(o / "checkpoint")[0] for o in (output, tmp_path / "whole")]
    for a, b in zip(*(model.state_dict().values() for model in weights), strict=True):
        assert torch.equal(a, b)
    assert temporary_files(output) == []


# ---- two processes


@pytest.mark.slow
def test_of_two_processes_on_one_folder_the_second_is_refused(tmp_path):
    config = configured(tmp_path, stages=[stage(steps=120)], workers=0)
    # Long enough that a slow start of the second is not after the end of the first.
    processes = [start(config), start(config)]
    ends = sorted(end_of(process) for process in processes)
    assert [code for code, _ in ends] == [0, 2]
    assert f"folder {tmp_path / 'run'} is in use by another process (process " in ends[1][1]
    assert len(metrics(tmp_path / "run")) == 120
