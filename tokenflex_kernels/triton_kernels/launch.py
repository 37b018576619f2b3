"""One way to launch every kernel: on a GPU, in Triton's interpreter, or only to compile it.

The device of the tensors says which:

* ``cuda``: launched on the current stream of that device;
* ``cpu``: run by Triton's interpreter (``TRITON_INTERPRET=1``), for tests without a GPU;
* ``meta``: compiled for the active target and not launched: how ``python -m tokenflex_kernels.aot``
  and the tests that count compilations go through the very code that launches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

# Told of each kernel that was compiled for meta tensors: its name and Triton's compiled kernel.
on_compile: Callable[[str, Any], None] | None = None


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. (Triton's own is made for kernels, and takes microseconds on the host.)"""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of 2 that is at least ``n``, of n >= 1."""
    return 1 << (n - 1).bit_length()


def launch(kernel: Any, programs: int, like: torch.Tensor, *args: Any, **options: Any) -> None:
    """Launch ``programs`` instances of ``kernel`` on the device of ``like``; none for none.

    ``args`` are the kernel's run-time arguments, ``options`` its constants, ``num_warps`` and
    ``num_stages``.
    """
    if programs == 0:
        return
    kind = like.device.type
    if kind == "cuda":
        if like.device.index == torch.cuda.current_device():
            kernel[(programs,)](*args, **options)
        else:
            with torch.cuda.device(like.device):
                kernel[(programs,)](*args, **options)
    elif kind == "meta":
        compiled = kernel.warmup(*args, grid=(programs,), **options)
        if on_compile is not None:
            on_compile(kernel.__name__, compiled)
    elif kind == "cpu" and not isinstance(kernel, JITFunction):
        _interpret(kernel, programs, args, options)
    else:
        raise ValueError(
            "Triton kernels run on CUDA tensors, or on CPU tensors if TRITON_INTERPRET=1 was set "
            f"before Triton was imported; got {kind} tensors"
        )


def _interpret(kernel: Any, programs: int, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Run the interpreter, with bfloat16 as float32: it would cut bits off instead of rounding, and
    multiply bits instead of numbers. Results are rounded once, as they are copied back."""
    widened: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def widen(value: Any) -> Any:
        if isinstance(value, TensorDescriptor):
            return replace(value, base=widen(value.base))
        if not isinstance(value, torch.Tensor) or value.dtype != torch.bfloat16:
            return value
        storage = value.untyped_storage()
        if storage.data_ptr() not in widened:  # the same memory may come as several arguments
            narrow = torch.empty(0, dtype=value.dtype).set_(storage)
            widened[storage.data_ptr()] = narrow, narrow.float()
        wide = widened[storage.data_ptr()][1]
        return wide.as_strided(value.size(), value.stride(), value.storage_offset())

    kernel[(programs,)](*map(widen, args), **options)
    for narrow, wide in widened.values():
        # Only what was written is written back: inputs are left alone.
        changed = wide != narrow.float()
        narrow[changed] = wide[changed].to(narrow.dtype)
