"""TensorBoard, W&B and the others that accelerate knows: told what the metrics file is told."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

PROJECT = "tokenflex"
FOLDER = "trackers"
_TIME = re.compile(r"\d+(\.\d+)?")


def check_names(trackers: Collection[str]) -> None:
    """Only what accelerate knows.

    Raises:
        ValueError: one of the names is unknown.
    """
    if not trackers:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    known = {str(name) for name in LOGGER_TYPE_TO_CLASS}
    for name in trackers:
        if name not in known:
            raise ValueError(f"trackers must be among {', '.join(sorted(known))}, got {name!r}")


def check_installed(trackers: Collection[str]) -> None:
    """accelerate leaves out, without a word, a tracker whose package is missing.

    Raises:
        ValueError: a package is missing; the message says what to install.
    """
    if not trackers:
        return
    from accelerate.tracking import LoggerType, get_available_trackers

    # Those that were registered with accelerate by hand are not in its enumeration.
    packaged = {str(name) for name in LoggerType.list()}
    available = {str(name) for name in get_available_trackers()}
    for name in trackers:
        if name in packaged and name not in available:
            raise ValueError(
                f"trackers names {name!r}, whose package is not installed; pip install {name}"
            )


def tracker_arguments(trackers: Collection[str], output: Path) -> dict[str, Any]:
    """What an Accelerator needs to know of them; they write into the run's folder."""
    if not trackers:
        return {}
    from accelerate.utils import ProjectConfiguration

    folders = ProjectConfiguration(project_dir=str(output), logging_dir=str(output / FOLDER))
    return {"log_with": list(trackers), "project_config": folders}


def start_trackers(accelerator: Any, config: Mapping[str, Any], *, first_step: int) -> None:
    """Begin to track, or go on: at ``first_step``, the next that will be logged.

    TensorBoard is told to hide what it has from there on, which a run that died had logged after
    its last state. Other trackers keep it, or refuse to log a step twice (W&B).
    """
    accelerator.init_trackers(
        PROJECT,
        # TensorBoard writes a further event file for it: once is enough.
        config=None if first_step else dict(flat(config, texts=True)),
        init_kwargs={"tensorboard": {"purge_step": first_step}} if first_step else {},
    )


def remove_event_files(folder: Path) -> None:
    """Remove what TensorBoard was told in an earlier run, and the folders that are then empty.

    Other trackers keep a run of their own for each, under a name of its own. A link is left as it
    is: what it leads to may be shared with other runs.
    """
    events = folder / PROJECT
    if folder.is_symlink() or events.is_symlink() or not events.is_dir():
        return
    # A run writes into the project's folder and, of its settings, into one named by the time.
    own = [path for path in events.iterdir() if _TIME.fullmatch(path.name)]
    for parent in [*(path for path in own if path.is_dir() and not path.is_symlink()), events]:
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
    """Names like "learning_rate/text" and their numbers; None is left out.

    ``texts`` keeps texts, and lists as texts.
    """
    if isinstance(values, Mapping):
        for name, value in values.items():
            yield from flat(value, f"{prefix}/{name}" if prefix else str(name), texts=texts)
    elif isinstance(values, (int, float)):
        yield prefix, values
    elif values is not None and texts:
        yield prefix, str(values)
