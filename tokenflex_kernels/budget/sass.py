"""Machine code of NVIDIA's GPUs (SASS) as instructions, read from the text of ``cuobjdump -sass``.

The text has no published grammar. Instructions of the kernels of this package for sm_90 are read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_REGISTER = re.compile(r"(U?R)(\d+|Z)$")
_PREDICATE = re.compile(r"(U?P)(\d+|T)$")
_NUMBER = re.compile(r"-?(0x[0-9a-f]+|\d+)$")
_CONSTANT = re.compile(r"c\[0x0\]\[(.+)\]$")

# The pipe of a multiprocessor that executes an instruction, by the start of its name; the first
# that fits. What is not listed is executed by the ALU. Names that may touch memory or tensor cores
# are listed whether our kernels have them or not, so that the walk refuses those it cannot count.
PIPES: dict[str | tuple[str, ...], str] = {
    "IMAD": "imad",
    ("HMMA", "IMMA", "DMMA", "BMMA", "QMMA", "OMMA", "HGMMA", "IGMMA", "BGMMA", "QGMMA", "UTC"):
        "tensor",
    ("FADD", "FMUL", "FFMA", "HADD2", "HMUL2", "HFMA2"): "float",
    ("MUFU", "I2F.", "I2F ", "F2I", "F2F.", "POPC", "FLO", "BREV", "REDUX"): "special",
    ("BRA", "EXIT", "BAR", "BSSY", "BSYNC", "WARPSYNC", "DEPBAR", "LDGDEPBAR", "NOP", "CALL", "RET",
     "WARPGROUP", "ERRBAR", "MEMBAR", "FENCE", "NANOSLEEP", "ACQBULK", "BREAK", "BMOV",
     "CCTL", "UTMACCTL"): "control",
    ("LDS", "LDSM", "STS", "STSM", "STAS", "ATOMS", "REDAS", "SHFL", "SYNCS"): "shared",
    "LDC": "integer",  # constants
    "ULDC": "uniform",
    ("LD", "ST", "ATOM", "RED", "SULD", "SUST", "SUATOM", "SURED", "TEX", "TLD", "TXD",
     "TMML", "ULD", "UST", "UATOM", "URED", "UBLK", "UTMA"): "global",
    ("U", "R2UR", "S2UR", "VOTEU"): "uniform",
}  # fmt: skip


@dataclass(frozen=True)
class Operand:
    """One operand of an instruction.

    Attributes:
        text: as the disassembler writes it.
        kind: "register", "predicate", "number", "constant" (of bank 0), "address" or "other".
        name: of a register or predicate; "" for those that are constant (RZ, PT).
        number: a number's value modulo 2^32, or the offset in the bank of constants.
        negative, inverted: whether the value is negated (-R1) or inverted (~R1, !P0).
        terms: of an address, the operands whose sum it is, each with its factor.
    """

    text: str
    kind: str
    name: str = ""
    number: int = 0
    negative: bool = False
    inverted: bool = False
    wide: bool = False
    terms: tuple[tuple[Operand, int], ...] = ()


@dataclass(frozen=True)
class Instruction:
    """One instruction: ``@guard name operands``, the name with its modifiers (LDG.E.128)."""

    address: int
    guard: Operand | None
    name: str
    operands: tuple[Operand, ...]

    def __str__(self) -> str:
        guard = f"@{self.guard.text} " if self.guard else ""
        return f"{guard}{self.name} {', '.join(o.text for o in self.operands)}".rstrip()

    @cached_property
    def opcode(self) -> str:
        """The name without modifiers."""
        return self.name.partition(".")[0]

    @cached_property
    def modifiers(self) -> frozenset[str]:
        """The modifiers of the name."""
        return frozenset(self.name.split(".")[1:])

    @cached_property
    def pipe(self) -> str:
        """The pipe that executes it."""
        name = f"{self.name} "
        return next((pipe for start, pipe in PIPES.items() if name.startswith(start)), "integer")

    @cached_property
    def num_bytes(self) -> int:
        """The bytes that a memory instruction moves for each lane."""
        sizes = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
        return next((sizes[name] for name in self.modifiers if name in sizes), 4)

    @cached_property
    def waits_for(self) -> tuple[str, ...]:
        """The registers and predicates that must be ready before it issues."""
        width = 1
        if self.pipe == "tensor":
            width = 4
        elif self.pipe in ("global", "shared"):
            width = max(1, self.num_bytes // 4)
        names: list[str] = []
        for operand in (*self.operands, *filter(None, [self.guard])):
            if operand.kind == "register":
                names += vector(operand.name, 2 if operand.wide else width)
            elif operand.name:
                names.append(operand.name)
            for term, _ in operand.terms:
                names += vector(term.name, 2 if term.wide else 1)
        return tuple(dict.fromkeys(names))

    @cached_property
    def data_results(self) -> tuple[str, ...]:
        """The registers and predicates that it writes, if it is an instruction on data."""
        if self.pipe == "control":
            return ()
        if self.opcode in ("FSETP", "HSETP2", "DSETP"):
            return tuple(operand.name for operand in self.operands[:2] if operand.name)
        width = 2 if "64" in self.modifiers else 1
        if self.opcode == "LDSM":
            width = self.num_matrices
        elif self.opcode in ("LDS", "LDG", "LDL"):
            width = max(1, self.num_bytes // 4)
        predicates: list[str] = []
        for operand in self.operands:
            if operand.kind != "predicate":
                registers = vector(operand.name, width) if operand.kind == "register" else []
                return (*predicates, *registers)
            if operand.name:
                predicates.append(operand.name)
        return tuple(predicates)

    @cached_property
    def num_matrices(self) -> int:
        """The matrices of 8 x 8 that LDSM or STSM moves."""
        return next((int(m) for m in self.modifiers if m in ("2", "4")), 1)


def next_register(name: str) -> str:
    """Return the register behind ``name``."""
    prefix = name.rstrip("0123456789")
    return f"{prefix}{int(name[len(prefix) :]) + 1}"


def vector(name: str, width: int) -> list[str]:
    """Return the names of ``width`` registers that follow each other; none for RZ."""
    names = []
    for _ in range(width if name else 0):
        names.append(name)
        name = next_register(name)
    return names


def parse_sass(text: str) -> list[Instruction]:
    """Return the instructions of the only kernel in the text of ``cuobjdump -sass``."""
    return [
        Instruction(
            int(match[1], 16),
            parse_operand(match[2]) if match[2] else None,
            match[3],
            tuple(parse_operand(part) for part in match[4].split(", ") if part),
        )
        for match in map(_LINE.match, text.splitlines())
        if match
    ]


def parse_operand(text: str) -> Operand:
    """Return the operand that ``text`` stands for."""
    text = text.strip().removesuffix(".reuse")
    bare, negative = text.removeprefix("-"), text.startswith("-")
    inverted = bare[:1] in ("~", "!")
    bare = bare.lstrip("~!").strip("|").removesuffix(".reuse")
    wide = bare.endswith(".64")
    bare = bare.removesuffix(".64")
    if match := _REGISTER.match(bare):
        name = "" if match[2] == "Z" else bare
        return Operand(text, "register", name, 0, negative, inverted, wide)
    if match := _PREDICATE.match(bare):
        return Operand(text, "predicate", "" if match[2] == "T" else bare, inverted=inverted)
    if _NUMBER.match(text):
        return Operand(text, "number", number=int(text, 0) % 2**32)
    if (match := _CONSTANT.match(bare)) and _NUMBER.match(match[1]):
        return Operand(text, "constant", "", int(match[1], 0), negative, inverted)
    if text.endswith("]") and not text.startswith(("c[", "cx[", "gdesc[", "tmem[")):
        terms = tuple(map(_parse_term, text[text.rindex("[") + 1 : -1].split("+")))
        return Operand(text, "address", terms=terms)
    return Operand(text, "other")


def _parse_term(text: str) -> tuple[Operand, int]:
    scaled = re.match(r"(\w+)\.X(\d+)$", text)
    if scaled:
        return parse_operand(scaled[1]), int(scaled[2])
    return parse_operand(text.removesuffix(".U32")), 1
