"""PTX text to instructions.

Only the first kernel of a text is read, and of it only what decides what it computes: parameters,
shared variables, the number of threads, labels and instructions. Declarations of registers,
positions in source files and debug sections are left out.

Names that are declared in inner braces, as in Triton's loops that wait for a barrier, get the
number of their scope, so that two loops may use the same label.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property


class PtxError(RuntimeError):
    """An error of the PTX itself, or of what it does: the message names the instruction."""


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        opcode: with its modifiers, "ld.global.v4.b32".
        operands: as text: "%r1", "{%r1, %r2}", "[%rd1+16]", "12".
        predicate: the register that decides which threads take part, or None.
        negated: whether those take part whose predicate is false.
        line: in the PTX text, from 1.
    """

    opcode: str
    operands: tuple[str, ...]
    predicate: str | None = None
    negated: bool = False
    line: int = 0

    @cached_property
    def words(self) -> tuple[str, ...]:
        """The opcode at its dots: ("ld", "global", "v4", "b32")."""
        return tuple(self.opcode.split("."))

    @property
    def type(self) -> str:
        """The type of the operands: the last word of the opcode."""
        return self.words[-1]

    def __str__(self) -> str:
        condition = f"@{'!' * self.negated}{self.predicate} " if self.predicate else ""
        operands = ", ".join(self.operands)
        return f"{condition}{self.opcode} {operands if len(operands) < 100 else operands[:97]}"


@dataclass(frozen=True)
class Kernel:
    """A kernel as its PTX describes it.

    Attributes:
        name: of the entry.
        parameters: names, in order.
        threads: of a block.
        instructions: in order.
        labels: the position in ``instructions`` that each label stands before.
        shared: the address of each shared variable. The dynamic one begins at 0 or after the
            others, as its alignment has it.
        static_shared: bytes of the shared variables whose size the text gives.
        registers: the bits of registers by their name without its number, as declared.
    """

    name: str
    parameters: tuple[str, ...]
    threads: int
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    shared: dict[str, int]
    static_shared: int
    registers: dict[str, int]

    def bits_of(self, register: str) -> int | None:
        """Return the declared size of a register; None where it is not declared."""
        return self.registers.get(register.rstrip("0123456789"))


_ENTRY = re.compile(r"\.entry\s+(\w+)\s*\((.*?)\)(.*?)\{", re.DOTALL)
_SHARED = re.compile(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d*)\]")
_REGISTERS = re.compile(r"\.reg\s+\.[bfsu](\d+)\s+(%\w*[A-Za-z_])<\d+>")
_LABEL = re.compile(r"\s*([$\w]+):(?!:)")
_LINES_TO_SKIP = re.compile(r"//[^\n]*|/\*.*?\*/|^[ \t]*\.(?:loc|file)[^\n]*", re.DOTALL | re.M)
_STATEMENT = re.compile(r"(?:@(!?)\s*([%$@\w]+)\s+)?([\w.:]+)\s*(.*)", re.DOTALL)
_NAME = re.compile(r"[%$A-Za-z_][$\w]*(?:\.[xyz])?")


def parse(text: str) -> Kernel:
    """Return the first kernel of a PTX text.

    Raises:
        PtxError: there is no kernel, or it has no fixed number of threads.
    """
    code = _LINES_TO_SKIP.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)
    entry = _ENTRY.search(code)
    if entry is None:
        raise PtxError("the text has no kernel (.entry)")
    threads = re.search(
        r"\.(?:reqntid|maxntid)\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", entry[3]
    )
    if threads is None:
        raise PtxError(f"{entry[1]} has no .reqntid, so the number of its threads is unknown")
    count = 1
    for dimension in threads.groups():
        count *= int(dimension or 1)
    parameters = re.findall(r"([\w$]+)(?:\[\d+\])?\s*(?:,|$)", entry[2].strip())
    shared, static_shared = _shared_variables(code)
    instructions, labels = _body(code, entry.end())
    registers = {name: int(bits) for bits, name in _REGISTERS.findall(code, entry.end())}
    return Kernel(
        entry[1], tuple(parameters), count, instructions, labels, shared, static_shared, registers
    )


def _shared_variables(code: str) -> tuple[dict[str, int], int]:
    addresses, end = {}, 0
    # The dynamic variable, which has no size, comes after all others.
    for align, name, size in sorted(_SHARED.findall(code), key=lambda found: not found[2]):
        end = -(-end // int(align)) * int(align)
        addresses[name] = end
        end += int(size or 0)
    return addresses, end


def _body(code: str, start: int) -> tuple[tuple[Instruction, ...], dict[str, int]]:
    """Read statements up to the brace that closes the kernel."""
    statements: list[tuple[str, int, int]] = []  # text, position, scope
    labels: list[tuple[str, int, int]] = []  # name, scope, number of statements before it
    declared: dict[int, set[str]] = {0: set()}
    parents: dict[int, int] = {}
    scope, depth, buffer, began = 0, 0, "", start

    def strip_labels() -> None:
        nonlocal buffer, began
        while match := _LABEL.match(buffer):
            labels.append((match[1], scope, len(statements)))
            declared[scope].add(match[1])
            buffer, began = buffer[match.end() :], began + match.end()

    for token in re.compile(r"[{};]|[^{};]+").finditer(code, start):
        symbol = token[0]
        if depth == 0 and symbol in "{};":
            strip_labels()
        if symbol == "{" and (depth or buffer.strip()):
            depth, buffer = depth + 1, buffer + symbol
        elif symbol == "{":
            parents[len(declared)] = scope
            scope = len(declared)
            declared[scope] = set()
            buffer = ""
        elif symbol == "}" and depth:
            depth, buffer = depth - 1, buffer + symbol
        elif symbol == "}" and scope == 0:
            break
        elif symbol == "}":
            scope, buffer = parents[scope], ""
        elif symbol == ";" and not depth:
            statement = buffer.strip()
            if statement.startswith(".reg") and scope:
                declared[scope] |= set(re.findall(r"[%$\w]+", statement.partition(" ")[2]))
            elif statement and not statement.startswith("."):
                statements.append((statement, began + len(buffer) - len(buffer.lstrip()), scope))
            buffer = ""
        else:
            began = token.start() if not buffer else began
            buffer += symbol

    def qualified(name: str, scope: int) -> str:
        while scope and name not in declared[scope]:
            scope = parents[scope]
        return f"{name}@{scope}" if scope else name

    newlines = [match.start() for match in re.finditer("\n", code)]
    instructions = []
    for statement, position, inside in statements:
        if inside:
            statement = _in_scope(statement, lambda name, inside=inside: qualified(name, inside))
        instructions.append(_instruction(statement, bisect_left(newlines, position) + 1))
    places = {qualified(name, inside): index for name, inside, index in labels}
    return tuple(instructions), places


def _in_scope(statement: str, qualified: Callable[[str], str]) -> str:
    match = _STATEMENT.fullmatch(statement)
    if match is None:
        return statement
    negated, predicate, opcode, operands = match.groups()
    condition = f"@{negated}{qualified(predicate)} " if predicate else ""
    return f"{condition}{opcode} {_NAME.sub(lambda name: qualified(name[0]), operands)}"


def _instruction(statement: str, line: int) -> Instruction:
    match = _STATEMENT.fullmatch(statement)
    if match is None:
        raise PtxError(f"line {line}: no instruction: {statement!r}")
    negated, predicate, opcode, operands = match.groups()
    return Instruction(opcode, split_operands(operands), predicate, negated == "!", line)


def split_operands(text: str) -> tuple[str, ...]:
    """Return the parts of ``text`` between commas that no bracket holds."""
    parts, depth, current = [], 0, ""
    for piece in re.findall(r"[\[{(]|[\]})]|,|[^\[{()}\],]+", text):
        depth += (piece in "[{(") - (piece in "]})")
        if piece == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += piece
    return tuple([*parts, current.strip()] if current.strip() else parts)
