"""The costs of a call beside its time: memory, and waiting for the device."""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch


def peak_bytes(call: Callable[[], Any], device: str) -> int | None:
    """Return how far memory rises above its level before the call, the result included.

    On a GPU the allocator counts. On the CPU it is the resident memory of this process, whose
    high-water mark Linux can reset; None where it cannot.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    else:
        try:
            ctypes.CDLL(None).malloc_trim(0)  # freed memory would serve the call unseen
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except (OSError, AttributeError):
            return None
        before = _resident_bytes("VmRSS")
        result = call()
        peak = _resident_bytes("VmHWM")
    del result
    return max(0, peak - before)


def _resident_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (kib,) = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return 1024 * int(kib)


def synchronisations(call: Callable[[], Any], device: str) -> int | None:
    """Count how often PyTorch waits for the device during a call; None on the CPU.

    PyTorch knows of its own waiting only. Waiting by others shows when a graph cannot capture it.
    """
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    torch.cuda.synchronize()
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def saved_bytes(forward: Callable[[], Any], given: Sequence[torch.Tensor]) -> int:
    """Return the bytes that autograd keeps from forward to backward, each storage counted once.

    Args:
        forward: Computes the result.
        given: Inputs and weights, which the caller holds anyway and which are left out.
    """
    held = {tensor.untyped_storage().data_ptr() for tensor in given}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        plain = tensor.detach().values() if tensor.is_nested else tensor.detach()
        address = plain.untyped_storage().data_ptr()
        if address not in held:
            kept[address] = plain  # alive, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del result
    return total
