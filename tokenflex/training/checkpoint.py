"""Files that are whole or not there: the state a run resumes from, and the finished model."""

from __future__ import annotations

import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch

from tokenflex.files import write_atomically

STATE_KEYS = (
    "config",
    "stage",
    "step",
    "model",
    "optimizer",
    "scheduler",
    "scaler",
    "rng",
    "records",
    "broken",
)


def remove_leftovers(folder: Path) -> None:
    """Clear up after a process that was killed while it wrote into ``folder``."""
    for leftover in folder.glob(".*.tmp"):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()
    for previous in folder.glob(".*.old"):
        # Killed between the two renames of `save_model`: the old folder is all there is.
        directory = folder / previous.name.split(".")[1]
        if directory.exists():
            shutil.rmtree(previous)
        else:
            previous.rename(directory)


def save_state(path: Path, state: dict[str, Any], *, keep: int = 1) -> None:
    """A training state, atomically; the ``keep - 1`` before it stay as `state.1.pt`, `state.2.pt`..

    Raises:
        OSError: it could not be written (a full disk, say); the earlier states are as they were.
    """

    def write(temporary: Path) -> None:
        try:
            torch.save(state, temporary)
        except (OSError, RuntimeError) as error:  # torch's writer has no OSError for a full disk
            reason = str(error).splitlines()[0]
            raise OSError(
                f"training state {path} could not be written: {reason}; is the disk full? "
                "Earlier states are as they were"
            ) from error

    def age_the_others() -> None:
        for age in range(keep - 1, 0, -1):
            if _aged(path, age - 1).exists():
                _aged(path, age - 1).replace(_aged(path, age))

    write_atomically(path, write, make_room=age_the_others)


def saved_states(path: Path) -> list[Path]:
    """The states that lie at ``path``, the newest first."""
    aged = [one for one in path.parent.glob(f"{path.stem}.*{path.suffix}") if _age(one)]
    return [one for one in [path, *sorted(aged, key=_age)] if one.exists()]


def put_aside(state: Path) -> Path:
    """Rename a state that cannot be read, so that it is neither read again nor lost."""
    aside = state.with_name(f"{state.name}.corrupt")
    state.replace(aside)
    return aside


def _aged(path: Path, age: int) -> Path:
    return path.with_name(f"{path.stem}.{age}{path.suffix}") if age else path


def _age(path: Path) -> int:
    number = path.stem.rpartition(".")[2]
    return int(number) if number.isdecimal() else 0


def load_state(path: Path) -> dict[str, Any]:
    """A training state that :func:`save_state` wrote.

    Raises:
        ValueError: the file is cut off, has changed since, or is not such a state.
    """
    try:
        # torch itself does not look at the checksums it wrote.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"{damaged} does not match its checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, zipfile.BadZipFile, ValueError) as error:
        raise ValueError(f"training state {path} cannot be read: {error}") from error
    except Exception as error:  # the unpickler raises its own kinds
        raise ValueError(f"training state {path} is not one of ours: {error}") from error
    missing = [key for key in STATE_KEYS if not isinstance(state, dict) or key not in state]
    if missing:
        raise ValueError(f"training state {path} is not one of ours: it lacks {missing[0]!r}")
    return state


def save_model(
    directory: Path, model: Any, processor: Any, weights: dict[str, Any] | None = None
) -> None:
    """Model and processor as transformers writes them; the folder appears whole or not at all.

    ``weights`` are the model's, where it holds only shards of them itself.
    """
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    previous = directory.with_name(f".{directory.name}.{os.getpid()}.old")
    try:
        # A copy: transformers takes what it has written out of the dict that it is given.
        model.save_pretrained(temporary, state_dict=None if weights is None else {**weights})
        processor.save_pretrained(temporary)
        if directory.exists():
            directory.rename(previous)
        temporary.rename(directory)
    finally:
        if previous.exists() and not directory.exists():
            previous.rename(directory)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(previous, ignore_errors=True)
