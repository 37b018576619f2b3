"""The state of a block while its machine code is walked: registers, memory, counts, clocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

import numpy as np

from tokenflex_kernels.budget.integers import MASK, UNKNOWN, Lanes, Value, either, pair
from tokenflex_kernels.budget.sass import Instruction, Operand, next_register

WARP = 32
SHARED_BYTES = 128  # that shared memory moves in a cycle
# Cycles from issue to result, by pipe. Assumptions, of the order that microbenchmarks of Hopper
# report; "table" is a load of what every block reads, from L2; "repeated" is one of what the block
# has loaded before, as its first lane shows, from the first-level cache.
LATENCY = {
    "float": 4,
    "integer": 5,
    "imad": 5,
    "uniform": 10,
    "special": 20,
    "shared": 30,
    "control": 5,
    "tensor": 30,
    "repeated": 40,
    "table": 250,
    "global": 800,
}
_BUFFER_BITS = 40  # each buffer starts at a multiple of 2^40


class DependsOnDataError(RuntimeError):
    """A branch, its target, an address, or the use of memory or a tensor core depends on data."""


@dataclass(frozen=True)
class Buffer:
    """Memory that an argument points to.

    Attributes:
        num_bytes: its size; an access beyond it is an error.
        content: its bytes, where control flow depends on them.
    """

    num_bytes: int
    content: Lanes | None = None


@dataclass(frozen=True)
class TensorMap:
    """A tensor in memory as the copy engine gets it, by boxes; the last dimension lies together.

    Attributes:
        shape: of the tensor.
        box: of what one instruction moves.
        itemsize: bytes of an element.
    """

    shape: Sequence[int]
    box: Sequence[int]
    itemsize: int

    def bytes_within(self, start: Sequence[int]) -> int:
        """Return the bytes of the box that starts there, without what is outside of the tensor."""
        return self.itemsize * prod(
            max(0, min(first + length, side) - max(first, 0))
            for first, length, side in zip(start, self.box, self.shape, strict=True)
        )


@dataclass(frozen=True)
class Launch:
    """One compiled kernel with its arguments.

    Attributes:
        code: its instructions.
        constants: words of bank 0 by offset, among them the arguments; others are unknown.
        buffers: the memory that pointers in ``constants`` lead to, see :meth:`address`.
        num_warps: of a block.
        programs: blocks of the grid.
        tensor_flops: that the tensor cores of a multiprocessor do in a cycle.
        tensor_maps: among the arguments, by their address.
    """

    code: Sequence[Instruction]
    constants: dict[int, int]
    buffers: Sequence[Buffer]
    num_warps: int
    programs: int
    tensor_flops: int
    tensor_maps: Mapping[int, TensorMap] = field(default_factory=dict)

    @staticmethod
    def address(buffer: int) -> int:
        """Return the address of a buffer, by its place in ``buffers``."""
        return (buffer + 1) << _BUFFER_BITS


class Totals(NamedTuple):
    """Counts of the instructions and bytes of one block, and its time alone.

    Attributes:
        instructions: warp-instructions by pipe.
        loaded, stored: bytes of global memory, without those of tables. A bulk load counts whole
            boxes, zeros outside of the tensor included; a bulk store what lies in the tensor.
        sectors: pieces of 32 bytes that loads of global memory touch, each warp by itself.
        shared_cycles: for which shared memory is busy, operands of tensor cores included.
        flops: of the tensor cores.
        cycles: of the block, alone on its multiprocessor.
    """

    instructions: Counter[str]
    loaded: int
    stored: int
    sectors: int
    shared_cycles: float
    flops: int
    cycles: float

    @property
    def issued(self) -> int:
        """All warp-instructions."""
        return sum(self.instructions.values())


class Group:
    """Lanes that are at the same instruction, and their clock."""

    def __init__(self, pc: int, lanes: Lanes, clock: float) -> None:
        self.pc = pc
        self.clock = clock
        self.set_lanes(lanes)

    def set_lanes(self, lanes: Lanes) -> None:
        """Change the lanes of the group."""
        self.lanes = lanes
        self.warps = int(lanes.reshape(-1, WARP).any(1).sum())


@dataclass
class Pending:
    """Asynchronous work: when what was issued, and each group that was committed, completes."""

    issued: float = 0.0
    committed: list[float] = field(default_factory=list)

    def commit(self) -> None:
        """Make a group of all that was issued since the last one."""
        self.committed.append(self.issued)

    def all_but(self, last: int) -> float:
        """Return when all groups but the ``last`` ones are complete."""
        return max(self.committed[: len(self.committed) - last], default=0.0)


class State:
    """A block of ``launch``: the values of all lanes' registers, and what was counted so far."""

    def __init__(self, launch: Launch, program: int) -> None:
        self.launch = launch
        self.program = program
        self.num_lanes = WARP * launch.num_warps
        self.lane = np.arange(self.num_lanes, dtype=np.int64)
        self.values: dict[str, Value] = {}
        self.ready: dict[str, float] = {}  # when a register has its value
        self.copies, self.products = Pending(), Pending()
        self.arrivals: dict[int, float] = {}  # when the copies that a barrier counts have arrived
        self.touched: set[tuple[int, int]] = set()  # buffers and sectors that were loaded
        self.tensor_free = 0.0
        self.instructions: Counter[str] = Counter()
        self.loaded = self.stored = self.sectors = self.flops = 0
        self.shared_cycles = 0.0
        self.end = 0.0

    def totals(self) -> Totals:
        """Return what was counted."""
        return Totals(
            self.instructions,
            self.loaded,
            self.stored,
            self.sectors,
            self.shared_cycles,
            self.flops,
            self.end,
        )

    def full(self, value: int) -> Lanes:
        """Return ``value`` for every lane."""
        return np.full(self.num_lanes, value, np.int64)

    # ---- Registers and predicates.

    def read(self, operand: Operand, high: bool = False) -> Value:
        """Return the value of an operand, or with ``high`` the word behind it."""
        value: Value = None
        if operand.kind == "register":
            name = operand.name
            value = self.values.get(next_register(name) if high else name) if name else self.full(0)
        elif operand.kind == "predicate":
            value = self.values.get(operand.name) if operand.name else self.full(1)
        elif operand.kind == "number":
            number = operand.number
            value = self.full((MASK if number >= 2**31 else 0) if high else number)
        elif operand.kind == "constant":
            constant = self.launch.constants.get(operand.number + 4 * high)
            value = None if constant is None else self.full(constant)
        if value is None or not (operand.negative or operand.inverted):
            return value
        if operand.kind == "predicate":
            changed = 1 - value
        elif operand.inverted:
            changed = MASK - value
        else:  # of 33 bits, as carries need it: -0 is 2^32
            changed = 2**32 - value
        return np.where(value < 0, UNKNOWN, changed)

    def write(self, name: str, value: Value, lanes: Lanes, guard: Value = None) -> None:
        """Write a register or predicate in ``lanes``; where the guard is unknown, it may stay."""
        before = self.values.get(name)
        if value is None and before is None:
            return
        if guard is not None and (guard[lanes] < 0).any():
            unsure = self._or_unknown(either(before, value))
            value = np.where(guard < 0, unsure, self._or_unknown(value))
        if not lanes.all():
            value = np.where(lanes, self._or_unknown(value), self._or_unknown(before))
        self.values[name] = value

    def _or_unknown(self, value: Value) -> Lanes:
        return self.full(UNKNOWN) if value is None else value

    def lanes_where(self, condition: Value, lanes: Lanes, instruction: Instruction) -> Lanes:
        """Return those of the lanes where a predicate holds that says what is counted.

        Raises:
            DependsOnDataError: it depends on data in one of them.
        """
        if condition is None or (condition[lanes] < 0).any():
            raise DependsOnDataError(f"an access depends on data: {instruction}")
        return lanes & (condition != 0)

    def known_in(self, value: Value, lanes: Lanes, instruction: Instruction) -> Lanes:
        """Return an address, or a part of one, that is known in the lanes.

        Raises:
            DependsOnDataError: it depends on data in one of them.
        """
        if value is None or (value[lanes] < 0).any():
            raise DependsOnDataError(f"an address depends on data: {instruction}")
        return value

    # ---- Memory.

    def sum_of(self, address: Operand) -> Value:
        """Return the sum of an address's terms in 64 bits, or UNKNOWN; None for all lanes."""
        total, unsure = self.full(0), np.zeros(self.num_lanes, bool)
        for term, factor in address.terms:
            value = self.read(term)
            if term.kind == "number":
                value = self.full(term.number - (term.number >> 31 << 32))
            elif term.wide and term.name and value is not None:
                high = self.read(term, high=True)
                if high is None:
                    return None
                unsure |= (value < 0) | (high < 0)
                value = pair(value, high).astype(np.int64)
            if value is None:
                return None
            if term.kind == "register":
                unsure |= value < 0
            total = total + value * factor
        return np.where(unsure, UNKNOWN, total)

    def access(
        self, instruction: Instruction, address: Operand, lanes: Lanes
    ) -> tuple[Buffer, Lanes]:
        """Return the buffer that the lanes access, and their offsets in it.

        Raises:
            DependsOnDataError: the address depends on data.
            RuntimeError: the access is outside of all buffers, or reaches beyond one.
        """
        num_bytes = instruction.num_bytes
        place = self.known_in(self.sum_of(address), lanes, instruction)
        number = int(place[lanes][0] >> _BUFFER_BITS) - 1
        if not 0 <= number < len(self.launch.buffers):
            raise RuntimeError(f"{instruction} of program {self.program} is outside of all buffers")
        buffer = self.launch.buffers[number]
        offsets = place - self.launch.address(number)
        used = offsets[lanes]
        if used.min() < 0 or used.max() + num_bytes > buffer.num_bytes:
            raise RuntimeError(
                f"{instruction} of program {self.program} accesses bytes {used.min()} to"
                f" {used.max() + num_bytes} of a buffer of {buffer.num_bytes}"
            )
        return buffer, offsets

    def tensor_map(self, address: int, instruction: Instruction) -> TensorMap:
        """Return the tensor map at an address.

        Raises:
            RuntimeError: no argument there is one.
        """
        if address not in self.launch.tensor_maps:
            raise RuntimeError(
                f"{instruction} of program {self.program} finds no tensor map at {address:#x}"
            )
        return self.launch.tensor_maps[address]

    def count_load(self, offsets: Lanes, num_bytes: int, lanes: Lanes) -> None:
        """Count the bytes and sectors of a load of data."""
        self.loaded += num_bytes * int(lanes.sum())
        warp = self.lane // WARP << 48
        ends = [warp + offsets // 32, warp + (offsets + num_bytes - 1) // 32]
        self.sectors += len(np.unique(np.concatenate([end[lanes] for end in ends])))


def bank_cycles(address: Lanes, lanes: Lanes, num_bytes: int, together: int, last: int) -> int:
    """Return the cycles of shared memory for an access, bank conflicts included.

    Args:
        address: of each lane.
        lanes: that take part.
        num_bytes: of each.
        together: lanes of a warp that are served at once, if their banks differ.
        last: of a warp, the first lane that gives no address.
    """
    words = np.arange(max(1, num_bytes // 4))
    cycles = 0
    for warp in range(0, len(address), WARP):
        for first in range(warp, warp + last, together):
            part = address[first : first + together][lanes[first : first + together]]
            if len(part):
                word = np.unique((part // 4)[:, None] + words)
                cycles += int(np.bincount(word % 32).max())
    return cycles
