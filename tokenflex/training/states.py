"""The states of a run: what is in one, and which of those on the disk to continue from."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from tokenflex.training.checkpoint import load_state, put_aside, save_state, saved_states
from tokenflex.training.config import TrainConfig

# What may change between two halves of a run: where, how fast, how much is said.
_FREE = {
    "output",
    "workers",
    "threads",
    "log_every",
    "save_every",
    "keep_states",
    "max_broken_samples",
    "sample",
    "evaluation",
    "trackers",
    "peak_tflops",
}


class RunStates:
    """``state.pt`` and the states before it, in the run's folder.

    Args:
        config: the run's; a state of another one is refused.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.path = config.output / "state.pt"
        self._keep = config.keep_states
        self._fingerprint = config.model_dump_json(exclude=_FREE)
        self._stages = [stage.name for stage in config.stages]
        self._unreadable: list[Path] = []

    def save(self, state: dict[str, Any]) -> None:
        """Save what a run needs to continue, and age the states before."""
        save_state(self.path, {"config": self._fingerprint, **state}, keep=self._keep)

    def read(self, *, warn: bool = True) -> dict[str, Any] | None:
        """The newest state that can be read; None where there is none at all.

        Raises:
            ValueError: none of them can be read, or it is of another configuration.
        """
        paths = saved_states(self.path)
        problems = []
        for path in paths:
            try:
                state = load_state(path)
            except ValueError as error:
                problems.append(str(error))
                continue
            if state["config"] != self._fingerprint:
                raise ValueError(
                    f"{path} holds an unfinished run of another configuration; give another "
                    "output, or --fresh to begin anew"
                )
            if problems and warn:
                warnings.warn(
                    f"{problems[0]}; continuing from {path.name}, step {state['step']} of stage "
                    f"{self._stages[state['stage']]!r}",
                    stacklevel=2,
                )
            self._unreadable = paths[: len(problems)]
            return state
        if problems:
            raise ValueError(f"{problems[0]}; no earlier state can be read, --fresh begins anew")
        return None

    def put_unreadable_aside(self) -> None:
        """Rename the states that :meth:`read` could not read."""
        for path in self._unreadable:
            put_aside(path)

    def remove(self) -> None:
        """Delete them all: the run is done, or begins anew."""
        for path in saved_states(self.path):
            path.unlink()
