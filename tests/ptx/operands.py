"""Registers, and operands as vectors: one element for each thread of a block.

Registers hold bits: uint32 for types of up to 32 bits, uint64 for those of 64 bits, bool for
predicates. A :data:`Reader` gives the bits of an operand the meaning of a type, and a
:data:`Writer` turns a result back into bits. Both are made once for each instruction.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from tests.ptx.parse import PtxError

Vector = np.ndarray
Mask = np.ndarray | None  # the threads that take part; None for all
Reader = Callable[[Any], Vector]  # of a block
Writer = Callable[[Any, Vector, Mask], None]

POISON = 0xFFC0DEAD  # what a thread finds where it never wrote: a NaN in float32
SHARED_WINDOW = 0  # a generic address of shared memory is the address itself
# Addresses of parameters, which only tensor maps have: above all of shared memory, and of 32 bits,
# in which Triton 3.9 keeps them.
PARAMETER_WINDOW = 1 << 31

_BITS = {"pred": 1, "f16x2": 32, "bf16x2": 32, "tf32": 32}


@cache
def bits_of(type: str) -> int:
    """Return the size of a type in bits."""
    return _BITS[type] if type in _BITS else int(re.sub(r"\D", "", type))


class Registers:
    """The registers of all threads of a block.

    Attributes:
        values: the bits by name; a register that was never written is absent.
        in_flight: registers that an asynchronous product will write, by name.
        unfenced: registers that were written since the last wgmma.fence.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.values: dict[str, Vector] = {}
        self.in_flight: dict[str, Any] = {}
        self.unfenced: set[str] = set()

    def missing(self, name: str) -> PtxError:
        if name in self.in_flight:
            return PtxError(f"{name} is read while a wgmma may still write it")
        return PtxError(f"{name} is read, but was never written")

    def write(self, name: str, bits: Vector, mask: Mask) -> None:
        self.unfenced.add(name)
        if mask is not None:
            old = self.values.get(name)
            if old is None:
                if name in self.in_flight:
                    raise PtxError(f"{name} is written while a wgmma may still write it")
                old = bits.dtype.type(POISON if bits.dtype != np.bool_ else False)
            bits = np.where(mask, bits, old)
        elif self.in_flight:
            self.in_flight.pop(name, None)
        self.values[name] = bits


def registers_in(operand: str) -> list[str]:
    """Return the elements of a vector operand, "{%r1, %r2}", or the operand alone."""
    return [part.strip() for part in operand.strip("{} \t\n").split(",")]


def interpret(bits: Vector, type: str) -> Vector:
    """Return the bits of a register as values of ``type``."""
    return _view(type)(bits)


@cache
def _view(type: str) -> Callable[[Vector], Vector]:
    """Return the function from bits to values of a type."""
    size, is_signed = bits_of(type), type[0] == "s"
    if type == "pred":
        return lambda bits: bits
    if size == 64:

        def view_wide(bits: Vector) -> Vector:
            if bits.dtype != np.uint64:
                raise PtxError(f"a register of 32 bits is read as {type}")
            return bits.view(np.int64) if is_signed else bits

        return view_wide
    narrow: dict[str, Callable[[Vector], Vector]] = {
        "s32": lambda bits: bits.view(np.int32),
        "f32": lambda bits: bits.view(np.float32),
        # The hardware reads no other bits of these.
        "tf32": lambda bits: (bits & np.uint32(0xFFFFE000)).view(np.float32),
        "bf16": lambda bits: (bits << np.uint32(16)).view(np.float32),
        "f16": lambda bits: bits.astype(np.uint16).view(np.float16),
        "s16": lambda bits: bits.astype(np.uint16).view(np.int16),
        "s8": lambda bits: bits.astype(np.uint8).view(np.int8),
    }
    dtype = {8: np.uint8, 16: np.uint16, 32: np.uint32}[size]
    view = narrow.get(type, lambda bits: bits.astype(dtype, copy=False))
    return lambda bits: view(bits if bits.dtype == np.uint32 else bits.astype(np.uint32))


@cache
def _pack(type: str) -> Callable[[Vector], Vector]:
    """Return the function from values of a type to the bits of a register."""
    size = bits_of(type)
    if type == "pred":
        return lambda values: values.astype(np.bool_, copy=False)
    if type == "bf16":
        return round_to_bf16
    if size >= 32:
        dtype = np.uint64 if size == 64 else np.uint32
        return lambda values: (
            values if values.dtype == dtype else np.ascontiguousarray(values).view(dtype)
        )
    if type == "f16":
        return lambda values: np.ascontiguousarray(values).view(np.uint16).astype(np.uint32)
    if type[0] == "s":  # wider registers hold the sign
        return lambda values: values.astype(np.int32).view(np.uint32)
    return lambda values: values.astype(np.uint32)


def round_to_bf16(values: Vector) -> Vector:
    """Return the bits of float32 values, rounded to nearest even in bfloat16."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FFF), rounded)


_SPECIAL: dict[str, Reader] = {
    "%tid.x": lambda block: block.lanes,
    "%laneid": lambda block: block.lanes % np.uint32(32),
    "%warpid": lambda block: block.lanes // np.uint32(32),
    "%ntid.x": lambda block: np.full_like(block.lanes, len(block.lanes)),
    "%ctaid.x": lambda block: np.full_like(block.lanes, block.number),
    "%nctaid.x": lambda block: np.full_like(block.lanes, block.programs),
    **dict.fromkeys(
        [f"%{name}.{axis}" for name in ("tid", "ctaid") for axis in "yz"],
        lambda block: np.zeros_like(block.lanes),
    ),
    **dict.fromkeys(
        [f"%{name}.{axis}" for name in ("ntid", "nctaid") for axis in "yz"],
        lambda block: np.ones_like(block.lanes),
    ),
    "%cluster_ctarank": lambda block: np.zeros_like(block.lanes),
}

_NUMBER = re.compile(r"-?(0[xX][0-9a-fA-F]+|\d+)U?")


class Operands:
    """Make readers, writers and addresses of one kernel's operands."""

    def __init__(self, threads: int, symbols: dict[str, int]) -> None:
        self.threads = threads
        self.symbols = symbols  # addresses of shared variables and parameters

    def reader(self, operand: str, type: str) -> Reader:
        """Return a function that reads ``operand`` as ``type``."""
        constant = self._constant(operand, type)
        if constant is not None:
            return lambda block: constant
        view = _view(type)
        if operand in _SPECIAL:
            special = _SPECIAL[operand]
            return lambda block: view(special(block))
        if re.match(r"[^%\w$]", operand):
            raise PtxError(f"{operand!r} is no operand of type {type}")

        def read(block: Any) -> Vector:
            bits = block.registers.values.get(operand)
            if bits is None:
                raise block.registers.missing(operand)
            return view(bits)

        return read

    def _constant(self, operand: str, type: str) -> Vector | None:
        if operand in self.symbols:
            dtype = np.uint64 if bits_of(type) == 64 else np.uint32
            return np.full(self.threads, self.symbols[operand], dtype)
        if operand[:2] in ("0f", "0F") and len(operand) == 10:
            bits = np.full(self.threads, int(operand[2:], 16), np.uint32)
            return bits.view(np.float32) if type == "f32" else bits
        if not _NUMBER.fullmatch(operand):
            return None
        value = int(operand.rstrip("U"), 0)
        if type == "pred":
            return np.full(self.threads, value != 0)
        size = max(32, bits_of(type))
        bits = np.full(
            self.threads, value & ((1 << size) - 1), np.uint64 if size == 64 else np.uint32
        )
        return interpret(bits, type)

    def writer(self, register: str, type: str) -> Writer:
        """Return a function that writes values of ``type`` into ``register``; "_" drops them."""
        if register == "_":
            return lambda block, values, mask: None

        pack = _pack(type)

        def write(block: Any, values: Vector, mask: Mask) -> None:
            block.registers.write(register, pack(values), mask)

        return write

    def address(self, operand: str) -> Reader:
        """Return a function that computes the address "[register + offset]", int64."""
        match = re.fullmatch(r"\[\s*([%$@\w.]+)\s*(?:([+-])\s*(-?\w+))?\s*\]", operand)
        if match is None:
            raise PtxError(f"no address: {operand!r}")
        base, sign, digits = match.groups()
        offset = np.int64(int(digits or "0", 0) * (-1 if sign == "-" else 1))
        constant = self._constant(base, "b64")
        if constant is not None:
            address = constant.astype(np.int64) + offset
            return lambda block: address

        def read(block: Any) -> Vector:
            bits = block.registers.values.get(base)
            if bits is None:
                raise block.registers.missing(base)
            return bits.astype(np.int64) + offset

        return read
