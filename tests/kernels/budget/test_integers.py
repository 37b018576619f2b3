"""Integer instructions of machine code, beside the same arithmetic of Python's integers."""

from __future__ import annotations

import random

import pytest

from tests.kernels.budget.code import values_after

MASK = 2**32 - 1
EDGES = [0, 1, 2, 31, 2**16, 2**31 - 1, 2**31, 2**32 - 2, MASK]
A, B, C = (f"c[0x0][{0x210 + 8 * k:#x}]" for k in range(3))


def signed(value):
    return value - 2**32 if value >= 2**31 else value


def random_words(count):
    """Triples of 32-bit patterns: zeros and ones in all places, then random ones."""
    source = random.Random(0)
    return [(5, 0, 7), (0, 5, 7), (0, 0, 0), (MASK, MASK, MASK)] + [
        tuple(source.choice([source.choice(EDGES), source.getrandbits(32)]) for _ in range(3))
        for _ in range(count)
    ]


def registers_of(*lines, arguments):
    """Walk the lines with a, b and c in R0, R1 and R2; return the first lane's values."""
    setup = [f"MOV R{k}, c[0x0][{0x210 + 8 * k:#x}]" for k in range(len(arguments))]
    after = values_after(*setup, *lines, arguments=arguments)
    return {name: None if value is None else int(value[0]) for name, value in after.items()}


# Lines, and what R4 (and R5, or P0) must be.
WORDS = [
    ("IADD3 R4, R0, R1, R2", lambda a, b, c: a + b + c),
    ("IADD3 R4, R0, -R1, R2", lambda a, b, c: a - b + c),
    ("IADD3 R4, R0, 0x7f, RZ", lambda a, b, c: a + 127),
    ("IADD3 R4, R0, -0x10, RZ", lambda a, b, c: a - 16),
    ("VIADD R4, R0, 0xffffffff", lambda a, b, c: a - 1),
    ("IMAD R4, R0, R1, R2", lambda a, b, c: a * b + c),
    ("IMAD R4, R0, -0x3, R2", lambda a, b, c: a * -3 + c),
    ("IMAD R4, R0, R1, -R2", lambda a, b, c: a * b - c),
    ("IMAD.MOV.U32 R4, RZ, RZ, R1", lambda a, b, c: b),
    ("IMAD.SHL.U32 R4, R0, 0x10, RZ", lambda a, b, c: a << 4),
    ("IMAD.IADD R4, R0, 0x1, R1", lambda a, b, c: a + b),
    ("LEA R4, R0, R1, 0x3", lambda a, b, c: b + (a << 3)),
    ("LEA.HI R4, R0, R1, R2, 0x3", lambda a, b, c: b + ((c << 32 | a) << 3 >> 32)),
    ("LEA.HI.SX32 R4, R0, R1, 0x1b", lambda a, b, c: b + (signed(a) >> 5)),
    ("SHF.L.U32 R4, R0, 0x5, RZ", lambda a, b, c: a << 5),
    ("SHF.R.U32.HI R4, RZ, 0x5, R0", lambda a, b, c: a >> 5),
    ("SHF.R.S32.HI R4, RZ, 0x1f, R0", lambda a, b, c: signed(a) >> 31),
    ("SHF.L.U64.HI R4, R0, 0x7, R1", lambda a, b, c: (b << 32 | a) << 7 >> 32),
    ("SHF.R.U64 R4, R0, 0x7, R1", lambda a, b, c: (b << 32 | a) >> 7),
    ("LOP3.LUT R4, R0, R1, RZ, 0xc0, !PT", lambda a, b, c: a & b),
    ("LOP3.LUT R4, R0, R1, R2, 0xfe, !PT", lambda a, b, c: a | b | c),
    ("LOP3.LUT R4, R0, R1, R2, 0x96, !PT", lambda a, b, c: a ^ b ^ c),
    ("LOP3.LUT R4, RZ, R1, RZ, 0x33, !PT", lambda a, b, c: ~b),
    ("LOP3.LUT R4, R0, R1, R2, 0xe2, !PT", lambda a, b, c: (a & b) | (~b & c)),
    ("PRMT R4, R0, 0x7610, R1", lambda a, b, c: b & 0xFFFF0000 | a & 0xFFFF),
    ("PRMT R4, R0, 0x5410, R1", lambda a, b, c: (b & 0xFFFF) << 16 | a & 0xFFFF),
    ("PRMT R4, R0, 0x9910, RZ", lambda a, b, c: (a & 0xFFFF) - (a >> 15 & 1) * 0x10000),
    ("IABS R4, R0", lambda a, b, c: abs(signed(a))),
    ("VIMNMX R4, R0, R1, PT", lambda a, b, c: min(signed(a), signed(b))),
    ("VIMNMX.U32 R4, R0, R1, !PT", lambda a, b, c: max(a, b)),
    ("IMNMX R4, R0, R1, !PT", lambda a, b, c: max(signed(a), signed(b))),
    ("VIADDMNMX R4, R0, R1, R2, PT", lambda a, b, c: min(signed(a + b & MASK), signed(c))),
    ("VIADDMNMX.U32 R4, R0, 0x8, R2, !PT", lambda a, b, c: max(a + 8 & MASK, c)),
    ("SGXT R4, R0, 0x9", lambda a, b, c: (a & 511) - (a & 256) * 2),
    ("SGXT.U32 R4, R0, 0x9", lambda a, b, c: a & 511),
    ("HFMA2.MMA R4, -RZ, RZ, 0, 0", lambda a, b, c: 0),
    ("HFMA2.MMA R4, -RZ, RZ, 1.5, 5.9604644775390625e-08", lambda a, b, c: 0x3E000001),
    ("IMAD.MOV R4, RZ, RZ, -R0", lambda a, b, c: -a),
    ("UIADD3 R4, R0, R1, URZ", lambda a, b, c: a + b),
]


@pytest.mark.parametrize(("line", "expected"), WORDS, ids=[line for line, _ in WORDS])
def test_words(line, expected):
    for arguments in random_words(12):
        assert registers_of(line, arguments=arguments)["R4"] == expected(*arguments) & MASK


def wide(results):
    return results["R5"] << 32 | results["R4"]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (
            ["IADD3 R4, P0, R0, R1, RZ", "IADD3.X R5, R2, R1, RZ, P0, !PT"],
            lambda a, b, c: (c << 32 | a) + (b << 32 | b),
        ),
        (
            ["IADD3 R4, P0, R0, -R1, RZ", "IADD3.X R5, R2, ~R1, RZ, P0, !PT"],
            lambda a, b, c: (c << 32 | a) - (b << 32 | b),
        ),
        (
            ["IADD3 R4, P0, P1, R0, R1, R2", "IADD3.X R5, RZ, RZ, RZ, P0, P1"],
            lambda a, b, c: a + b + c,
        ),
        (
            ["LEA R4, P0, R0, R1, 0x2", "LEA.HI.X R5, R0, R1, R2, 0x2, P0"],
            lambda a, b, c: (b << 32 | b) + ((c << 32 | a) << 2),
        ),
        (
            ["LEA R4, P0, R0, R1, 0x2", "LEA.HI.X.SX32 R5, R0, R1, 0x2, P0"],
            lambda a, b, c: (b << 32 | b) + (signed(a) << 2),
        ),
        (["IMAD.WIDE R4, R0, R1, RZ"], lambda a, b, c: signed(a) * signed(b)),
        (["IMAD.WIDE.U32 R4, R0, R1, RZ"], lambda a, b, c: a * b),
        (["IMAD.WIDE R4, R0, 0x2, R1"], lambda a, b, c: signed(a) * 2 + (c << 32 | b)),
        (["IMAD.WIDE.U32 R4, R0, R1, c[0x0][0x210]"], lambda a, b, c: a * b + a),
        (
            ["IMAD.MOV.U32 R4, RZ, RZ, R0", "IADD3 R9, P0, R0, R1, RZ",
             "IMAD.X R5, RZ, RZ, R2, P0"],
            lambda a, b, c: (c + (a + b >> 32)) << 32 | a,
        ),
    ],
)  # fmt: skip
def test_pairs(lines, expected):
    for arguments in random_words(12):
        results = registers_of(*lines, arguments=arguments)
        assert wide(results) == expected(*arguments) & (2**64 - 1)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["ISETP.GE.AND P0, PT, R0, R1, PT"], lambda a, b, c: signed(a) >= signed(b)),
        (["ISETP.LT.U32.AND P0, PT, R0, R1, PT"], lambda a, b, c: a < b),
        (["ISETP.NE.AND P0, PT, R0, RZ, PT"], lambda a, b, c: a != 0),
        (
            ["ISETP.EQ.AND P1, PT, R0, R1, PT", "ISETP.GT.OR P0, PT, R0, R2, P1"],
            lambda a, b, c: a == b or signed(a) > signed(c),
        ),
        (
            ["ISETP.GT.U32.AND P1, PT, R0, R1, PT", "ISETP.GT.AND.EX P0, PT, R1, R2, PT, P1"],
            lambda a, b, c: (signed(b) << 32 | a) > (signed(c) << 32 | b),
        ),
        (
            ["ISETP.GE.U32.AND P1, PT, R0, R1, PT", "ISETP.GE.U32.AND.EX P0, PT, R1, R2, PT, P1"],
            lambda a, b, c: (b << 32 | a) >= (c << 32 | b),
        ),
        (
            ["ISETP.NE.U32.AND P1, PT, R0, R1, PT", "ISETP.NE.AND.EX P0, PT, R2, R2, PT, P1"],
            lambda a, b, c: a != b,
        ),
        (["LOP3.LUT P0, RZ, R0, 0x1, RZ, 0xc0, !PT"], lambda a, b, c: a & 1),
        (
            ["ISETP.LT.AND P1, P2, R0, R1, PT", "PLOP3.LUT P0, PT, P1, P2, PT, 0xa8, 0x0"],
            lambda a, b, c: True,
        ),
        (
            ["ISETP.LT.AND P1, PT, R0, R1, PT", "P2R R4, PR, RZ, 0x2", "R2P PR, R4, 0x2",
             "PLOP3.LUT P0, PT, P1, PT, PT, 0x80, 0x0"],
            lambda a, b, c: signed(a) < signed(b),
        ),
    ],
)  # fmt: skip
def test_predicates(lines, expected):
    for arguments in random_words(12):
        results = registers_of(*lines, arguments=arguments)
        assert results["P0"] == bool(expected(*arguments))


# As ptxas divides by a number that it does not know.
DIVISION = """I2F.U32.RP R8, R1
ISETP.NE.U32.AND P2, PT, R1, RZ, PT
MUFU.RCP R8, R8
VIADD R6, R8, 0xffffffe
F2I.FTZ.U32.TRUNC.NTZ R7, R6
MOV R6, RZ
IADD3 R9, RZ, -R7, RZ
IMAD R9, R9, R1, RZ
IMAD.HI.U32 R7, R7, R9, R6
IMAD.HI.U32 R4, R7, R0, RZ
IADD3 R5, -R4, RZ, RZ
IMAD R3, R1, R5, R0
ISETP.GE.U32.AND P0, PT, R3, R1, PT
@P0 IADD3 R3, -R1, R3, RZ
@P0 IADD3 R4, R4, 0x1, RZ
ISETP.GE.U32.AND P1, PT, R3, R1, PT
@P1 IADD3 R4, R4, 0x1, RZ
@!P2 LOP3.LUT R4, RZ, R1, RZ, 0x33, !PT"""


def test_a_division_is_exact():
    numbers = random.Random(1)
    for _ in range(20):
        a, b = numbers.getrandbits(31), numbers.randint(1, 10 ** numbers.randint(1, 9))
        assert registers_of(*DIVISION.splitlines(), arguments=(a, b))["R4"] == a // b


@pytest.mark.parametrize("choice", [0, 1])
def test_select(choice):
    lines = ["ISETP.NE.AND P0, PT, R2, RZ, PT", "SEL R4, R0, R1, P0", "SEL R5, R0, R1, !P0"]
    results = registers_of(*lines, arguments=(7, 8, choice))
    assert (results["R4"], results["R5"]) == ((7, 8) if choice else (8, 7))


def test_what_depends_on_data_is_unknown():
    results = registers_of("FADD R4, R0, R1", "IADD3 R5, R4, 0x1, RZ", arguments=(1, 2))
    assert results.get("R4") is None
    assert results.get("R5") is None
    results = registers_of("MOV R4, 0x1", "FADD R4, R0, R1", arguments=(1, 2))
    assert results["R4"] is None


# R20 is written by nothing before, and P6 depends on data.
DATA = ["FADD R9, R0, R1", "FSETP.GT.AND P6, PT, R9, RZ, PT"]


@pytest.mark.parametrize(("a", "b"), [(1, 2), (2, 1)])
def test_predicates_are_known_one_by_one_when_a_register_holds_them(a, b):
    lines = [
        *DATA,
        "ISETP.GE.AND P1, PT, R0, R1, PT",
        "LOP3.LUT R20, R20, 0xfffffffb, RZ, 0xc0, !PT",
        "@P1 LOP3.LUT R20, R20, 0x4, RZ, 0xfc, !PT",
        "LOP3.LUT R20, R20, 0xfffffffd, RZ, 0xc0, !PT",
        "@P6 LOP3.LUT R20, R20, 0x2, RZ, 0xfc, !PT",
        "MOV R21, R20",
        "LOP3.LUT P2, RZ, R20, 0x4, RZ, 0xc0, !PT",
        "LOP3.LUT P3, RZ, R20, 0x2, RZ, 0xc0, !PT",
        "LOP3.LUT P4, RZ, R20, 0x1, RZ, 0xc0, !PT",
        "R2P PR, R20, 0x26",  # the bits of P1, P2 and P5
    ]
    results = registers_of(*lines[:-1], arguments=(a, b))
    assert results["P2"] == (a >= b)
    assert results["P3"] < 0
    assert results["P4"] < 0
    unpacked = registers_of(*lines, arguments=(a, b))
    assert unpacked["P2"] == (a >= b)
    assert unpacked["P1"] < 0
    assert unpacked["P5"] < 0


def test_predicates_that_are_packed_at_once_are_known_one_by_one():
    lines = [*DATA, "ISETP.LT.AND P1, PT, R0, R1, PT", "ISETP.GE.AND P2, PT, R0, R1, PT"]
    results = registers_of(*lines, "P2R R4, PR, R20, 0x46", "R2P PR, R4, 0x7f", arguments=(1, 2))
    assert [results[f"P{k}"] for k in (1, 2)] == [1, 0]
    assert all(results[f"P{k}"] < 0 for k in (0, 3, 4, 5, 6))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("LOP3.LUT R4, R20, RZ, RZ, 0xc0, !PT", 0),  # and
        ("LOP3.LUT R4, R20, 0xffffffff, RZ, 0xfc, !PT", MASK),  # or
        ("LOP3.LUT R4, R20, R0, R0, 0xca, !PT", 5),  # one of two words that are the same
        ("@P6 MOV R4, 0x7", 7),
    ],
)
def test_bits_are_known_that_do_not_depend_on_unknown_ones(line, expected):
    assert registers_of(*DATA, "MOV R4, 0x7", line, arguments=(5, 6))["R4"] == expected


@pytest.mark.parametrize(
    "line",
    [
        "LOP3.LUT R4, R20, R20, RZ, 0xc0, !PT",
        "LOP3.LUT R4, R0, R20, R0, 0xca, !PT",
        "LOP3.LUT R4, R20, 0x7fffffff, RZ, 0xfc, !PT",
        "@P6 MOV R4, 0x6",
    ],
)
def test_a_word_with_an_unknown_bit_is_unknown(line):
    result = registers_of(*DATA, "MOV R4, 0x7", line, arguments=(5, 6))["R4"]
    assert result is None or result < 0
