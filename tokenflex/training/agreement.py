"""Agreements between processes: they share values and errors, and stop at the same step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate.utils import broadcast_object_list
from torch.distributed import DistBackendError, DistNetworkError, DistStoreError

from tokenflex.errors import ReportedError
from tokenflex.interruption import Interruption

T = TypeVar("T")

_LOST_CONNECTION = ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL")


class OtherProcessError(ReportedError):
    """Another process of the run has stopped or was lost."""


class AgreedStop(Exception):
    """All processes stop between the same two steps; the state of the first can be saved.

    Args:
        reason: The exception that this process ends with.
    """

    def __init__(self, reason: BaseException) -> None:
        super().__init__(str(reason))
        self.reason = reason


def other_process_stopped() -> AgreedStop:
    """Return the stop of a process that another one told of an error."""
    return AgreedStop(OtherProcessError("another process has stopped: its own message says why"))


def share(accelerator: Any, *values: float) -> list[float]:
    """Return the sums of ``values`` over all processes."""
    numbers = torch.tensor(values, dtype=torch.float32)
    if accelerator.num_processes > 1:
        numbers = accelerator.reduce(numbers.to(accelerator.device), "sum")
    return numbers.tolist()


def interrupted_anywhere(accelerator: Any, interruption: Interruption) -> bool:
    """Return whether a signal came to any process, so that all stop at the same place.

    Raises:
        AgreedStop: Another process has stopped.
    """
    interrupted, failed = share(accelerator, interruption.requested, False)
    if failed and not interrupted:
        raise other_process_stopped()
    return bool(interrupted)


def is_lost_connection(error: RuntimeError) -> bool:
    """Return whether a collective failed because another process is gone."""
    if isinstance(error, (DistBackendError, DistNetworkError, DistStoreError)):
        return True
    return any(words in str(error) for words in _LOST_CONNECTION)


def from_main(make: Callable[[], T], is_main: bool) -> T:
    """Return what ``make`` returns on the main process, on every process.

    Raises:
        Exception: ``make`` failed. Every process raises an error that a user can mend; of another
            one all processes but the first raise OtherProcessError.
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
