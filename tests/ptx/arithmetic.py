"""Arithmetic, conversions, and exchange between the threads of a warp.

float32 operations are rounded as IEEE has it. Approximations of the hardware are taken to be exact
but for ``tanh.approx``, whose error of 2^-11 shows in bfloat16: its result keeps 11 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.ptx.machine import Block, Program, Step, decodes
from tests.ptx.operands import Mask, Vector, bits_of, registers_in, round_to_bf16
from tests.ptx.parse import Instruction, PtxError

FLOATS = ("f32", "f16", "bf16", "f64")
_PACKED = {"f16x2": "f16", "bf16x2": "bf16"}
_LOGIC = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _map(instruction: Instruction, program: Program, function: Callable, *types: str) -> Step:
    """Return a step that writes ``function`` of the operands; types of result and operands."""
    write = program.operands.writer(instruction.operands[0], types[0])
    pairs = zip(instruction.operands[1:], types[1:], strict=True)
    readers = [program.operands.reader(operand, type) for operand, type in pairs]
    if len(readers) == 1:
        (only,) = readers
        return lambda block, mask: write(block, function(only(block)), mask)
    if len(readers) == 2:
        first, second = readers
        return lambda block, mask: write(block, function(first(block), second(block)), mask)
    return lambda block, mask: write(block, function(*(read(block) for read in readers)), mask)


def _shift(shift: Callable, size: int, fill: Callable) -> Callable:
    def apply(value: Vector, amount: Vector) -> Vector:
        within = np.minimum(amount, np.uint32(size - 1)).astype(value.dtype)
        return np.where(amount < size, shift(value, within), fill(value))

    return apply


def _quotient(a: Vector, b: Vector) -> Vector:
    """Integer division towards zero."""
    wide = a.astype(np.int64), np.where(b == 0, 1, b).astype(np.int64)
    return (np.sign(wide[0]) * np.sign(wide[1]) * (np.abs(wide[0]) // np.abs(wide[1]))).astype(
        a.dtype
    )


def _float32(function: Callable) -> Callable:
    """Round the float64 result of a function of float32 values once."""
    return lambda *values: function(*(value.astype(np.float64) for value in values)).astype(
        np.float32
    )


def tanh_approx(values: Vector) -> Vector:
    """Return tanh with an error of up to 2^-11: 11 bits are kept."""
    mantissa, exponent = np.frexp(np.tanh(values.astype(np.float64)))
    return np.ldexp(np.round(mantissa * 2048) / 2048, exponent).astype(np.float32)


_FLOAT_OPERATIONS: dict[str, Callable] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "fma": _float32(lambda a, b, c: a * b + c),
    "mad": _float32(lambda a, b, c: a * b + c),
    "div": lambda a, b: a / b,
    "min": np.fmin,
    "max": np.fmax,
    "neg": lambda a: -a,
    "abs": np.abs,
    "sqrt": np.sqrt,
    "ex2": _float32(np.exp2),
    "lg2": _float32(np.log2),
    "rcp": lambda a: np.float32(1) / a,
    "rsqrt": _float32(lambda a: 1 / np.sqrt(a)),
    "sin": _float32(np.sin),
    "cos": _float32(np.cos),
    "tanh": tanh_approx,
    "copysign": lambda a, b: np.copysign(b, a),
}


@decodes(
    *("add", "sub", "mul", "mad", "fma", "div", "rem", "min", "max", "neg", "abs", "not"),
    *("and", "or", "xor", "shl", "shr", "sqrt", "ex2", "lg2", "rcp", "rsqrt", "sin", "cos"),
    *("tanh", "copysign", "popc", "clz"),
)
def _arithmetic(instruction: Instruction, program: Program) -> Step:
    type, (name, *modifiers) = instruction.type, instruction.words
    operands = len(instruction.operands) - 1
    if type == "f64":
        raise PtxError("double precision is not supported")
    if type in _PACKED:
        return _packed(instruction, program, _FLOAT_OPERATIONS[name], _PACKED[type])
    if type in FLOATS:
        function = _FLOAT_OPERATIONS[name]
        if name in ("min", "max") and "NaN" in modifiers:
            function = np.minimum if name == "min" else np.maximum
        if type == "f16":
            half = function
            function = lambda *values: half(  # noqa: E731
                *(value.astype(np.float32) for value in values)
            ).astype(np.float16)
        return _map(instruction, program, function, *[type] * (operands + 1))
    if type == "pred":
        function = _LOGIC.get(name, np.logical_not)
        return _map(instruction, program, function, *["pred"] * (operands + 1))
    if "wide" in modifiers:
        wide = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}[type]
        dtype = {"s32": np.int32, "u32": np.uint32, "s64": np.int64, "u64": np.uint64}[wide]
        multiply = lambda a, b: a.astype(dtype) * b.astype(dtype)  # noqa: E731
        if name == "mul":
            return _map(instruction, program, multiply, wide, type, type)
        return _map(
            instruction, program, lambda a, b, c: multiply(a, b) + c, wide, type, type, wide
        )
    if "hi" in modifiers:
        return _map(instruction, program, _high_product, *[type] * 3)
    size = bits_of(type)
    if name in ("shl", "shr"):
        # The sign of a right shift decides what fills; a count of the size or more shifts all out.
        shift = np.left_shift if name == "shl" else np.right_shift
        fill = (lambda a: a >> (size - 1)) if name == "shr" and type[0] == "s" else np.zeros_like
        return _map(instruction, program, _shift(shift, size, fill), type, type, "u32")
    if name in ("popc", "clz"):
        count = _ones if name == "popc" else lambda value: _leading_zeros(value, size)
        return _map(instruction, program, count, "u32", type)
    function = {
        "add": lambda a, b: a + b,
        "sub": lambda a, b: a - b,
        "mul": lambda a, b: a * b,
        "mad": lambda a, b, c: a * b + c,
        "div": _quotient,
        "rem": lambda a, b: a - _quotient(a, b) * b,
        "min": np.minimum,
        "max": np.maximum,
        "neg": lambda a: -a,
        "abs": np.abs,
        "not": np.invert,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }[name]
    return _map(instruction, program, function, *[type] * (operands + 1))


def _high_product(a: Vector, b: Vector) -> Vector:
    if a.dtype.itemsize == 8:
        product = [int(x) * int(y) >> 64 for x, y in zip(a.tolist(), b.tolist(), strict=True)]
        return np.array(product, a.dtype)
    wide = np.int64 if a.dtype == np.int32 else np.uint64
    return (a.astype(wide) * b.astype(wide) >> wide(32)).astype(a.dtype)


def _ones(values: Vector) -> Vector:
    parts = values.view(np.uint8).reshape(len(values), -1)
    return np.unpackbits(parts, axis=1).sum(1).astype(np.uint32)


def _leading_zeros(values: Vector, size: int) -> Vector:
    lengths = [size - int(value).bit_length() for value in values.tolist()]
    return np.array(lengths, np.uint32)


def _packed(instruction: Instruction, program: Program, function: Callable, part: str) -> Step:
    """Apply a function to both halves of registers."""
    reader = program.operands.reader
    low = [reader(operand, part) for operand in instruction.operands[1:]]
    whole = [reader(operand, "b32") for operand in instruction.operands[1:]]
    write = program.operands.writer(instruction.operands[0], "b32")

    def halves(block: Block, shift: int) -> list[Vector]:
        if shift == 0:
            return [read(block).astype(np.float32) for read in low]
        bits = [read(block) >> np.uint32(16) for read in whole]
        return [_widen(value, part) for value in bits]

    def step(block: Block, mask: Mask) -> None:
        first, second = (_half_bits(function(*halves(block, s)), part) for s in (0, 16))
        write(block, first | (second << np.uint32(16)), mask)

    return step


def _widen(bits: Vector, type: str) -> Vector:
    if type == "bf16":
        return (bits << np.uint32(16)).view(np.float32)
    return bits.astype(np.uint16).view(np.float16).astype(np.float32)


def _half_bits(values: Vector, type: str) -> Vector:
    if type == "bf16":
        return round_to_bf16(values)
    return values.astype(np.float16).view(np.uint16).astype(np.uint32)


# ---- Comparison, selection, moves.

_COMPARE: dict[str, Callable] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):  # true where one is NaN

    def _unordered(a: Vector, b: Vector, ordered: Callable = _COMPARE[_name]) -> Vector:
        return ordered(a, b) | np.isnan(a) | np.isnan(b)

    _COMPARE[f"{_name}u"] = _unordered


@decodes("setp")
def _compare(instruction: Instruction, program: Program) -> Step:
    _, name, *modifiers = instruction.words
    type = instruction.type
    result, first, second, *third = instruction.operands
    compare = _COMPARE[name]
    if name == "ne" and type in FLOATS:  # ordered: false where one is NaN
        compare = lambda a, b: (a != b) & ~(np.isnan(a) | np.isnan(b))  # noqa: E731
    a, b = (program.operands.reader(operand, type) for operand in (first, second))
    yes, _, no = result.partition("|")
    write = program.operands.writer(yes, "pred")
    write_not = program.operands.writer(no or "_", "pred")
    combine: Callable | None = None
    if third:
        combine = _LOGIC[next(word for word in modifiers if word in _LOGIC)]
        other = program.operands.reader(third[0].lstrip("!"), "pred")
        negated = third[0].startswith("!")

    def step(block: Block, mask: Mask) -> None:
        truth = compare(a(block), b(block))
        inverse = ~truth
        if combine is not None:
            value = other(block) ^ negated
            truth, inverse = combine(truth, value), combine(inverse, value)
        write(block, truth, mask)
        write_not(block, inverse, mask)

    return step


@decodes("selp")
def _select(instruction: Instruction, program: Program) -> Step:
    type = instruction.type
    return _map(instruction, program, lambda a, b, p: np.where(p, a, b), type, type, type, "pred")


@decodes("mov")
def _move(instruction: Instruction, program: Program) -> Step:
    type = instruction.type
    target, origin = instruction.operands
    if target.startswith("{"):
        return _unpack(registers_in(target), origin, type, program)
    if origin.startswith("{"):
        return _pack(target, registers_in(origin), type, program)
    copy = _map(instruction, program, lambda value: value, type, type)

    def step(block: Block, mask: Mask) -> None:
        waiting = block.registers.in_flight
        if waiting and mask is None and origin in waiting:  # the result has another name from here
            waiting[target] = waiting[origin]
            block.registers.values.pop(target, None)
        else:
            copy(block, mask)

    return step


def _pack(target: str, parts: list[str], type: str, program: Program) -> Step:
    size = bits_of(type) // len(parts)
    readers = [program.operands.reader(part, f"b{size}") for part in parts]
    dtype = np.uint64 if bits_of(type) == 64 else np.uint32
    write = program.operands.writer(target, type)

    def step(block: Block, mask: Mask) -> None:
        total = dtype(0)
        for index, read in enumerate(readers):
            total = total | (read(block).astype(dtype) << dtype(index * size))
        write(block, total, mask)

    return step


def _unpack(targets: list[str], origin: str, type: str, program: Program) -> Step:
    size = bits_of(type) // len(targets)
    read = program.operands.reader(origin, type)
    writers = [program.operands.writer(target, f"b{size}") for target in targets]

    def step(block: Block, mask: Mask) -> None:
        value = read(block)
        for index, write in enumerate(writers):
            part = value >> value.dtype.type(index * size)
            write(block, part.astype(np.uint64).astype(_unsigned(size)), mask)

    return step


def _unsigned(size: int) -> Any:
    return {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}[size]


@decodes("cvta")
def _generic_address(instruction: Instruction, program: Program) -> Step:
    return _map(instruction, program, lambda value: value, instruction.type, instruction.type)


@decodes("createpolicy")
def _policy(instruction: Instruction, program: Program) -> Step:
    write = program.operands.writer(instruction.operands[0], "b64")
    nothing = np.zeros(program.threads, np.uint64)
    return lambda block, mask: write(block, nothing, mask)


@decodes("cvt")
def _convert(instruction: Instruction, program: Program) -> Step:
    *modifiers, target, origin = instruction.words[1:]
    if target in _PACKED:  # the first operand is the upper half
        half = _PACKED[target]

        def pack(upper: Vector, lower: Vector) -> Vector:
            return _half_bits(lower, half) | (_half_bits(upper, half) << np.uint32(16))

        return _map(instruction, program, pack, "b32", origin, origin)
    if target == "tf32":
        return _map(instruction, program, _round_to_tf32, "b32", origin)
    if "f64" in (target, origin):
        raise PtxError("double precision is not supported")
    return _map(instruction, program, _conversion(modifiers, target, origin), target, origin)


def _conversion(modifiers: list[str], target: str, origin: str) -> Callable:
    dtypes = {"f32": np.float32, "f16": np.float16, "bf16": np.float32}
    if target in dtypes:
        dtype = dtypes[target]
        if origin not in FLOATS or target != "bf16":
            return lambda value: value.astype(dtype)
        return lambda value: value.astype(np.float32)  # rounded as it is written
    kind, size = target[0], bits_of(target)
    dtype = np.dtype(f"{'i' if kind == 's' else 'u'}{size // 8}")
    if origin not in FLOATS:
        if "sat" in modifiers:
            limits = np.iinfo(dtype)
            return lambda value: np.clip(value, limits.min, limits.max).astype(dtype)
        return lambda value: value.astype(dtype)
    rounding = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
    round_ = next(rounding[word] for word in modifiers if word in rounding)
    limits = np.iinfo(dtype)  # floats are always saturated

    def to_integer(value: Vector) -> Vector:
        wide = round_(value.astype(np.float64))
        wide = np.where(np.isnan(wide), 0, wide)
        inside = np.clip(wide, float(limits.min), float(limits.max))
        return np.where(wide >= float(limits.max), limits.max, inside.astype(dtype)).astype(dtype)

    return to_integer


def _round_to_tf32(values: Vector) -> Vector:
    """Round to nearest, ties away from zero, keeping 10 bits."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)


# ---- Bits.


@decodes("bfe")
def _extract(instruction: Instruction, program: Program) -> Step:
    type = instruction.type
    size = bits_of(type)

    def extract(value: Vector, first: Vector, length: Vector) -> Vector:
        wide = value.astype(np.uint64)
        mask = (np.uint64(1) << length.astype(np.uint64)) - np.uint64(1)
        field = (wide >> first.astype(np.uint64)) & mask
        if type[0] == "u":
            return field.astype(value.dtype)
        sign = np.uint64(1) << np.maximum(length.astype(np.int64) - 1, 0).astype(np.uint64)
        signed = ((field ^ sign) - sign).view(np.int64)
        return np.where(length == 0, 0, signed).astype(value.dtype)

    if size != 32:
        raise PtxError("bfe of 64 bits is not supported")
    return _map(instruction, program, extract, type, type, "u32", "u32")


@decodes("bfi")
def _insert(instruction: Instruction, program: Program) -> Step:
    def insert(field: Vector, value: Vector, first: Vector, length: Vector) -> Vector:
        mask = ((np.uint64(1) << length.astype(np.uint64)) - np.uint64(1)) << first.astype(
            np.uint64
        )
        mask = mask.astype(np.uint32)
        return (value & ~mask) | ((field << first) & mask)

    return _map(instruction, program, insert, "b32", "b32", "b32", "u32", "u32")


@decodes("lop3")
def _logic_of_three(instruction: Instruction, program: Program) -> Step:
    table = int(instruction.operands[-1], 0)
    inputs = Instruction("lop3.b32", instruction.operands[:-1])

    def combine(a: Vector, b: Vector, c: Vector) -> Vector:
        total = np.zeros_like(a)
        for row in range(8):
            if table >> row & 1:
                total |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
        return total

    return _map(inputs, program, combine, "b32", "b32", "b32", "b32")


@decodes("prmt")
def _permute(instruction: Instruction, program: Program) -> Step:
    if len(instruction.words) > 2:
        raise PtxError("only the plain form of prmt is supported")

    def permute(a: Vector, b: Vector, selector: Vector) -> Vector:
        both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
        total = np.zeros_like(a)
        for index in range(4):
            choice = (selector >> np.uint32(4 * index)) & np.uint32(15)
            byte = (both >> (np.uint64(8) * (choice & np.uint32(7)).astype(np.uint64))) & np.uint64(
                255
            )
            sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
            byte = np.where(choice & np.uint32(8), sign, byte)
            total |= byte.astype(np.uint32) << np.uint32(8 * index)
        return total

    return _map(instruction, program, permute, "b32", "b32", "b32", "b32")


@decodes("shf")
def _funnel_shift(instruction: Instruction, program: Program) -> Step:
    left, wraps = instruction.words[1] == "l", instruction.words[2] == "wrap"

    def shift(low: Vector, high: Vector, amount: Vector) -> Vector:
        both = low.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32))
        amount = (amount & np.uint32(31) if wraps else np.minimum(amount, 32)).astype(np.uint64)
        if left:
            return ((both << amount) >> np.uint64(32)).astype(np.uint32)
        return (both >> amount).astype(np.uint32)

    return _map(instruction, program, shift, "b32", "b32", "b32", "u32")


# ---- Exchange between the threads of a warp.


@decodes("shfl.sync")
def _shuffle(instruction: Instruction, program: Program) -> Step:
    mode = instruction.words[2]
    result, value, operand, clamp, *_ = instruction.operands
    result, _, valid = result.partition("|")
    read = program.operands.reader(value, "b32")
    read_operand = program.operands.reader(operand, "u32")
    read_clamp = program.operands.reader(clamp, "u32")
    write = program.operands.writer(result, "b32")
    write_valid = program.operands.writer(valid or "_", "pred")
    everywhere = np.arange(program.threads)
    lane = everywhere % 32

    def step(block: Block, mask: Mask) -> None:
        if mask is not None:
            raise PtxError("some threads take part in an exchange and others do not")
        bound = read_clamp(block).astype(np.int64)
        segment = (bound >> 8) & 31
        last = (lane & segment) | (bound & 31 & ~segment)
        first = lane & segment
        other = read_operand(block).astype(np.int64) & 31
        if mode == "bfly":
            chosen = lane ^ other
            inside = chosen <= last
        elif mode == "up":
            chosen = lane - other
            inside = chosen >= last
        elif mode == "down":
            chosen = lane + other
            inside = chosen <= last
        else:
            chosen = first | (other & ~segment)
            inside = chosen <= last
        origin = np.where(inside, chosen, lane)
        write(block, read(block)[everywhere - lane + origin], mask)
        write_valid(block, inside, mask)

    return step


@decodes("elect.sync")
def _elect(instruction: Instruction, program: Program) -> Step:
    leader, _, elected = instruction.operands[0].partition("|")
    write_leader = program.operands.writer(leader, "b32")
    write = program.operands.writer(elected, "pred")
    lane = np.arange(program.threads, dtype=np.uint32) % 32

    def step(block: Block, mask: Mask) -> None:
        write_leader(block, np.zeros_like(lane), mask)
        write(block, lane == 0, mask)

    return step


@decodes("vote.sync")
def _vote(instruction: Instruction, program: Program) -> Step:
    mode = instruction.words[2]
    result, value, *_ = instruction.operands
    read = program.operands.reader(value.lstrip("!"), "pred")
    negated = value.startswith("!")
    write = program.operands.writer(result, "b32" if mode == "ballot" else "pred")
    weights = (np.uint64(1) << np.arange(32, dtype=np.uint64))[None, :]

    def step(block: Block, mask: Mask) -> None:
        if mask is not None:
            raise PtxError("some threads take part in a vote and others do not")
        votes = (read(block) ^ negated).reshape(-1, 32)
        if mode == "ballot":
            outcome = (votes * weights).sum(1).astype(np.uint32)
        else:
            outcome = {"any": votes.any(1), "all": votes.all(1)}[mode]
        write(block, np.repeat(outcome, 32), mask)

    return step


@decodes("redux.sync")
def _reduce(instruction: Instruction, program: Program) -> Step:
    functions = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and,
                 "or": np.bitwise_or, "xor": np.bitwise_xor}  # fmt: skip
    function, type = functions[instruction.words[2]], instruction.type
    read = program.operands.reader(instruction.operands[1], type)
    write = program.operands.writer(instruction.operands[0], type)

    def step(block: Block, mask: Mask) -> None:
        if mask is not None:
            raise PtxError("some threads take part in a reduction and others do not")
        values = read(block).reshape(-1, 32)
        write(block, np.repeat(function.reduce(values, 1, values.dtype), 32), mask)

    return step
