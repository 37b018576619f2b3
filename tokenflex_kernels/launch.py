"""One way to launch every Triton kernel: on a GPU, in Triton's interpreter, or only to compile it.

The device of the tensors decides:

* ``cuda``: launched on the current stream of that device, by Triton for the first time and
  without Triton's binder after that (``relaunch``);
* ``cpu``: run by Triton's interpreter (``TRITON_INTERPRET=1``), for tests without a GPU;
* ``meta``: compiled for the active target and not launched: ``python -m tokenflex_kernels.aot``
  and the tests that count compilations call the very code that launches.

Importing this does not import Triton.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from threading import local
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import _disable_current_modes

from tokenflex_kernels import relaunch
from tokenflex_kernels.launch_configs import TileConfig
from tokenflex_kernels.layout import neighbours
from tokenflex_kernels.relaunch import Binary, binary_key, binary_of, descriptor_type

MAX_BLOCK = 512  # rows of a tile

# Called with the name and Triton's compiled kernel of each kernel compiled for meta tensors.
on_compile: Callable[[str, Any], None] | None = None
# Called with the kernel, Triton's compiled kernel, the programs and the run-time arguments of each
# launch on meta tensors.
on_launch: Callable[[Any, Any, int, tuple[Any, ...]], None] | None = None

# For kernels that are interpreted, or compiled only: few enough that a program walks over several
# tiles.
multiprocessors_without_gpu = 2
# Whether the compiler takes a limit of registers: NVIDIA's does, AMD's has no such option.
limits_registers = torch.version.hip is None


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. (Triton's own is made for kernels, and takes microseconds on the host.)"""
    return -(-a // b)


class Launch(NamedTuple):
    """One launch of a kernel, as :func:`observed_launches` notes it."""

    kernel: Any
    programs: int
    args: tuple[Any, ...]
    options: dict[str, Any]
    binary: Binary | None  # None in the interpreter, and for launches that are left to Triton


class _Observer(local):
    launches: list[Launch] | None = None


_observer = _Observer()


@contextmanager
def observed_launches() -> Iterator[list[Launch]]:
    """Note every launch of this thread on a GPU or in the interpreter."""
    before = _observer.launches
    launches: list[Launch] = []
    _observer.launches = launches
    try:
        yield launches
    finally:
        _observer.launches = before


def launch(kernel: Any, programs: int, like: torch.Tensor, *args: Any, **options: Any) -> None:
    """Launch ``programs`` instances of ``kernel`` on the device of ``like``; none for none.

    ``args`` are the kernel's run-time arguments, ``options`` its constants, ``num_warps`` and
    ``num_stages``.
    """
    if programs == 0:
        return
    binary = None
    if relaunch.is_on_gpu(like):
        index = like.device.index
        if index == relaunch.current_device():
            binary = _launch_on_gpu(kernel, programs, index, args, options)
        else:
            with torch.cuda.device(like.device):
                binary = _launch_on_gpu(kernel, programs, index, args, options)
    elif like.is_meta:
        compiled = kernel.warmup(*args, grid=(programs,), **compiler_options(options))
        if on_compile is not None:
            on_compile(kernel.__name__, compiled)
        if on_launch is not None:
            on_launch(kernel, compiled, programs, args)
        return
    elif like.is_cpu and is_interpreted(kernel):
        with _disable_current_modes():  # it computes by PyTorch's operations
            interpret(kernel, programs, args, options)
    else:
        raise ValueError(
            "Triton kernels run on CUDA tensors, or on CPU tensors if TRITON_INTERPRET=1 was set "
            f"before Triton was imported; got {like.device.type} tensors"
        )
    if _observer.launches is not None:
        _observer.launches.append(Launch(kernel, programs, args, options, binary))


_binaries: dict[relaunch.Key, Binary] = {}


def _launch_on_gpu(
    kernel: Any, programs: int, index: int, args: tuple[Any, ...], options: dict[str, Any]
) -> Binary | None:
    """Launch on the current device; return the binary, or None if the launch is left to Triton."""
    key = binary_key(kernel, index, args, options)
    if key is None or not relaunch.is_ordinary((kernel,)):
        kernel[(programs,)](*args, **compiler_options(options))
        return None
    binary = _binaries.get(key)
    if binary is not None:
        relaunch.run(binary, programs, relaunch.current_stream(index), args)
        return binary
    compiled = kernel[(programs,)](*args, **compiler_options(options))
    binary = binary_of(compiled, kernel, args, options)
    if binary is not None:
        _binaries[key] = binary
    return binary


def is_interpreted(kernel: Any) -> bool:
    """Return whether ``kernel`` runs in Triton's interpreter."""
    from triton.runtime.jit import JITFunction

    return not isinstance(kernel, JITFunction)


def interpret(kernel: Any, programs: int, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Run a kernel in the interpreter, with bfloat16 as float32: it would cut bits off instead of
    rounding, and multiply bits instead of numbers. Results are rounded once, as they are copied
    back."""
    widened: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def widen(value: Any) -> Any:
        if isinstance(value, descriptor_type()):
            beyond = _beyond_storage(value)
            return replace(value, base=widen(value.base)) if beyond is None else beyond
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


def _beyond_storage(descriptor: Any) -> Any | None:
    """Return a descriptor of a float32 copy if this one reaches beyond the storage of its base.

    That of two bfloat16 matrices does: the second one is read from its address. None for others.
    """
    base, sides = descriptor.base, zip(descriptor.shape, descriptor.strides, strict=True)
    reach = 1 + sum((size - 1) * stride for size, stride in sides)
    end = (base.storage_offset() + reach) * base.element_size()
    if base.dtype != torch.bfloat16 or end <= base.untyped_storage().nbytes():
        return None
    memory = (ctypes.c_int16 * reach).from_address(base.data_ptr())
    narrow = torch.frombuffer(memory, dtype=base.dtype)
    wide = narrow.as_strided(descriptor.shape, descriptor.strides).float().contiguous()
    return replace(descriptor, base=wide, strides=list(wide.stride()))


def register_limit(registers: int | None) -> dict[str, int | None]:
    """Return the option that limits the registers of a thread, where the compiler has one."""
    return {"maxnreg": registers} if limits_registers else {}


def compiler_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return a kernel's options with the word that a product and a sum become one instruction.

    That is Triton's default up to 3.9, which warns where nothing is said: from 3.10 on it is not.
    ``TRITON_DEFAULT_FP_FUSION`` in the environment decides in its place, as ever.
    """
    if "TRITON_DEFAULT_FP_FUSION" in os.environ:
        return options
    return {"enable_fp_fusion": True, **options}


# ---- Matrix products.


def num_tiles(rows: int, columns: int, config: TileConfig) -> int:
    """Return the number of programs of a product with a result of [rows, columns]."""
    return cdiv(rows, config.block_m) * cdiv(columns, config.block_n)


def num_programs(tiles: int, config: TileConfig, device: torch.device) -> int:
    """Return the number of programs that share ``tiles`` tiles of a persistent kernel."""
    if config.programs_per_sm is None:
        return tiles
    return min(tiles, config.programs_per_sm * _multiprocessors(device))


def _multiprocessors(device: torch.device) -> int:
    return _multiprocessors_of_gpu(device) if device.type == "cuda" else multiprocessors_without_gpu


@cache
def _multiprocessors_of_gpu(device: torch.device) -> int:
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def pointwise_options(config: TileConfig, *, limit_registers: bool) -> dict[str, Any]:
    """Return the options that all pointwise kernels share."""
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "GROUP_M": config.group_m,
        "num_warps": config.num_warps,
        **register_limit(config.max_registers if limit_registers else None),
    }


def product_options(config: TileConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Return the options that all matrix products share."""
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
        "PRECISION": dot_precision(dtype),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        **register_limit(config.max_registers),
    }


def tileable(matrix: torch.Tensor) -> torch.Tensor:
    """Return ``matrix`` as ``load_tile`` can read it: offsets in a tile are int32."""
    matrix = neighbours(matrix)
    return matrix if matrix.stride(0) < 2**31 // MAX_BLOCK else matrix.contiguous()


def divisible(*numbers: int) -> bool:
    """Return whether all are multiples of 16, as wide loads need of sides, strides, addresses."""
    return all(number % 16 == 0 for number in numbers)


def takes(config: TileConfig, rows: torch.Tensor, *weights: torch.Tensor) -> bool:
    """Return whether this config is for a product of ``rows`` and ``weights``: see ``ragged``."""
    return config.ragged or (
        divisible(rows.data_ptr(), rows.shape[1], rows.stride(0))
        and all(divisible(w.data_ptr(), *w.shape, w.stride(0)) for w in weights)
    )


def can_describe(*matrices: torch.Tensor) -> bool:
    """Return whether tensor-map descriptors can hold these: 16-byte addresses and strides."""
    return all(
        matrix.data_ptr() % 16 == 0
        and matrix.stride(0) * matrix.element_size() % 16 == 0
        and matrix.stride(0) > 0
        and matrix.stride(1) == 1
        for matrix in matrices
    )


def pair_stride(first: torch.Tensor, second: torch.Tensor) -> int | None:
    """Return the distance from ``first`` to ``second`` in elements, or None.

    It is the first stride of a descriptor of both as [2, R, C]. None where there can be no such
    descriptor: the matrices differ in shape or stride, or ``second`` does not lie behind ``first``.
    Strides of a descriptor are below 2^40 bytes.
    """
    distance = second.data_ptr() - first.data_ptr()
    alike = first.shape == second.shape and first.stride() == second.stride()
    if not alike or not 0 < distance < 2**40 or not can_describe(first, second):
        return None
    return distance // first.element_size()


def pair_source(
    first: torch.Tensor, second: torch.Tensor, block: list[int]
) -> tuple[Any, bool] | None:
    """Return a descriptor of two matrices as [2, R, C], for tiles of ``block``, and their order.

    The order is whether ``second`` is the first of the two in memory. None where one descriptor
    cannot hold both: see ``pair_stride``.
    """
    for swapped, (lower, upper) in enumerate(((first, second), (second, first))):
        stride = pair_stride(lower, upper)
        if stride is not None:
            shape, strides = [2, *lower.shape], [stride, *lower.stride()]
            return descriptor_type()(lower, shape, strides, block), bool(swapped)
    return None


def source(matrix: torch.Tensor, block: list[int], tma: bool) -> Any:
    """Return what ``load_tile`` reads tiles of ``block`` from: the matrix, or its descriptor."""
    if not tma:
        return matrix
    return descriptor_type()(matrix, list(matrix.shape), list(matrix.stride()), block)


def dot_precision(dtype: torch.dtype) -> str:
    """Return the precision of products of tiles.

    That of float32 is IEEE unless the user allows tf32, as of PyTorch's products.
    """
    if dtype != torch.float32:
        return "ieee"
    # The legacy flag sets the new one; reading the legacy one after the new was set is an error.
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
