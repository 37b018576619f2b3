"""Run the PTX of a kernel on tensors of the CPU, alone or as the stages of an op launch it.

:func:`execute` runs one launch. :func:`executing` is a context in which every stage that is called
on CPU tensors compiles its kernels for an architecture, with that architecture's configs, and runs
the PTX that comes out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.ptx.asynchronous import TensorMap
from tests.ptx.machine import Execution, Program, run_programs
from tests.ptx.memory import GlobalMemory
from tests.ptx.parse import PtxError, parse
from tests.ptx.results import remembered
from tokenflex_kernels import backend, launch, launch_configs

Argument = torch.Tensor | TensorMap | int | float | None


@lru_cache(maxsize=64)
def _program(ptx: str, shared_bytes: int | None) -> Program:
    return Program(parse(ptx), shared_bytes)


def execute(
    compiled: Any,
    arguments: Sequence[Argument] | Mapping[str, Any],
    programs: int,
    *,
    blocks: Iterable[int] | None = None,
    memory: Iterable[torch.Tensor] = (),
    shared_bytes: int | None = None,
) -> Execution:
    """Run a compiled kernel on CPU tensors, which it reads and writes in place.

    Args:
        compiled: what ``triton.compile`` or a kernel's ``warmup`` returns, or a PTX text.
        arguments: for a PTX text, one for each of its parameters in order: a tensor stands for its
            address, a ``TensorMap`` for itself; those left out are 0. For a compiled kernel, its
            arguments by name, ``TensorDescriptor`` included; constants may be among them.
        programs: of the launch, in one dimension.
        blocks: the numbers of the programs to run; all by default.
        memory: further tensors that the kernel may access, such as one that is only reached by the
            stride of a descriptor.
        shared_bytes: of shared memory that a program has: by default what a compiled kernel asks
            for, and for a text as much as there is.

    Returns:
        What was observed; see :class:`Execution`.

    Raises:
        PtxError: an access out of bounds or unaligned, control flow that is not uniform, a register
            that was never written, an instruction that is not known, a wait that never ends.
    """
    if isinstance(compiled, str):
        return _run(compiled, shared_bytes, list(arguments), programs, blocks, memory)
    flat = (
        _flat_arguments(compiled, arguments) if isinstance(arguments, Mapping) else list(arguments)
    )
    return _run(compiled.asm["ptx"], compiled.metadata.shared, flat, programs, blocks, memory)


def _run(
    text: str,
    shared_bytes: int | None,
    arguments: list[Argument],
    programs: int,
    blocks: Iterable[int] | None,
    memory: Iterable[torch.Tensor],
) -> Execution:
    program = _program(text, shared_bytes)
    names = program.kernel.parameters
    if len(arguments) > len(names):
        raise PtxError(f"{program.kernel.name} has {len(names)} parameters, got {len(arguments)}")
    known = GlobalMemory()
    values: dict[str, Any] = dict.fromkeys(names, 0)
    for name, argument in zip(names, arguments, strict=False):
        if isinstance(argument, torch.Tensor):
            known.add(name, argument)
            values[name] = argument.data_ptr()
        elif isinstance(argument, float):
            values[name] = int(np.float32(argument).view(np.uint32))
        else:
            values[name] = 0 if argument is None else argument
    for index, tensor in enumerate([*_described(arguments), *memory]):
        known.add(f"memory {index}", tensor)
    return run_programs(program, values, known, programs, blocks)


def _describe(arguments: list[Argument], programs: int, blocks: Any) -> str:
    """Return a text of all that decides about a result, beside the bytes of tensors."""
    parts = [f"{programs} programs, {blocks}"]
    for argument in arguments:
        tensor = argument
        if isinstance(argument, TensorMap):
            tensor = argument.tensor
            parts.append(f"{argument.shape} {argument.strides} {argument.box} {argument.swizzle}")
        if isinstance(tensor, torch.Tensor):
            place = tensor.storage_offset(), tensor.data_ptr() % 64
            parts.append(f"{tensor.dtype} {tensor.shape} {tensor.stride()} {place}")
        else:
            parts.append(repr(argument))
    return "\n".join(parts)


def _described(arguments: Sequence[Argument]) -> list[torch.Tensor]:
    """Return the tensors that maps among the arguments were made of."""
    maps = [argument for argument in arguments if isinstance(argument, TensorMap)]
    return [described.tensor for described in maps if described.tensor is not None]


def tensor_map(descriptor: TensorDescriptor, box: Sequence[int], swizzle: int) -> TensorMap:
    """Return the map that the driver makes of a descriptor.

    Args:
        descriptor: of a tensor.
        box: elements that one instruction moves, of each dimension.
        swizzle: in bytes.
    """
    if descriptor.padding != "zero":
        raise PtxError("descriptors that pad with NaN are not supported")
    item = descriptor.base.element_size()
    strides = tuple(step * item for step in descriptor.strides)
    return TensorMap(
        descriptor.base.data_ptr(),
        tuple(descriptor.shape),
        strides,
        tuple(box),
        item,
        swizzle,
        descriptor.base,
    )


_SWIZZLE_BYTES = (0, 32, 64, 128)  # by the number that Triton's metadata has


def _flat_arguments(compiled: Any, arguments: Mapping[str, Any]) -> list[Argument]:
    """Return the arguments of a compiled kernel in the order of its PTX parameters."""
    maps = iter(getattr(compiled.metadata, "tensordesc_meta", None) or ())
    flat: list[Argument] = []
    for name, type in compiled.src.signature.items():
        if type == "constexpr":
            continue
        value = arguments[name]
        if isinstance(value, TensorDescriptor):
            described = next(maps, None)
            if described is None:
                raise PtxError(f"{name}: this architecture has no tensor maps")
            swizzle = _SWIZZLE_BYTES[described["swizzle"]]
            flat.append(tensor_map(value, described["block_size"], swizzle))
            flat += [*value.shape, *value.strides]
        else:
            flat.append(value)
    return flat


class _Target:
    """A driver with which Triton compiles for an architecture, on a device number of its own."""

    def __init__(self, number: int) -> None:
        self._number = number

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._number, 32)

    def get_current_device(self) -> int:
        return self._number  # Triton keeps the binaries of each device

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_kernel(
    architecture: str, kernel: Any, arguments: Sequence[Any], programs: int, **options: Any
) -> tuple[Any, list[Argument]]:
    """Compile a Triton kernel for an architecture as a launch on a GPU would.

    Args:
        architecture: "sm_90".
        kernel: a ``triton.jit`` function.
        arguments: of the launch, tensors on the CPU among them.
        programs: of the launch.
        options: constants, ``num_warps`` and the like.

    Returns:
        What Triton compiled, and the arguments in the order of its PTX parameters, for
        :func:`execute`.
    """
    with _compiling_for(architecture):
        compiled = kernel.warmup(*arguments, grid=(programs,), **launch.compiler_options(options))
    named = {**dict(zip(kernel.arg_names, arguments, strict=False)), **options}
    return compiled, _flat_arguments(compiled, named)


@contextmanager
def executing(
    architecture: str,
    *,
    memory: Sequence[torch.Tensor] = (),
    blocks: Callable[[int], Iterable[int]] | None = None,
    edit: Callable[[str, str], str] | None = None,
) -> Iterator[list[Execution]]:
    """Compile and run the kernels of every stage that is called on CPU tensors in this context.

    Memory that a stage allocates is filled with NaN first, so that what is never written shows.

    Args:
        architecture: to compile for, "sm_90".
        memory: further tensors that kernels may access: see :func:`execute`.
        blocks: a function from the number of programs to the numbers of those to run.
        edit: a function of a kernel's name and PTX that returns the PTX to run instead.

    Yields:
        The executions so far, one for each launch.
    """
    executions: list[Execution] = []

    def run(kernel: Any, programs: int, like: torch.Tensor, *args: Any, **options: Any) -> None:
        if programs == 0:
            return
        compiled, flat = compile_kernel(architecture, kernel, args, programs, **options)
        text, shared_bytes = compiled.asm["ptx"], compiled.metadata.shared
        if edit is not None:
            text = edit(kernel.__name__, text)
        chosen = None if blocks is None else list(blocks(programs))
        tensors = [value for value in flat if isinstance(value, torch.Tensor)]
        execution = remembered(
            text,
            _describe(flat, programs, chosen),
            [*tensors, *_described(flat), *memory],
            lambda: _run(text, shared_bytes, flat, programs, chosen, memory),
        )
        execution.config = " ".join(f"{name}={value}" for name, value in options.items())
        executions.append(execution)

    with _replaced(run, architecture), _filled():
        yield executions


@contextmanager
def _filled() -> Iterator[None]:
    """Let PyTorch fill new memory with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def _compiling_for(architecture: str) -> Iterator[None]:
    """Let Triton compile for ``architecture`` without a GPU."""
    before = driver._active
    driver.set_active(_Target(int(architecture.removeprefix("sm_"))))
    try:
        yield
    finally:
        driver._active = before


@contextmanager
def _replaced(run: Any, architecture: str) -> Iterator[None]:
    """Let stages take Triton's kernels and ``architecture``'s configs, and launch by ``run``."""

    def choose(op: str, device: Any, beyond: str | None, *variables: Any) -> str:
        is_triton = "triton" in backend.IMPLEMENTATIONS[op] and not beyond
        return "triton" if is_triton else original_choose(op, device, beyond, *variables)

    original_choose, original_launch = backend._choose, launch.launch
    changed: list[tuple[Any, str, Any, Any]] = [
        (backend, "_choose", original_choose, choose),
        (
            launch_configs,
            "architecture",
            launch_configs.architecture,
            lambda device: architecture,
        ),
    ]
    for name, module in list(sys.modules.items()):
        if name.startswith("tokenflex_kernels") and vars(module).get("launch") is original_launch:
            changed.append((module, "launch", original_launch, run))
    for module, name, _, replacement in changed:
        setattr(module, name, replacement)
    try:
        yield
    finally:
        for module, name, original, _ in changed:
            setattr(module, name, original)
