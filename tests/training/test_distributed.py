"""Two processes: the numbers of one, sharded or not; stopped, continued, and what ends them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from tests.selection import ALL
from tests.training.processes import Process, start_two
from tests.training.runs import (
    ROOT,
    evaluations,
    metrics,
    own_data,
    stage,
    temporary_files,
    tiny_values,
    write_config,
)
from tokenflex.digits.dataset import DigitsDataset
from tokenflex.digits.processor import digits_processor
from tokenflex.evaluation import evaluate
from tokenflex.models.loading import load_checkpoint
from tokenflex.training.config import load_config
from tokenflex.training.engine import build_accelerator
from tokenflex.training.loop import TrainingRun
from tokenflex.training.states import load_state

pytestmark = pytest.mark.slow

PATIENCE = 120  # seconds before processes count as hanging
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
SHARDED = {"sharding": "full"}


def torchrun(*arguments: object) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    return subprocess.Popen(
        [sys.executable, *launcher, *map(str, arguments)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def stop_alone(config: Path, steps: int) -> None:
    """One process, stopped by a signal after ``steps`` steps."""
    training = TrainingRun(load_config(config))
    step, count = training._step, [0]

    def counting(*args, **kwargs):
        count[0] += 1
        training.interruption.requested = count[0] == steps
        return step(*args, **kwargs)

    training._step = counting
    with pytest.raises(KeyboardInterrupt):
        training.run()
    AcceleratorState._reset_state(reset_partial_state=True)


class Session:
    """Runs of two processes of the same data and stages; each beside what one process makes."""

    # Stages that learn other parts; bins of text alone, broken pictures, odd numbers of samples.
    RATES = ({"projector": 0.002}, {"vision": 0.002, "projector": 0.002, "text": 0.002})
    STOPPED = (
        *("two to two", "two to one", "one to two", "sharded to replicated"),
        *("full disk", "error"),
    )
    RUNS = {
        "replicated": {},
        "sharded": SHARDED,
        "bfloat16": {**SHARDED, "precision": "bf16"},
        "evaluated": SHARDED,
        **({"recomputed": {**SHARDED, "gradient_checkpointing": True}} if ALL else {}),
        **dict.fromkeys(STOPPED, SHARDED),
    }
    DISTILLED = {
        "distilled, replicated": {},
        "distilled, sharded": SHARDED,
        **(
            {
                "distilled, recomputed": {**SHARDED, "gradient_checkpointing": True},
                "distilled, bfloat16": {**SHARDED, "precision": "bf16"},
            }
            if ALL
            else {}
        ),
    }

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        data = own_data(folder, 12, broken=(4,), text_only=(1, 5, 8, 9, 10))
        bounds = {"batch_size": 7, "max_tokens": 20, "warmup_steps": 0}
        self.common = {
            "data": data,
            "encoder_warm_up": None,
            "evaluation": None,
            "stages": [
                *(stage(steps=4, learning_rate=rates, **bounds) for rates in self.RATES),
                stage(steps=2, learning_rate={"text": 0.002, "vision": 0.002}, **bounds),
            ],
        }
        for name, changes in {"alone": {}, **self.RUNS}.items():
            self.configure(name, **changes)
        evaluation = {
            "data": {"name": "digits", "split": "test", "size": 7, "questions": 2},
            "counts": [4, 9],
            "every": 2,
            "samples": 5,
        }
        for name, changes in {"alone": {}, "evaluated": SHARDED}.items():
            self.configure(name, **{**changes, "evaluation": evaluation})
        options = {"steps": 3, **bounds}
        distilling = [
            stage(learning_rate={"projector": 0.002}, **options, distillation=2.0),
            stage(**options, distillation=0.5),
        ]
        for name, changes in {"distilled, alone": {}, **self.DISTILLED}.items():
            self.configure(name, **{**changes, "stages": distilling})
        for name in ("alone", "distilled, alone"):
            TrainingRun(load_config(self.config(name))).run()
            AcceleratorState._reset_state(reset_partial_state=True)
        stop_alone(self.config("one to two"), 6)
        replicated = self.configure("continued", where="sharded to replicated")
        whole = [name for name in self.RUNS if name not in self.STOPPED]
        runs = [
            *([self.config(name), None] for name in (*whole, *self.DISTILLED)),
            [self.config("two to two"), "signal"],
            [self.config("two to two"), None],
            [self.config("two to one"), "signal"],
            [self.config("one to two"), None],
            [self.config("sharded to replicated"), "signal"],
            [replicated, None],
            [self.config("full disk"), "full disk"],
            [self.config("error"), "error"],
        ]
        (folder / "runs.json").write_text(json.dumps(runs, default=str))
        process = torchrun("tests.training.ranks", folder / "runs.json")
        _, self.errors = process.communicate(timeout=PATIENCE)

    def configure(self, name: str, where: str | None = None, **changes: object) -> Path:
        values = tiny_values(self.output(where or name), **{**self.common, **changes})
        return write_config(self.config(name), values)

    def config(self, name: str) -> Path:
        return self.folder / f"{name}.yaml"

    def output(self, name: str) -> Path:
        return self.folder / name

    def result(self, name: str, rank: int) -> list[str] | None:
        path = self.folder / f"{name}.{rank}.json"
        assert path.exists(), self.errors
        return json.loads(path.read_text())

    def losses(self, name: str) -> list[float]:
        assert self.output(name).exists(), self.errors
        return [line["loss"] for line in metrics(self.output(name))]

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return load_checkpoint(self.output(name) / "checkpoint")[0].state_dict()


@pytest.fixture(scope="module")
def session(tmp_path_factory) -> Session:
    return Session(tmp_path_factory.mktemp("session"))


@pytest.mark.parametrize(
    "name",
    [
        *("replicated", "sharded", "two to two", "one to two", "sharded to replicated"),
        pytest.param("recomputed", marks=pytest.mark.release),
    ],
)
def test_two_processes_train_as_one(session, name):
    assert [session.result(name, rank) for rank in (0, 1)] == [None, None], session.errors
    alone = metrics(session.output("alone"))
    for ours, line in zip(metrics(session.output(name)), alone, strict=True):
        assert ours["loss"] == pytest.approx(line["loss"], abs=1e-5)
        for key in ("stage", "step", "tokens", "tiles", "broken_samples"):
            assert ours[key] == line[key]
    assert max(line["bins"] for line in metrics(session.output(name))) >= 4
    expected = session.weights("alone")
    for key, tensor in session.weights(name).items():
        assert torch.allclose(tensor, expected[key], atol=1e-4), key


def test_a_sharded_model_is_evaluated_while_it_trains_and_after(session):
    """By one process with whole weights: the others' shards cannot be run alone."""
    output = session.output("evaluated")
    assert metrics(output) == metrics(session.output("sharded"))  # it disturbs nothing
    ours, alone = (evaluations(folder) for folder in (output, session.output("alone")))
    assert [(one["stage"], one["step"]) for one in ours] == [(0, 2), (0, 4), (1, 2), (1, 4), (2, 2)]
    for a, b in zip(ours, alone, strict=True):
        assert (a["questions"], a["stage"], a["step"]) == (b["questions"], b["stage"], b["step"])
        assert a["accuracy"] == pytest.approx(b["accuracy"], abs=0.11)  # of 10 questions
    report = json.loads((output / "report.json").read_text())
    assert sum(report["questions"].values()) == 14
    saved = load_checkpoint(output / "checkpoint")[0]
    data = DigitsDataset("test", size=7, questions=2)
    again = evaluate(saved, digits_processor(16), data, [4, 9])
    assert again["accuracy"] == report["accuracy"]


def test_two_sharded_processes_continue_bit_by_bit(session):
    assert metrics(session.output("two to two")) == metrics(session.output("sharded"))
    expected = session.weights("sharded")
    for key, tensor in session.weights("two to two").items():
        assert torch.equal(tensor, expected[key]), key


def test_a_signal_to_one_rank_stops_both_at_the_same_step(session):
    for rank in (0, 1):
        assert session.result("two to one", rank) == ["KeyboardInterrupt", ""]
    state = load_state(session.output("two to one") / "state.pt")
    assert (state["stage"], state["step"]) == (1, 1)  # the fifth step of the run


def test_one_process_continues_what_two_began(session):
    TrainingRun(load_config(session.config("two to one"))).run()
    assert session.losses("two to one") == pytest.approx(session.losses("alone"), abs=1e-5)


def test_bfloat16_is_near(session):
    assert session.losses("bfloat16") == pytest.approx(session.losses("alone"), rel=0.01)
    assert session.losses("bfloat16") != session.losses("alone")
    assert {one.dtype for one in session.weights("bfloat16").values()} == {torch.float32}


def test_two_processes_distil_as_one(session):
    """Whole and sharded, with bins of text alone, a broken picture and more bins than one."""
    expected = metrics(session.output("distilled, alone"))
    assert any(line["distillation_loss"] > 1e-4 for line in expected)
    for name in session.DISTILLED:
        assert [session.result(name, rank) for rank in (0, 1)] == [None, None], session.errors
        is_narrow = "bfloat16" in name
        close = {"rel": 0.02, "abs": 1e-4} if is_narrow else {"abs": 1e-5}
        for ours, line in zip(metrics(session.output(name)), expected, strict=True):
            assert ours["loss"] == pytest.approx(line["loss"], **close), name
            if not is_narrow:
                for key in ("distillation_loss", "gradient_norm"):
                    assert ours[key] == pytest.approx(line[key], abs=1e-4), (name, key)


def test_a_full_disk_on_the_first_rank_stops_both_with_its_error(session):
    for rank in (0, 1):
        assert session.result("full disk", rank) == ["OSError", "the disk is full"]


def test_an_error_on_one_rank_ends_the_other(session):
    assert session.result("error", 1) == ["RuntimeError", "rank 1 has had enough"]
    # The other one meets the broken connection, unless torchrun's signal comes before.
    if not (session.folder / "error.0.json").exists():
        assert "closing signal SIGTERM" in session.errors
        return
    name, message = session.result("error", 0)
    assert name in ("RuntimeError", "DistBackendError"), message


# ---- processes that are ended from outside


def wait_for_step(processes: Sequence[Process], output: Path, step: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and all(one.poll() is None for one in processes):
        path = output / "metrics.jsonl"
        lines = path.read_text() if path.exists() else ""
        if lines.count("\n") >= step:
            return
        time.sleep(0.01)
    raise AssertionError([one.communicate(timeout=10)[1] for one in processes])


LONG = {
    "stages": [stage(steps=3000, schedule="constant", batch_size=4)],
    "encoder_warm_up": None,
    "evaluation": None,
    "save_every": 5000,
}


@pytest.mark.release
def test_sigterm_to_torchrun_saves_and_ends_all(tmp_path):
    config = write_config(tmp_path / "run.yaml", tiny_values(tmp_path / "run", **LONG, **SHARDED))
    launcher = torchrun("tokenflex.cli", "train", config)
    wait_for_step([launcher], tmp_path / "run", 5)
    launcher.send_signal(signal.SIGTERM)
    _, errors = launcher.communicate(timeout=30)
    assert launcher.returncode != 0
    assert "state.pt is whole" in errors
    assert temporary_files(tmp_path / "run") == []
    stopped = load_state(tmp_path / "run" / "state.pt")["step"]
    assert 5 <= stopped == len(metrics(tmp_path / "run"))

    shorter = {**LONG, "stages": [stage(steps=stopped, schedule="constant", batch_size=4)]}
    values = tiny_values(tmp_path / "alone", **shorter)
    TrainingRun(load_config(write_config(tmp_path / "alone.yaml", values))).run()
    ours = [line["loss"] for line in metrics(tmp_path / "run")]
    alone = [line["loss"] for line in metrics(tmp_path / "alone")]
    assert ours[:20] == pytest.approx(alone[:20], abs=1e-5)


def test_a_rank_that_is_killed_ends_the_other_with_an_error(tmp_path):
    """Without torchrun, which would end the others by itself."""
    config = write_config(tmp_path / "run.yaml", tiny_values(tmp_path / "run", **LONG))
    ranks = start_two(config)
    try:
        wait_for_step(ranks, tmp_path / "run", 3)
        ranks[1].kill()
        _, errors = ranks[0].communicate(timeout=30)
    finally:
        for process in ranks:
            process.kill()
    assert ranks[0].returncode == 2
    assert errors.splitlines()[-1].startswith("tokenflex: "), errors


# ---- launching


def test_fsdp_of_accelerates_own_is_refused(tmp_path, monkeypatch):
    config = load_config(write_config(tmp_path / "run.yaml", tiny_values(tmp_path / "run")))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"sharding: full.*got ACCELERATE_USE_FSDP=true"):
        build_accelerator(config)
