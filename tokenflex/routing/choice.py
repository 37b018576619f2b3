"""``num_image_tokens="auto"``: encode once, choose each image's count, expand the prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tokenflex.counts import AUTO, Grid
from tokenflex.models.auto_counts import ChoosesCounts, join_words
from tokenflex.models.placeholders import in_order
from tokenflex.models.vision import EncodedImages
from tokenflex.routing.expansion import Prompts, read_prompts
from tokenflex.routing.policies import find_policy


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
    """Return inputs of ``generate`` with every image's count chosen and its placeholders repeated.

    With a router, an image gets the count with the highest p(right at n) - penalty * n / largest
    count, estimated from its statistics and its prompt's text. With ``budget``, the images of each
    prompt share that many vision tokens, see :mod:`tokenflex.routing.budget`.

    Args:
        model: A :class:`tokenflex.TokenFlexForConditionalGeneration`.
        input_ids: int64 [B, L], padded on any side, one placeholder per image, as the processor
            returns them for ``num_image_tokens="auto"``. The same holds for ``inputs``.
        num_image_tokens: "auto", or another policy of :mod:`tokenflex.routing.policies`.
        penalty: Share of right answers given up to save all tokens of the largest count. The
            default is the router's penalty, or 0 with a budget.
        budget: Largest number of vision tokens of each prompt.
        **inputs: ``attention_mask``, ``pixel_values`` and ``grids`` or ``encoded_images``,
            ``tiles_per_image`` of each placeholder (default 1 each), and ``image_index``: prompts
            that show one image each get a count of their own for it.

    Returns:
        ``input_ids`` and ``attention_mask``, padded on the left; with images also
        ``encoded_images`` and ``num_image_tokens``, a count per tile.

    Raises:
        FileNotFoundError: There is neither a router nor a budget.
        TypeError: An argument has a wrong type.
        ValueError: Arguments do not fit together, or ``budget`` is too small.
    """
    policy = find_policy(join_words(num_image_tokens))
    prompts, encoded = read_inputs(model, input_ids, **inputs)
    if encoded is None:
        return prompts.expanded([])
    counts = policy.choose(model, prompts, encoded, penalty=penalty, budget=budget)
    return {**prompts.expanded(counts), "encoded_images": encoded}


def read_inputs(
    model: Any,
    input_ids: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None = None,
    pixel_values: torch.Tensor | None = None,
    grids: Grid | Sequence[Grid] | None = None,
    encoded_images: EncodedImages | None = None,
    image_index: Sequence[int] | None = None,
    tiles_per_image: Sequence[int] | None = None,
) -> tuple[Prompts, EncodedImages | None]:
    """Return the prompts of a batch and its encoded images, None if it has no images.

    Raises:
        ValueError: Placeholders, images and tiles do not fit together.
    """
    if pixel_values is not None and encoded_images is not None:
        raise ValueError("give the images as one of pixel_values and encoded_images")
    if pixel_values is not None:
        encoded_images = model.encode_images(pixel_values, grids)
    if image_index is not None:
        if encoded_images is None:
            raise ValueError("image_index tells where images are shown: give the images with it")
        encoded_images = encoded_images.select(in_order(range(len(encoded_images)), image_index))
    prompts = read_prompts(
        input_ids,
        attention_mask,
        model.config.image_token_id,
        model.generation_config.pad_token_id,
        tiles_per_image,
        0 if encoded_images is None else len(encoded_images),
    )
    return prompts, encoded_images


ChoosesCounts.count_chooser = staticmethod(choose_counts)  # the models' hook
