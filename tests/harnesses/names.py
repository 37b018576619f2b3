"""Names of benchmarks that nobody can have made an exception for, or look at."""

from __future__ import annotations

import random
import string
from typing import Any, NoReturn


def arbitrary_names(seed: int, number: int = 12) -> list[str]:
    """Letters, digits and underscores, some behind the beginnings that benchmarks often have."""
    draw = random.Random(seed)
    beginnings = ("", "MM", "mm", "MMStar_", "mmstar", "Math", "ai2d", "OCR", "Hallusion")
    letters = string.ascii_letters + string.digits
    return [
        beginnings[i % len(beginnings)] + "x" + "".join(draw.choices(letters, k=6))
        for i in range(number)
    ]


class Unreadable:
    """Stands where a benchmark's name does: it may be handed on, and nothing else."""

    def __getattribute__(self, name: str) -> NoReturn:
        raise AssertionError(f"the name of the benchmark was read: {name}")


def _refuse(*_: Any) -> NoReturn:
    raise AssertionError("the name of the benchmark was read")


# Operators are looked up on the class, past __getattribute__.
for _operator in (
    "eq",
    "ne",
    "hash",
    "str",
    "repr",
    "format",
    "bool",
    "contains",
    "len",
    "iter",
    "getitem",
    "lt",
    "le",
    "gt",
    "ge",
    "add",
    "radd",
):
    setattr(Unreadable, f"__{_operator}__", _refuse)


class OneTask:
    """A task dictionary that gives the same documents for any name, without looking at it."""

    def __init__(self, documents: Any) -> None:
        self.documents = documents

    def __getitem__(self, name: Any) -> Any:
        return self.documents
