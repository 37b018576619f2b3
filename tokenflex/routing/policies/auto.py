"""The policy "auto": the checkpoint's router chooses, or a budget is spread over the images."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tokenflex.counts import TokenCount, token_grid
from tokenflex.models.vision import EncodedImages
from tokenflex.routing.budget import detail_kept, spread
from tokenflex.routing.expansion import Prompts
from tokenflex.routing.features import image_statistics, question_embeddings
from tokenflex.routing.ladder import known_counts
from tokenflex.routing.router import best, check_penalty, utilities
from tokenflex.routing.storage import attach_router, has_router, load_router, router_of


def load(checkpoint: str | Path, penalty: float | None) -> Callable[[Any], None]:
    """Load the checkpoint's router; return the function that attaches it to a model.

    Raises:
        FileNotFoundError: The checkpoint has no router.
        TypeError: ``penalty`` is not a number.
        ValueError: ``penalty`` is out of its range, or the router's file is broken.
    """
    if penalty is not None:
        check_penalty(penalty)
    return partial(attach_router, router=load_router(checkpoint))


def largest(model: Any, budget: int | None) -> TokenCount:
    """Return the router's largest count, or with a budget that of the known counts."""
    return (router_of(model).counts if budget is None else known_counts(model))[-1]


def choose(
    model: Any,
    prompts: Prompts,
    encoded: EncodedImages,
    *,
    penalty: float | None,
    budget: int | None,
) -> list[TokenCount]:
    """Choose as :func:`tokenflex.routing.choice.choose_counts` describes."""
    if budget is None:
        router = router_of(model)
        penalty = router.penalty if penalty is None else penalty
        worth = utilities(_chances(model, prompts, encoded), router.counts, penalty)
        return [router.counts[i] for i in best(worth)]
    counts = known_counts(model)
    grids = [token_grid(count) for count in counts]
    if has_router(model) or penalty is not None:  # a penalty without a router is an error
        chances = _chances(model, prompts, encoded)
        worth = utilities(chances, router_of(model).counts, 0.0 if penalty is None else penalty)
    else:
        worth = detail_kept(encoded, prompts.tiles, grids, model.projector.pooling)
    chosen: list[TokenCount] = []
    for row in range(len(prompts.rows)):
        images = prompts.images_of(row)
        choice = spread(
            [worth[i].tolist() for i in images],
            [[height * width * prompts.tiles[i] for height, width in grids] for i in images],
            budget,
            name=f"row {row}",
        )
        chosen += [counts[j] for j in choice]
    return chosen


def _chances(model: Any, prompts: Prompts, encoded: EncodedImages) -> NDArray[np.float64]:
    """Return the router's probability of a right answer for each image, [images, counts]."""
    images = image_statistics(encoded, prompts.tiles)
    questions = question_embeddings(model.get_input_embeddings(), prompts.questions())
    owner = torch.repeat_interleave(
        torch.arange(len(prompts.rows)), torch.tensor(prompts.images_per_row)
    )
    return router_of(model).probabilities(images, questions[owner])
