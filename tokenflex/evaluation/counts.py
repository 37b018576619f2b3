"""The counts that a question can be asked at: a number, a grid, or something that chooses."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch

from tokenflex.counts import TokenCount, token_grid
from tokenflex.models.vision import EncodedImages


class CountSelector(Protocol):
    """Chooses the count of each question, once its images are encoded: what ``auto`` stands for.

    Attributes:
        label: its name in tables.
    """

    label: str

    def select(self, model: Any, images: EncodedImages, prompt_ids: torch.Tensor) -> TokenCount:
        """The count for all tiles of one question's images.

        Args:
            model: the model that will answer.
            images: what its encoder gave for the question's tiles, in order.
            prompt_ids: int64 [length], the prompt up to the answer, with one placeholder an image.
        """
        ...


AskedCount: TypeAlias = "TokenCount | CountSelector"


def selector_of(count: Any) -> CountSelector | None:
    """``count`` where it chooses per question, else None."""
    return count if hasattr(count, "select") else None


def label_of(count: AskedCount) -> str:
    """How tables name a count: ``64``, ``12x16``, or a selector's own label."""
    if (selector := selector_of(count)) is not None:
        return selector.label
    token_grid(count, name="counts")
    if isinstance(count, Sequence):
        return f"{count[0]}x{count[1]}"
    return f"{count}"


def labels_of(counts: Sequence[AskedCount]) -> list[str]:
    """The label of each count.

    Raises:
        TypeError: one is neither a count nor a selector.
        ValueError: there are none, one is no grid, or one is named twice.
    """
    labels = [label_of(count) for count in counts]
    if not labels:
        raise ValueError("counts must name at least one count, got none")
    if len({*labels}) < len(labels):
        raise ValueError(f"counts must differ from each other, got {', '.join(labels)}")
    return labels


def resolve_count(count: TokenCount | str, checkpoint: str | Path) -> AskedCount:
    """``"auto"`` becomes the selector that is saved with ``checkpoint``; other counts stay.

    Raises:
        ValueError: this version cannot choose counts.
    """
    if not isinstance(count, str):
        return count
    try:
        selection = import_module("tokenflex.selection")
    except ModuleNotFoundError as error:
        raise ValueError(
            "the count auto needs tokenflex.selection, which this version does not have: give "
            "counts like 64,144,256"
        ) from error
    return selection.load_selector(checkpoint)
