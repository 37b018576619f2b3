"""Record what a stage launches on meta tensors, as launches whose machine code can be walked."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from tokenflex_kernels import launch as launching
from tokenflex_kernels.budget.model import Resources
from tokenflex_kernels.budget.sass import Instruction, parse_sass
from tokenflex_kernels.budget.state import WARP, Buffer, Launch, TensorMap
from tokenflex_kernels.gpus import TENSOR_FLOPS

# Where a kernel's arguments begin in bank 0 of its constants, by compute capability.
FIRST_ARGUMENT = {90: 0x210}
# The words of the same bank that hold the address of the arguments, which tensor maps are read by.
ADDRESS_OF_ARGUMENTS = {90: 0x198}
ARGUMENTS = 1 << 60  # that address, behind all buffers
STACK_POINTER, STACK = {90: 0x28}, 1 << 24  # the word that holds the end of a thread's stack
# Words of the same bank: the sides of a block, then those of the grid.
BLOCK_SIDES, GRID_SIDES = (0x0, 0x4, 0x8), (0xC, 0x10, 0x14)
_SIZES = {"u8": 1, "u16": 2, "u32": 4, "u64": 8, "f32": 4, "f64": 8, "b8": 1, "b32": 4, "b64": 8}


@dataclass(frozen=True)
class Recorded:
    """One launch of a kernel.

    Attributes:
        kernel: its name.
        launch: what :func:`walk` takes.
        resources: of a block.
        unique_bytes: of all tensors among the arguments, each argument counted once.
    """

    kernel: str
    launch: Launch
    resources: Resources
    unique_bytes: int


@contextmanager
def recording(capability: int, multiprocessors: int) -> Iterator[list[Recorded]]:
    """Record the launches on meta tensors in this context.

    Args:
        capability: that Triton compiles for, 90 for sm_90.
        multiprocessors: of the GPU, which share the tiles of persistent kernels.
    """
    recorded: list[Recorded] = []

    def record(kernel: Any, compiled: Any, programs: int, arguments: tuple[Any, ...]) -> None:
        recorded.append(_record(capability, kernel, compiled, programs, arguments))

    before = launching.on_launch, launching.multiprocessors_without_gpu
    launching.on_launch, launching.multiprocessors_without_gpu = record, multiprocessors
    try:
        yield recorded
    finally:
        launching.on_launch, launching.multiprocessors_without_gpu = before


def _record(
    capability: int, kernel: Any, compiled: Any, programs: int, arguments: tuple[Any, ...]
) -> Recorded:
    signature = compiled.src.signature
    given = [
        argument
        for name, argument in zip(kernel.arg_names, arguments, strict=False)
        if signature[name] != "constexpr"
    ]
    memory: list[Buffer] = []
    # Of each parameter; None for those that are unknown.
    values: list[int | TensorMap | None] = []
    boxes = iter(compiled.metadata.tensordesc_meta or ())
    unique_bytes = 0
    for argument in given:
        if isinstance(argument, torch.Tensor):
            values.append(Launch.address(len(memory)))
            memory.append(_buffer(argument))
            unique_bytes += argument.nbytes
        elif isinstance(argument, (bool, int)):
            values.append(argument)
        elif isinstance(argument, float):
            values.append(None)
        else:  # a tensor descriptor: the map itself, then sides and strides
            box = next(boxes)
            tensor_map = TensorMap(argument.shape, box["block_size"], box["elem_size"])
            values += [tensor_map, *argument.shape, *argument.strides]
            unique_bytes += argument.base.nbytes
    code, registers = _machine_code(compiled.asm["cubin"])
    warps = compiled.metadata.num_warps
    constants, tensor_maps = _arguments(capability, compiled.asm["ptx"], values)
    return Recorded(
        kernel.__name__,
        Launch(
            code,
            {
                **dict(zip(BLOCK_SIDES, (WARP * warps, 1, 1), strict=True)),
                **dict(zip(GRID_SIDES, (programs, 1, 1), strict=True)),
                STACK_POINTER[capability]: STACK,
                **constants,
            },
            memory,
            warps,
            programs,
            TENSOR_FLOPS[capability],
            tensor_maps,
        ),
        Resources(registers, compiled.metadata.shared, warps),
        unique_bytes,
    )


def _buffer(tensor: torch.Tensor) -> Buffer:
    first = int(tensor.storage_offset())
    num_bytes = int(tensor.untyped_storage().nbytes()) - first * tensor.element_size()
    if tensor.device.type == "meta":
        return Buffer(num_bytes)
    behind = tensor.as_strided((num_bytes // tensor.element_size(),), (1,), first)
    return Buffer(num_bytes, behind.view(torch.uint8).numpy())


def _arguments(
    capability: int, ptx: str, values: list[int | TensorMap | None]
) -> tuple[dict[int, int], dict[int, TensorMap]]:
    """Return the words of bank 0 that hold the arguments, laid out as the PTX declares them.

    Returns:
        The words by offset, and the tensor maps by address.
    """
    entry = re.search(r"\.entry \w+\((.*?)\)", ptx, re.S)
    if entry is None:
        raise ValueError("the PTX has no entry")
    pointer = ADDRESS_OF_ARGUMENTS[capability]
    constants = {pointer: ARGUMENTS & 0xFFFFFFFF, pointer + 4: ARGUMENTS >> 32}
    tensor_maps = {}
    first = offset = FIRST_ARGUMENT[capability]
    parameters = re.findall(
        r"\.param(?: \.align (\d+))? \.(\w+)(?: \.ptr[^\w%]*(?:\.\w+ )*(?:\.align \d+ )?)?"
        r"\s*\w+(?:\[(\d+)\])?",
        entry[1],
    )
    for k, (align, kind, count) in enumerate(parameters):
        size = _SIZES[kind] * int(count or 1)
        step = int(align or _SIZES[kind])
        offset = -(-offset // step) * step
        # Those behind the arguments are memory that Triton gives, of which our kernels need none.
        value = values[k] if k < len(values) else 0
        if isinstance(value, TensorMap):
            tensor_maps[ARGUMENTS + offset - first] = value
        elif value is not None:
            for word in range(max(1, size // 4)):
                constants[offset + 4 * word] = value >> 32 * word & 0xFFFFFFFF
        offset += size
    if len(parameters) < len(values):
        raise ValueError(f"{len(values)} arguments for {len(parameters)} parameters of the PTX")
    return constants, tensor_maps


@lru_cache(maxsize=64)
def _machine_code(cubin: bytes) -> tuple[list[Instruction], int]:
    """Return the instructions and the registers of a cubin's kernel, by Triton's cuobjdump."""
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        output = subprocess.run(
            [cuobjdump, "-sass", "--dump-resource-usage", file.name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    usage = re.search(r"REG:(\d+)", output)
    if usage is None:
        raise RuntimeError(f"cuobjdump reported no registers:\n{output[:2000]}")
    return parse_sass(output), int(usage[1])
