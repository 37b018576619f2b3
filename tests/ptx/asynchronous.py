"""Copies that complete later: cp.async, and the copy engine (TMA) with its barrier objects.

Each takes effect as late as the program allows. What cp.async copies appears at the wait that
covers its group; what the copy engine loads, at the wait for the phase of its barrier object; the
engine reads what it stores at the wait for its group. So a wait that is missing or too weak shows
as old data in the results, and as an access of memory in flight in the races.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from tests.ptx.machine import Block, Program, Step, decodes, uniform
from tests.ptx.memory import tags_of
from tests.ptx.operands import Mask, Reader, Vector, registers_in
from tests.ptx.parse import Instruction, PtxError

# ---- Groups of asynchronous operations: the last group of a queue is open.


def commit(groups: deque[list[Any]]) -> None:
    """Close the open group."""
    groups.append([])


def wait(groups: deque[list[Any]], pending: int, block: Block) -> None:
    """Complete all but the last ``pending`` committed groups, in order."""
    while len(groups) - 1 > pending:
        for operation in groups.popleft():
            operation.complete(block)


# ---- cp.async: each thread copies up to 16 bytes.


@dataclass
class Copy:
    """The copies of one cp.async of a block."""

    origins: Vector  # addresses in global memory of those that read it
    live: Vector  # which of ``targets`` these are; the others get zeros
    targets: Vector
    tags: np.ndarray
    warps: Vector
    size: int

    def complete(self, block: Block) -> None:
        unit = min(self.size, 8)
        values = np.zeros((len(self.targets), self.size // unit), f"u{unit}")
        values[self.live] = block.memory.load(self.origins, unit, self.size // unit, block)
        index = self.targets[:, None] // unit + np.arange(values.shape[1])
        block.shared.elements(unit)[index] = values
        block.shared.end_write(self.tags, self.warps)


@decodes("cp.async.ca", "cp.async.cg")
def _copy(instruction: Instruction, program: Program) -> Step:
    target, origin, size, *rest = instruction.operands
    read_target, read_origin = map(program.operands.address, (target, origin))
    bytes_ = int(size, 0)
    hinted = "cache_hint" in instruction.opcode
    sized = len(rest) > hinted
    read_size = program.operands.reader(rest[0] if sized else size, "u32")

    def step(block: Block, mask: Mask) -> None:
        threads = slice(None) if mask is None else np.nonzero(mask)[0]
        targets, origins = read_target(block)[threads], read_origin(block)[threads]
        sizes, warps = read_size(block)[threads], block.warp_of[threads]
        if ((sizes != 0) & (sizes != bytes_)).any():
            raise PtxError("copies of a part of their bytes are not supported")
        live = np.nonzero(sizes)[0]
        block.memory.check(origins[live], bytes_)
        tags = block.shared.accesses(targets, bytes_)
        block.shared.begin_write(tags, warps)
        block.execution.bytes_loaded += len(live) * bytes_
        copy = Copy(origins[live], live, targets, tags, warps, bytes_)
        block.copies[-1].append(copy)

    return step


@decodes("cp.async.commit_group")
def _commit_copies(instruction: Instruction, program: Program) -> Step:
    return lambda block, mask: commit(block.copies)


@decodes("cp.async.wait_group")
def _wait_for_copies(instruction: Instruction, program: Program) -> Step:
    pending = int(instruction.operands[0], 0)
    return lambda block, mask: wait(block.copies, pending, block)


@decodes("cp.async.wait_all")
def _wait_for_all_copies(instruction: Instruction, program: Program) -> Step:
    def step(block: Block, mask: Mask) -> None:
        commit(block.copies)
        wait(block.copies, 0, block)

    return step


# ---- Barrier objects.


@dataclass
class Barrier:
    """A barrier object: a phase is over when all arrived and all bytes announced were copied.

    Attributes:
        count: arrivals of a phase.
        missing: arrivals that the current phase still needs.
        bytes: announced and not yet copied.
        phase: the number of phases that are over.
        copies: the loads of the current phase.
    """

    count: int
    missing: int
    bytes: int = 0
    phase: int = 0
    copies: list[BulkLoad] = field(default_factory=list)

    def arrive(self, block: Block, announced: int) -> None:
        if self.missing == 0:
            block.report("arrives at a barrier object whose phase nobody waited for")
            self.finish(block)
        self.missing -= 1
        self.bytes += announced
        if self.missing == 0 and self.bytes == 0 and not self.copies:
            self.finish(block)

    def finish(self, block: Block) -> None:
        """End the phase if it can end: let the loads take effect."""
        copied = sum(copy.size for copy in self.copies)
        if self.missing or copied != self.bytes:
            raise PtxError(
                f"the wait never ends: {self.missing} arrivals are missing, {self.bytes} bytes "
                f"were announced and {copied} are copied"
            )
        for copy in self.copies:
            copy.complete(block)
        self.copies, self.bytes = [], 0
        self.missing = self.count
        self.phase += 1


def _barrier_at(block: Block, address: int) -> Barrier:
    if address not in block.barriers:
        raise PtxError(f"there is no barrier object at {address} of shared memory")
    return block.barriers[address]


def _access_barrier(block: Block, mask: Mask, address: int, writes: bool = False) -> None:
    """Record that the warps of ``mask`` use a barrier object: they may, all at once.

    To begin or end it is a write to its memory, which another barrier has to order.
    """
    warps = np.unique(block.warp_of if mask is None else block.warp_of[mask])
    places = np.full(len(warps), address)
    if writes:
        block.shared.store(places, np.zeros((len(warps), 1), np.uint64), warps)
    elif address in block.barriers:
        block.shared.load(places, 8, 1, warps)


@decodes("mbarrier.init")
def _init_barrier(instruction: Instruction, program: Program) -> Step:
    read_address = program.operands.address(instruction.operands[0])
    read_count = program.operands.reader(instruction.operands[1], "u32")

    def step(block: Block, mask: Mask) -> None:
        address, count = uniform(mask, read_address(block)), uniform(mask, read_count(block))
        if address % 8 or not 0 <= address <= block.shared.size - 8:
            raise PtxError(f"a barrier object cannot be at {address} of shared memory")
        _access_barrier(block, mask, address, writes=True)
        block.barriers[address] = Barrier(count, count)

    return step


@decodes("mbarrier.inval")
def _end_barrier(instruction: Instruction, program: Program) -> Step:
    read_address = program.operands.address(instruction.operands[0])

    def step(block: Block, mask: Mask) -> None:
        address = uniform(mask, read_address(block))
        if _barrier_at(block, address).copies:
            block.report("a barrier object ends before its loads are waited for")
        _access_barrier(block, mask, address, writes=True)
        del block.barriers[address]

    return step


@decodes("mbarrier.arrive")
def _arrive(instruction: Instruction, program: Program) -> Step:
    # The first operand, the state, is there in some forms.
    operands = [text for text in instruction.operands if text.startswith("[")]
    read_address = program.operands.address(operands[0])
    last = instruction.operands[-1]
    announces = "expect_tx" in instruction.words
    read_last = program.operands.reader("1" if last.startswith("[") else last, "u32")

    def step(block: Block, mask: Mask) -> None:
        threads = np.arange(program.threads) if mask is None else np.nonzero(mask)[0]
        addresses, values = read_address(block), read_last(block)
        for address in np.unique(addresses[threads]):
            _access_barrier(block, mask, int(address))
        for thread in threads:
            barrier = _barrier_at(block, int(addresses[thread]))
            if announces:
                barrier.arrive(block, int(values[thread]))
            else:
                for _ in range(int(values[thread])):
                    barrier.arrive(block, 0)

    return step


@decodes("mbarrier.try_wait.parity", "mbarrier.test_wait.parity")
def _wait_for_barrier(instruction: Instruction, program: Program) -> Step:
    done, address, parity, *_ = instruction.operands
    write = program.operands.writer(done, "pred")
    read_address = program.operands.address(address)
    read_parity = program.operands.reader(parity, "u32")
    true = np.ones(program.threads, np.bool_)

    def step(block: Block, mask: Mask) -> None:
        address = uniform(mask, read_address(block))
        _access_barrier(block, mask, address)
        barrier = _barrier_at(block, address)
        if barrier.phase % 2 == uniform(mask, read_parity(block)) % 2:
            barrier.finish(block)
        write(block, true, mask)

    return step


# ---- The copy engine.

MAX_BOX = 256


@dataclass(frozen=True)
class TensorMap:
    """The contents of a tensor-map descriptor.

    Attributes:
        address: of the first element, a multiple of 16.
        shape: of the tensor, of rank 1 to 5, the contiguous dimension last.
        strides: in bytes; all but the last, which is ``item``, are multiples of 16.
        box: what one instruction moves, at most 256 a dimension.
        item: bytes of an element.
        swizzle: bytes of shared memory within which units of 16 are exchanged: 0, 32, 64 or 128.
        tensor: whose memory the map makes accessible; None where memory is given beside it.

    Raises:
        PtxError: the driver would refuse the descriptor.
    """

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    item: int
    swizzle: int
    tensor: torch.Tensor | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        refused = {
            "rank": not 1 <= len(self.shape) == len(self.strides) == len(self.box) <= 5,
            "address": self.address % 16 != 0,
            "strides": any(step % 16 or not 0 < step < 2**40 for step in self.strides[:-1]),
            "last stride": self.strides[-1] != self.item,
            "shape": any(not 0 < size <= 2**32 for size in self.shape),
            "box": any(not 0 < size <= MAX_BOX for size in self.box),
            "inner box": self.box[-1] * self.item % 16 != 0
            or self.box[-1] * self.item > (self.swizzle or 2**31),
            "swizzle": self.swizzle not in (0, 32, 64, 128),
        }
        if wrong := [name for name, is_wrong in refused.items() if is_wrong]:
            raise PtxError(f"a tensor map is refused for its {', '.join(wrong)}: {self}")

    def box_at(self, corner: Sequence[int]) -> tuple[Vector, Vector]:
        """Return the addresses of the elements of a box, and which are within the tensor."""
        address = np.full((), self.address, np.int64)
        inside = np.ones((), np.bool_)
        for start, size, step, extent in zip(
            corner, self.shape, self.strides, self.box, strict=True
        ):
            at = start + np.arange(extent, dtype=np.int64)
            address = address[..., None] + at * step
            inside = inside[..., None] & ((at >= 0) & (at < size))
        return address.reshape(-1), inside.reshape(-1)

    def placed(self, base: int) -> Vector:
        """Return where in shared memory the elements of a box lie that begins at ``base``."""
        addresses = base + np.arange(int(np.prod(self.box)), dtype=np.int64) * self.item
        return swizzled(addresses, self.swizzle)

    @property
    def box_bytes(self) -> int:
        return int(np.prod(self.box)) * self.item


def swizzled(addresses: Vector, swizzle: int) -> Vector:
    """Return addresses with bits 4.. exchanged as a swizzle of 32, 64 or 128 bytes does."""
    units = max(swizzle // 16 - 1, 0)  # 1, 3 or 7
    return addresses ^ (((addresses >> 7) & units) << 4)


@dataclass
class BulkLoad:
    """A load of one box, to complete with its barrier's phase."""

    map: TensorMap
    corner: tuple[int, ...]
    places: Vector
    tags: np.ndarray
    size: int

    def complete(self, block: Block) -> None:
        addresses, inside = self.map.box_at(self.corner)
        values = np.zeros(len(addresses), f"u{self.map.item}")
        values[inside] = block.memory.load(addresses[inside], self.map.item, 1, block)[:, 0]
        block.shared.elements(self.map.item)[self.places // self.map.item] = values
        block.shared.end_write(self.tags, None)


@dataclass
class BulkStore:
    """A store of one box, to complete with its group."""

    map: TensorMap
    corner: tuple[int, ...]
    places: Vector
    tags: np.ndarray

    def complete(self, block: Block) -> None:
        addresses, inside = self.map.box_at(self.corner)
        values = block.shared.elements(self.map.item)[self.places // self.map.item]
        block.memory.store(addresses[inside], values[inside][:, None], block)
        block.shared.end_read(self.tags)


@decodes("cp.async.bulk.tensor")
def _bulk_copy(instruction: Instruction, program: Program) -> Step:
    is_load = instruction.words[5].startswith("shared")
    described = instruction.operands[0 if not is_load else 1]
    place = instruction.operands[1 if not is_load else 0]
    match = re.fullmatch(r"\[\s*([^,\s]+)\s*,\s*\{(.*)\}\s*\]", described)
    if match is None or "im2col" in instruction.opcode:
        raise PtxError("only boxes of tensor maps are supported")
    read_map = program.operands.reader(match[1], "b64")
    coordinates = [program.operands.reader(text, "s32") for text in registers_in(match[2])]
    read_place = program.operands.address(place)
    read_barrier: Reader | None = None
    if is_load:
        read_barrier = program.operands.address(instruction.operands[2])
    names = {address: name for name, address in program.parameters.items()}

    def step(block: Block, mask: Mask) -> None:
        threads = np.arange(program.threads) if mask is None else np.nonzero(mask)[0]
        maps, places = read_map(block), read_place(block)
        corners = [read(block) for read in coordinates]
        for thread in threads:
            tensor_map = block.arguments.get(names.get(int(maps[thread]), ""))
            if not isinstance(tensor_map, TensorMap):
                raise PtxError("the operand is not the address of a tensor map")
            if len(tensor_map.shape) != len(corners):
                raise PtxError(f"{len(corners)} coordinates for a map of {tensor_map.shape}")
            # Coordinates are given with the contiguous dimension first.
            corner = tuple(int(values[thread]) for values in reversed(corners))
            base = int(places[thread])
            if base % max(128, 8 * tensor_map.swizzle):
                raise PtxError(f"a box of swizzle {tensor_map.swizzle} cannot be at {base}")
            elements = tensor_map.placed(base)
            tags = tags_of(elements, tensor_map.item)
            if base < 0 or base + tensor_map.box_bytes > block.shared.size:
                raise PtxError(f"a box at {base} is outside of shared memory")
            _, inside = tensor_map.box_at(corner)
            moved = int(inside.sum()) * tensor_map.item
            if read_barrier is None:
                block.shared.begin_read(tags)
                block.execution.bytes_stored += moved
                block.bulk_stores[-1].append(BulkStore(tensor_map, corner, elements, tags))
            else:
                block.shared.begin_write(tags[:, None], np.full(len(tags), thread // 32))
                block.execution.bytes_loaded += moved
                at = int(read_barrier(block)[thread])
                _access_barrier(block, block.lanes == thread, at)
                barrier = _barrier_at(block, at)
                load = BulkLoad(tensor_map, corner, elements, tags[:, None], tensor_map.box_bytes)
                barrier.copies.append(load)

    return step


@decodes("cp.async.bulk.commit_group")
def _commit_stores(instruction: Instruction, program: Program) -> Step:
    return lambda block, mask: commit(block.bulk_stores)


@decodes("cp.async.bulk.wait_group")
def _wait_for_stores(instruction: Instruction, program: Program) -> Step:
    pending = int(instruction.operands[0], 0)
    return lambda block, mask: wait(block.bulk_stores, pending, block)
