"""The counts that a question can be asked at: a number, a grid, or something that chooses."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch

from tokenflex.counts import TokenCount, token_grid
from tokenflex.models.vision import EncodedImages


class CountSelector(Protocol):
    """Chooses counts per question, once the images are encoded: what ``auto`` stands for.

    Attributes:
        label: its name in tables.
    """

    label: str

    def select(
        self,
        model: Any,
        images: EncodedImages,
        tiles: Sequence[int],
        prompts: Sequence[torch.Tensor],
    ) -> list[list[TokenCount]]:
        """For each prompt one count per image, for all tiles of it.

        Args:
            model: the model that will answer.
            images: what its encoder gave for the tiles; all prompts show the same.
            tiles: how many each image became.
            prompts: int64 [length] each, with one placeholder per image: up to the answer that is
                generated; where answers are forced, up to the first (placeholders of images in
                later turns stand at the end).
        """
        ...


class RoutedCounts:
    """The counts that the router saved with a checkpoint chooses.

    Args:
        checkpoint: the folder that the model was loaded from.
        penalty: see :func:`tokenflex.routing.choice.choose_counts`; the router's own if None.

    Raises:
        FileNotFoundError: it holds no router.
        TypeError: ``penalty`` is not a number.
        ValueError: this version cannot choose counts, or ``penalty`` is out of its range.
    """

    label = "auto"

    def __init__(self, checkpoint: str | Path, penalty: float | None = None) -> None:
        try:
            self._choice = import_module("tokenflex.routing.choice")
            storage = import_module("tokenflex.routing.storage")
            if penalty is not None:  # before the work, not after it
                import_module("tokenflex.routing.router").check_penalty(penalty)
        except ModuleNotFoundError as error:
            raise ValueError(
                "the count auto needs tokenflex.routing, which this version does not have: give "
                "counts like 64,144,256"
            ) from error
        self._attach, self._router = storage.attach_router, storage.load_router(checkpoint)
        self._penalty = penalty

    def select(
        self,
        model: Any,
        images: EncodedImages,
        tiles: Sequence[int],
        prompts: Sequence[torch.Tensor],
    ) -> list[list[TokenCount]]:
        """See :class:`CountSelector`."""
        if not tiles:
            return [[] for _ in prompts]
        self._attach(model, self._router)
        length = max(map(len, prompts))
        ids = torch.zeros(len(prompts), length, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, length - len(prompt) :] = prompt
            mask[row, length - len(prompt) :] = 1
        chosen = self._choice.choose_counts(
            model,
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            encoded_images=images.select([*range(len(images))] * len(prompts)),
            tiles_per_image=[*tiles] * len(prompts),
            penalty=self._penalty,
        )["num_image_tokens"]
        per_prompt = len(images)
        firsts = [end - size for end, size in zip(accumulate(tiles), tiles, strict=True)]
        return [
            [chosen[row * per_prompt + first] for first in firsts] for row in range(len(prompts))
        ]


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


def resolve_count(
    count: TokenCount | str, checkpoint: str | Path, penalty: float | None = None
) -> AskedCount:
    """``"auto"`` becomes the selector that is saved with ``checkpoint``; other counts stay.

    Args:
        count: what a user asked for.
        checkpoint: as :class:`RoutedCounts` takes it, as is ``penalty``; so are the errors.
    """
    return RoutedCounts(checkpoint, penalty) if isinstance(count, str) else count
