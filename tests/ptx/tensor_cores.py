"""Matrix products of warps and groups of four warps, and how they move their operands.

Products are summed in float64 and rounded to float32 once an instruction. A wgmma takes effect at
the wait for its group: it reads shared memory then, and its accumulators do not exist in between.
A first operand in registers is read at once: where Triton writes such a register again before the
wait, the assembler, which sees that, has to wait.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from tests.ptx.asynchronous import commit, swizzled, wait
from tests.ptx.machine import Block, Program, Step, decodes, uniform
from tests.ptx.memory import tags_of
from tests.ptx.operands import Mask, Vector, bits_of, interpret, registers_in
from tests.ptx.parse import Instruction, PtxError

_LANE = np.arange(32)


def _elements(bits: Vector, type: str) -> list[Vector]:
    """Return the elements that a register of 32 bits holds, as float64."""
    if bits_of(type) == 32:
        return [interpret(bits, type).astype(np.float64)]
    halves = bits & np.uint32(0xFFFF), bits >> np.uint32(16)
    return [interpret(half, type).astype(np.float64) for half in halves]


def _rows_fragment(registers: list[Vector], type: str) -> np.ndarray:
    """Return the rows of 16 that the registers of each warp hold: [warps, 16, columns].

    Registers go through rows 0-7 and 8-15 first, and then through the columns.
    """
    per = 32 // bits_of(type)
    matrix = np.zeros((len(registers[0]) // 32, 16, 4 * per * (len(registers) // 2)))
    for index, bits in enumerate(registers):
        row = _LANE // 4 + 8 * (index % 2)
        first = _LANE % 4 * per + 4 * per * (index // 2)
        for offset, values in enumerate(_elements(bits, type)):
            matrix[:, row, first + offset] = values.reshape(-1, 32)
    return matrix


# ---- mma: a warp's product, of registers.


@decodes("mma.sync")
def _multiply(instruction: Instruction, program: Program) -> Step:
    shape = next(word for word in instruction.words if re.fullmatch(r"m\d+n\d+k\d+", word))
    result, left, right, addend = instruction.words[-4:]
    if not shape.startswith("m16n8") or (result, addend) != ("f32", "f32") or left != right:
        raise PtxError("only m16n8 products with float32 sums are supported")
    out, a, b, c = (registers_in(operand) for operand in instruction.operands)
    writers = [program.operands.writer(name, "f32") for name in out]
    readers = [[program.operands.reader(name, "b32") for name in names] for names in (a, b, c)]
    per = 32 // bits_of(left)

    def step(block: Block, mask: Mask) -> None:
        if mask is not None:
            raise PtxError("some threads take part in a product and others do not")
        left_bits, right_bits, sums = ([read(block) for read in group] for group in readers)
        matrix_a = _rows_fragment(left_bits, left)
        warps, _, depth = matrix_a.shape
        matrix_b = np.zeros((warps, depth, 8))
        for index, bits in enumerate(right_bits):
            first = _LANE % 4 * per + 4 * per * index
            for offset, values in enumerate(_elements(bits, right)):
                matrix_b[:, first + offset, _LANE // 4] = values.reshape(-1, 32)
        product = matrix_a @ matrix_b
        for index, (write, bits) in enumerate(zip(writers, sums, strict=True)):
            part = product[:, _LANE // 4 + 8 * (index // 2), _LANE % 4 * 2 + index % 2]
            total = bits.view(np.float32) + part.reshape(-1)
            write(block, total.astype(np.float32), mask)

    return step


# ---- ldmatrix and stmatrix: 8 x 8 matrices of 16 bits, a row of which a thread points to.


def _matrix_rows(addresses: Vector, matrices: int) -> tuple[Vector, Vector]:
    """Return the threads that point to rows, and for each register its row's thread."""
    everywhere = np.arange(len(addresses))
    pointing = everywhere[everywhere % 32 < 8 * matrices]
    return pointing, everywhere - everywhere % 32


@decodes("ldmatrix.sync")
def _load_matrices(instruction: Instruction, program: Program) -> Step:
    registers = registers_in(instruction.operands[0])
    read_address = program.operands.address(instruction.operands[1])
    writers = [program.operands.writer(name, "b32") for name in registers]
    transposed = "trans" in instruction.words
    lane = np.arange(program.threads) % 32

    def step(block: Block, mask: Mask) -> None:
        if mask is not None:
            raise PtxError("some threads take part in ldmatrix and others do not")
        addresses = read_address(block)
        pointing, warp = _matrix_rows(addresses, len(registers))
        block.shared.load(addresses[pointing], 4, 4, block.warp_of[pointing])
        halves = block.shared.elements(2)
        for index, write in enumerate(writers):
            if transposed:
                rows = [warp + 8 * index + lane % 4 * 2 + offset for offset in (0, 1)]
                low, high = (halves[addresses[row] // 2 + lane // 4] for row in rows)
            else:
                first = addresses[warp + 8 * index + lane // 4] // 2 + lane % 4 * 2
                low, high = halves[first], halves[first + 1]
            write(block, low.astype(np.uint32) | (high.astype(np.uint32) << np.uint32(16)), mask)

    return step


@decodes("stmatrix.sync")
def _store_matrices(instruction: Instruction, program: Program) -> Step:
    registers = registers_in(instruction.operands[1])
    read_address = program.operands.address(instruction.operands[0])
    readers = [program.operands.reader(name, "b32") for name in registers]
    transposed = "trans" in instruction.words

    def step(block: Block, mask: Mask) -> None:
        if mask is not None:
            raise PtxError("some threads take part in stmatrix and others do not")
        addresses = read_address(block)
        pointing, _ = _matrix_rows(addresses, len(registers))
        bits = np.stack([read(block) for read in readers])  # [matrices, threads]
        pairs = np.stack([bits & np.uint32(0xFFFF), bits >> np.uint32(16)], -1).astype(np.uint16)
        # [matrices, warps, 8, 8]: a thread holds two neighbours of row lane / 4.
        matrices = pairs.reshape(len(registers), -1, 8, 8)
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        rows = matrices.swapaxes(0, 1).reshape(-1, 8)  # in the order of the threads that point
        block.shared.store(addresses[pointing], np.ascontiguousarray(rows), block.warp_of[pointing])

    return step


# ---- wgmma: the product of a group of four warps, of shared memory.

_SWIZZLES = {0: 0, 1: 128, 2: 64, 3: 32}


@lru_cache(maxsize=512)
def operand_at(
    descriptor: int, rows: int, item: int, transposed: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return the addresses of an operand's elements, [rows, 32 bytes / item], and their tags.

    Args:
        descriptor: of the matrix, as wgmma takes it.
        rows: of the first operand, or columns of the second.
        item: bytes of an element.
        transposed: whether ``rows`` lie next to each other, instead of what is summed over.
    """
    start = (descriptor & 0x3FFF) << 4
    leading = ((descriptor >> 16) & 0x3FFF) << 4
    stride = ((descriptor >> 32) & 0x3FFF) << 4
    swizzle = _SWIZZLES[descriptor >> 62 & 3]
    span = swizzle or 16
    row, k = np.arange(rows)[:, None], np.arange(32 // item)[None, :]
    if (descriptor >> 49) & 7:
        raise PtxError("a descriptor with a base offset is not supported")
    if transposed:
        per = span // item
        address = row // per * leading + k // 8 * stride + k % 8 * span + row % per * item
    else:
        within = k * item
        address = row // 8 * stride + row % 8 * span + within % span + within // span * leading
    addresses = swizzled(start + address, swizzle)
    return addresses, tags_of(addresses, item)


@dataclass
class Product:
    """A wgmma that was issued: of one group of four warps.

    Attributes:
        results: the accumulators.
        group: the number of the group of warps.
        left: addresses of the first operand's elements [64, K], or the registers that hold it.
        right: addresses of the second operand's elements [N, K].
        type: of the elements.
        signs: that the operands are multiplied by.
        keeps: whether each thread adds to its accumulators, or replaces them.
        tags: of the shared memory that is read.
    """

    results: list[Result]
    group: int
    left: np.ndarray | list[Vector]
    right: np.ndarray
    type: str
    signs: tuple[int, int]
    keeps: np.ndarray
    tags: list[np.ndarray]

    def complete(self, block: Block) -> None:
        item = bits_of(self.type) // 8
        memory = block.shared.elements(item)

        def load(addresses: np.ndarray) -> np.ndarray:
            bits = memory[addresses // item].astype(np.uint32)
            return interpret(bits.reshape(-1), self.type).reshape(bits.shape).astype(np.float64)

        if isinstance(self.left, list):
            left = _rows_fragment(self.left, self.type).reshape(64, -1)
        else:
            left = load(self.left)
        product = self.signs[0] * self.signs[1] * (left @ load(self.right).T)
        lane = np.arange(128)
        threads = slice(128 * self.group, 128 * self.group + 128)
        for index, result in enumerate(self.results):
            row = lane // 32 * 16 + lane % 32 // 4 + 8 * (index // 2 % 2)
            column = index // 4 * 8 + lane % 4 * 2 + index % 2
            before = np.where(self.keeps, result.values[threads], np.float32(0))
            result.values[threads] = (before + product[row, column]).astype(np.float32)
        for tags in self.tags:
            block.shared.end_read(tags)


class Result:
    """The values of an accumulator that products in flight write, float32."""

    def __init__(self, values: Vector) -> None:
        self.values = values


@decodes("wgmma.mma_async")
def _multiply_later(instruction: Instruction, program: Program) -> Step:
    shape = next(word for word in instruction.words if re.fullmatch(r"m64n\d+k\d+", word))
    columns = int(shape[4:].partition("k")[0])
    result, type, right_type = instruction.words[-3:]
    if result != "f32" or type != right_type:
        raise PtxError("only products of one type with float32 sums are supported")
    accumulators, left, right, scale, *flags = instruction.operands
    names = registers_in(accumulators)
    if len(names) != columns // 2 or program.threads % 128:
        raise PtxError(f"{len(names)} accumulators for {shape} by {program.threads} threads")
    in_registers = left.startswith("{")
    left_names = registers_in(left) if in_registers else []
    left_readers = [program.operands.reader(name, "b32") for name in left_names]
    read_left = None if in_registers else program.operands.reader(left, "b64")
    read_right = program.operands.reader(right, "b64")
    read_scale = program.operands.reader(scale, "pred")
    signs = int(flags[0]), int(flags[1])
    transposed = [flag == "1" for flag in flags[2:]]
    transposed = [False] * (2 - len(transposed)) + transposed
    item = bits_of(type) // 8

    def results_of(block: Block) -> list[Result]:
        registers = block.registers
        results = []
        for name in names:
            if name not in registers.in_flight:
                bits = registers.values.pop(name, None)
                if bits is None:
                    raise registers.missing(name)
                registers.in_flight[name] = Result(bits.view(np.float32).copy())
            results.append(registers.in_flight[name])
        return results

    def step(block: Block, mask: Mask) -> None:
        if mask is not None:
            raise PtxError("some threads take part in a product and others do not")
        # The accumulators of a product in flight are ordered, as are those that it left.
        if not block.registers.unfenced.isdisjoint((*names, *left_names)):
            block.report("multiplies registers that were written since the last wgmma.fence")
        left_bits = [read(block) for read in left_readers]
        scales, rights = read_scale(block), read_right(block)
        lefts = None if read_left is None else read_left(block)
        results = results_of(block)
        for group in range(program.threads // 128):
            threads = slice(128 * group, 128 * group + 128)
            b, b_tags = operand_at(uniform(None, rights[threads]), columns, item, transposed[1])
            tags = [b_tags]
            if lefts is None:
                a: np.ndarray | list[Vector] = [bits[threads] for bits in left_bits]
            else:
                a, a_tags = operand_at(uniform(None, lefts[threads]), 64, item, transposed[0])
                tags.append(a_tags)
            for each in tags:
                block.shared.begin_read(each)
            block.products[-1].append(
                Product(results, group, a, b, type, signs, scales[threads], tags)
            )

    return step


@decodes("wgmma.commit_group")
def _commit_products(instruction: Instruction, program: Program) -> Step:
    return lambda block, mask: commit(block.products)


@decodes("wgmma.wait_group")
def _wait_for_products(instruction: Instruction, program: Program) -> Step:
    pending = int(instruction.operands[0], 0)

    def step(block: Block, mask: Mask) -> None:
        wait(block.products, pending, block)
        busy = {id(result) for group in block.products for product in group
                for result in product.results}  # fmt: skip
        registers = block.registers
        for name, result in list(registers.in_flight.items()):
            if id(result) not in busy:
                del registers.in_flight[name]
                registers.values[name] = result.values.view(np.uint32)

    return step
