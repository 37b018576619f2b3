"""Plans do not change once made: what was computed from one would no longer fit it."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any


class SetOnce:
    """Attributes that may be set once.

    Not ``dataclass(frozen=True)``: as one of those enters a compiled function, torch.compile (up to
    2.11 at least) reads every field, tuples of one entry per image too, and so compiles anew for
    each number of images. Of any other object it reads what the function uses.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name in vars(self):
            raise FrozenInstanceError(f"cannot assign to field {name!r}")
        super().__setattr__(name, value)
