"""A block of threads: runs the instructions of a kernel, all threads in step.

Control flow must be uniform, as it is in what Triton compiles: a branch, barrier or return on which
the threads of a block disagree is an error. So races cannot be seen in results; shared memory
records who accesses it instead (``memory``). What is asynchronous on a GPU completes here as late
as the program allows (``asynchronous``, ``tensor_cores``).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.ptx.memory import GlobalMemory, SharedMemory
from tests.ptx.operands import PARAMETER_WINDOW, SHARED_WINDOW, Mask, Operands, Reader, Registers
from tests.ptx.parse import Instruction, Kernel, PtxError

# Runs one instruction of a block for the threads of a mask; returns the next position for a jump.
Step = Callable[["Block", Mask], "int | None"]
Decoder = Callable[[Instruction, "Program"], Step]

DECODERS: dict[str, Decoder] = {}
"""The function that decodes each opcode, by its longest prefix of words that is here."""

SHARED_MEMORY = 232448  # bytes, the most that a block of any architecture may have
END = -1  # the position that a return jumps to


def decodes(*opcodes: str) -> Callable[[Decoder], Decoder]:
    """Register a decoder of these opcodes."""

    def register(decoder: Decoder) -> Decoder:
        DECODERS.update(dict.fromkeys(opcodes, decoder))
        return decoder

    return register


_CLASSES = {
    "global": ("ld.global", "st.global", "cp.async.ca", "cp.async.cg", "cp.async.bulk.tensor"),
    "shared": (
        *("ld.shared", "ld.shared::cta", "st.shared", "st.shared::cta", "ldmatrix", "stmatrix"),
    ),
    "shuffle": ("shfl", "vote", "redux"),
    "tensor": ("mma", "wgmma.mma_async"),
    "special": ("ex2", "lg2", "rcp", "rsqrt", "sqrt", "tanh", "sin", "cos", "div"),
    "control": (
        *("bra", "ret", "exit", "bar", "barrier", "mbarrier", "fence", "membar", "elect"),
        *("cp.async", "wgmma", "griddepcontrol", "setmaxnreg", "prefetch", "nanosleep"),
    ),
}
_CLASS_OF = {opcode: name for name, opcodes in _CLASSES.items() for opcode in opcodes}


def _longest_prefix(instruction: Instruction, table: dict[str, Any]) -> Any:
    words = instruction.words
    for length in range(len(words), 0, -1):
        if (name := ".".join(words[:length])) in table:
            return table[name]
    return None


def class_of(instruction: Instruction) -> str:
    """Return the class an instruction is counted in: see :class:`Execution`."""
    return _longest_prefix(instruction, _CLASS_OF) or "other"


@dataclass
class Execution:
    """Observations of the programs of one launch.

    Attributes:
        kernel: its name.
        programs: of the launch.
        executed: the programs that ran: all, or those asked for.
        warps: of a program.
        config: the constants and options that it was compiled with, where stages launched it.
        instructions: warp-instructions of the executed programs together, by class: "global" and
            "shared" memory, "shuffle", "tensor" core, "special" function, "control", "other".
            A PTX instruction counts once for each warp, whether or not its predicate holds.
        opcodes: the same by opcode.
        bytes_loaded: by threads and by the copy engine from global memory.
        bytes_stored: to it.
        races: every kind of access that is not ordered, once for each instruction: shared memory
            without a barrier, before an asynchronous operation is done, or never written; global
            memory that two programs write.
    """

    kernel: str
    programs: int
    executed: int = 0
    warps: int = 0
    config: str = ""
    instructions: Counter[str] = field(default_factory=Counter)
    opcodes: Counter[str] = field(default_factory=Counter)
    bytes_loaded: int = 0
    bytes_stored: int = 0
    races: list[str] = field(default_factory=list)


class Program:
    """A kernel whose instructions were decoded: what all its blocks share."""

    def __init__(self, kernel: Kernel, shared_bytes: int | None = None) -> None:
        self.kernel = kernel
        self.threads = kernel.threads
        self.warps = -(-kernel.threads // 32)
        self.shared_bytes = SHARED_MEMORY if shared_bytes is None else shared_bytes
        self.parameters = {
            name: PARAMETER_WINDOW + 256 * index for index, name in enumerate(kernel.parameters)
        }
        shared = {name: SHARED_WINDOW + address for name, address in kernel.shared.items()}
        self.operands = Operands(kernel.threads, {**shared, **self.parameters})
        self.predicates: list[Reader | None] = []
        self.steps: list[Step] = []
        for instruction in kernel.instructions:
            decoder = _longest_prefix(instruction, DECODERS)
            if decoder is None:
                raise PtxError(f"line {instruction.line}: unknown instruction: {instruction}")
            predicate = instruction.predicate
            self.predicates.append(self.operands.reader(predicate, "pred") if predicate else None)
            try:
                self.steps.append(decoder(instruction, self))
            except (PtxError, KeyError, ValueError, IndexError) as error:
                raise PtxError(f"line {instruction.line}: {error!r}: {instruction}") from error


class Block:
    """One program of a launch while it runs.

    Attributes:
        lanes: the number of each thread, uint32.
        number: of the program in its launch of ``programs``.
        arguments: the bits of each parameter by name, or its ``TensorMap``.
        registers, shared, memory: see their types.
        copies, bulk_stores, products: groups of asynchronous operations that are not complete,
            oldest first; the last group is the one that is not committed yet.
        barriers: barrier objects by their address in shared memory.
    """

    def __init__(
        self,
        program: Program,
        execution: Execution,
        number: int,
        arguments: dict[str, Any],
        memory: GlobalMemory,
    ) -> None:
        self.program = program
        self.execution = execution
        self.number = number
        self.programs = execution.programs
        self.arguments = arguments
        self.memory = memory
        self.lanes = np.arange(program.threads, dtype=np.uint32)
        self.warp_of = np.arange(program.threads) // 32
        self.registers = Registers(program.threads)
        self.shared = SharedMemory(program.shared_bytes, self)
        self.copies: deque[list[Any]] = deque([[]])
        self.bulk_stores: deque[list[Any]] = deque([[]])
        self.products: deque[list[Any]] = deque([[]])
        self.barriers: dict[int, Any] = {}
        self.position = 0

    def report(self, words: str) -> None:
        """Record an access that is not ordered."""
        instruction = self.program.kernel.instructions[self.position]
        race = f"line {instruction.line}: {instruction.opcode}: {words}"
        if race not in self.execution.races:
            self.execution.races.append(race)

    def run(self, counts: list[int]) -> None:
        """Run to the end; ``counts`` counts how often each instruction is reached."""
        steps, predicates = self.program.steps, self.program.predicates
        negated = [instruction.negated for instruction in self.program.kernel.instructions]
        end = len(steps)
        position = 0
        while 0 <= position < end:
            self.position = position
            counts[position] += 1
            mask = None
            predicate = predicates[position]
            if predicate is not None:
                mask = predicate(self)
                if negated[position]:
                    mask = ~mask
                if mask.all():
                    mask = None
                elif not mask.any():
                    position += 1
                    continue
            target = steps[position](self, mask)
            position = position + 1 if target is None else target
        self.position = min(self.position, end - 1)
        self._check_end()

    def _check_end(self) -> None:
        for groups, name in (
            (self.copies, "a copy"),
            (self.bulk_stores, "a store of the copy engine"),
            (self.products, "a wgmma"),
        ):
            if any(groups):
                self.report(f"the program ends before {name} is waited for")
        if any(barrier.copies for barrier in self.barriers.values()):
            self.report("the program ends before a load of the copy engine is waited for")


def run_programs(
    program: Program,
    arguments: dict[str, Any],
    memory: GlobalMemory,
    programs: int,
    blocks: Iterable[int] | None,
) -> Execution:
    """Run programs of a launch one after another.

    Raises:
        PtxError: with the program, the line and the instruction that failed.
    """
    kernel = program.kernel
    execution = Execution(kernel.name, programs, warps=program.warps)
    counts = [0] * len(kernel.instructions)
    with np.errstate(all="ignore"):
        for number in range(programs) if blocks is None else blocks:
            block = Block(program, execution, number, arguments, memory)
            try:
                block.run(counts)
            except PtxError as error:
                instruction = kernel.instructions[block.position]
                raise PtxError(
                    f"{kernel.name}, program {number}, line {instruction.line}: {error}: "
                    f"{instruction}"
                ) from error
            execution.executed += 1
    for instruction, count in zip(kernel.instructions, counts, strict=True):
        if count:
            execution.opcodes[instruction.opcode] += count * program.warps
            execution.instructions[class_of(instruction)] += count * program.warps
    return execution


def uniform(mask: Mask, values: Sequence[Any] | np.ndarray) -> int:
    """Return the value that the threads of ``mask`` agree on.

    Raises:
        PtxError: they do not agree.
    """
    chosen = np.asarray(values) if mask is None else np.asarray(values)[mask]
    if (chosen != chosen[0]).any():
        raise PtxError("threads disagree on an operand that must be uniform")
    return int(chosen[0])
