"""``num_image_tokens="auto"``: encode once, choose each image's count, expand the prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tokenflex.counts import AUTO, Grid
from tokenflex.models.vision import EncodedImages
from tokenflex.routing.expansion import Prompts, read_prompts
from tokenflex.routing.policies import find_policy

INPUTS = ("attention_mask", "pixel_values", "grids", "encoded_images", "tiles_per_image")
_KNOBS = ("penalty", "budget")


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
        **inputs: ``attention_mask``, ``pixel_values`` and ``grids`` or ``encoded_images``, and
            ``tiles_per_image`` (default 1 each).

    Returns:
        ``input_ids`` and ``attention_mask``, padded on the left; with images also
        ``encoded_images`` and ``num_image_tokens``, a count per tile.

    Raises:
        FileNotFoundError: There is neither a router nor a budget.
        TypeError: An argument has a wrong type.
        ValueError: Arguments do not fit together, or ``budget`` is too small.
    """
    policy = find_policy(_joined(num_image_tokens))
    prompts, encoded = read_inputs(model, input_ids, **inputs)
    if encoded is None:
        return prompts.expanded([])
    counts = policy.choose(model, prompts, encoded, penalty=penalty, budget=budget)
    return {**prompts.expanded(counts), "encoded_images": encoded}


def generate_with_choice(model: Any, inputs: Any = None, **kwargs: Any) -> Any:
    """``generate`` at chosen counts. Its answer begins with the prompts as they were given.

    Args:
        model: a :class:`tokenflex.TokenFlexForConditionalGeneration`.
        inputs: ``input_ids``, or they are among ``kwargs``.
        **kwargs: those of :func:`choose_counts`, and what ``generate`` takes besides.

    Returns:
        What ``generate`` returns. With ``return_dict_in_generate`` it has ``num_image_tokens``, the
        count chosen for each tile.
    """
    asked = {
        name: kwargs.pop(name) for name in ("num_image_tokens", *_KNOBS, *INPUTS) if name in kwargs
    }
    named = kwargs.pop("input_ids", None)
    given = named if inputs is None else inputs
    if given is None:
        raise ValueError("input_ids must be given where counts are to be chosen, got None")
    chosen = choose_counts(model, given, **asked)
    output = model.generate(**chosen, **kwargs)
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    new = sequences[:, chosen["input_ids"].shape[1] :]
    asked_again = given.repeat_interleave(len(new) // len(given), 0)
    sequences = torch.cat([asked_again.to(new.device), new], dim=1)
    if isinstance(output, torch.Tensor):
        return sequences
    output.sequences = sequences
    output.num_image_tokens = chosen.get("num_image_tokens", [])
    return output


def asks_for_choice(kwargs: Mapping[str, Any]) -> bool:
    """Whether arguments of ``generate`` leave counts to be chosen."""
    return isinstance(_joined(kwargs.get("num_image_tokens")), str) or any(
        kwargs.get(name) is not None for name in (*_KNOBS, "tiles_per_image")
    )


def _joined(num_image_tokens: Any) -> Any:
    """Return the one word of several calls, which a pipeline batches into a list."""
    words = num_image_tokens if isinstance(num_image_tokens, list) else []
    alike = bool(words) and all(isinstance(word, str) and word == words[0] for word in words)
    return words[0] if alike else num_image_tokens


def refuse_auto(num_image_tokens: Any) -> None:
    """An error for what needs counts that are chosen already: training, and every forward pass.

    Raises:
        ValueError: ``num_image_tokens`` is "auto".
    """
    if isinstance(_joined(num_image_tokens), str):
        raise ValueError(
            f"num_image_tokens must be counts here, got {num_image_tokens!r}: 'auto' is for "
            "generate; for a forward pass call model(**model.choose_counts(**inputs))"
        )


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
    """Return the prompts of a batch and its encoded images, None if it has no images.

    Raises:
        ValueError: Placeholders, images and tiles do not fit together.
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
