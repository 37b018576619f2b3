"""The states of a run: what is in one, and which of those on the disk to continue from.

A state holds whole tensors under the names of parameters, so it continues on any number of
processes, sharded or not. The first process alone writes and reads it; the others take part, and
hear of its errors.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import broadcast_object_list

from tokenflex.errors import ReportedError
from tokenflex.files import sync_folder
from tokenflex.training.agreement import OtherProcessError
from tokenflex.training.checkpoint import (
    DamagedStateError,
    load_state,
    put_aside,
    remove_states,
    save_state,
    saved_states,
)
from tokenflex.training.config import TrainConfig
from tokenflex.training.data_digests import Digests
from tokenflex.training.output import read_fingerprint
from tokenflex.training.sharding import like, whole

T = TypeVar("T")

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
    "sharding",
    "gradient_checkpointing",
    "compile",
}


def fingerprint(config: TrainConfig) -> str:
    """Return what a run is compared by, as JSON: all that its numbers follow from."""
    return config.model_dump_json(exclude=_FREE)


class RunStates:
    """``state.pt`` and the states before it, in the run's folder.

    Args:
        config: the run's; a state of another one is refused.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.path = config.output / "state.pt"
        self._keep = config.keep_states
        self._fingerprint = fingerprint(config)
        self._stages = [stage.name for stage in config.stages]
        self._unreadable: list[Path] = []
        self.data: Digests = {}
        """Digests of the run's data files, which go into every state."""

    def _check_folder(self) -> None:
        """Refuse a folder that another configuration's run, finished or not, has left.

        Raises:
            ValueError: it has.
        """
        made_by = read_fingerprint(self.path.parent)
        if made_by is not None and made_by != json.loads(self._fingerprint):
            raise ValueError(
                f"{self.path.with_name('config.json')} is of a run of another "
                "configuration; give another output, or --fresh to begin anew"
            )

    def _is_of_this_run(self, saved: Any) -> bool:
        """Compare a state's configuration; versions may have its keys in another order."""
        try:
            return bool(json.loads(saved) == json.loads(self._fingerprint))
        except (TypeError, ValueError):
            return False

    def save(self, state: dict[str, Any]) -> None:
        """Save what a run needs to continue, and age the states before."""
        save_state(
            self.path, {"config": self._fingerprint, "data": self.data, **state}, keep=self._keep
        )

    def read(self) -> dict[str, Any] | None:
        """The newest state that can be read; None where there is none at all.

        A state that is damaged is passed over.

        Raises:
            ValueError: all of them are damaged, or it is of another configuration.
            OSError, MemoryError: the newest that is not damaged cannot be read now.
        """
        paths = saved_states(self.path, keep=self._keep)
        if not paths:
            self._check_folder()
        problems = []
        for path in paths:
            try:
                state = load_state(path)
            except DamagedStateError as error:
                problems.append(str(error))
                continue
            if not self._is_of_this_run(state["config"]):
                raise ValueError(
                    f"{path} holds an unfinished run of another configuration; give another "
                    "output, or --fresh to begin anew"
                )
            if problems:
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
        """Rename the states that :meth:`read` found damaged."""
        for path in self._unreadable:
            put_aside(path)

    def remove(self) -> None:
        """Delete them all: the run is done."""
        remove_states(self.path, keep=self._keep)
        sync_folder(self.path.parent)


# ---- several processes


def from_main(make: Callable[[], T], is_main: bool) -> T:
    """What ``make`` gives on the main process, on every process.

    Raises:
        Exception: ``make`` failed. All raise the same where a user can mend it; else the others
            raise OtherProcessError.
    """
    shared: list[Any] = [None, None]
    failure: Exception | None = None
    if is_main:
        try:
            shared = [make(), None]
        except (ValueError, OSError, ReportedError) as error:
            shared, failure = [None, error], error
        except Exception as error:
            other = OtherProcessError(f"the first process failed: {type(error).__name__}: {error}")
            shared, failure = [None, other], error
    broadcast_object_list(shared)
    if failure is not None:
        raise failure
    if shared[1] is not None:
        raise shared[1]
    result: T = shared[0]
    return result


def without_weights(state: dict[str, Any] | None) -> dict[str, Any] | None:
    """A state as the other processes need it: of the optimiser the names and scalars, no model."""
    if state is None:
        return None
    optimizer = state["optimizer"]
    moments = {
        name: {key: None if value.ndim else value for key, value in moments.items()}
        for name, moments in optimizer["moments"].items()
    }
    return {**state, "model": {}, "optimizer": {**optimizer, "moments": moments}}


def model_weights(model: Any, *, keep: bool = True) -> dict[str, Any]:
    """The whole weights under their names; on every process, kept by those that ``keep`` them.

    A weight with two names (of a head and an embedding) is one tensor.
    """
    weights: dict[int, Any] = {}
    named = model.state_dict(keep_vars=True)
    for tensor in named.values():
        if id(tensor) not in weights:
            weights[id(tensor)] = whole(tensor, keep=keep)
    return {name: weights[id(tensor)] for name, tensor in named.items()}


def optimizer_state(model: Any, optimizer: Any, *, keep: bool = True) -> dict[str, Any]:
    """What an optimiser knows of each parameter, whole and by name, and the settings of its groups.

    Runs on every process; kept by those that ``keep`` it.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    moments: dict[str, Any] = {}
    groups = []
    for group in optimizer.param_groups:
        groups.append({key: value for key, value in group.items() if key != "params"})
        for parameter in group["params"]:
            known = optimizer.state.get(parameter, {})
            moments[names[parameter]] = {key: whole(known[key], keep=keep) for key in known}
    return {"moments": moments, "groups": groups}


def restore_optimizer(model: Any, optimizer: Any, state: dict[str, Any]) -> None:
    """Continue from :func:`optimizer_state`, on every process; the first one's tensors count."""
    for group, settings in zip(optimizer.param_groups, state["groups"], strict=True):
        group.update(settings)
    parameters = dict(model.named_parameters())
    for name, moments in state["moments"].items():
        parameter = parameters[name]
        for key, value in moments.items():
            is_scalar = value is not None and not value.ndim
            optimizer.state[parameter][key] = value if is_scalar else like(parameter, value)


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """What PyTorch's generators of this process are at."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(states: list[dict[str, torch.Tensor]], rank: int, device: Any) -> None:
    """Continue from the :func:`random_state` of each process; a new one from the first's."""
    state = states[rank] if rank < len(states) else states[0]
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
