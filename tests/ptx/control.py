"""Branches, barriers and what has no effect here."""

from __future__ import annotations

from tests.ptx.machine import END, Block, Program, Step, decodes
from tests.ptx.operands import Mask
from tests.ptx.parse import Instruction, PtxError


def _refuse_disagreement(mask: Mask, words: str) -> None:
    if mask is not None:
        raise PtxError(f"some threads of the block {words} and others do not")


@decodes("bra")
def _branch(instruction: Instruction, program: Program) -> Step:
    target = program.kernel.labels[instruction.operands[0]]

    def step(block: Block, mask: Mask) -> int:
        _refuse_disagreement(mask, "jump")
        return target

    return step


@decodes("ret", "exit")
def _return(instruction: Instruction, program: Program) -> Step:
    def step(block: Block, mask: Mask) -> int:
        _refuse_disagreement(mask, "return")
        return END

    return step


@decodes("trap")
def _trap(instruction: Instruction, program: Program) -> Step:
    def step(block: Block, mask: Mask) -> None:
        raise PtxError("trap")

    return step


@decodes("bar.sync", "barrier.sync", "barrier.cta.sync", "bar.cta.sync")
def _barrier(instruction: Instruction, program: Program) -> Step:
    threads = instruction.operands[1:]
    if threads and threads[0] != str(program.threads):
        raise PtxError(f"a barrier of {threads[0]} of {program.threads} threads is not supported")

    def step(block: Block, mask: Mask) -> None:
        _refuse_disagreement(mask, "reach a barrier")
        block.shared.barrier()

    return step


@decodes("fence.proxy.async")
def _fence(instruction: Instruction, program: Program) -> Step:
    def step(block: Block, mask: Mask) -> None:
        _refuse_disagreement(mask, "reach a fence")
        block.shared.fence()

    return step


@decodes("wgmma.fence")
def _fence_registers(instruction: Instruction, program: Program) -> Step:
    def step(block: Block, mask: Mask) -> None:
        _refuse_disagreement(mask, "reach a fence")
        block.registers.unfenced.clear()

    return step


@decodes(
    *("bar.warp.sync", "fence", "membar", "griddepcontrol", "prefetch", "prefetchu", "nanosleep"),
    *("setmaxnreg", "pmevent", "discard", "fence.mbarrier_init", "barrier.cluster"),
)
def _nothing(instruction: Instruction, program: Program) -> Step:
    return lambda block, mask: None
