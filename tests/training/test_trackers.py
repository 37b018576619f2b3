"""Trackers are told what the metrics file is told, through accelerate."""

from __future__ import annotations

import struct
from pathlib import Path

import accelerate.tracking
import pytest
import yaml
from accelerate.tracking import GeneralTracker, LoggerType, register_tracker_class
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.training.runs import evaluations, metrics, stage, tiny_values, write_config
from tokenflex.cli import main
from tokenflex.training.config import TrainConfig
from tokenflex.training.loop import TrainingRun
from tokenflex.training.states import load_state
from tokenflex.training.trackers import flat, remove_event_files

EVALUATION = {
    "data": {"name": "digits", "split": "test", "size": 4, "questions": 2},
    "counts": [4, 9],
    "every": 3,
    "samples": 2,
}


class Notebook(GeneralTracker):
    """A tracker of our own: what accelerate asks of W&B it asks of this one."""

    name = "notebook"
    requires_logging_directory = False
    told: list[tuple[int, dict]] = []
    heard: list[str] = []

    def __init__(self, run_name: str, **options) -> None:
        super().__init__()
        self.heard.append(f"begin {run_name}")

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values: dict) -> None:
        self.heard.append(f"seed {values['seed']}")

    def log(self, values: dict, step: int, **options) -> None:
        self.told.append((step, values))

    def finish(self) -> None:
        self.heard.append("finish")


@pytest.fixture
def notebook(monkeypatch):
    monkeypatch.setattr(
        accelerate.tracking,
        "LOGGER_TYPE_TO_CLASS",
        accelerate.tracking.LOGGER_TYPE_TO_CLASS.copy(),
    )
    monkeypatch.setattr(
        "accelerate.accelerator.LOGGER_TYPE_TO_CLASS", accelerate.tracking.LOGGER_TYPE_TO_CLASS
    )
    register_tracker_class(Notebook)
    monkeypatch.setattr(Notebook, "told", [])
    monkeypatch.setattr(Notebook, "heard", [])
    return Notebook


def config_of(folder: Path, *trackers: str, **changes) -> TrainConfig:
    values = {
        "encoder_warm_up": None,
        "trackers": list(trackers),
        "evaluation": EVALUATION,
        "stages": [stage(name="one", steps=2), stage(name="two", steps=4)],
        **changes,
    }
    return TrainConfig.model_validate(tiny_values(folder, **values))


def test_a_tracker_hears_every_line(notebook, tmp_path):
    TrainingRun(config_of(tmp_path / "run", "notebook")).run()
    logged = [(step, one) for step, one in notebook.told if "training/loss" in one]
    lines = metrics(tmp_path / "run")
    assert [step for step, _ in logged] == [1, 2, 3, 4, 5, 6]
    for (_, told), line in zip(logged, lines, strict=True):
        assert told["training/loss"] == line["loss"]
        assert told["training/learning_rate/text"] == line["learning_rate"]["text"]
        assert told["training/counts/16"] == line["counts"].get("16") or "16" not in line["counts"]
        assert told["training/tokens_per_second"] > 0
        assert all(isinstance(value, (int, float)) for value in told.values())
    ((step, told),) = [(step, one) for step, one in notebook.told if "training/loss" not in one]
    (evaluation,) = evaluations(tmp_path / "run")
    assert step == evaluation["global_step"] == 5
    assert told["evaluation/accuracy/9"] == evaluation["accuracy"]["9"]
    assert notebook.heard == ["begin tokenflex", "seed 0", "finish"]


def test_a_run_that_fails_finishes_its_trackers(notebook, tmp_path, monkeypatch):
    training = TrainingRun(config_of(tmp_path / "run", "notebook"))

    def failing(*args):
        raise RuntimeError("no")

    monkeypatch.setattr(training, "_step", failing)
    with pytest.raises(RuntimeError, match="no"):
        training.run()
    assert notebook.heard[-1] == "finish"


def scalars(run: Path) -> EventAccumulator:
    folder = run / "trackers" / "tokenflex"
    return EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()


def float32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


def test_tensorboard_holds_the_values_of_a_run_that_died_once_each(tmp_path, monkeypatch):
    """The steps between the last state and its death were logged twice; the second time counts."""
    config = config_of(tmp_path / "run", "tensorboard", save_every=3)
    training, left = TrainingRun(config), [4]
    step = training._step

    def dying(*args):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(training, "_step", dying)
    with pytest.raises(KeyboardInterrupt):
        training.run()
    assert len(metrics(tmp_path / "run")) == 4
    assert load_state(tmp_path / "run" / "state.pt")["stage"] == 0  # after the second step
    TrainingRun(config).run()

    lines, events = metrics(tmp_path / "run"), scalars(tmp_path / "run")
    for tag, values in {
        "training/loss": [line["loss"] for line in lines],
        "training/learning_rate/vision": [line["learning_rate"]["vision"] for line in lines],
        "training/gradient_norm": [line["gradient_norm"] for line in lines],
        "training/stage_tokens": [line["stage_tokens"] for line in lines],
    }.items():
        found = events.Scalars(tag)
        assert [one.step for one in found] == [1, 2, 3, 4, 5, 6]
        assert [one.value for one in found] == [float32(value) for value in values]
    (line,) = evaluations(tmp_path / "run")
    (found,) = events.Scalars("evaluation/accuracy/4")
    assert (found.step, found.value) == (5, float32(line["accuracy"]["4"]))


def test_a_fresh_run_begins_with_empty_trackers(tmp_path):
    config = config_of(tmp_path / "run", "tensorboard", evaluation=None)
    for _ in range(2):
        TrainingRun(config, fresh=True).run()
    assert len(scalars(tmp_path / "run").Scalars("training/loss")) == 6
    assert len(list((tmp_path / "run" / "trackers" / "tokenflex").glob("events*"))) == 1


@pytest.mark.parametrize("link", ["trackers", "trackers/tokenflex"])
def test_events_behind_a_link_are_left_alone(tmp_path, link):
    shared = tmp_path / "shared" / "tokenflex"
    shared.mkdir(parents=True)
    events = shared / "events.out.tfevents.1"
    events.touch()
    (tmp_path / "run" / link).parent.mkdir(parents=True)
    (tmp_path / "run" / link).symlink_to(shared if "/" in link else shared.parent)
    remove_event_files(tmp_path / "run" / "trackers")
    assert events.exists()
    assert (tmp_path / "run" / link).is_symlink()


def test_only_events_where_a_run_writes_them_are_removed(tmp_path):
    folder = tmp_path / "tokenflex"
    ours = ["events.out.tfevents.1", "17.5/events.out.tfevents.2", "17.5/hparams.yml"]
    theirs = ["mine/events.out.tfevents.3", "17.5/notes.md", "18/a/hparams.yml"]
    for name in ours + theirs:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / "19").symlink_to(folder / "mine")
    remove_event_files(tmp_path)
    assert [name for name in ours + theirs if (folder / name).exists()] == theirs


def test_without_trackers_there_is_no_folder(tmp_path):
    TrainingRun(config_of(tmp_path / "run", evaluation=None)).run()
    assert not (tmp_path / "run" / "trackers").exists()


def test_a_missing_package_is_one_line_before_anything_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", lambda: [])
    monkeypatch.setattr("tokenflex.training.setup.load_kind", None)
    values = tiny_values(tmp_path / "run", trackers=["tensorboard"])
    path = write_config(tmp_path / "run.yaml", values)
    assert main(["train", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "'tensorboard'" in line
    assert "pip install tensorboard" in line
    assert not (tmp_path / "run").exists()


def test_the_real_list_says_what_is_there():
    assert LoggerType.TENSORBOARD in accelerate.tracking.get_available_trackers()


def test_an_unknown_tracker_is_named_with_those_that_are_known(tmp_path, capsys):
    values = tiny_values(tmp_path / "run", trackers=["tensorbord"])
    path = write_config(tmp_path / "run.yaml", yaml.safe_load(yaml.safe_dump(values)))
    assert main(["train", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "'tensorbord'" in line
    assert "tensorboard, " in line


def test_flat_names():
    values = {"a": 1, "b": {"c": 2.5, "d": None, "e": "text"}, "f": [1, 2]}
    assert dict(flat(values)) == {"a": 1, "b/c": 2.5}
    assert dict(flat(values, "x", texts=True)) == {
        "x/a": 1,
        "x/b/c": 2.5,
        "x/b/e": "text",
        "x/f": "[1, 2]",
    }
