"""The confidence cascade: answer with few vision tokens, and with more where the model is unsure.

Images are encoded once; pooling them again costs next to nothing beside that. What an escalation
does cost is reading the prompt again, at the larger count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from tokenflex.counts import AUTO, TokenCount, token_grid
from tokenflex.models.auto_counts import CHOICE_INPUTS
from tokenflex.models.loading import check_length
from tokenflex.routing.choice import read_inputs, trained_counts
from tokenflex.routing.expansion import Prompts

# What confidence is read from, and what it means only for greedy search.
_GREEDY = {
    "do_sample": False,
    "num_beams": 1,
    "return_dict_in_generate": True,
    "output_logits": True,
}


@dataclass(frozen=True)
class EscalatedAnswers:
    """What a cascade answered. Lists have an entry per row of the batch.

    Attributes:
        new_tokens: int64 [B, longest answer], without the prompts, padded at the end.
        counts: at which the answer was given; None for a row without images.
        confidences: of that answer, the probability of its least certain token.
        vision_tokens: of that answer's prompt.
        prefill_tokens: vision tokens of all the row's tries.
    """

    new_tokens: torch.Tensor
    counts: list[TokenCount | None]
    confidences: list[float]
    vision_tokens: list[int]
    prefill_tokens: list[int]


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
    """Greedy answers at the smallest count; those below ``threshold`` again at the next, and so on.

    At a threshold of 0 all answers are the smallest count's, above 1 all are the largest's.

    Args:
        model: a :class:`tokenflex.TokenFlexForConditionalGeneration` in evaluation mode.
        input_ids: int64 [B, L], one placeholder per image, as the processor gives it for
            ``num_image_tokens="auto"``; so are ``attention_mask``, ``pixel_values``, ``grids`` and
            ``tiles_per_image`` (or ``encoded_images`` in place of pixels).
        threshold: answers whose least certain token is below this probability are tried again.
        counts: to try, from few vision tokens to many; those the model was trained with if None.
        num_image_tokens: "auto".
        **kwargs: for ``generate``, for example ``max_new_tokens``; answers stay greedy.

    Raises:
        TypeError: ``threshold`` is not a number.
        ValueError: ``threshold`` is NaN, no counts are known, they do not rise, the largest of them
            exceeds the language model's positions, ``kwargs`` ask for another search, or inputs do
            not fit together.
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
    ladder = trained_counts(model) if counts is None else tuple(counts)
    sizes = [height * width for height, width in map(token_grid, ladder)]
    if not sizes or sizes != sorted(set(sizes)):
        raise ValueError(f"counts must rise from the first to the last, got {list(ladder)}")
    inputs = {name: kwargs.pop(name) for name in CHOICE_INPUTS if name in kwargs}
    prompts, encoded = read_inputs(model, input_ids, **inputs)
    rows = len(prompts.rows)
    for row in range(rows):  # before the first answer, not once an unsure one gets there
        try:
            check_length(model.config, sizes[-1] * _num_tiles(prompts, row))
        except ValueError as error:
            raise ValueError(f"counts {list(ladder)} at row {row}: {error}") from error
    images = prompts.images_per_row
    answers: list[torch.Tensor] = [input_ids[0, :0]] * rows
    chosen: list[TokenCount | None] = [None] * rows
    confidences, vision_tokens, prefill_tokens = [0.0] * rows, [0] * rows, [0] * rows
    unsure = list(range(rows))
    for count, size in zip(ladder, sizes, strict=True):
        tried = prompts.select(unsure)
        places = prompts.tiles_of([image for row in unsure for image in prompts.images_of(row)])
        shown = {} if not places or encoded is None else {"encoded_images": encoded.select(places)}
        said = _answers(model, {**tried.expanded([count] * len(tried.tiles)), **shown}, kwargs)
        for row, (tokens, confidence) in zip(unsure, said, strict=True):
            answers[row], confidences[row] = tokens, confidence
            if images[row]:
                chosen[row] = count
                vision_tokens[row] = size * _num_tiles(prompts, row)
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
    )


def _answers(
    model: Any, inputs: dict[str, Any], options: dict[str, Any]
) -> list[tuple[torch.Tensor, float]]:
    """Each row's new tokens up to its end, and the probability of the least certain one."""
    output = model.generate(**inputs, **options)
    new = output.sequences[:, inputs["input_ids"].shape[1] :]
    logits = torch.stack(output.logits, dim=1).float()  # before any processor, [B, new, V]
    certain = logits.softmax(-1).gather(2, new[..., None].to(logits.device)).squeeze(2).cpu()
    answers = []
    for row, tokens in enumerate(new.cpu()):
        length = _length(tokens, options.get("eos_token_id", model.generation_config.eos_token_id))
        answers.append((new[row, :length], float(certain[row, :length].min())))
    return answers


def _length(tokens: torch.Tensor, ends: int | Sequence[int] | None) -> int:
    """New tokens up to the first that ends an answer, that one included."""
    if ends is None:
        return len(tokens)
    stops = torch.isin(tokens, torch.tensor(ends)).nonzero().flatten()
    return int(stops[0]) + 1 if len(stops) else len(tokens)


def _num_tiles(prompts: Prompts, row: int) -> int:
    return sum(prompts.tiles[image] for image in prompts.images_of(row))
