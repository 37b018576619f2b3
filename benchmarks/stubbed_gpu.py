"""A GPU that computes nothing, to measure and test all that a call does on the host without a GPU.

Tensors are in host memory and pass for CUDA tensors. Triton binds and specialises arguments and
looks its binaries up as ever, but a stub stands in the place of its compiler and its launcher. So
the time of a call lacks that of Triton's launcher and of the driver, a few microseconds a kernel,
and has the host's allocator in the place of the GPU's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any, NamedTuple
from unittest import mock

import torch

from tokenflex_kernels import backend, launch, launch_configs, relaunch
from tokenflex_kernels.call_records import forget_records
from tokenflex_kernels.pool_norm import op as pool_norm
from tokenflex_kernels.project_and_pack import op as project_and_pack
from tokenflex_kernels.project_tokens import op as project_tokens
from tokenflex_kernels.swiglu import op as swiglu

ARCHITECTURE = 90
DEVICE = 1000  # Triton keeps binaries by device: these must not be taken for real ones
STREAM = 7

OPS = (pool_norm, project_and_pack, project_tokens, swiglu)


class Launched(NamedTuple):
    """One launch, as Triton's launcher gets it."""

    function: int  # the handle of the binary
    programs: int
    stream: int
    args: tuple[Any, ...]


def _on_no_host(x: object) -> bool:
    """Stand for ``library.is_ordinary``, which a mock of its own would take longer than."""
    return False


Note = Callable[[Launched], object]


class _Driver:
    """The part of Triton's driver that binding needs."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", ARCHITECTURE, 32)

    def get_current_device(self) -> int:
        return DEVICE

    def get_current_stream(self, device: int) -> int:
        return STREAM


def _compiler(note: Note | None) -> Callable[..., Any]:
    """Return what stands for Triton's ``compile``: its kernels call ``note``."""
    from triton.compiler import CompiledKernel

    handles = count(1)

    def run(x: int, y: int, z: int, stream: int, function: int, packed: Any, *rest: Any) -> None:
        metadata, enter, leave, *args = rest
        if enter is not None:
            enter(metadata)
        if note is not None:
            note(Launched(function, x, stream, tuple(args)))
        if leave is not None:
            leave(metadata)

    class Kernel(CompiledKernel):
        def __init__(self, source: Any) -> None:
            self.src, self.name, self.function = source, source.fn.__name__, next(handles)
            self.packed_metadata, self._run = (), run
            self.module = None

        def _init_handles(self) -> None: ...

    return lambda source, **_: Kernel(source)


@contextmanager
def stubbed_gpu(note: Note | None = None) -> Iterator[None]:
    """Pass the host for a GPU of ``sm_90``; ``note`` is called with each launch."""
    from triton.runtime import driver

    runs_on, active = backend._runs_on, driver._active

    def has_triton(implementation: str, device_type: str) -> bool:
        return implementation == "triton" or runs_on(implementation, device_type)

    def is_on_gpu(tensor: torch.Tensor) -> bool:
        return tensor.is_cpu or tensor.is_cuda

    stubs: list[tuple[Any, str, Any]] = [
        (backend, "_runs_on", has_triton),
        (launch_configs, "architecture", lambda device: f"sm_{ARCHITECTURE}"),
        (relaunch, "is_on_gpu", is_on_gpu),
        (relaunch, "current_device", lambda: None),  # the index of a device that is the host's
        (relaunch, "current_stream", lambda index: STREAM),
        (relaunch, "is_capturing", lambda: False),
    ]
    with ExitStack() as stack:
        for module, name, stub in stubs:
            stack.enter_context(mock.patch.object(module, name, stub))
        for module in OPS:
            stack.enter_context(mock.patch.object(module, "is_ordinary", _on_no_host))
        stack.enter_context(mock.patch("triton.compiler.compile", _compiler(note)))
        driver.set_active(_Driver())
        _forget()
        try:
            yield
        finally:
            driver._active = active
            _forget()


@contextmanager
def unrecorded() -> Iterator[None]:
    """Record no calls."""
    with ExitStack() as stack:
        for module in OPS:
            stack.enter_context(mock.patch.object(module, "may_be_recorded", return_value=False))
        yield


@contextmanager
def by_triton_alone() -> Iterator[None]:
    """Leave every launch to Triton, and record no calls."""
    with mock.patch.object(relaunch, "_parameters", return_value=None), unrecorded():
        yield


def _forget() -> None:
    """Forget the choices, binaries and records of another device."""
    from triton.runtime.jit import JITFunction

    backend._choose.cache_clear()
    # Triton compiles for a device that it knows by what it bound last, for whichever device.
    modules = [module for name, module in sys.modules.items() if name.endswith(".kernels")]
    kernels = [value for module in modules for value in vars(module).values()]
    for kernel in [*kernels, *(key[0] for key in launch._binaries)]:
        if isinstance(kernel, JITFunction):
            kernel.device_caches.pop(DEVICE, None)
    launch._binaries.clear()
    forget_records()
