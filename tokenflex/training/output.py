"""The folder of a run: for one run at a time, and without a change to what others put into it."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from tokenflex.files import check_folder, read_json, sync_folder, write_json
from tokenflex.locks import NAME as LOCK
from tokenflex.locks import FolderLock
from tokenflex.models.weights import weight_files
from tokenflex.training.checkpoint import (
    Sizes,
    check_checkpoint_folder,
    is_checkpoint,
    restore_folder,
)
from tokenflex.training.config import TrainConfig
from tokenflex.training.records import read_lines, training_report
from tokenflex.training.states import (
    DamagedStateError,
    load_state,
    remove_states,
    saved_states,
)
from tokenflex.training.trackers import FOLDER as TRACKERS
from tokenflex.training.trackers import remove_event_files

CHECKPOINT = "checkpoint"
ADAPTER = "adapter"
BEST = "best"
FOLDERS = (CHECKPOINT, ADAPTER, BEST)
"""Folders that a run replaces as a whole."""
CONFIG = "config.json"
STATE = "state.pt"
METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"
REPORT = "report.json"
NON_FINITE = "non_finite.json"
BROKEN_SAMPLES = "broken_samples.json"

# Files that a run replaces in one step, under its lock. Temporary ones are of dead processes.
_REPLACED = (CONFIG, STATE, METRICS, EVALUATIONS, REPORT, NON_FINITE, BROKEN_SAMPLES)
_LEFTOVER = re.compile(
    rf"\.(?:{'|'.join(map(re.escape, _REPLACED))}|(?P<folder>{'|'.join(FOLDERS)}))\.\d+"
    r"\.(?P<kind>tmp|old)"
)
# What an ablation puts into a run's folder before the run begins.
_BEFORE_A_RUN = {"config.yaml", "train.log"}
_KEYS_OF_A_RUN = {"model", "data", "stages", "seed"}
# Key of config.json beside those of the configuration: whether the run is finished, its report on
# training, and the files of its folders by name. Runs of earlier versions have no such key.
_PROGRESS = "run"


class RunFolder:
    """The output folder of a run, which need not exist, with at most ``keep_states`` states."""

    def __init__(self, path: Path, *, keep_states: int = 1) -> None:
        self.path = path
        self.saved_files: dict[str, Sizes] = {}
        """Of each folder in :data:`FOLDERS` the names and sizes of the files that were saved."""
        self._keep_states = keep_states
        self._lock = FolderLock(path)

    def claim(self) -> None:
        """Lock the folder; refuse one that holds anything but a run.

        Raises:
            FolderInUseError: Another run is at work in it.
            ValueError: It is a file, or holds what no run has written.
            OSError: It cannot be created or written.
        """
        check_folder(self.path)
        if self.path.is_dir():
            self._check()  # also before the lock is written into it
        self._lock.acquire()
        try:
            self._check()
        except BaseException:
            self.release(undo=True)
            raise

    def release(self, *, undo: bool = False) -> None:
        """Unlock the folder; ``undo`` also deletes it, if it is new and empty."""
        self._lock.release(undo=undo)

    def _check(self) -> None:
        self._check_ours()
        check_checkpoint_folder(self.path / CHECKPOINT)
        for path in self._written_files():
            if os.path.lexists(path) and not path.is_file():
                raise ValueError(f"{path} must be a file to be replaced by a run, move it")

    def _written_files(self) -> list[Path]:
        names = [*_REPLACED, *(f"state.{age}.pt" for age in range(1, self._keep_states))]
        return [self.path / name for name in names]

    def _check_ours(self) -> None:
        names = {name for name in os.listdir(self.path) if name != LOCK}
        if names <= _BEFORE_A_RUN or read_fingerprint(self.path) is not None:
            return
        try:
            read_json(self.path / CONFIG)
        except (OSError, ValueError) as damage:
            problems = []
            for state in saved_states(self.path / STATE, keep=self._keep_states):
                try:
                    load_state(state)
                except DamagedStateError as error:
                    problems.append(error)
                else:
                    return  # the state holds the configuration as well
            if CONFIG in names and self._has_traces():
                raise ValueError(
                    f"{damage}, so nothing says what run output {self.path} holds; give another "
                    "output, or put the file back"
                ) from damage
            if problems:
                raise problems[0] from damage
        raise ValueError(
            f"output {self.path} holds files of something else, {sorted(names)[0]!r} among them, "
            "and no run; give an empty folder, or one that does not exist"
        )

    def check_configuration(self, fingerprint: str) -> None:
        """Refuse the folder of a run of another configuration, finished or not.

        Raises:
            ValueError: The run in the folder has another fingerprint.
        """
        made_by = read_fingerprint(self.path)
        if made_by is not None and made_by != json.loads(fingerprint):
            raise ValueError(
                f"{self.path / CONFIG} is of a run of another configuration; give another output, "
                "or --fresh to begin anew"
            )

    def _has_traces(self) -> bool:
        """Return whether the folder has what only a run writes: a line of metrics or a model."""
        metrics, model = self.path / METRICS, self.path / CHECKPOINT / "config.json"
        return is_checkpoint(model.parent) or (metrics.is_file() and bool(read_lines(metrics)))

    def prepare(self, fingerprint: str, *, resumed: bool, fresh: bool) -> None:
        """Note that a run begins; remove what a killed one and an earlier one have left.

        The files of a run that is ``resumed`` stay. Those of one that is not, and its states too if
        it begins ``fresh``, are removed.
        """
        _, progress = _read_config(self.path)
        self.saved_files = {name: _sizes_in(progress, name) for name in FOLDERS}
        self._note(fingerprint, finished=False)  # before anything of a finished run is removed
        self._remove_leftovers()
        (self.path / NON_FINITE).unlink(missing_ok=True)
        if resumed:
            return
        (self.path / BROKEN_SAMPLES).unlink(missing_ok=True)
        for name in FOLDERS[1:]:
            self._remove_saved(name)
        if fresh:
            remove_states(self.path / STATE, keep=self._keep_states)

    def note_saved(self, fingerprint: str) -> None:
        """Note what :attr:`saved_files` says, in a run that is not finished."""
        self._note(fingerprint, finished=False)

    def _remove_saved(self, name: str) -> None:
        """Remove the files that an earlier run saved in a folder, and the folder if it is empty."""
        folder = self.path / name
        if folder.is_symlink() or not folder.is_dir():
            return
        for file, size in self.saved_files.pop(name, {}).items():
            path = folder / file
            if path.is_file() and not path.is_symlink() and path.stat().st_size == size:
                path.unlink()
        if not any(folder.iterdir()):
            folder.rmdir()

    def finish(self, fingerprint: str, training: dict[str, Any]) -> None:
        """Note that the run is finished. Everything it saved must be on the disk.

        ``training`` is the report on training; :attr:`saved_files` says what was saved.
        """
        self._note(fingerprint, finished=True, training=training)

    def _note(self, fingerprint: str, **progress: Any) -> None:
        progress |= {name: {**files} for name, files in self.saved_files.items() if files}
        write_json(self.path / CONFIG, {**json.loads(fingerprint), _PROGRESS: progress})

    def begin_records(self) -> None:
        """Remove what an earlier run has logged."""
        remove_event_files(self.path / TRACKERS)
        for name in (METRICS, EVALUATIONS):
            (self.path / name).unlink(missing_ok=True)

    def sync(self) -> None:
        """Write the lines that were added to files, and the names of the folder, to the disk."""
        for name in (METRICS, EVALUATIONS):
            if (self.path / name).is_file():
                with (self.path / name).open("rb+") as file:
                    os.fsync(file.fileno())
        sync_folder(self.path)

    def _remove_leftovers(self) -> None:
        for path in [*self.path.iterdir()]:
            leftover = _LEFTOVER.fullmatch(path.name)
            if leftover is None or path.is_symlink():
                continue
            if leftover["kind"] == "old":
                if leftover["folder"] and path.is_dir():
                    folder = leftover["folder"]
                    restore_folder(path, self.path / folder, self.saved_files.get(folder))
            elif path.is_dir() and leftover["folder"]:
                shutil.rmtree(path)
            elif path.is_file() and not leftover["folder"]:
                path.unlink()


def is_run(folder: Path) -> bool:
    """Return whether a folder's ``config.json`` is that of a run."""
    return read_fingerprint(folder) is not None


def read_fingerprint(folder: Path) -> dict[str, Any] | None:
    """Return the fingerprint of the run in a folder; None where its ``config.json`` has none."""
    return _read_config(folder)[0]


def _read_config(folder: Path) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Return a run's fingerprint and what it noted of its progress; None for what is missing."""
    try:
        config = read_json(folder / CONFIG)
    except (OSError, ValueError):
        return None, None
    if not isinstance(config, dict) or not config.keys() >= _KEYS_OF_A_RUN:
        return None, None
    progress = config.pop(_PROGRESS, None)
    return config, progress if isinstance(progress, dict) else None


def _sizes_in(progress: dict[str, Any] | None, folder: str) -> dict[str, int]:
    sizes = {} if progress is None else progress.get(folder)
    if not isinstance(sizes, dict):
        return {}
    return {
        name: size
        for name, size in sizes.items()
        if isinstance(size, int) and name == Path(name).name
    }


def finished_report(config: TrainConfig) -> dict[str, Any] | None:
    """Return the report of a finished run of ``config`` in its folder; None if none is finished.

    Raises:
        ValueError: The run is finished, and some of what it left is damaged.
    """
    folder = config.output
    made_by, progress = _read_config(folder)
    if (folder / STATE).exists() or made_by != json.loads(config.fingerprint()):
        return None
    if progress is None:
        report = _report_without_progress(config)
    else:
        report = progress.get("training") if progress.get("finished") is True else None
    if not isinstance(report, dict):
        return None
    _check_checkpoint(folder / CHECKPOINT)
    if (folder / REPORT).exists():
        saved = read_json(folder / REPORT, "report file")
        if not isinstance(saved, dict) or "accuracy" not in saved:
            raise _damaged(folder / REPORT, "it is not a report")
        report = {**report, **saved}
    return report


def _report_without_progress(config: TrainConfig) -> dict[str, Any] | None:
    """Return the report on training of a finished run of an earlier version, which noted nothing.

    It has a checkpoint, and no metrics or those of its last step.
    """
    metrics = config.output / METRICS
    lines = read_lines(metrics) if metrics.is_file() else []
    if metrics.is_file():
        stage, last = config.stages[-1], lines[-1] if lines else {}
        done = last.get("step" if stage.tokens is None else "stage_tokens", 0)
        if last.get("stage") != len(config.stages) - 1 or done < stage.budget:
            return None  # begun anew after the checkpoint was written
    return training_report(_records(lines)) if (config.output / CHECKPOINT).is_dir() else None


def _records(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the counts of each stage, from its last line."""
    keys = {
        **{"name": "stage_name", "steps": "step", "seconds": "seconds"},
        **{key: f"stage_{key}" for key in ("tokens", "vision_tokens", "tiles")},
    }
    last = {line["stage"]: line for line in lines if line.keys() >= {*keys.values()}}
    return [{key: line[name] for key, name in keys.items()} for _, line in sorted(last.items())]


def _check_checkpoint(checkpoint: Path) -> None:
    """Raise ValueError for a checkpoint that is gone, or for its first file that is cut off."""
    if not checkpoint.is_dir():
        raise _damaged(checkpoint, "it is gone")
    read_json(checkpoint / "config.json", "checkpoint file")
    try:
        weight_files(checkpoint)
    except (FileNotFoundError, ValueError) as error:
        raise _damaged(checkpoint, str(error)) from error


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"{path} of a finished run is damaged: {reason}; --fresh trains anew, or give another "
        "output"
    )
