"""Arbitrary names of benchmarks, and a name that must not be read."""

from __future__ import annotations

import random
import string
from typing import Any, NoReturn


def arbitrary_names(seed: int, number: int = 12) -> list[str]:
    """Return random names, some with the beginnings that benchmarks often have."""
    draw = random.Random(seed)
    beginnings = ("", "MM", "mm", "MMStar_", "mmstar", "Math", "ai2d", "OCR", "Hallusion")
    letters = string.ascii_letters + string.digits
    return [
        beginnings[i % len(beginnings)] + "x" + "".join(draw.choices(letters, k=6))
        for i in range(number)
    ]


class Unreadable:
    """Stand-in for a benchmark's name that may only be passed on."""

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
    """A task dictionary with the same documents for any name, which it does not read."""

    def __init__(self, documents: Any) -> None:
        self.documents = documents

    def __getitem__(self, name: Any) -> Any:
        return self.documents
