"""Count policies as selectors of :func:`tokenflex.evaluation.evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from tokenflex.counts import TokenCount
from tokenflex.evaluation.counts import AskedCount
from tokenflex.models.vision import EncodedImages
from tokenflex.prompts import left_padded
from tokenflex.routing.choice import choose_counts
from tokenflex.routing.policies import find_policy


class PolicySelector:
    """A :class:`tokenflex.evaluation.CountSelector` that chooses by a count policy.

    Args:
        name: Name of the policy, for example "auto".
        checkpoint: Folder that the model was loaded from.
        penalty: See :func:`tokenflex.routing.choice.choose_counts`; the router's default if None.

    Raises:
        FileNotFoundError: The policy needs a router, and the checkpoint has none.
        TypeError: ``penalty`` is not a number.
        ValueError: There is no such policy, or ``penalty`` is out of its range.
    """

    def __init__(self, name: str, checkpoint: str | Path, penalty: float | None = None) -> None:
        self.label = name
        self._prepare = find_policy(name).load(checkpoint, penalty)
        self._penalty = penalty

    def select(
        self,
        model: Any,
        images: EncodedImages,
        tiles: Sequence[int],
        prompts: Sequence[torch.Tensor],
    ) -> list[list[TokenCount]]:
        """See :meth:`tokenflex.evaluation.CountSelector.select`."""
        if not tiles:
            return [[] for _ in prompts]
        self._prepare(model)
        ids, mask = left_padded(prompts, 0)
        chosen = choose_counts(
            model,
            ids.to(model.device),
            num_image_tokens=self.label,
            attention_mask=mask.to(model.device),
            encoded_images=images.select([*range(len(images))] * len(prompts)),
            tiles_per_image=[*tiles] * len(prompts),
            penalty=self._penalty,
        )["num_image_tokens"]
        firsts = [end - size for end, size in zip(accumulate(tiles), tiles, strict=True)]
        rows = range(0, len(chosen), len(images))
        return [[chosen[row + first] for first in firsts] for row in rows]


def resolve_count(
    count: TokenCount | str, checkpoint: str | Path, penalty: float | None = None
) -> AskedCount:
    """Replace the name of a policy by its :class:`PolicySelector`; return other counts unchanged.

    The arguments and errors are those of :class:`PolicySelector`.
    """
    return PolicySelector(count, checkpoint, penalty) if isinstance(count, str) else count
