"""Files that are whole or not there: the state a run resumes from, and the finished model."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, BinaryIO, TypeAlias, cast

import torch

from tokenflex.files import read_json, settle_folder, sync_folder, write_atomically
from tokenflex.models.configuration import TokenFlexConfig
from tokenflex.routing import storage as router

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

STATES_KEPT = 10
"""``state.pt`` and ``state.1.pt`` to ``state.9.pt`` are a run's, or more of them with a larger
``keep_states``; copies under other names are their owner's."""

Sizes: TypeAlias = "Mapping[str, int]"
"""Name of a file in a checkpoint -> its bytes."""

# What follows the archive that torch writes: a mark, and the digest of all bytes before it.
_MARK = b"tokenflex blake2"
_HAS_DIGEST = "digest"
_DIGEST = hashlib.blake2b().digest_size
_END_OF_ZIP = b"PK\x05\x06"
_END_OF_ZIP_SIZE = 22

# What transformers and this package write into a checkpoint's folder.
_CHECKPOINT_NAMES = re.compile(
    r"(adapter_|generation_|processor_|preprocessor_|video_preprocessor_|tokenizer_)?config\.json"
    r"|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
    r"|tokenizer\.json|tokenizer\.model|special_tokens_map\.json|added_tokens\.json|vocab\.json"
    r"|vocab\.txt|merges\.txt|spiece\.model|chat_template\.(jinja|json)"
)
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_ROUTER_NAMES = (router.WEIGHTS, router.REPORT, router.CURVE)


class DamagedStateError(ValueError):
    """A state is cut off, has changed since it was written, or never was one."""


# ---- states


class _Hashing(io.BufferedIOBase):
    """A file that is written from its beginning to its end, and the digest of that."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.hash = hashlib.blake2b()

    def write(self, content: Any) -> int:
        self.hash.update(content)
        return self._file.write(content)


def save_state(path: Path, state: dict[str, Any], *, keep: int = 1) -> None:
    """A training state, atomically; the ``keep - 1`` before it stay as `state.1.pt`, `state.2.pt`..

    The file is what ``torch.save`` writes, and after it a digest of all its bytes. The state itself
    says that there is one, so that a file that was cut off just before it is not taken for whole.

    Raises:
        OSError: it could not be written (a full disk, say); the earlier states are as they were.
    """

    def write(temporary: Path) -> None:
        try:
            with temporary.open("wb") as file:
                hashing = _Hashing(file)
                torch.save({**state, _HAS_DIGEST: True}, cast("IO[bytes]", hashing))
                file.write(_MARK + hashing.hash.digest())
        except (OSError, RuntimeError) as error:  # torch's writer wraps some of the first
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
    """The states that lie at ``path``, the newest first."""
    paths = [_aged(path, age) for age in range(max(keep, STATES_KEPT))]
    return [state for state in paths if state.is_file()]


def remove_states(path: Path, *, keep: int = 1) -> None:
    """Delete the states that lie at ``path``, and no file that a run has not written."""
    for state in saved_states(path, keep=keep):
        if _is_state(state):
            state.unlink()


def _is_state(path: Path) -> bool:
    """Return whether a file is a state, by its end where it has a digest."""
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - len(_MARK) - _DIGEST, 0))
        if file.read(len(_MARK)) == _MARK:
            return True
    try:
        load_state(path)
    except DamagedStateError:
        return False
    return True


def put_aside(state: Path) -> Path:
    """Rename a state that cannot be read, so that it is neither read again nor lost."""
    aside = state.with_name(f"{state.name}.corrupt")
    state.replace(aside)
    return aside


def _aged(path: Path, age: int) -> Path:
    return path.with_name(f"{path.stem}.{age}{path.suffix}") if age else path


def load_state(path: Path) -> dict[str, Any]:
    """A training state that :func:`save_state` wrote, now or before states had a digest.

    Raises:
        DamagedStateError: the file is cut off, has changed since, or is not such a state.
        OSError: it cannot be read now; it may be whole.
        MemoryError: there is not enough memory for it.
    """
    try:
        has_digest = _check_digest(path)
        if not has_digest:
            _check_archive(path)
    except DamagedStateError as error:
        raise DamagedStateError(f"training state {path} cannot be read: {error}") from error
    except OSError as error:
        raise _passing(path, error) from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise _passing(path, error) from error
    except RuntimeError as error:
        if "memory" in str(error):
            raise MemoryError(f"training state {path} does not fit into memory: {error}") from error
        if has_digest:  # what was written is there, so the reading failed
            raise _passing(path, error) from error
        raise DamagedStateError(f"training state {path} cannot be read: {error}") from error
    except MemoryError:
        raise
    except Exception as error:  # the unpickler raises its own kinds
        raise DamagedStateError(f"training state {path} is not one of ours: {error}") from error
    missing = [key for key in STATE_KEYS if not isinstance(state, dict) or key not in state]
    if missing:
        raise DamagedStateError(
            f"training state {path} is not one of ours: it lacks {missing[0]!r}"
        )
    if state.pop(_HAS_DIGEST, False) and not has_digest:
        raise DamagedStateError(f"training state {path} cannot be read: its digest is cut off")
    return state


def _passing(path: Path, error: Exception) -> OSError:
    number = getattr(error, "errno", None) or errno.EIO
    message = f"training state could not be read ({error}), which says nothing of what it holds"
    return OSError(number, message, str(path))


def _check_digest(path: Path) -> bool:
    """Compare a state with its digest; return False for one that was written without.

    Raises:
        DamagedStateError: it differs, or it ends as neither kind does.
    """
    size = path.stat().st_size
    body = size - len(_MARK) - _DIGEST
    with path.open("rb") as file:
        file.seek(max(body, 0))
        tail = file.read()
        if not tail.startswith(_MARK) or body < 0:
            if tail[-_END_OF_ZIP_SIZE:].startswith(_END_OF_ZIP):
                return False
            raise DamagedStateError("it is cut off, or is not a state")
        file.seek(0)
        digest, left = hashlib.blake2b(), body
        while left:
            block = file.read(min(left, 1 << 22))
            if not block:
                raise DamagedStateError("it became shorter while it was read")
            digest.update(block)
            left -= len(block)
    if tail[len(_MARK) :] != digest.digest():
        raise DamagedStateError("it does not match its digest")
    return True


def _check_archive(path: Path) -> None:
    """Compare the parts of an archive with their checksums, which torch itself does not look at."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except OSError as error:
        if error.errno == errno.EINVAL:  # a position that does not exist
            raise DamagedStateError(str(error)) from error
        raise
    except MemoryError:
        raise
    except Exception as error:  # zipfile and zlib raise several kinds
        raise DamagedStateError(str(error)) from error
    if damaged is not None:
        raise DamagedStateError(f"{damaged} does not match its checksum")


# ---- finished models


def save_model(
    directory: Path,
    model: Any,
    processor: Any,
    weights: dict[str, Any] | None = None,
    *,
    replaced: Sizes | None = None,
) -> Sizes:
    """Model and processor as transformers writes them; the folder appears whole or not at all.

    It takes the place of an earlier checkpoint. Files in that one are kept unless an earlier save
    wrote them or this one writes them anew. When this returns, all is on the disk.

    Args:
        directory: The checkpoint's folder.
        model: The model.
        processor: Its processor.
        weights: The model's, where it holds only shards of them itself.
        replaced: What the save of the earlier checkpoint returned, if that is known.

    Returns:
        The names and sizes of the files that were written.

    Raises:
        FileExistsError: the folder holds something else.
    """
    check_checkpoint_folder(directory)
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    previous = directory.with_name(f".{directory.name}.{os.getpid()}.old")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        # A copy: transformers takes what it has written out of the dict that it is given.
        model.save_pretrained(temporary, state_dict=None if weights is None else {**weights})
        processor.save_pretrained(temporary)
        settle_folder(temporary)
        files = [path for path in sorted(temporary.iterdir()) if path.is_file()]
        written = {path.name: path.stat().st_size for path in files}
        if directory.exists():
            directory.rename(previous)
        temporary.rename(directory)
        sync_folder(directory.parent)
    finally:
        if previous.exists():
            restore_folder(previous, directory, replaced)
        shutil.rmtree(temporary, ignore_errors=True)
    return written


def check_checkpoint_folder(directory: Path) -> None:
    """Refuse to put a checkpoint in the place of something that is none of ours.

    Raises:
        FileExistsError: it is a file, a link, or a folder with another model.
    """
    if directory.is_symlink():
        raise FileExistsError(
            f"{directory} must be a folder to be replaced by a checkpoint, and it is a link; move "
            "it, or give an output on the disk that it leads to"
        )
    if not directory.exists():
        return
    if directory.is_dir():
        if not any(_CHECKPOINT_NAMES.fullmatch(name) for name in os.listdir(directory)):
            return
        if is_checkpoint(directory):
            return
    raise FileExistsError(
        f"{directory} must be a TokenFLEX checkpoint to be replaced by one, and it is not; move it"
    )


def is_checkpoint(directory: Path) -> bool:
    """Return whether a folder's ``config.json`` is that of a TokenFLEX model."""
    try:
        config = read_json(directory / "config.json")
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == TokenFlexConfig.model_type


def restore_folder(previous: Path, directory: Path, written: Sizes | None = None) -> None:
    """End the replacement of a checkpoint's folder, which was renamed to ``previous`` before.

    Either it goes back, where there is no new one, or what others have put into it goes into the
    new one and the rest is deleted.

    Args:
        previous: The renamed folder.
        directory: The checkpoint's folder.
        written: Names and sizes of the files in ``previous`` that its save wrote, if known. Its
            weights are known without them.
    """
    if not directory.exists():
        previous.rename(directory)
        return
    sizes, weights = written or {}, _weights_of(previous)

    def is_ours(path: Path) -> bool:
        return path.name in weights or sizes.get(path.name) == path.stat().st_size

    _move_others(previous, directory, is_ours)
    shutil.rmtree(previous)


def _weights_of(checkpoint: Path) -> set[str]:
    """Return the names of the weights that a checkpoint has, in one file or as its index says."""
    names = {_WEIGHTS}
    try:
        index = read_json(checkpoint / _INDEX)
        shards = {*index["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return names
    return names | {_INDEX} | {name for name in shards if _SHARD.fullmatch(str(name))}


def _is_named(names: Sequence[str], path: Path) -> bool:
    return path.name in names


def _move_others(source: Path, target: Path, is_ours: Callable[[Path], bool]) -> None:
    for entry in [*source.iterdir()]:
        is_folder = entry.is_dir() and not entry.is_symlink()
        if is_folder and entry.name == router.FOLDER:
            # It was chosen for the weights that are replaced.
            ours = _ROUTER_NAMES if router.is_router_file(entry / router.WEIGHTS) else ()
            if any(name not in ours for name in os.listdir(entry)):
                (target / router.FOLDER).mkdir(exist_ok=True)
                _move_others(entry, target / router.FOLDER, partial(_is_named, ours))
        elif os.path.lexists(target / entry.name):
            continue
        elif is_folder or entry.is_symlink() or not is_ours(entry):
            entry.rename(target / entry.name)
