"""Launch compiled Triton kernels without Triton's binder. All use of Triton's private API is here.

``kernel[grid](..)`` binds the arguments by name, describes each of them to choose a binary, writes
all options as text, and looks the binary up: 25 to 60 us, of which the launch itself is 3. A call
that Triton has served once is repeated here with that binary. Its key is what Triton's choice
depends on: the kernel, the device, the constants and options with their types, and of each run-time
argument

* an int: whether it is 1, whether it is a multiple of 16, and its type (int32, int64 or uint64);
* a tensor: its dtype, and whether its address is a multiple of 16;
* a tensor-map descriptor: its dtype and block;

each as far as the kernel's ``do_not_specialize`` and ``do_not_specialize_on_alignment`` leave it. A
test compares keys with those of Triton's own binder. Everything else is left to Triton: other
arguments, kernels with hooks or annotations of their own, debugging and instrumentation, other
makers' GPUs, and releases of Triton that lack what is used here.

Importing this does not import Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from operator import attrgetter
from typing import Any, NamedTuple

import torch

_TENSORS = (torch.Tensor, torch.nn.Parameter)
_hooks_before_launches = attrgetter("pre_run_hooks")

Key = tuple[Any, ...]


# ---- Where a launch goes. A stub of a GPU, for tests and measurements without one, replaces these.


def is_on_gpu(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is on a CUDA device; ``device.type`` takes eight times as long."""
    return tensor.is_cuda


def current_device() -> int:
    """Return the index of the current CUDA device, for callers that have a tensor on one."""
    device: int = torch._C._cuda_getDevice()  # torch.cuda's function looks for a device first
    return device


def current_stream(index: int) -> int:
    """Return the handle of the current stream of a CUDA device."""
    stream: int = torch._C._cuda_getCurrentRawStream(index)
    return stream


def is_capturing() -> bool:
    """Return whether the current stream is being captured into a CUDA graph."""
    return torch.cuda.is_current_stream_capturing()


# ---- Binaries.


class Binary(NamedTuple):
    """A kernel that Triton has compiled and loaded on one device, and what its launcher takes."""

    compiled: Any
    run: Callable[..., None]
    function: int
    packed_metadata: Any
    constants: tuple[Any, ...]  # values of the kernel's parameters after the run-time arguments


@cache
def _knobs() -> Any:
    """Return Triton's settings, or None where this Triton is not as this module expects."""
    try:
        from triton import knobs
        from triton.compiler import CompiledKernel
        from triton.runtime.jit import JITFunction, KernelParam
    except ImportError:
        return None
    expected = (
        (knobs.runtime, ("launch_enter_hook", "launch_exit_hook", "debug")),
        (knobs.compilation, ("instrumentation_mode",)),
        (CompiledKernel, ("run", "launch_metadata")),
        (JITFunction, ("add_pre_run_hook", "create_binder")),
        (KernelParam, ("annotation", "is_constexpr")),
    )
    fits = all(hasattr(owner, name) for owner, names in expected for name in names)
    return knobs if fits and torch.version.hip is None else None


def is_ordinary(kernels: Sequence[Any]) -> bool:
    """Return whether nobody but Triton's launcher has business with launches of ``kernels`` now.

    Debugging and instrumentation compile other binaries, and hooks before a launch get its
    arguments. Hooks around launches, as of profilers, are called by :func:`run`.
    """
    knobs = _knobs()
    if (
        knobs is None
        or knobs.runtime.debug
        or knobs.compilation.instrumentation_mode
        or getattr(knobs.runtime, "add_stages_inspection_hook", None) is not None
    ):
        return False
    return not any(map(_hooks_before_launches, kernels))


def has_launch_hooks() -> bool:
    """Return whether hooks around launches are to be called, as of profilers."""
    runtime = _knobs().runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    # Chains of hooks are there even if they are empty.
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


@cache
def _parameters(kernel: Any) -> tuple[tuple[bool, bool], ...] | None:
    """Return for each run-time parameter whether Triton specialises its value, and its alignment.

    None for a kernel whose launches are left to Triton.
    """
    from triton.runtime.jit import JITFunction

    if _knobs() is None or type(kernel) is not JITFunction or kernel.launch_metadata is not None:
        return None
    runtime = [parameter for parameter in kernel.params if not parameter.is_constexpr]
    if runtime != kernel.params[: len(runtime)] or any(
        parameter.annotation or parameter.has_default for parameter in runtime
    ):
        return None
    return tuple(
        (
            not parameter.do_not_specialize,
            not parameter.do_not_specialize and not parameter.do_not_specialize_on_alignment,
        )
        for parameter in runtime
    )


def binary_key(
    kernel: Any, device: int, args: tuple[Any, ...], options: dict[str, Any]
) -> Key | None:
    """Return the key of the binary of a launch, or None where the launch is left to Triton.

    Args:
        kernel: a function of ``triton.jit``.
        device: index of the CUDA device.
        args: the kernel's run-time arguments.
        options: its constants, ``num_warps`` and so on.
    """
    parameters = _parameters(kernel)
    if parameters is None or len(args) != len(parameters):
        return None
    key: list[Any] = [kernel, device]
    for value, (by_value, by_alignment) in zip(args, parameters, strict=True):
        kind = type(value)
        if kind is int:
            if by_value and value == 1:
                key.append(1)  # a constant of the binary
                continue
            if -(2**31) <= value < 2**31:
                width = 32
            else:
                width = 64 if value < 2**63 else 65  # of uint64
            key.append((width, by_alignment and value % 16 == 0))
        elif value is None:
            key.append(None)
        elif kind in _TENSORS:
            key.append((value.dtype, by_alignment and value.data_ptr() % 16 == 0))
        elif kind is descriptor_type():
            key.append((value.base.dtype, tuple(value.block_shape)))
        else:
            return None
    # 1 and True are equal, and are different constants.
    return *key, *options.items(), *map(type, options.values())


@cache
def descriptor_type() -> Any:
    """Return Triton's type of tensor-map descriptors."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor


def binary_of(
    compiled: Any, kernel: Any, args: tuple[Any, ...], options: dict[str, Any]
) -> Binary | None:
    """Return what Triton returned from a launch in the form that :func:`run` takes, or None."""
    if compiled is None:  # a hook compiles in Triton's place
        return None
    constants = tuple(
        options.get(parameter.name, parameter.default) for parameter in kernel.params[len(args) :]
    )
    return Binary(compiled, compiled.run, compiled.function, compiled.packed_metadata, constants)


def launcher_arguments(
    binary: Binary, programs: int, stream: int
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return what ``binary.run`` gets before and after a kernel's arguments, without hooks."""
    head = programs, 1, 1, stream, binary.function, binary.packed_metadata, None, None, None
    return head, binary.constants


def run(binary: Binary, programs: int, stream: int, args: tuple[Any, ...] | list[Any]) -> None:
    """Launch ``binary`` on the current device.

    Args:
        binary: of that device.
        programs: at least 1.
        stream: the CUDA stream's handle.
        args: the kernel's run-time arguments; addresses may stand for tensors, which spares the
            launcher a call of the driver for each.
    """
    head, tail = launcher_arguments(binary, programs, stream)
    if has_launch_hooks():
        runtime = _knobs().runtime
        metadata = binary.compiled.launch_metadata((programs,), stream, *args, *tail)
        head = *head[:-3], metadata, runtime.launch_enter_hook, runtime.launch_exit_hook
    binary.run(*head, *args, *tail)
