"""Files that are whole or not there: the state a run resumes from, and the finished model."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

STATE_KEYS = ("config", "stage", "step", "model", "optimizer", "scheduler", "rng", "records")


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a temporary file, then put it in the place of ``path`` in one step."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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


def write_json(path: Path, value: Any) -> None:
    """``value`` as indented JSON, atomically."""
    text = json.dumps(value, indent=2) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def save_state(path: Path, state: dict[str, Any]) -> None:
    """A training state, atomically."""
    write_atomically(path, lambda temporary: torch.save(state, temporary))


def load_state(path: Path) -> dict[str, Any]:
    """A training state that :func:`save_state` wrote.

    Raises:
        ValueError: the file is cut off or not such a state.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, zipfile.BadZipFile, ValueError) as error:
        raise ValueError(f"training state {path} cannot be read: {error}") from error
    except Exception as error:  # the unpickler raises its own kinds
        raise ValueError(f"training state {path} is not one of ours: {error}") from error
    missing = [key for key in STATE_KEYS if not isinstance(state, dict) or key not in state]
    if missing:
        raise ValueError(f"training state {path} is not one of ours: it lacks {missing[0]!r}")
    return state


def save_model(directory: Path, model: Any, processor: Any) -> None:
    """Model and processor as transformers writes them; the folder appears whole or not at all."""
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    previous = directory.with_name(f".{directory.name}.{os.getpid()}.old")
    try:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        if directory.exists():
            directory.rename(previous)
        temporary.rename(directory)
    finally:
        if previous.exists() and not directory.exists():
            previous.rename(directory)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(previous, ignore_errors=True)
