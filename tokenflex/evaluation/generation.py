"""Greedy answers for a batch of prompts whose images are encoded already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tokenflex.prompts import left_padded


@dataclass(frozen=True)
class GeneratedAnswer:
    """The text of an answer and its number of tokens, the one that ends it included."""

    text: str
    tokens: int


def answer_length(tokens: torch.Tensor, ends: int | Sequence[int] | None) -> int:
    """Return the number of tokens up to the first that ends an answer, that one included."""
    stops = torch.isin(tokens, torch.tensor([] if ends is None else ends)).nonzero().flatten()
    return int(stops[0]) + 1 if len(stops) else len(tokens)


def answers_with_certainty(
    output: Any, prompt_length: int, ends: int | Sequence[int] | None
) -> list[tuple[torch.Tensor, float]]:
    """Return each row's new tokens, and the probability of the least certain one.

    Args:
        output: Of ``generate`` with ``return_dict_in_generate`` and ``output_logits``. The
            probabilities are those of the logits before any logits processor.
        prompt_length: Length of the prompts in ``output.sequences``.
        ends: Tokens that end an answer, the last of its tokens.

    Returns:
        For each row int64 [tokens], and a number from 0 to 1.
    """
    new = output.sequences[:, prompt_length:]
    logits = torch.stack(output.logits, dim=1).float()  # [B, new, V]
    certain = logits.softmax(-1).gather(2, new[..., None].to(logits.device)).squeeze(2).cpu()
    answers = []
    for row, tokens in enumerate(new.cpu()):
        length = answer_length(tokens, ends)
        answers.append((new[row, :length], float(certain[row, :length].min())))
    return answers


def special_tokens(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Return ``eos_token_id`` and ``pad_token_id`` for ``generate``."""
    ends, pad = model.generation_config.eos_token_id, tokenizer.pad_token_id
    return {
        "eos_token_id": tokenizer.eos_token_id if ends is None else ends,
        "pad_token_id": tokenizer.eos_token_id if pad is None else pad,
    }


def generate_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[torch.Tensor],
    **options: Any,
) -> list[GeneratedAnswer]:
    """Return the answer to each prompt, from one left-padded batch.

    Args:
        model: A :class:`tokenflex.TokenFlexForConditionalGeneration` or a converted stock model, in
            evaluation mode.
        tokenizer: Its processor's tokenizer.
        prompts: int64 [length] each, see :func:`tokenflex.prompts.expand_placeholders`.
        **options: The prompts' ``encoded_images`` with their ``num_image_tokens`` (and
            ``image_index``), and options of ``generate``; the default is greedy search.
    """
    tokens = special_tokens(model, tokenizer)
    ids, mask = left_padded(prompts, tokens["pad_token_id"])
    output = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        **{"do_sample": False, "num_beams": 1, **tokens, **options},
    )
    answers = output[:, ids.shape[1] :].cpu()
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return [
        GeneratedAnswer(text.strip(), answer_length(answer, tokens["eos_token_id"]))
        for text, answer in zip(texts, answers, strict=True)
    ]
