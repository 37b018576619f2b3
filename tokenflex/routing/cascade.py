"""The confidence cascade: answer with few vision tokens, and with more where the model is unsure.

Images are encoded once. An escalation costs another pooling, which is cheap, and another reading of
the prompt at the larger count.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from tokenflex.counts import AUTO, Grid, TokenCount, token_grid
from tokenflex.evaluation.generation import answers_with_certainty
from tokenflex.models.auto_counts import CHOICE_INPUTS
from tokenflex.models.loading import check_length
from tokenflex.routing.calibration import Curve, calibrated
from tokenflex.routing.choice import read_inputs
from tokenflex.routing.ladder import known_counts
from tokenflex.routing.storage import has_router, router_of

# Confidence is read from the logits of greedy search.
_GREEDY = {
    "do_sample": False,
    "num_beams": 1,
    "return_dict_in_generate": True,
    "output_logits": True,
}


@dataclass(frozen=True)
class EscalatedAnswers:
    """Answers of a cascade, with an entry per row of the batch.

    Attributes:
        new_tokens: int64 [B, longest answer], without the prompts, padded at the end.
        counts: Count of the final answer; None for a row without images.
        confidences: Confidence in the final answer: the probability of its least certain token,
            or with ``calibrated`` the probability that it is right.
        vision_tokens: Vision tokens of the final answer's prompt.
        prefill_tokens: Vision tokens of all tries of the row.
        calibrated: Whether the router's curves made the confidences probabilities.
    """

    new_tokens: torch.Tensor
    counts: list[TokenCount | None]
    confidences: list[float]
    vision_tokens: list[int]
    prefill_tokens: list[int]
    calibrated: bool


@torch.no_grad()
def generate_with_escalation(
    model: Any,
    input_ids: torch.Tensor,
    *,
    threshold: float = 0.9,
    counts: Sequence[TokenCount] | None = None,
    num_image_tokens: str = AUTO,
    **kwargs: Any,
) -> EscalatedAnswers:
    """Answer greedily at the smallest count, and again at the next one below ``threshold``.

    At a threshold of 0 all answers come from the smallest count, above 1 from the largest.

    Confidence is the probability of the answer's least certain token, which is seldom how often
    such answers are right. A router that was trained on the same counts brings curves that make it
    so, see :mod:`tokenflex.routing.calibration`; without one it is used as it is.

    Args:
        model: A :class:`tokenflex.TokenFlexForConditionalGeneration` in evaluation mode.
        input_ids: int64 [B, L], one placeholder per image, as the processor returns them for
            ``num_image_tokens="auto"``. The same holds for ``attention_mask``, ``pixel_values``,
            ``grids`` and ``tiles_per_image`` (or ``encoded_images`` in place of pixels).
        threshold: An answer of a lower confidence is tried again.
        counts: Counts to try, rising; if None the router's, or without a router those the model
            was trained with. Confidence is calibrated if the router has them all.
        num_image_tokens: "auto".
        **kwargs: Options of ``generate``, for example ``max_new_tokens``; the search is greedy.

    Raises:
        TypeError: ``threshold`` is not a number.
        ValueError: ``threshold`` is NaN, no counts are known, they do not rise, the largest exceeds
            the language model's positions, ``kwargs`` ask for another search, or inputs do not fit
            together.
    """
    if not isinstance(threshold, (int, float)) or isinstance(threshold, bool):
        raise TypeError(f"threshold must be a number, got {threshold!r}")
    if isnan(threshold):
        raise ValueError(f"threshold must be a probability to compare with, got {threshold}")
    for option, value in _GREEDY.items():
        if kwargs.setdefault(option, value) != value:
            raise ValueError(
                f"{option} must be {value} in a cascade, which is greedy, got {kwargs[option]!r}"
            )
    if not isinstance(num_image_tokens, str) or num_image_tokens != AUTO:
        raise ValueError(f"num_image_tokens must be 'auto', got {num_image_tokens!r}")
    ladder = known_counts(model) if counts is None else tuple(counts)
    sizes = [height * width for height, width in map(token_grid, ladder)]
    if not sizes or sizes != sorted(set(sizes)):
        raise ValueError(f"counts must rise from the first to the last, got {list(ladder)}")
    kwargs = model.ready_for_choice(kwargs)
    inputs = {name: kwargs.pop(name) for name in CHOICE_INPUTS if name in kwargs}
    prompts, encoded = read_inputs(model, input_ids, **inputs)
    rows = range(len(prompts.rows))
    images = [prompts.images_of(row) for row in rows]
    num_tiles = [sum(prompts.tiles[image] for image in of_row) for of_row in images]
    for row in rows:  # before the first answer, not after an unsure one
        try:
            check_length(model.config, sizes[-1] * num_tiles[row])
        except ValueError as error:
            raise ValueError(f"counts {list(ladder)} at row {row}: {error}") from error
    curves = _curves(model, ladder)
    answers: list[torch.Tensor] = [input_ids[0, :0]] * len(rows)
    chosen: list[TokenCount | None] = [None] * len(rows)
    confidences = [0.0] * len(rows)
    vision_tokens, prefill_tokens = [0] * len(rows), [0] * len(rows)
    unsure = [*rows]
    for count, size in zip(ladder, sizes, strict=True):
        batch = prompts.select(unsure).expanded([count] * sum(len(images[row]) for row in unsure))
        tiles = prompts.tiles_of([image for row in unsure for image in images[row]])
        if tiles and encoded is not None:
            batch["encoded_images"] = encoded.select(tiles)
        for row, (tokens, confidence) in zip(unsure, _answers(model, batch, kwargs), strict=True):
            if curves is not None:
                confidence = float(
                    calibrated(np.array([confidence]), [curves[token_grid(count)]])[0]
                )
            answers[row], confidences[row] = tokens, confidence
            if images[row]:
                chosen[row] = count
                vision_tokens[row] = size * num_tiles[row]
                prefill_tokens[row] += vision_tokens[row]
        unsure = [row for row in unsure if images[row] and confidences[row] < threshold]
        if not unsure:
            break
    return EscalatedAnswers(
        new_tokens=pad_sequence(answers, batch_first=True, padding_value=prompts.pad_token_id),
        counts=chosen,
        confidences=confidences,
        vision_tokens=vision_tokens,
        prefill_tokens=prefill_tokens,
        calibrated=curves is not None,
    )


def _curves(model: Any, ladder: Sequence[TokenCount]) -> dict[Grid, Curve] | None:
    """Return the curve of each grid, or None unless the model's router has all of the counts."""
    try:
        router = router_of(model) if has_router(model) else None
    except ValueError as error:  # with counts of its own, a cascade needs no router
        warnings.warn(f"confidence is not calibrated: {error}", stacklevel=3)
        router = None
    if router is None or router.confidence_calibration is None:
        return None
    curves = dict(zip(map(token_grid, router.counts), router.confidence_calibration, strict=True))
    return curves if all(token_grid(count) in curves for count in ladder) else None


def _answers(
    model: Any, inputs: dict[str, Any], options: dict[str, Any]
) -> list[tuple[torch.Tensor, float]]:
    """Return each row's new tokens and the probability of the least certain one."""
    output = model.generate(**inputs, **options)
    ends = options.get("eos_token_id", model.generation_config.eos_token_id)
    return answers_with_certainty(output, inputs["input_ids"].shape[1], ends)
