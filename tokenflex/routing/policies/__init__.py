"""Registry of count policies: ways to choose the vision-token count of each image, by name.

Each module of this package is a policy, and its name stands in place of a count in
``num_image_tokens``, in the options ``--counts`` and ``--tokens`` and in harnesses. It defines

* ``load(checkpoint, penalty)``: check the penalty and read files of the checkpoint's folder before
  any other work; return a function that prepares a model with them.
* ``largest(model, budget)``: return the largest count that it may choose.
* ``choose(model, prompts, encoded, *, penalty, budget)``: return a count for each image of
  ``prompts`` (:class:`tokenflex.routing.expansion.Prompts`), which ``encoded`` holds the tiles of.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from tokenflex.counts import TokenCount
    from tokenflex.models.vision import EncodedImages
    from tokenflex.routing.expansion import Prompts


class CountPolicy(Protocol):
    """The functions of a policy's module."""

    def load(self, checkpoint: str | Path, penalty: float | None) -> Callable[[Any], None]: ...

    def largest(self, model: Any, budget: int | None) -> TokenCount: ...

    def choose(
        self,
        model: Any,
        prompts: Prompts,
        encoded: EncodedImages,
        *,
        penalty: float | None,
        budget: int | None,
    ) -> list[TokenCount]: ...


def policy_names() -> list[str]:
    """Return the name of every policy."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find_policy(name: object) -> CountPolicy:
    """Return the policy of that name.

    Raises:
        ValueError: There is no such policy.
    """
    names = policy_names()
    if not isinstance(name, str) or name not in names:
        words = " or ".join(repr(known) for known in names)
        raise ValueError(
            f"num_image_tokens must be {words} where counts are to be chosen, with penalty or "
            f"budget, got {name!r}"
        )
    return cast(CountPolicy, import_module(f"{__name__}.{name}"))
