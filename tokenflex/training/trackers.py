"""Log to TensorBoard, W&B and other trackers through accelerate."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

PROJECT = "tokenflex"
FOLDER = "trackers"
_TIME = re.compile(r"\d+(\.\d+)?")


def check_names(trackers: Collection[str]) -> None:
    """Raise ValueError for a name that accelerate does not know."""
    if not trackers:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    known = {str(name) for name in LOGGER_TYPE_TO_CLASS}
    for name in trackers:
        if name not in known:
            raise ValueError(f"trackers must be among {', '.join(sorted(known))}, got {name!r}")


def check_installed(trackers: Collection[str]) -> None:
    """Raise ValueError for a tracker without its package, which accelerate leaves out silently."""
    if not trackers:
        return
    from accelerate.tracking import LoggerType, get_available_trackers

    # Trackers that were registered with accelerate by hand are not in its enumeration.
    packaged = {str(name) for name in LoggerType.list()}
    available = {str(name) for name in get_available_trackers()}
    for name in trackers:
        if name in packaged and name not in available:
            raise ValueError(
                f"trackers names {name!r}, whose package is not installed; pip install {name}"
            )


def tracker_arguments(trackers: Collection[str], output: Path) -> dict[str, Any]:
    """Return the arguments of an Accelerator whose trackers write into the folder of a run."""
    if not trackers:
        return {}
    from accelerate.utils import ProjectConfiguration

    folders = ProjectConfiguration(project_dir=str(output), logging_dir=str(output / FOLDER))
    return {"log_with": list(trackers), "project_config": folders}


def start_trackers(accelerator: Any, config: BaseModel, *, first_step: int) -> None:
    """Start the trackers, or continue at ``first_step``, the next that will be logged.

    TensorBoard hides events at or after ``first_step``, which a run logged after its last saved
    state before it died. Other trackers keep such events, or refuse to log a step twice (W&B).
    """
    values = config.model_dump(mode="json", exclude_none=True)
    accelerator.init_trackers(
        PROJECT,
        # TensorBoard writes another event file for it: once is enough.
        config=None if first_step else dict(flat(values, texts=True)),
        init_kwargs={"tensorboard": {"purge_step": first_step}} if first_step else {},
    )


def log_to_trackers(accelerator: Any, kind: str, line: dict[str, Any]) -> None:
    """Log the numbers of a line, with names that begin with ``kind``."""
    values = {key: value for key, value in line.items() if key not in ("step", "global_step")}
    accelerator.log(dict(flat(values, kind)), step=line["global_step"])


def remove_event_files(folder: Path) -> None:
    """Remove the event files of an earlier run, and the folders that are then empty.

    Other trackers give each run a name of its own. Links stay as they are: other runs may share
    what they lead to.
    """
    events = folder / PROJECT
    if folder.is_symlink() or events.is_symlink() or not events.is_dir():
        return
    # A run writes into the project's folder, and its settings into one named by the time.
    dated = [path for path in events.iterdir() if _TIME.fullmatch(path.name)]
    for parent in [*(path for path in dated if path.is_dir() and not path.is_symlink()), events]:
        for path in [*parent.iterdir()]:
            is_written = path.name.startswith("events.out.tfevents.") or path.name == "hparams.yml"
            if is_written and path.is_file() and not path.is_symlink():
                path.unlink()
        _remove_if_empty(parent)
    _remove_if_empty(folder)


def _remove_if_empty(folder: Path) -> None:
    if not any(folder.iterdir()):
        folder.rmdir()


def flat(values: Any, prefix: str = "", *, texts: bool = False) -> Iterator[tuple[str, Any]]:
    """Yield the numbers of nested values with names like "learning_rate/text"; leave out None.

    With ``texts`` also yield texts, and lists as texts.
    """
    if isinstance(values, Mapping):
        for name, value in values.items():
            yield from flat(value, f"{prefix}/{name}" if prefix else str(name), texts=texts)
    elif isinstance(values, (int, float)):
        yield prefix, values
    elif values is not None and texts:
        yield prefix, str(values)
