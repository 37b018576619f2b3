"""The counts that a model chooses from, from the fewest vision tokens to the most."""

from __future__ import annotations

from typing import Any

from tokenflex.counts import TokenCount, tokens_of
from tokenflex.routing.storage import has_router, router_of


def trained_counts(model: Any) -> tuple[TokenCount, ...]:
    """Return the counts the model was trained with; of equally large ones the first.

    A converted stock model whose config does not name them has those that it is fitted at.

    Raises:
        ValueError: The model's config does not name them.
    """
    counts = getattr(model.config, "trained_num_image_tokens", None)
    counts = counts or getattr(model, "fitted_num_image_tokens", None)
    if not counts:
        raise ValueError(
            "config.trained_num_image_tokens must name the counts to choose from where there is "
            f"no router, got {counts}"
        )
    by_size: dict[int, TokenCount] = {}
    for count in counts:
        grid = tuple(count) if isinstance(count, list) else count  # JSON has no tuples
        by_size.setdefault(tokens_of(count), grid)
    return tuple(by_size[size] for size in sorted(by_size))


def known_counts(model: Any) -> tuple[TokenCount, ...]:
    """Return the router's counts, or those the model was trained with if it has no router.

    Raises:
        ValueError: There is no router, and the model's config names no counts.
    """
    return router_of(model).counts if has_router(model) else trained_counts(model)
