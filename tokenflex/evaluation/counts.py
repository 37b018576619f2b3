"""The counts of an evaluation: numbers, grids, and selectors that choose per question."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

import torch

from tokenflex.counts import TokenCount, token_grid
from tokenflex.models.vision import EncodedImages


class CountSelector(Protocol):
    """Chooses counts per question from encoded images.

    :func:`tokenflex.routing.selector.resolve_count` returns one for a name such as "auto".

    Attributes:
        label: Name in tables.
    """

    label: str

    def select(
        self,
        model: Any,
        images: EncodedImages,
        tiles: Sequence[int],
        prompts: Sequence[torch.Tensor],
    ) -> list[list[TokenCount]]:
        """Return one count per image, for all its tiles, for each prompt.

        Args:
            model: The model that will answer.
            images: The encoder's output for the tiles; all prompts show the same images.
            tiles: Number of tiles of each image.
            prompts: int64 [length] each, with one placeholder per image: the text before the
                generated answer, or before the first of forced answers (placeholders of images in
                later turns stand at the end).
        """
        ...


AskedCount: TypeAlias = "TokenCount | CountSelector"


def selector_of(count: Any) -> CountSelector | None:
    """Return ``count`` if it chooses per question, else None."""
    return count if hasattr(count, "select") else None


def label_of(count: AskedCount) -> str:
    """Return the name of a count in tables: ``64``, ``12x16``, or a selector's label."""
    if (selector := selector_of(count)) is not None:
        return selector.label
    token_grid(count, name="counts")
    return f"{count[0]}x{count[1]}" if isinstance(count, Sequence) else f"{count}"


def labels_of(counts: Sequence[AskedCount]) -> list[str]:
    """Return the label of each count.

    Raises:
        TypeError: A count is neither a count nor a selector.
        ValueError: There are no counts, one is no grid, or a label is repeated.
    """
    labels = [label_of(count) for count in counts]
    if not labels:
        raise ValueError("counts must name at least one count, got none")
    if len({*labels}) < len(labels):
        raise ValueError(f"counts must differ from each other, got {', '.join(labels)}")
    return labels
