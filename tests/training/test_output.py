"""A run's folder: whose it is, what is removed from it, and a run that was finished before."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from tests.training.runs import metrics, stage, tiny_values, write_config
from tokenflex.cli import main
from tokenflex.locks import NAME as LOCK
from tokenflex.locks import FolderInUseError, locked
from tokenflex.training import loop, output
from tokenflex.training.config import TrainConfig, load_config
from tokenflex.training.loop import TrainingRun
from tokenflex.training.output import RunFolder, finished_report
from tokenflex.training.states import RunStates

SHORT = {"encoder_warm_up": None, "stages": [stage(steps=2)]}


def configured(tmp_path: Path, **changes) -> Path:
    values = tiny_values(tmp_path / "run", **{**SHORT, **changes})
    return write_config(tmp_path / "run.yaml", values)


def train(config: Path, **options) -> dict:
    try:
        return TrainingRun(load_config(config), **options).run()
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def put(folder: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"mine: {name}")
    return {name: f"mine: {name}".encode() for name in names}


THEIRS = (
    *("notes.md", ".x.tmp", ".x.old", ".notes.txt.12.tmp", "plots/a.png", "state.backup.pt"),
    *("trackers/mine.txt", "trackers/tokenflex/mine.txt", "trackers/wandb/run-1/log.txt"),
    *("checkpoint/notes.md", ".checkpoint.mine.old/a.txt", ".mine.12.old/a.txt", "state.100.pt"),
)


# ---- folders of others


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize(
    "names",
    [("notes.md",), (".x.tmp",), ("trackers/a",), ("checkpoint/a",), ("config.json",), ("a/b/c",)],
)
def test_a_folder_of_something_else_is_refused_and_not_touched(tmp_path, names, fresh):
    theirs = put(tmp_path / "run", names)
    with pytest.raises(ValueError, match=r"holds files of something else.*no run; give an empty"):
        train(configured(tmp_path), fresh=fresh)
    assert contents(tmp_path / "run") == theirs


def test_a_model_of_others_is_refused_and_not_touched(tmp_path):
    """Its config.json is not that of a run."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llava"}')
    (folder / "state.pt").write_text("theirs")
    before = contents(folder)
    for fresh in (False, True):
        with pytest.raises(ValueError, match="something else"):
            train(configured(tmp_path), fresh=fresh)
    assert contents(folder) == before


def test_a_state_file_of_others_is_not_removed(tmp_path):
    theirs = put(tmp_path / "run", ("state.pt",))
    with pytest.raises(ValueError, match=r"state\.pt cannot be read"):
        train(configured(tmp_path), fresh=True)
    assert contents(tmp_path / "run") == theirs


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("kind", ["folder", "dangling link", "foreign state", "aged state"])
def test_a_state_that_is_not_one_makes_no_folder_ours(tmp_path, kind, fresh):
    folder = tmp_path / "run"
    names = ("metrics.jsonl", "report.json", "evaluations.jsonl", "broken_samples.json")
    put(folder, (*names, "thesis.tex"))
    if kind == "folder":
        put(folder, ("state.pt/shard0",))
    elif kind == "dangling link":
        (folder / "state.pt").symlink_to(tmp_path / "none")
    elif kind == "foreign state":
        torch.save({"model": 1}, folder / "state.pt")
    else:
        put(folder, ("state.1.pt",))
    before = contents(folder)
    with pytest.raises(ValueError, match=r"holds files of something else|state(\.1)?\.pt"):
        train(configured(tmp_path), fresh=fresh)
    assert contents(folder) == before
    assert os.path.lexists(folder / ("state.1.pt" if kind == "aged state" else "state.pt"))


def test_a_stale_lock_in_a_folder_that_is_refused_is_not_touched(tmp_path):
    put(tmp_path / "run", ("notes.md",))
    (tmp_path / "run" / LOCK).write_text("process 1 on host")
    before = contents(tmp_path / "run")
    with pytest.raises(ValueError, match="something else"):
        train(configured(tmp_path))
    assert contents(tmp_path / "run") == before


def test_a_lock_of_others_is_refused_and_not_touched(tmp_path):
    put(tmp_path, ("victim",))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).symlink_to(tmp_path / "victim")
    with pytest.raises(FileExistsError, match="in the place of a lock"):
        train(configured(tmp_path))
    assert (tmp_path / "victim").read_text() == "mine: victim"


@pytest.mark.parametrize("name", ["state.pt", "state.1.pt", "report.json", "metrics.jsonl"])
@pytest.mark.parametrize("kind", ["folder", "dangling link"])
def test_what_cannot_be_replaced_by_a_file_is_refused_at_the_start(finished, tmp_path, name, kind):
    shutil.copytree(finished / "run", tmp_path / "run")
    path = tmp_path / "run" / name
    path.unlink(missing_ok=True)
    if kind == "folder":
        put(path, ("mine",))
    else:
        path.symlink_to(tmp_path / "none")
    before = contents(tmp_path / "run")
    with pytest.raises(ValueError, match=rf"{re.escape(name)} must be a file to be replaced"):
        train(configured(tmp_path), fresh=True)
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("fresh", [False, True])
def test_a_checkpoint_that_is_a_link_is_refused_before_training(finished, tmp_path, fresh):
    shutil.copytree(finished / "run", tmp_path / "run")
    shutil.move(tmp_path / "run" / "checkpoint", tmp_path / "elsewhere")
    (tmp_path / "run" / "checkpoint").symlink_to(tmp_path / "elsewhere")
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match=r"checkpoint must be a folder .* it is a link"):
        train(configured(tmp_path), fresh=fresh)
    (tmp_path / "run.yaml").unlink()
    assert contents(tmp_path) == before


def test_a_damaged_configuration_of_a_run_is_named(finished, tmp_path):
    shutil.copytree(finished / "run", tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text('{"model": ')
    before = contents(tmp_path / "run")
    for fresh in (False, True):
        with pytest.raises(ValueError, match=r"config\.json is not JSON.*nothing says what run"):
            train(configured(tmp_path), fresh=fresh)
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("names", [(), ("config.yaml", "train.log")])
def test_an_empty_folder_and_one_that_an_ablation_made_are_taken(tmp_path, names):
    (tmp_path / "run").mkdir()
    theirs = put(tmp_path / "run", names)
    train(configured(tmp_path, evaluation=None))
    assert theirs.items() <= contents(tmp_path / "run").items()


def test_a_file_in_the_folders_place_is_refused(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(ValueError, match="output must be a folder, but"):
        train(configured(tmp_path))


# ---- files of others in a run's own folder


def test_what_others_keep_in_a_runs_folder_stays(tmp_path):
    config = configured(tmp_path, trackers=["tensorboard"])
    train(config)
    folder = tmp_path / "run"
    events = [*(folder / "trackers").rglob("events.*")]
    assert events
    theirs = put(folder, THEIRS)
    train(config, fresh=True)
    assert theirs.items() <= contents(folder).items()
    assert not any(path.exists() for path in events)
    assert any((folder / "trackers" / "tokenflex").rglob("events.*"))


def test_leftovers_of_a_killed_run_are_removed_or_put_back(tmp_path):
    folder = tmp_path / "run"
    train(configured(tmp_path, evaluation=None))
    put(
        folder, (".state.pt.12.tmp", ".metrics.jsonl.7.tmp", ".checkpoint.12.tmp/model.safetensors")
    )
    theirs = put(folder, THEIRS)
    (folder / "checkpoint").rename(folder / ".checkpoint.12.old")
    run = RunFolder(folder)
    run.claim()
    run.prepare(load_config(tmp_path / "run.yaml").fingerprint(), resumed=True, fresh=False)
    run.release()
    assert (folder / "checkpoint" / "model.safetensors").exists()
    assert theirs.items() <= contents(folder).items()
    left = {path.name for path in folder.iterdir() if path.name.startswith(".")}
    assert left == {".x.tmp", ".x.old", ".notes.txt.12.tmp", ".checkpoint.mine.old", ".mine.12.old"}


def test_another_model_in_the_checkpoints_place_is_known_before_training(tmp_path):
    folder = tmp_path / "run"
    train(configured(tmp_path, evaluation=None))
    shutil.rmtree(folder / "checkpoint")
    (folder / "checkpoint").mkdir()
    (folder / "checkpoint" / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(FileExistsError, match="must be a TokenFLEX checkpoint"):
        train(configured(tmp_path), fresh=True)


# ---- one run at a time


def test_a_folder_in_use_is_refused_and_not_touched(tmp_path):
    training = TrainingRun(load_config(configured(tmp_path, evaluation=None)))
    AcceleratorState._reset_state(reset_partial_state=True)
    before = contents(tmp_path / "run")
    for fresh in (False, True):
        with pytest.raises(FolderInUseError, match="in use by another process"):
            train(configured(tmp_path, evaluation=None), fresh=fresh)
    assert contents(tmp_path / "run") == before
    training.setup.folder.release()
    train(configured(tmp_path, evaluation=None))


def test_a_run_that_cannot_begin_leaves_no_folder_and_no_lock(tmp_path):
    missing = {"name": "messages", "path": str(tmp_path / "none.jsonl")}
    with pytest.raises(FileNotFoundError):
        train(configured(tmp_path, data=missing))
    assert not (tmp_path / "run").exists()
    with locked(tmp_path / "run"):
        pass


# ---- finished runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    train(configured(folder))
    return folder


def test_a_finished_run_says_so_and_trains_nothing(finished, capsys):
    before = contents(finished / "run")
    assert main(["train", str(finished / "run.yaml")]) == 0
    assert "holds this run, finished: nothing to do; --fresh trains anew" in capsys.readouterr().out
    report = train(finished / "run.yaml")
    assert contents(finished / "run") == before
    saved = json.loads((finished / "run" / "report.json").read_text())
    assert report == saved
    assert [one["steps"] for one in report["stages"]] == [2]


def report_of(config: TrainConfig) -> dict | None:
    return finished_report(config)


def test_what_is_finished_and_what_is_not(finished, tmp_path):
    shutil.copytree(finished / "run", tmp_path / "run")
    config = load_config(configured(tmp_path))
    assert report_of(config) is not None
    assert report_of(load_config(configured(tmp_path, log_every=7))) is not None
    assert report_of(load_config(configured(tmp_path, seed=7))) is None  # refused, not finished
    (tmp_path / "run" / "state.pt").touch()
    assert report_of(config) is None
    (tmp_path / "run" / "state.pt").unlink()
    for damage in (lambda path: path.write_text("{"), Path.unlink):
        damage(tmp_path / "run" / "metrics.jsonl")
        assert report_of(config) == report_of(load_config(finished / "run.yaml"))


def test_of_runs_of_earlier_versions_the_last_step_says_that_they_are_finished(finished, tmp_path):
    """They noted nothing in their configuration."""
    shutil.copytree(finished / "run", tmp_path / "run")
    config, noted = load_config(configured(tmp_path)), tmp_path / "run" / "config.json"
    values = json.loads(noted.read_text())
    expected, training = report_of(config), values["run"]["training"]
    del values["run"]
    noted.write_text(json.dumps(values))
    report = report_of(config)
    assert report == expected
    assert [one["steps"] for one in report["stages"]] == [2]
    assert training["stages"] == report["stages"]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "run" / "metrics.jsonl").write_text(lines[0])  # begun anew, and killed
    assert report_of(config) is None
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert report_of(config) is not None


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "report.json"])
def test_a_finished_run_that_is_damaged_is_an_error(finished, tmp_path, name):
    shutil.copytree(finished / "run", tmp_path / "run")
    config = load_config(configured(tmp_path))
    path = tmp_path / "run" / ("" if name == "report.json" else "checkpoint") / name
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        report_of(config)


def test_a_finished_run_whose_checkpoint_is_gone_is_an_error(finished, tmp_path):
    shutil.copytree(finished / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint")
    with pytest.raises(ValueError, match=r"checkpoint of a finished run is damaged: it is gone"):
        train(configured(tmp_path))


@pytest.mark.parametrize("noted", [True, False])
def test_a_run_begun_anew_is_not_finished_from_its_first_moment(finished, tmp_path, noted):
    """Before it has logged a line, or done anything else in the folder."""
    shutil.copytree(finished / "run", tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    if not noted:
        values = json.loads(path.read_text())
        del values["run"]
        path.write_text(json.dumps(values))
    config = load_config(configured(tmp_path))
    assert report_of(config) is not None
    training = TrainingRun(config, fresh=True)
    assert report_of(config) is None
    training.setup.folder.begin_records()
    assert report_of(config) is None
    training.setup.folder.release()


def test_a_run_is_marked_as_finished_after_all_that_it_saves(tmp_path, monkeypatch):
    """Check the order: a machine may lose its power between any two of these."""
    calls: list[str] = []

    def recorded(owner, name, label):
        original = getattr(owner, name)

        def call(*args, **kwargs):
            calls.append(label(*args))
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    recorded(loop, "save_model", lambda *_: "model")
    recorded(loop, "write_json", lambda path, _: path.name)
    recorded(RunFolder, "sync", lambda *_: "sync")
    recorded(output, "write_json", lambda _, value: f"finished {value['run']['finished']}")
    recorded(RunStates, "save", lambda *_: "state")
    recorded(RunStates, "remove", lambda *_: "states removed")
    train(configured(tmp_path))
    assert calls[0] == "finished False"
    assert calls[1:3] == ["sync", "state"]
    assert calls[3:] == ["model", "report.json", "sync", "finished True", "states removed"]


def test_a_finished_run_that_is_now_to_be_evaluated_says_how(tmp_path, capsys):
    train(configured(tmp_path, evaluation=None))
    assert main(["train", str(configured(tmp_path))]) == 0
    said = capsys.readouterr().out
    checkpoint = tmp_path / "run" / "checkpoint"
    assert f"finished: `tokenflex evaluate {checkpoint} ...` evaluates it; --fresh" in said
    assert said.rstrip().endswith(f"Its model is in {checkpoint}")
    assert "nothing to do" not in said


def test_files_that_no_save_wrote_stay_in_a_checkpoint_that_is_made_anew(finished, tmp_path):
    shutil.copytree(finished / "run", tmp_path / "run")
    folder = tmp_path / "run" / "checkpoint"
    written = json.loads((tmp_path / "run" / "config.json").read_text())["run"]["checkpoint"]
    assert written == {path.name: path.stat().st_size for path in folder.iterdir()}
    theirs = put(
        folder,
        (
            *("adapter_config.json", "adapter_model.safetensors", "merges.txt", "vocab.txt"),
            *("added_tokens.json", "model-00001-of-00002.safetensors", "router/report.json"),
            "../state.5.pt",
        ),
    )
    train(configured(tmp_path, evaluation=None), fresh=True)
    assert {name: (folder / name).read_bytes() for name in theirs} == theirs


def test_what_an_earlier_save_wrote_goes_with_it(finished, tmp_path):
    """A file that the new model does not have, but the old one had."""
    shutil.copytree(finished / "run", tmp_path / "run")
    folder, noted = tmp_path / "run" / "checkpoint", tmp_path / "run" / "config.json"
    put(folder, ("vocab.json", "merges.txt"))
    values = json.loads(noted.read_text())
    values["run"]["checkpoint"] |= {"vocab.json": len("mine: vocab.json"), "merges.txt": 1}
    noted.write_text(json.dumps(values))
    train(configured(tmp_path, evaluation=None), fresh=True)
    assert not (folder / "vocab.json").exists()
    assert (folder / "merges.txt").exists()  # of another size than the one that was written


def test_fresh_trains_a_finished_run_anew(finished, tmp_path, capsys):
    shutil.copytree(finished / "run", tmp_path / "run")
    assert main(["train", str(configured(tmp_path)), "--fresh"]) == 0
    assert len(metrics(tmp_path / "run")) == 2
    assert "nothing to do" not in capsys.readouterr().out


def test_a_report_of_an_earlier_checkpoint_does_not_stay(finished, tmp_path):
    shutil.copytree(finished / "run", tmp_path / "run")
    train(configured(tmp_path, evaluation=None), fresh=True)
    assert not (tmp_path / "run" / "report.json").exists()


def test_states_of_a_finished_run_go_after_what_it_saved_is_there(tmp_path, monkeypatch):
    """Killed before the states are removed, the run is not finished but continues to the end."""
    config = configured(tmp_path, evaluation=None)

    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("tokenflex.training.states.RunStates.remove", killed)
        with pytest.raises(Killed):
            train(config)
    assert {"state.pt", "checkpoint"} <= {*os.listdir(tmp_path / "run")}
    assert report_of(load_config(config)) is None
    train(config)
    assert report_of(load_config(config)) is not None
