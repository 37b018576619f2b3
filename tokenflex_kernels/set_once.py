"""The base of plans, which must not change: results computed from a plan would not fit it."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any


class SetOnce:
    """Attributes that may be set once.

    Not ``dataclass(frozen=True)``: torch.compile (up to 2.11 at least) reads every field of one
    that enters a compiled function, also tuples with an entry per image, so it would compile anew
    for each number of images. Of other objects it reads only the fields that the function uses.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name in vars(self):
            raise FrozenInstanceError(f"cannot assign to field {name!r}")
        super().__setattr__(name, value)
