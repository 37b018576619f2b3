"""Results of executions that are kept on disk, so that an unchanged kernel is executed once.

A result is found again by the PTX, the arguments, the bytes of all tensors and the source of the
executor. It holds the bytes that the tensors had afterwards.
"""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tests.ptx.machine import Execution

_SIZE_LIMIT = 1 << 28  # bytes of all results; the oldest are removed


def folder() -> Path:
    """Return the folder of results, below the user's cache."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "tokenflex" / "ptx"


@cache
def _executor() -> bytes:
    names = ("accesses", "arithmetic", "asynchronous", "control", "launching", "machine", "memory")
    digest = hashlib.sha256()
    for name in (*names, "operands", "parse", "tensor_cores"):
        digest.update(Path(__file__).with_name(f"{name}.py").read_bytes())
    return digest.digest()


def _storage_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def remembered(
    text: str,
    description: str,
    tensors: Sequence[torch.Tensor],
    execute: Callable[[], Execution],
) -> Execution:
    """Return what ``execute`` does to ``tensors``, from a previous time if there was one.

    Args:
        text: the PTX.
        description: all that matters beside the text and the tensors' bytes.
        tensors: that the kernel may access.
        execute: runs the kernel.
    """
    storages = {
        tensor.untyped_storage().data_ptr(): _storage_bytes(tensor)
        for tensor in tensors
        if tensor.numel() > 0
    }
    digest = hashlib.sha256(_executor() + text.encode() + description.encode())
    for storage in storages.values():
        digest.update(storage.numpy().tobytes())
    path = folder() / digest.hexdigest()
    kept = _read(path)
    if kept is None:
        before = [storage.clone() for storage in storages.values()]
        execution = execute()
        contents = [
            None if torch.equal(old, storage) else storage.numpy().tobytes()
            for old, storage in zip(before, storages.values(), strict=True)
        ]
        _write(path, pickle.dumps((execution, contents)))
        return execution
    execution, contents = kept
    for content, storage in zip(contents, storages.values(), strict=True):
        if content is not None:
            storage.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    return execution


def _read(path: Path) -> tuple[Execution, list[bytes | None]] | None:
    try:
        result = pickle.loads(path.read_bytes())
        path.touch()
    except (OSError, EOFError, pickle.UnpicklingError):
        return None
    return result


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial: Any = path.with_suffix(f".{os.getpid()}")
    partial.write_bytes(data)
    partial.replace(path)
    kept = sorted(path.parent.iterdir(), key=lambda file: file.stat().st_mtime)
    total = sum(file.stat().st_size for file in kept)
    for file in kept:
        if total <= _SIZE_LIMIT:
            break
        total -= file.stat().st_size
        file.unlink(missing_ok=True)
