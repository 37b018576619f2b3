"""Instructions that are not arithmetic: memory, tensor cores, barriers, and lanes of a warp.

Each function gets the state, the instruction, the lanes that execute it, the cycle in which it
issues, and the group, whose clock it may advance. It returns the registers and predicates that are
written, and the cycles until they are ready.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from tokenflex_kernels.budget.integers import (
    MASK,
    UNKNOWN,
    Lanes,
    Value,
    from_bits,
    known_bits,
    signed,
)
from tokenflex_kernels.budget.sass import Instruction, Operand, vector
from tokenflex_kernels.budget.state import (
    LATENCY,
    SHARED_BYTES,
    WARP,
    DependsOnDataError,
    Group,
    State,
    bank_cycles,
)

Effect = tuple[dict[str, Value], float]
NOTHING: Effect = ({}, 0)


def _address_of(instruction: Instruction) -> Operand:
    return next(operand for operand in instruction.operands if operand.kind == "address")


# ---- Global memory.


def _load_global(state: State, i: Instruction, lanes: Lanes, start: float, group: Group) -> Effect:
    results: dict[str, Value] = dict.fromkeys(i.data_results)
    buffer, offsets = state.access(i, _address_of(i), lanes)
    content = buffer.content
    if content is None:
        sector = id(buffer), int(offsets[lanes][0]) // 32
        latency = LATENCY["repeated" if sector in state.touched else "global"]
        state.touched.add(sector)
        state.count_load(offsets, i.num_bytes, lanes)
        return results, latency
    offsets = np.where(lanes, offsets, 0)
    for k, name in enumerate(name for name in results if "P" not in name):
        word = state.full(0)
        for byte in range(min(4, i.num_bytes)):
            word |= content[offsets + 4 * k + byte].astype(np.int64) << 8 * byte
        results[name] = word
    return results, LATENCY["table"]


def _store_global(state: State, i: Instruction, lanes: Lanes, start: float, group: Group) -> Effect:
    state.access(i, _address_of(i), lanes)
    state.stored += i.num_bytes * int(lanes.sum())
    return NOTHING


def _copy_to_shared(
    state: State, i: Instruction, lanes: Lanes, start: float, group: Group
) -> Effect:
    """LDGSTS: shared memory gets global memory, or zeros where the last predicate says so."""
    state.shared_cycles += i.num_bytes * int(lanes.sum()) / SHARED_BYTES
    if i.operands[-1].kind == "predicate":
        lanes = state.lanes_where(state.read(i.operands[-1]), lanes, i)
    if lanes.any():
        _, offsets = state.access(i, i.operands[1], lanes)
        state.count_load(offsets, i.num_bytes, lanes)
    state.copies.issued = start + LATENCY["global"]
    return NOTHING


def _local(state: State, i: Instruction, lanes: Lanes, start: float, group: Group) -> Effect:
    """LDL, STL: a thread's own words, which the first-level cache holds; no bytes are counted."""
    places = np.unique(state.known_in(state.sum_of(_address_of(i)), lanes, i)[lanes])
    if len(places) != 1 or i.num_bytes < 4:
        raise RuntimeError(f"words of a stack that the walk cannot follow: {i}")
    words = [f"local {places[0] + 4 * k}" for k in range(i.num_bytes // 4)]
    if i.opcode == "LDL":
        values = map(state.values.get, words)
        return dict(zip(i.data_results, values, strict=False)), LATENCY["repeated"]
    source = i.operands[1].name
    for k, word in enumerate(words):
        name = vector(source, k + 1)[-1] if source else ""
        state.write(word, state.values.get(name) if name else state.full(0), lanes)
    return NOTHING


def _commit_copies(
    state: State, i: Instruction, lanes: Lanes, start: float, group: Group
) -> Effect:
    state.copies.commit()
    return NOTHING


def _await_copies(state: State, i: Instruction, lanes: Lanes, start: float, group: Group) -> Effect:
    group.clock = max(group.clock, state.copies.all_but(i.operands[-1].number))
    return NOTHING


def _bulk_load(state: State, i: Instruction, lanes: Lanes, start: float, group: Group) -> Effect:
    """UTMALDG: the barrier, in the register behind the destination, counts its bytes."""
    _, barrier = vector(_address_of(i).terms[0][0].name, 2)
    places = state.known_in(state.values.get(barrier), lanes, i)
    for place in places[_first_lanes(lanes)]:
        state.arrivals[int(place)] = start + LATENCY["global"]
    return NOTHING


def _bulk_store(state: State, i: Instruction, lanes: Lanes, start: float, group: Group) -> Effect:
    """UTMASTG: each warp stores the part of a box that lies in the tensor, once."""
    source, tensor_map = (operand for operand in i.operands if operand.kind == "address")
    dimensions = next(int(m[0]) for m in i.modifiers if re.fullmatch(r"\dD", m))
    # Behind the place in shared memory: the first element of the box, the last dimension first.
    _, *coordinates = vector(source.terms[0][0].name, 1 + dimensions)
    names = *vector(tensor_map.terms[0][0].name, 2), *reversed(coordinates)
    low, high, *starts = (state.known_in(state.values.get(name), lanes, i) for name in names)
    for lane in _first_lanes(lanes):
        used = state.tensor_map(int(high[lane]) << 32 | int(low[lane]), i)
        stored = used.bytes_within([int(signed(start[lane])) for start in starts])
        cycles = stored / SHARED_BYTES
        state.stored += stored
        state.shared_cycles += cycles
        # A wait is for the reading of shared memory, so that it can be written again.
        read = start + LATENCY["shared"] + cycles
        state.copies.issued = max(state.copies.issued, read)
    return NOTHING


# ---- Shared memory.


def _shared(state: State, i: Instruction, lanes: Lanes, start: float, group: Group) -> Effect:
    """LDS, STS, LDSM, STSM: count the cycles of the banks that the addresses need."""
    in_matrices = i.opcode in ("LDSM", "STSM")
    num_bytes = 4 * i.num_matrices if in_matrices else i.num_bytes
    place = state.known_in(state.sum_of(_address_of(i)), lanes, i)
    if in_matrices:
        state.shared_cycles += bank_cycles(place, lanes, 16, 8, 8 * i.num_matrices)
    else:
        together = WARP * 4 // max(4, num_bytes)
        state.shared_cycles += bank_cycles(place, lanes, num_bytes, together, WARP)
    is_load = i.opcode in ("LDS", "LDSM")
    return dict.fromkeys(i.data_results) if is_load else {}, LATENCY["shared"]


def _barrier_in_memory(
    state: State, i: Instruction, lanes: Lanes, start: float, group: Group
) -> Effect:
    """SYNCS: say how many bytes the copy engine will bring, or wait for them."""
    if "TRYWAIT" in i.modifiers:
        places = state.known_in(state.sum_of(_address_of(i)), lanes, i)
        arrivals = [state.arrivals.get(int(place), 0.0) for place in np.unique(places[lanes])]
        group.clock = max(group.clock, *arrivals)
        done = [operand.name for operand in i.operands if operand.kind == "predicate"]
        return dict.fromkeys(done, state.full(1)), LATENCY["shared"]
    if "ARRIVE" in i.modifiers and i.operands[-1].kind == "register":
        expected = state.read(i.operands[-1])
        if expected is None or (expected[lanes] < 0).any():
            raise DependsOnDataError(f"the bytes of a copy depend on data: {i}")
        num_bytes = int(expected[lanes].sum())
        state.loaded += num_bytes
        state.sectors += num_bytes // 32
        state.shared_cycles += num_bytes / SHARED_BYTES
    return {}, LATENCY["shared"]


def _barrier(state: State, i: Instruction, lanes: Lanes, start: float, group: Group) -> Effect:
    group.clock += LATENCY["shared"]
    return NOTHING


# ---- Tensor cores, which work through products in the order of issue.


def _product(state: State, i: Instruction, lanes: Lanes, start: float, group: Group) -> Effect:
    """HMMA: a product of registers, for each warp."""
    shape = re.search(r"\.(16)(8)(8|16|32)\.", i.name)
    if shape is None:
        raise RuntimeError(f"a product of unknown shape: {i.name}")
    m, n, k = map(int, shape.groups())
    _use_tensor_cores(state, 2 * m * n * k * (int(lanes.sum()) // WARP), 0.0, start)
    latency = state.tensor_free - start + LATENCY["tensor"]
    return dict.fromkeys(vector(i.operands[0].name, 4)), latency


def _group_product(
    state: State, i: Instruction, lanes: Lanes, start: float, group: Group
) -> Effect:
    """HGMMA: a product of four warps, of shared memory; ready after a wait for its group."""
    shape = re.search(r"\.64x(\d+)x(\d+)\.", i.name)
    if shape is None:
        raise RuntimeError(f"a product of unknown shape: {i.name}")
    n, k = map(int, shape.groups())
    groups = int(lanes.sum()) // (4 * WARP)
    # Each of the four tensor cores reads its quarter of the first operand, and one reading of the
    # second serves all four.
    rows = n + (64 if i.operands[1].text.startswith("gdesc") else 0)
    port = rows * k * 2 / SHARED_BYTES * groups
    _use_tensor_cores(state, 2 * 64 * n * k * groups, port, start)
    state.products.issued = state.tensor_free + LATENCY["tensor"]
    if any(operand.text == "gsb0" for operand in i.operands):
        state.products.commit()
    for name in vector(i.operands[0].name, n // 2):
        state.write(name, None, lanes)
    return NOTHING


def _use_tensor_cores(state: State, flops: int, port_cycles: float, start: float) -> None:
    cycles = flops / state.launch.tensor_flops
    state.flops += flops
    state.shared_cycles += port_cycles
    state.tensor_free = max(state.tensor_free, start) + max(cycles, port_cycles)


def _await_products(
    state: State, i: Instruction, lanes: Lanes, start: float, group: Group
) -> Effect:
    if "DEPBAR" in i.modifiers:
        group.clock = max(group.clock, state.products.all_but(i.operands[-1].number))
    return NOTHING


# ---- Lanes of a warp, and registers of the system.


def _exchange(state: State, i: Instruction, lanes: Lanes, start: float, group: Group) -> Effect:
    """SHFL: lanes read other lanes of their warp."""
    out, destination, source, offset = i.operands[:4]
    value, by = state.read(source), state.read(offset)
    results: dict[str, Value] = {out.name: None, destination.name: None}
    if value is not None and by is not None:
        lane = state.lane
        others = {"IDX": by, "BFLY": lane ^ by, "UP": lane - by, "DOWN": lane + by}
        other = next(others[kind] for kind in others if kind in i.modifiers)
        read = value[lane // WARP * WARP + other % WARP]
        results[destination.name] = np.where(by < 0, UNKNOWN, read)
    return results, LATENCY["shared"]


def _system_register(
    state: State, i: Instruction, lanes: Lanes, start: float, group: Group
) -> Effect:
    destination, source = i.operands[:2]
    values = {
        "SR_TID.X": state.lane,
        "SR_LANEID": state.lane % WARP,
        "SR_CTAID.X": state.full(state.program),
        "SR_NCTAID.X": state.full(state.launch.programs),
    }
    # Zero for SRZ, the other sides of the grid, and the place in a cluster of one block.
    value = values.get(source.text, state.full(0))
    width = 2 if i.opcode == "CS2R" and "32" not in i.modifiers else 1
    return dict.fromkeys(vector(destination.name, width), value), LATENCY["uniform"]


def _to_uniform(state: State, i: Instruction, lanes: Lanes, start: float, group: Group) -> Effect:
    """R2UR: the first active lane's value for the whole warp."""
    destination, source = [operand for operand in i.operands if operand.kind == "register"][:2]
    value = state.read(source)
    if value is not None:
        value = np.repeat(value[_first_of_warps(lanes)], WARP)
    return {destination.name: value}, LATENCY["uniform"]


_REDUCTIONS: dict[str, Callable[[Lanes], np.integer]] = {
    "MAX": np.maximum.reduce,
    "MIN": np.minimum.reduce,
    "SUM": np.add.reduce,
    "OR": np.bitwise_or.reduce,
    "XOR": np.bitwise_xor.reduce,
    "AND": np.bitwise_and.reduce,
}


def _reduce(state: State, i: Instruction, lanes: Lanes, start: float, group: Group) -> Effect:
    """REDUX: one number of the active lanes' for the whole warp; AND where nothing is said."""
    destination, source = i.operands[:2]
    value = state.read(source)
    if value is None:
        return {destination.name: None}, LATENCY["special"]
    reduction = _REDUCTIONS[next((name for name in _REDUCTIONS if name in i.modifiers), "AND")]
    result = state.full(UNKNOWN)
    for first in range(0, state.num_lanes, WARP):
        warp = slice(first, first + WARP)
        numbers = value[warp][lanes[warp]]
        if len(numbers) and (numbers >= 0).all():
            numbers = signed(numbers) if "S32" in i.modifiers else numbers
            result[warp] = int(reduction(numbers)) & MASK
    return {destination.name: result}, LATENCY["special"]


def _first_of_warps(lanes: Lanes) -> Lanes:
    """Return the first active lane of each warp, and of a warp that has none its first lane."""
    active = lanes.reshape(-1, WARP)
    return np.arange(len(active)) * WARP + active.argmax(1)


def _first_lanes(lanes: Lanes) -> Lanes:
    """Return the first active lane of each warp that has one."""
    return _first_of_warps(lanes)[lanes.reshape(-1, WARP).any(1)]


def _vote(state: State, i: Instruction, lanes: Lanes, start: float, group: Group) -> Effect:
    condition = state.read(i.operands[-1])
    outs = [operand for operand in i.operands[:-1] if operand.name]
    if condition is None or (condition[lanes] < 0).any():
        return dict.fromkeys(out.name for out in outs), LATENCY["uniform"]
    holds = ((condition > 0) & lanes).reshape(-1, WARP)
    misses = ((condition == 0) & lanes).reshape(-1, WARP)
    agreed = (~misses.any(1) if "ALL" in i.modifiers else holds.any(1)).astype(np.int64)
    ballot = (holds.astype(np.int64) << np.arange(WARP)).sum(1)
    return {
        out.name: np.repeat(agreed if out.kind == "predicate" else ballot, WARP) for out in outs
    }, LATENCY["uniform"]


def _elect(state: State, i: Instruction, lanes: Lanes, start: float, group: Group) -> Effect:
    elected = (state.lane == np.repeat(_first_of_warps(lanes), WARP)).astype(np.int64)
    outs = [operand.name for operand in i.operands[:-1] if operand.kind == "predicate"]
    return dict.fromkeys(outs, elected), LATENCY["uniform"]


def _check_division(
    state: State, i: Instruction, lanes: Lanes, start: float, group: Group
) -> Effect:
    """FCHK: data say whether a slow division is needed."""
    return {i.operands[0].name: None}, LATENCY["special"]


def _pack_predicates(
    state: State, i: Instruction, lanes: Lanes, start: float, group: Group
) -> Effect:
    """P2R: predicates become the bits of a register."""
    destination, _, base, chosen = i.operands[:4]
    mask, bits = known_bits(state.read(base))
    for k in range(7):
        if chosen.number >> k & 1:
            known, value = known_bits(state.values.get(f"P{k}"))
            mask = mask & ~(1 << k) | (known & 1) << k
            bits = bits & ~(1 << k) | (value & 1) << k
    return {destination.name: from_bits(mask, bits)}, LATENCY["integer"]


def _unpack_predicates(
    state: State, i: Instruction, lanes: Lanes, start: float, group: Group
) -> Effect:
    """R2P: the bits of a register, or of one of its bytes, become predicates."""
    mask, bits = known_bits(state.read(i.operands[1]))
    shift = next((8 * int(m[1]) for m in i.modifiers if re.match(r"B\d$", m)), 0)
    return {
        f"P{k}": state.full(0) + np.where(mask >> shift + k & 1, bits >> shift + k & 1, UNKNOWN)
        for k in range(7)
        if i.operands[2].number >> k & 1
    }, LATENCY["integer"]


EFFECTS: dict[str, Callable[[State, Instruction, Lanes, float, Group], Effect]] = {
    "LDG": _load_global,
    "STG": _store_global,
    "LDGSTS": _copy_to_shared,
    "LDGDEPBAR": _commit_copies,
    "DEPBAR": _await_copies,
    "LDL": _local,
    "STL": _local,
    "UTMALDG": _bulk_load,
    "UTMASTG": _bulk_store,
    "UTMACMDFLUSH": _commit_copies,
    "LDS": _shared,
    "STS": _shared,
    "LDSM": _shared,
    "STSM": _shared,
    "SYNCS": _barrier_in_memory,
    "BAR": _barrier,
    "HMMA": _product,
    "HGMMA": _group_product,
    "WARPGROUP": _await_products,
    "SHFL": _exchange,
    "S2R": _system_register,
    "S2UR": _system_register,
    "CS2R": _system_register,
    "R2UR": _to_uniform,
    "REDUX": _reduce,
    "VOTE": _vote,
    "VOTEU": _vote,
    "ELECT": _elect,
    "FCHK": _check_division,
    "P2R": _pack_predicates,
    "R2P": _unpack_predicates,
}
