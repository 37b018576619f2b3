"""Processes that stop together: each tells the others, all end between the same two steps."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed import DistBackendError, DistNetworkError, DistStoreError

from tokenflex.errors import ReportedError

_LOST_CONNECTION = ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL")


class OtherProcessError(ReportedError):
    """Another process of the run has stopped or was lost."""


class AgreedStop(Exception):
    """All processes stop between the same two steps; the state of the last one can be saved.

    Args:
        reason: What this process ends with: its own error, or that another one has stopped.
    """

    def __init__(self, reason: BaseException) -> None:
        super().__init__(str(reason))
        self.reason = reason


def other_process_stopped() -> AgreedStop:
    """Return the stop of a process that is told of another one's error."""
    return AgreedStop(OtherProcessError("another process has stopped: its own message says why"))


def share(accelerator: Any, *values: float) -> list[float]:
    """Return the sums of ``values`` over all processes."""
    own = torch.tensor(values, dtype=torch.float32)
    if accelerator.num_processes == 1:
        return own.tolist()
    total: list[float] = accelerator.reduce(own.to(accelerator.device), "sum").tolist()
    return total


def is_lost_connection(error: RuntimeError) -> bool:
    """Return whether a collective failed because another process is gone."""
    if isinstance(error, (DistBackendError, DistNetworkError, DistStoreError)):
        return True
    return any(words in str(error) for words in _LOST_CONNECTION)
