"""Walk the machine code of a kernel as the warps of one block issue it, and count.

No data are computed. Control flow and addresses depend on integers only: on the block's number, on
sizes, and on the tables that the launch passes. They are computed exactly, all else is unknown, and
a branch on something unknown is an error. So is an instruction on memory or tensor cores, or one
that waits, that an unknown predicate switches on or off, or whose address is unknown, or that the
walk does not know: counting it would be a guess. So the counts do not depend on data, and no GPU is
needed.

The block also gets a clock, as if it were alone on its multiprocessor: instructions issue in order,
all warps in step, and wait for the results that they read. Latencies are assumptions
(``state.LATENCY``); caches, bank conflicts between warps and the scheduler's choices are left out.
"""

from __future__ import annotations

import numpy as np

from tokenflex_kernels.budget.effects import EFFECTS
from tokenflex_kernels.budget.integers import UNKNOWN, Lanes, Value, compute
from tokenflex_kernels.budget.sass import Instruction, Operand
from tokenflex_kernels.budget.state import (
    LATENCY,
    WARP,
    DependsOnDataError,
    Group,
    Launch,
    State,
    Totals,
)

# Lanes of a multiprocessor that execute in one cycle, by pipe: throughput of arithmetic
# instructions, CUDA programming guide.
LANES = {"float": 128, "imad": 64, "integer": 64, "special": 16, "global": 32, "shared": 32}
# Pipes whose instructions move bytes or compute on tensor cores; and those that count or wait.
MOVING = ("global", "shared", "tensor")
COUNTED = (*MOVING, "control")
ISSUES = 4  # warp-instructions that a multiprocessor issues in a cycle, whatever their pipe


def walk(launch: Launch, program: int, limit: int = 2_000_000) -> Totals:
    """Walk one block of a launch.

    Args:
        program: its number in the grid.
        limit: steps after which a loop is taken for endless.

    Raises:
        DependsOnDataError: control flow, or what is counted, depends on data.
        RuntimeError: an access is outside of its buffer, an instruction on memory or tensor cores
            is none of those that are known, or there is no end.
    """
    state = State(launch, program)
    walk_block(state, limit)
    return state.totals()


def walk_block(state: State, limit: int) -> None:
    """Walk until all lanes of the block are done; see :func:`walk`."""
    index = {instruction.address: k for k, instruction in enumerate(state.launch.code)}
    groups = [Group(0, np.ones(state.num_lanes, bool), 0.0)]
    for _ in range(limit):
        # The group that is behind goes on, so that parted groups meet again.
        group = groups[0]
        if len(groups) > 1:
            group = min(groups, key=lambda g: g.pc)
            for other in [g for g in groups if g.pc == group.pc and g is not group]:
                group.set_lanes(group.lanes | other.lanes)
                group.clock = max(group.clock, other.clock)
                groups.remove(other)
        parted = _step(state, group, index)
        if parted is not None:
            groups.append(parted)
        if not group.warps:
            groups.remove(group)
        if not groups:
            return
    raise RuntimeError(f"no end after {limit} instructions")


def _step(state: State, group: Group, index: dict[int, int]) -> Group | None:
    """Execute the next instruction of a group; return the part of it that jumps, if parted."""
    instruction = state.launch.code[group.pc]
    pipe, warps = instruction.pipe, group.warps
    state.instructions[pipe] += warps
    ready = state.ready
    start = max([group.clock, *[ready[name] for name in instruction.waits_for if name in ready]])
    group.clock = start + max(warps / ISSUES, warps * WARP / LANES.get(pipe, WARP * ISSUES))
    guard = None if instruction.guard is None else _condition(state, instruction.guard)
    if instruction.opcode in ("BRA", "EXIT", "CALL", "RET", "BRX", "JMP"):
        return _jump(state, group, instruction, guard, index)
    group.pc += 1
    lanes = group.lanes
    if guard is not None:
        if pipe in COUNTED:
            lanes = state.lanes_where(guard, lanes, instruction)
        else:
            lanes = lanes & (guard != 0)
        if not lanes.any():
            return None
    latency: float = LATENCY.get(pipe, 0)
    results = compute(instruction, state.read, state.num_lanes)
    if results is None and instruction.opcode in EFFECTS:
        results, latency = EFFECTS[instruction.opcode](state, instruction, lanes, start, group)
    elif results is None:
        if pipe in MOVING:
            raise RuntimeError(f"an instruction that the walk cannot count: {instruction}")
        results = dict.fromkeys(instruction.data_results)
    for name, value in results.items():
        if name:
            written = _of_whole_warps(lanes) if name.startswith("U") else lanes
            state.write(name, value, written, guard)
            state.ready[name] = start + latency
    return None


def _of_whole_warps(lanes: Lanes) -> Lanes:
    """Return all lanes of the warps that have an active one: they share uniform registers."""
    return np.repeat(lanes.reshape(-1, WARP).any(1), WARP)


def _condition(state: State, predicate: Operand) -> Lanes:
    """Return the value of a predicate, UNKNOWN where it depends on data."""
    value = state.read(predicate)
    return state.full(UNKNOWN) if value is None else value


def _jump(
    state: State, group: Group, instruction: Instruction, guard: Value, index: dict[int, int]
) -> Group | None:
    condition = state.full(1) if guard is None else guard
    if instruction.opcode != "EXIT":
        for operand in instruction.operands:
            if operand.kind == "predicate":
                value = _condition(state, operand)
                condition = np.where(condition == 0, 0, np.minimum(condition, value))
    if "DIV" in instruction.modifiers:  # taken by warps whose lanes are parted
        condition = state.full(0)
    if (condition[group.lanes] < 0).any():
        raise DependsOnDataError(f"a branch depends on data: {instruction}")
    jumping = group.lanes & (condition > 0)
    group.pc += 1
    if not jumping.any():
        return None
    staying = group.lanes & ~jumping
    if instruction.opcode == "EXIT":
        group.set_lanes(staying)
        state.end = max(state.end, group.clock)
        return None
    target = _target(state, instruction, group, index)
    if not staying.any():
        group.pc = target
        return None
    group.set_lanes(staying)
    return Group(target, jumping, group.clock)


def _target(state: State, instruction: Instruction, group: Group, index: dict[int, int]) -> int:
    """Return the place of the instruction that a jump leads to."""
    addresses = [operand.number for operand in instruction.operands if operand.kind == "number"]
    if instruction.opcode == "RET":
        value = state.read(instruction.operands[0])
        addresses = [] if value is None else [int(value[group.lanes][0])]
    if len(addresses) != 1 or addresses[0] not in index:
        raise DependsOnDataError(f"the target of a jump is unknown: {instruction}")
    return index[addresses[0]]
