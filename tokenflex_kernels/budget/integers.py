"""Integer and predicate instructions of SASS on the lanes of a block.

Values are int64 arrays with a 32-bit pattern for each lane, as a number from 0 to 2^32 - 1, or
negative: ``UNKNOWN``, or a pattern of which only some bits are known, see :func:`known_bits`. None
stands for a value that is unknown in all lanes: it depends on data. Predicates are 0, 1 or
negative.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np

from tokenflex_kernels.budget.sass import Instruction, Operand, next_register

Lanes = np.ndarray[Any, np.dtype[Any]]
Value = Lanes | None
Read = Callable[..., Value]

UNKNOWN = -1
MASK = 0xFFFFFFFF
_KNOWN_APART = 0x7FFFFFFF  # bits that can be known while others are not: all but the sign


def known(*values: Value) -> Lanes | None:
    """Return the lanes in which all values are known; None if some value is unknown in all."""
    lanes: Value = None
    for value in values:
        if value is None:
            return None
        lanes = value >= 0 if lanes is None else lanes & (value >= 0)
    return lanes


def known_bits(value: Value) -> tuple[Lanes, Lanes]:
    """Return a mask of the bits that are known, and these bits; the others are 0.

    ptxas keeps predicates that it has no room for as bits of one register. Some of them may depend
    on data, and the rest of the register was perhaps never written, so single bits must be known.
    """
    if value is None:
        return np.zeros((), np.int64), np.zeros((), np.int64)
    packed = ~value  # of a pattern with unknown bits: the mask in the high word, then the bits
    unknown = value < 0
    return np.where(unknown, packed >> 32, MASK), np.where(unknown, packed & MASK, value)


def from_bits(mask: Lanes, bits: Lanes) -> Value:
    """Return the value of which the bits in ``mask`` are known; None if none is, in any lane."""
    if not mask.any():
        return None
    apart = mask & _KNOWN_APART
    return np.where(mask == MASK, bits, ~(apart << 32 | bits & apart))


def either(first: Value, second: Value) -> Value:
    """Return what is known of a value that is one of two: the bits that both have."""
    (mask, bits), (other_mask, other_bits) = known_bits(first), known_bits(second)
    return from_bits(mask & other_mask & ~(bits ^ other_bits), bits)


def signed(value: Lanes) -> Lanes:
    """Return 32-bit patterns as signed numbers."""
    return np.where(value >= 2**31, value - 2**32, value)


def pair(low: Lanes, high: Lanes) -> Lanes:
    """Return 64-bit patterns, as uint64."""
    return (low & MASK).astype(np.uint64) | ((high & MASK).astype(np.uint64) << np.uint64(32))


def halves(value: Lanes) -> tuple[Lanes, Lanes]:
    """Return the low and the high word of 64-bit patterns."""
    low = (value & np.uint64(MASK)).astype(np.int64)
    return low, (value >> np.uint64(32)).astype(np.int64)


def split(operands: tuple[Operand, ...]) -> tuple[list[Operand], list[Operand], list[Operand]]:
    """Return the predicates in front, the other operands, and the predicates behind."""
    first = next((k for k, o in enumerate(operands) if o.kind != "predicate"), len(operands))
    last = max((k for k, o in enumerate(operands) if o.kind != "predicate"), default=first) + 1
    return list(operands[:first]), list(operands[first:last]), list(operands[last:])


def compute(instruction: Instruction, read: Read, num_lanes: int) -> dict[str, Value] | None:
    """Return the registers and predicates that an integer instruction writes.

    Args:
        read: returns the value of an operand; with ``high=True`` of the register behind it.

    Returns:
        Their names and values, or None if the instruction is none of these.
    """
    operation = _OPERATIONS.get(instruction.opcode.removeprefix("U"))
    return None if operation is None else operation(instruction, read, num_lanes)


def _where_known(result: Any, *values: Value) -> Value:
    lanes = known(*values)
    return None if lanes is None else np.where(lanes, result, UNKNOWN)


def _apply(function: Callable[..., Any], *values: Value) -> Value:
    lanes = known(*values)
    return None if lanes is None else np.where(lanes, function(*values), UNKNOWN)


def _add(i: Instruction, read: Read, lanes: int) -> dict[str, Value]:
    _, operands, carries_in = split(i.operands)
    destination, *rest = operands
    carries_out = [o for o in rest if o.kind == "predicate"]
    values = [read(o) for o in rest if o.kind != "predicate"]
    if "X" in i.modifiers:
        values += [read(o) for o in carries_in]
    total = _exact_sum(values)
    results = {destination.name: _apply(lambda t: t & MASK, total)}
    for k, carry in enumerate(carries_out):
        results[carry.name] = _apply(lambda t, k=k: (t >= (k + 1) << 32).astype(np.int64), total)
    return results


def _exact_sum(values: list[Value]) -> Value:
    return _apply(lambda *v: reduce(np.add, v), *values)


def _multiply_add(i: Instruction, read: Read, lanes: int) -> dict[str, Value]:
    _, operands, carries_in = split(i.operands)
    destination, *rest = operands
    carries_out = [o for o in rest if o.kind == "predicate"]
    first, second, addend = [o for o in rest if o.kind != "predicate"]
    a, b, c = read(first), read(second), read(addend)
    if "WIDE" not in i.modifiers and "HI" not in i.modifiers:
        extra = [read(o) for o in carries_in] if "X" in i.modifiers else []
        if "MOV" in i.modifiers:
            return {destination.name: _apply(lambda c: c & MASK, c)}
        u = np.uint64

        def low(a: Lanes, b: Lanes, *added: Lanes) -> Lanes:
            total = a.astype(u) * b.astype(u)
            for value in added:
                total = total + value.astype(u)
            return (total & u(MASK)).astype(np.int64)

        return {destination.name: _apply(low, a, b, c, *extra)}
    c_high = read(addend, high=True)
    if known(a, b, c, c_high) is None:
        names = [destination.name]
        names += [next_register(destination.name)] if "WIDE" in i.modifiers else []
        return dict.fromkeys([*names, *(o.name for o in carries_out)])
    assert a is not None
    assert b is not None
    assert c is not None
    assert c_high is not None
    if "U32" in i.modifiers:
        product = (a & MASK).astype(np.uint64) * (b & MASK).astype(np.uint64)
    else:
        product = (signed(a) * signed(b)).astype(np.uint64)
    total = product + pair(c, c_high)
    low_word, high_word = (_where_known(word, a, b, c, c_high) for word in halves(total))
    if "HI" in i.modifiers:
        return {destination.name: high_word}
    results: dict[str, Value] = {destination.name: low_word}
    results[next_register(destination.name)] = high_word
    for carry in carries_out:
        results[carry.name] = _where_known((total < product).astype(np.int64), a, b, c, c_high)
    return results


def _shift_add(i: Instruction, read: Read, lanes: int) -> dict[str, Value]:
    """LEA: b + (a << shift), or the high word of that with HI, of the pair of a and c."""
    _, operands, carries_in = split(i.operands)
    destination, *rest = operands
    carries_out = [o for o in rest if o.kind == "predicate"]
    sources = [o for o in rest if o.kind != "predicate"]
    a, b, shift = read(sources[0]), read(sources[1]), sources[-1].number
    u = np.uint64
    if "HI" in i.modifiers:
        if "SX32" in i.modifiers or len(sources) == 3:
            c = _apply(lambda a: np.where(a >= 2**31, MASK, 0), a)
        else:
            c = read(sources[2])
        shifted = _apply(lambda a, c: halves(pair(a, c) << u(shift))[1], a, c)
    else:
        shifted = _apply(lambda a: (a << shift) & MASK, a)
    carry = [read(o) for o in carries_in] if "X" in i.modifiers else []
    total = _exact_sum([shifted, b, *carry])
    results = {destination.name: _apply(lambda t: t & MASK, total)}
    for out in carries_out:
        results[out.name] = _apply(lambda t: (t >> 32 > 0).astype(np.int64), total)
    return results


def _shift(i: Instruction, read: Read, lanes: int) -> dict[str, Value]:
    """SHF: a word of the pair (low, high), shifted."""
    destination, low, amount, high = i.operands[:4]
    arithmetic = "S32" in i.modifiers or "S64" in i.modifiers

    def shifted(low: Lanes, amount: Lanes, high: Lanes) -> Lanes:
        amount = (amount & 31 if "W" in i.modifiers else np.minimum(amount, 63)).astype(np.uint64)
        value = pair(low, high)
        if "L" in i.modifiers:
            value = value << amount
        elif arithmetic:
            value = (value.view(np.int64) >> amount.astype(np.int64)).view(np.uint64)
        else:
            value = value >> amount
        return halves(value)[1 if "HI" in i.modifiers else 0]

    return {destination.name: _apply(shifted, read(low), read(amount), read(high))}


def _logic(i: Instruction, read: Read, lanes: int) -> dict[str, Value]:
    """LOP3: any function of three bits, by its truth table; a predicate may get "not zero"."""
    predicates, operands, _ = split(i.operands)
    destination, a, b, c, table = operands[:5]
    if destination.kind != "register":
        raise ValueError(f"no register to write in {i}")
    inputs = [known_bits(read(operand)) for operand in (a, b, c)]
    can_be_one = [bits | ~mask for mask, bits in inputs]
    can_be_zero = [~(bits & mask) for mask, bits in inputs]
    # Whether some entry of the table that fits what is known has a result of 0, and of 1.
    reachable = [np.zeros(lanes, np.int64), np.zeros(lanes, np.int64)]
    for term in range(8):
        bits_of_term = [(can_be_one if term >> 2 - k & 1 else can_be_zero)[k] for k in range(3)]
        fits = reduce(np.bitwise_and, bits_of_term) & MASK
        reachable[table.number >> term & 1] |= fits
    known_mask = reachable[0] ^ reachable[1]
    ones = reachable[1] & known_mask
    results = {destination.name: from_bits(known_mask, ones)}
    not_zero = np.where(ones != 0, 1, np.where(known_mask == MASK, 0, UNKNOWN))
    return {**results, **dict.fromkeys((predicate.name for predicate in predicates), not_zero)}


def _predicate_logic(i: Instruction, read: Read, lanes: int) -> dict[str, Value]:
    """PLOP3: two functions of three predicates, by their truth tables."""
    outs = i.operands[:2]
    inputs = [read(o) for o in i.operands[2:5]]
    tables = [o.number for o in i.operands[5:7]]

    def look_up(a: Lanes, b: Lanes, c: Lanes, table: int) -> Lanes:
        return table >> (4 * (a & 1) + 2 * (b & 1) + (c & 1)) & 1

    return {
        out.name: _apply(lambda a, b, c, t=table: look_up(a, b, c, t), *inputs)
        for out, table in zip(outs, tables, strict=False)
    }


_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "LT": np.less,
    "LE": np.less_equal,
    "GT": np.greater,
    "GE": np.greater_equal,
    "EQ": np.equal,
    "NE": np.not_equal,
}
_COMBINE: dict[str, Callable[[Any, Any], Any]] = {
    "AND": np.bitwise_and,
    "OR": np.bitwise_or,
    "XOR": np.bitwise_xor,
}


def _set_predicate(i: Instruction, read: Read, lanes: int) -> dict[str, Value]:
    """ISETP: a comparison, with EX of the high words after ``ISETP`` of the low ones."""
    out, complement, first, second, combined, *low = i.operands
    name = next(name for name in _COMPARE if name in i.modifiers)
    combine = next(_COMBINE[name] for name in _COMBINE if name in i.modifiers)
    convert = (lambda v: v) if "U32" in i.modifiers else signed

    def compared(a: Lanes, b: Lanes, *low: Lanes) -> Lanes:
        a, b = convert(a), convert(b)
        if not low:
            return _COMPARE[name](a, b)
        if name == "NE":
            return (a != b) | (low[0] > 0)
        strict = _COMPARE[name[0] + "T"](a, b) if name != "EQ" else np.zeros(lanes, bool)
        return strict | ((a == b) & (low[0] > 0))

    extra = [read(o) for o in low] if "EX" in i.modifiers else []
    result = _apply(lambda *v: compared(*v).astype(np.int64), read(first), read(second), *extra)
    other = read(combined)
    return {
        out.name: _apply(combine, result, other),
        complement.name: _apply(lambda r, o: combine(1 - r, o), result, other),
    }


def _select(i: Instruction, read: Read, lanes: int) -> dict[str, Value]:
    destination, a, b, condition = i.operands
    first, second, chosen = read(a), read(b), read(condition)
    if chosen is None:
        return {destination.name: None}
    unknown = np.full(lanes, UNKNOWN)
    first = unknown if first is None else first
    second = unknown if second is None else second
    value = np.where(chosen > 0, first, second)
    return {destination.name: np.where(chosen < 0, UNKNOWN, value)}


def _minimum(i: Instruction, read: Read, lanes: int) -> dict[str, Value]:
    """VIMNMX, and VIADDMNMX: of a sum and a third value, the smaller or the larger."""
    destination, *sources = [operand for operand in i.operands if operand.kind != "predicate"]
    *added, last = [read(source) for source in sources]
    total = _apply(lambda t: t & MASK, _exact_sum(added))
    smaller = read(i.operands[-1])
    convert = (lambda v: v) if "U32" in i.modifiers else signed

    def chosen(a: Lanes, b: Lanes, smaller: Lanes) -> Lanes:
        below = convert(a) < convert(b)
        return np.where(below == (smaller > 0), a, b)

    return {destination.name: _apply(chosen, total, last, smaller)}


def _permute(i: Instruction, read: Read, lanes: int) -> dict[str, Value]:
    """PRMT: four bytes of the pair (a, b), each by a digit of the selector."""
    destination, a, selector, b = i.operands[:4]

    def permuted(a: Lanes, selector: Lanes, b: Lanes) -> Lanes:
        source = pair(a, b).astype(np.uint64)
        result = np.zeros(lanes, np.int64)
        for k in range(4):
            digit = selector >> 4 * k & 15
            byte = (source >> (8 * (digit & 7)).astype(np.uint64)).astype(np.int64) & 255
            byte = np.where(digit & 8, np.where(byte & 128, 255, 0), byte)
            result |= byte << 8 * k
        return result

    return {destination.name: _apply(permuted, read(a), read(selector), read(b))}


def _unary(function: Callable[[Lanes], Lanes]) -> Callable[..., dict[str, Value]]:
    def operation(i: Instruction, read: Read, lanes: int) -> dict[str, Value]:
        return {i.operands[0].name: _apply(lambda v: function(v) & MASK, read(i.operands[-1]))}

    return operation


def _move(i: Instruction, read: Read, lanes: int) -> dict[str, Value]:
    destination, source = i.operands[:2]
    results = {destination.name: _apply(lambda v: v & MASK, read(source))}
    if "64" in i.modifiers:
        results[next_register(destination.name)] = read(source, high=True)
    return results


def _sign_extend(i: Instruction, read: Read, lanes: int) -> dict[str, Value]:
    destination, source, bits = i.operands[:3]

    def extended(value: Lanes, bits: Lanes) -> Lanes:
        value = value & ((1 << bits) - 1)
        if "U32" in i.modifiers:
            return value
        return np.where(value >> (bits - 1) & 1, value - (1 << bits), value) & MASK

    return {destination.name: _apply(extended, read(source), read(bits))}


def _floats(value: Lanes) -> Lanes:
    return (value & MASK).astype(np.uint32).view(np.float32)


def _bits(value: Lanes) -> Lanes:
    return np.ascontiguousarray(value, np.float32).view(np.uint32).astype(np.int64)


def _integer_to_float(i: Instruction, read: Read, lanes: int) -> dict[str, Value]:
    """I2F, of which only the rounded-up reciprocal of integer divisions must be exact."""

    def converted(value: Lanes) -> Lanes:
        exact = value if "U32" in i.modifiers else signed(value)
        result = exact.astype(np.float32)
        if "RP" in i.modifiers:
            result = np.where(result < exact, np.nextafter(result, np.float32(np.inf)), result)
        return _bits(result)

    return {i.operands[0].name: _apply(converted, read(i.operands[1]))}


def _float_to_integer(i: Instruction, read: Read, lanes: int) -> dict[str, Value]:
    def converted(value: Lanes) -> Lanes:
        return (
            np.trunc(_floats(value).astype(np.float64)).clip(-(2**31), MASK).astype(np.int64) & MASK
        )

    return {i.operands[0].name: _apply(converted, read(i.operands[1]))}


def _special_function(i: Instruction, read: Read, lanes: int) -> dict[str, Value]:
    if "RCP" not in i.modifiers:
        return {i.operands[0].name: None}

    def reciprocal(value: Lanes) -> Lanes:
        with np.errstate(divide="ignore"):
            return _bits(np.float32(1) / _floats(value))

    return {i.operands[0].name: _apply(reciprocal, read(i.operands[1]))}


def _constant_halves(i: Instruction, read: Read, lanes: int) -> dict[str, Value]:
    """HFMA2 with factors of zero, as ptxas makes constants: the sum of two halves' addends."""
    destination, first, second, *addends = i.operands
    zeros = all(o.kind == "register" and not o.name for o in (first, second))
    if not zeros or len(addends) != 2 or "BF16_V2" in i.modifiers:
        return {destination.name: None}
    high, low = (int(np.float16(addend.text).view(np.uint16)) for addend in addends)
    return {destination.name: np.full(lanes, high << 16 | low, np.int64)}


_OPERATIONS: dict[str, Callable[[Instruction, Read, int], dict[str, Value]]] = {
    "IADD3": _add,
    "VIADD": _add,
    "IMAD": _multiply_add,
    "LEA": _shift_add,
    "SHF": _shift,
    "LOP3": _logic,
    "PLOP3": _predicate_logic,
    "ISETP": _set_predicate,
    "SEL": _select,
    "IMNMX": _minimum,
    "VIMNMX": _minimum,
    "VIADDMNMX": _minimum,
    "PRMT": _permute,
    "IABS": _unary(lambda v: abs(signed(v))),
    "MOV": _move,
    "LDC": _move,
    "SGXT": _sign_extend,
    "I2F": _integer_to_float,
    "F2I": _float_to_integer,
    "MUFU": _special_function,
    "HFMA2": _constant_halves,
}
