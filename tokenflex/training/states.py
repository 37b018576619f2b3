"""The states of a run: files that are whole or known to be damaged, and the one to continue from.

The first process writes and reads them. The others take part in gathering what a state holds.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import warnings
import zipfile
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from tokenflex.files import sync_folder, write_atomically
from tokenflex.training.config import TrainConfig
from tokenflex.training.data_digests import Digests
from tokenflex.training.sharding import model_weights, optimizer_state, restore_optimizer

STATE_KEYS = (
    *("config", "stage", "step", "model", "optimizer", "scheduler", "scaler", "rng", "records"),
    "broken",
)

STATES_KEPT = 10
"""``state.pt`` and ``state.1.pt`` to ``state.9.pt`` belong to the run, and more of them with a
larger ``keep_states``. Copies under other names belong to the user."""

# What follows the archive that torch writes: a mark, and the digest of all bytes before it.
_MARK = b"tokenflex blake2"
_HAS_DIGEST = "digest"
_DIGEST = hashlib.blake2b().digest_size
_END_OF_ZIP = b"PK\x05\x06"
_END_OF_ZIP_SIZE = 22


class DamagedStateError(ValueError):
    """A state is cut off, has changed since it was written, or never was one."""


class RunStates:
    """``state.pt`` and the states before it, in the folder of a run.

    Args:
        config: The run's configuration. The state of another one is refused.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.path = config.output / "state.pt"
        self._keep = config.keep_states
        self.fingerprint = config.fingerprint()
        self._stages = [stage.name for stage in config.stages]
        self._damaged: list[Path] = []
        self.data: Digests = {}
        """Digests of the run's data files, which every state holds."""

    def save(self, state: dict[str, Any]) -> None:
        """Save what a run needs to continue; the states before it move one place on."""
        state = {"config": self.fingerprint, "data": self.data, **state}
        save_state(self.path, state, keep=self._keep)

    def read(self) -> dict[str, Any] | None:
        """Return the newest state that is not damaged; None where no state exists.

        Raises:
            ValueError: All states are damaged, or the newest is of another configuration.
            OSError, MemoryError: The newest undamaged state cannot be read now.
        """
        paths = saved_states(self.path, keep=self._keep)
        problems = []
        for path in paths:
            try:
                state = load_state(path)
            except DamagedStateError as error:
                problems.append(str(error))
                continue
            if json.loads(state["config"]) != json.loads(self.fingerprint):
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
            self._damaged = paths[: len(problems)]
            return state
        if problems:
            raise ValueError(f"{problems[0]}; no earlier state can be read, --fresh begins anew")
        return None

    def put_damaged_aside(self) -> None:
        """Rename the damaged states that :meth:`read` found: neither read again nor lost."""
        for path in self._damaged:
            path.replace(path.with_name(f"{path.name}.corrupt"))

    def remove(self) -> None:
        """Delete all states: the run is finished."""
        remove_states(self.path, keep=self._keep)
        sync_folder(self.path.parent)


def shared_part(state: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return what all processes need of a state: no tensors of the model and its optimiser."""
    if state is None:
        return None
    optimizer = state["optimizer"]
    moments = {name: dict.fromkeys(values) for name, values in optimizer["moments"].items()}
    return {**state, "model": {}, "optimizer": {**optimizer, "moments": moments}}


def gather_state(
    accelerator: Accelerator, model: Any, optimizer: Any, scheduler: Any
) -> dict[str, Any]:
    """Return what training goes on with. Every process must call it; the first one gets tensors."""
    scaler, random = accelerator.scaler, {"cpu": torch.get_rng_state()}
    if accelerator.device.type == "cuda":
        random["cuda"] = torch.cuda.get_rng_state(accelerator.device)
    return {
        "model": model_weights(model),
        "optimizer": optimizer_state(model, optimizer),
        "scheduler": scheduler.state_dict(),
        "scaler": None if scaler is None else scaler.state_dict(),
        "rng": gather_object([random]),
    }


def restore_state(
    state: dict[str, Any], accelerator: Accelerator, model: Any, optimizer: Any, scheduler: Any
) -> None:
    """Restore what :func:`gather_state` returned, but for the model. Every process must call it."""
    restore_optimizer(model, optimizer, state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    if accelerator.scaler is not None and state["scaler"] is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
    rank, states = accelerator.process_index, state["rng"]
    random = states[rank if rank < len(states) else 0]  # an additional process takes the first's
    torch.set_rng_state(random["cpu"])
    if accelerator.device.type == "cuda" and "cuda" in random:
        torch.cuda.set_rng_state(random["cuda"], accelerator.device)


# ---- files


class _Hashing(io.BufferedIOBase):
    """A file that is written from its beginning to its end, with the digest of its bytes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.hash = hashlib.blake2b()

    def write(self, content: Any) -> int:
        self.hash.update(content)
        return self._file.write(content)


def save_state(path: Path, state: dict[str, Any], *, keep: int = 1) -> None:
    """Save a training state atomically; keep ``keep - 1`` earlier ones, ``state.1.pt`` and so on.

    The file is what ``torch.save`` writes, followed by a digest of all its bytes. The state itself
    says that it has a digest: a file that was cut off before the digest does not pass as whole.

    Raises:
        OSError: The file cannot be written (the disk may be full). Earlier states are unchanged.
    """

    def write(temporary: Path) -> None:
        try:
            with temporary.open("wb") as file:
                hashing = _Hashing(file)
                torch.save({**state, _HAS_DIGEST: True}, cast("IO[bytes]", hashing))
                file.write(_MARK + hashing.hash.digest())
        except (OSError, RuntimeError) as error:  # torch's writer wraps some OSErrors
            reason = str(error).splitlines()[0]
            raise OSError(
                f"training state {path} could not be written: {reason}; is the disk full? "
                "Earlier states are as they were"
            ) from error

    def age_the_others() -> None:
        for age in range(keep - 1, 0, -1):
            if _aged(path, age - 1).is_file():
                _aged(path, age - 1).replace(_aged(path, age))

    write_atomically(path, write, make_room=age_the_others)


def saved_states(path: Path, *, keep: int = 1) -> list[Path]:
    """Return the paths of the states at ``path``, the newest first."""
    paths = [_aged(path, age) for age in range(max(keep, STATES_KEPT))]
    return [state for state in paths if state.is_file()]


def _aged(path: Path, age: int) -> Path:
    return path.with_name(f"{path.stem}.{age}{path.suffix}") if age else path


def remove_states(path: Path, *, keep: int = 1) -> None:
    """Delete the states at ``path``, and no file that a run has not written."""
    for state in saved_states(path, keep=keep):
        if _is_state(state):
            state.unlink()


def _is_state(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - len(_MARK) - _DIGEST, 0))
        if file.read(len(_MARK)) == _MARK:
            return True
    try:
        load_state(path)
    except DamagedStateError:
        return False
    return True


def load_state(path: Path) -> dict[str, Any]:
    """Load a training state that :func:`save_state` wrote, also before states had a digest.

    Raises:
        DamagedStateError: The file is cut off, has changed since, or is no state.
        OSError: It cannot be read now, but may be whole.
        MemoryError: Its content does not fit into memory.
    """
    has_digest = False
    try:
        has_digest = _check_digest(path)
        if not has_digest:
            _check_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        missing = [key for key in STATE_KEYS if not isinstance(state, dict) or key not in state]
        if missing:
            raise DamagedStateError(f"is not one of ours: it lacks {missing[0]!r}")
        if state.pop(_HAS_DIGEST, False) and not has_digest:
            raise DamagedStateError("cannot be read: its digest is cut off")
    except DamagedStateError as error:
        raise DamagedStateError(f"training state {path} {error}") from error
    except MemoryError:
        raise
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" in str(error):
            raise MemoryError(f"training state {path} does not fit into memory: {error}") from error
        if has_digest or isinstance(error, OSError):  # its bytes are right, or nobody knows
            number = getattr(error, "errno", None) or errno.EIO
            reason = (
                f"training state could not be read ({error}), which says nothing of its content"
            )
            raise OSError(number, reason, str(path)) from error
        raise DamagedStateError(f"training state {path} cannot be read: {error}") from error
    except Exception as error:  # the unpickler raises its own types
        raise DamagedStateError(f"training state {path} is not one of ours: {error}") from error
    return cast("dict[str, Any]", state)


def _check_digest(path: Path) -> bool:
    """Compare a state with its digest; return False for one that was written without.

    Raises:
        DamagedStateError: The digest differs, or the file ends like neither kind.
    """
    body = path.stat().st_size - len(_MARK) - _DIGEST
    with path.open("rb") as file:
        file.seek(max(body, 0))
        tail = file.read()
        if not tail.startswith(_MARK) or body < 0:
            if tail[-_END_OF_ZIP_SIZE:].startswith(_END_OF_ZIP):
                return False
            raise DamagedStateError("cannot be read: it is cut off, or is not a state")
        file.seek(0)
        digest, left = hashlib.blake2b(), body
        while left:
            block = file.read(min(left, 1 << 22))
            if not block:
                raise DamagedStateError("cannot be read: it became shorter while it was read")
            digest.update(block)
            left -= len(block)
    if tail[len(_MARK) :] != digest.digest():
        raise DamagedStateError("cannot be read: it does not match its digest")
    return True


def _check_archive(path: Path) -> None:
    """Compare the parts of an archive with their checksums, which torch itself ignores."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except MemoryError:
        raise
    except Exception as error:  # zipfile and zlib raise several types
        # EINVAL is a position that does not exist.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        raise DamagedStateError(f"cannot be read: {error}") from error
    if damaged is not None:
        raise DamagedStateError(f"cannot be read: {damaged} does not match its checksum")
