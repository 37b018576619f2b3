"""``num_image_tokens="auto"``: encode once, choose each image's count, expand the prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tokenflex.counts import AUTO, Grid, TokenCount, token_grid
from tokenflex.models.auto_counts import ChoosesCounts, join_words
from tokenflex.models.vision import EncodedImages
from tokenflex.routing.budget import detail_kept, spread
from tokenflex.routing.expansion import Prompts, read_prompts
from tokenflex.routing.features import image_statistics, question_embeddings
from tokenflex.routing.router import best, utilities
from tokenflex.routing.storage import has_router, router_of


@torch.no_grad()
def choose_counts(
    model: Any,
    input_ids: torch.Tensor,
    *,
    num_image_tokens: str = AUTO,
    penalty: float | None = None,
    budget: int | None = None,
    **inputs: Any,
) -> dict[str, Any]:
    """Inputs for ``generate`` with every image's count chosen and its placeholders repeated.

    With a router, an image gets the count of the highest p(right at n) - penalty * n / largest
    count, of its own statistics and its prompt's text. With ``budget``, a prompt's images get as
    many vision tokens together at most, spread as :mod:`tokenflex.routing.budget` says, by the
    router where there is one.

    Args:
        model: a :class:`tokenflex.TokenFlexForConditionalGeneration`.
        input_ids: int64 [B, L], padded on any side, one placeholder per image: what the processor
            gives for ``num_image_tokens="auto"``, as are the others.
        num_image_tokens: "auto".
        penalty: the share of right answers given up to save all of the largest count's tokens. The
            router's own if None; with a budget 0.
        budget: vision tokens of each prompt at most.
        **inputs: ``attention_mask``, ``pixel_values`` and ``grids`` or ``encoded_images``, and
            ``tiles_per_image``, one each if None.

    Returns:
        ``input_ids`` and ``attention_mask``, padded on the left; with images also
        ``encoded_images`` and ``num_image_tokens``, a count per tile.

    Raises:
        FileNotFoundError: there is no router, and no budget to do without.
        TypeError: an argument is not of its kind.
        ValueError: arguments do not fit together, or ``budget`` is too small.
    """
    num_image_tokens = join_words(num_image_tokens)
    if not isinstance(num_image_tokens, str) or num_image_tokens != AUTO:
        raise ValueError(
            f"num_image_tokens must be 'auto' where counts are to be chosen, with penalty or "
            f"budget, got {num_image_tokens!r}"
        )
    prompts, encoded = read_inputs(model, input_ids, **inputs)
    if encoded is None:
        return prompts.expanded([])
    if budget is None:
        counts = _routed(model, prompts, encoded, penalty)
    else:
        counts = _within(model, prompts, encoded, penalty, budget)
    return {**prompts.expanded(counts), "encoded_images": encoded}


def read_inputs(
    model: Any,
    input_ids: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None = None,
    pixel_values: torch.Tensor | None = None,
    grids: Grid | Sequence[Grid] | None = None,
    encoded_images: EncodedImages | None = None,
    tiles_per_image: Sequence[int] | None = None,
) -> tuple[Prompts, EncodedImages | None]:
    """The prompts of a batch, and its images encoded; None if it has none.

    Raises:
        ValueError: placeholders, images and tiles do not fit together.
    """
    if pixel_values is not None and encoded_images is not None:
        raise ValueError("give the images as one of pixel_values and encoded_images")
    if pixel_values is not None:
        encoded_images = model.encode_images(pixel_values, grids)
    prompts = read_prompts(
        input_ids,
        attention_mask,
        model.config.image_token_id,
        model.generation_config.pad_token_id,
        tiles_per_image,
        0 if encoded_images is None else len(encoded_images),
    )
    return prompts, encoded_images


def chances(model: Any, prompts: Prompts, encoded: EncodedImages) -> NDArray[np.float64]:
    """The router's chance of a right answer for each image of the prompts, [images, counts]."""
    images = image_statistics(encoded, prompts.tiles)
    questions = question_embeddings(model.get_input_embeddings(), prompts.questions())
    owner = torch.repeat_interleave(
        torch.arange(len(prompts.rows)), torch.tensor(prompts.images_per_row)
    )
    return router_of(model).probabilities(images, questions[owner])


def _routed(
    model: Any, prompts: Prompts, encoded: EncodedImages, penalty: float | None
) -> list[TokenCount]:
    router = router_of(model)
    penalty = router.penalty if penalty is None else penalty
    worth = utilities(chances(model, prompts, encoded), router.counts, penalty)
    return [router.counts[i] for i in best(worth)]


def _within(
    model: Any, prompts: Prompts, encoded: EncodedImages, penalty: float | None, budget: int
) -> list[TokenCount]:
    counts = known_counts(model)
    if has_router(model):
        chance = chances(model, prompts, encoded)
        worth = utilities(chance, router_of(model).counts, 0.0 if penalty is None else penalty)
    else:
        if penalty is not None:
            router_of(model)  # there is none: say how to make one
        worth = detail_kept(
            encoded, prompts.tiles, [token_grid(n) for n in counts], model.config.pooling
        )
    sizes = [height * width for height, width in map(token_grid, counts)]
    chosen: list[TokenCount] = []
    for row in range(len(prompts.rows)):
        images = prompts.images_of(row)
        choice = spread(
            [worth[i].tolist() for i in images],
            [[size * prompts.tiles[i] for size in sizes] for i in images],
            budget,
            name=f"row {row}",
        )
        chosen += [counts[j] for j in choice]
    return chosen


def known_counts(model: Any) -> tuple[TokenCount, ...]:
    """What a budget chooses from: the router's counts, or those the model was trained with.

    Raises:
        ValueError: there is no router, and the model's config does not say.
    """
    return router_of(model).counts if has_router(model) else trained_counts(model)


def trained_counts(model: Any) -> tuple[TokenCount, ...]:
    """The counts the model was trained with, from the fewest vision tokens to the most.

    Raises:
        ValueError: its config does not say.
    """
    counts = model.config.trained_num_image_tokens
    if not counts:
        raise ValueError(
            "config.trained_num_image_tokens must name the counts to choose from where there is "
            f"no router, got {counts}"
        )
    by_size: dict[int, TokenCount] = {}
    for count in counts:
        height, width = token_grid(count)
        by_size.setdefault(height * width, count)
    return tuple(by_size[size] for size in sorted(by_size))


ChoosesCounts.count_chooser = staticmethod(choose_counts)  # the models' hook
