"""Loads and stores of threads."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.ptx.machine import Block, Program, Step, decodes
from tests.ptx.operands import Mask, Vector, bits_of, registers_in
from tests.ptx.parse import Instruction, PtxError


@decodes("ld.param")
def _load_parameter(instruction: Instruction, program: Program) -> Step:
    target, address = instruction.operands
    name = address.strip("[] \t").partition("+")[0].strip()
    if name not in program.parameters or "+" in address:
        raise PtxError(f"no parameter {address}")
    size = bits_of(instruction.type)
    extend, type = _extension(instruction, program, target)
    write = program.operands.writer(target, type)
    dtype = np.dtype(f"u{size // 8}")

    def step(block: Block, mask: Mask) -> None:
        bits = block.arguments[name] & ((1 << size) - 1)
        write(block, extend(np.full(program.threads, bits, dtype)), mask)

    return step


def _extension(
    instruction: Instruction, program: Program, register: str
) -> tuple[Callable[[Vector], Vector], str]:
    """Return a function from loaded bits to those of a register that may be wider, and its type.

    Signed types are extended by their sign, others by zeros.
    """
    size = bits_of(instruction.type)
    width = max(32, size, program.kernel.bits_of(register) or 0)
    wide = np.dtype(f"u{width // 8}")
    if instruction.type[0] != "s":
        return lambda bits: bits.astype(wide, copy=False), f"b{width}"
    signed, wide_signed = np.dtype(f"i{size // 8}"), np.dtype(f"i{width // 8}")
    return lambda bits: bits.view(signed).astype(wide_signed).view(wide), f"b{width}"


@decodes("ld.global", "ld.shared", "ld.shared::cta")
def _load(instruction: Instruction, program: Program) -> Step:
    operand, address = instruction.operands[:2]
    read_address = program.operands.address(address)
    registers = registers_in(operand)
    size = bits_of(instruction.type) // 8
    extend, type = _extension(instruction, program, registers[0])
    writers = [program.operands.writer(name, type) for name in registers]
    is_global = "global" in instruction.words

    def step(block: Block, mask: Mask) -> None:
        threads = slice(None) if mask is None else np.nonzero(mask)[0]
        addresses = read_address(block)[threads]
        if is_global:
            values = block.memory.load(addresses, size, len(registers), block)
            block.execution.bytes_loaded += values.nbytes
        else:
            values = block.shared.load(addresses, size, len(registers), block.warp_of[threads])
        values = extend(values)
        for index, write in enumerate(writers):
            if mask is None:
                write(block, values[:, index], mask)
            else:
                column = np.zeros(program.threads, values.dtype)
                column[threads] = values[:, index]
                write(block, column, mask)

    return step


@decodes("st.global", "st.shared", "st.shared::cta")
def _store(instruction: Instruction, program: Program) -> Step:
    address, operand = instruction.operands[:2]
    write_address = program.operands.address(address)
    type = f"b{bits_of(instruction.type)}"
    readers = [program.operands.reader(name, type) for name in registers_in(operand)]
    dtype = np.dtype(f"u{bits_of(type) // 8}")
    is_global = "global" in instruction.words

    def step(block: Block, mask: Mask) -> None:
        threads = slice(None) if mask is None else np.nonzero(mask)[0]
        addresses = write_address(block)[threads]
        values = np.stack([read(block)[threads].astype(dtype) for read in readers], 1)
        if is_global:
            block.memory.store(addresses, values, block)
            block.execution.bytes_stored += values.nbytes
        else:
            block.shared.store(addresses, values, block.warp_of[threads])

    return step
