"""Right or wrong: by the likeliest tokens of one forward pass, or by what the model generates."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tokenflex.data.encoding import IGNORE, ConversationEncoder
from tokenflex.evaluation.generation import expand_placeholders, generate_answers
from tokenflex.evaluation.questions import ProjectedImages, Question
from tokenflex.evaluation.scoring import RULES
from tokenflex_kernels import plan_packing


def grade_forced(
    model: Any,
    processor: Any,
    encode: ConversationEncoder,
    questions: Sequence[Question],
    vision: ProjectedImages,
) -> list[bool]:
    """Whether every token of each conversation's answers is the likeliest after those before it.

    All questions stand in one packed row, and no sequence sees another.

    Raises:
        ValueError: a conversation cannot be encoded, or holds no answer; the message names it.
    """
    sequences, labels, placeholder_counts, answer_lengths = [], [], [], []
    for one in questions:
        try:
            ids, learned = encode(one.conversation, len(one.sample.tiles))
        except ValueError as error:
            raise ValueError(f"sample {one.sample.id}: {error}") from error
        length = int((learned[1:] != IGNORE).sum())  # what nothing precedes is not predicted
        if not length:
            raise ValueError(f"sample {one.sample.id}: a conversation holds no answer to grade")
        sequences.append(ids)
        labels.append(learned)
        answer_lengths.append(length)
        placeholder_counts += one.tokens_per_image
    plan = plan_packing(sequences, placeholder_counts, processor.image_token_id, labels=labels)
    # Row t predicts the label of row t + 1.
    rows = (plan.labels[1:] != IGNORE).nonzero().squeeze(1)
    targets = plan.labels[rows + 1].to(model.device)
    ends = [0, *accumulate(len(tokens) for tokens in vision.tokens)]
    shown = [torch.arange(ends[place.start], ends[place.stop]) for place in vision.places]
    logits = model(
        plan=plan.to(model.device),
        mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=vision.tokens)},
        vision_index=torch.cat(shown).to(model.device),
        logits_to_keep=rows.to(model.device),
    ).logits[0]
    hits = (logits.argmax(-1) == targets).cpu()
    return [bool(answer.all()) for answer in hits.split(answer_lengths)]


def grade_generated(
    model: Any,
    processor: Any,
    questions: Sequence[Question],
    vision: ProjectedImages,
    score: str,
    *,
    batch_size: int,
    max_new_tokens: int,
) -> list[bool]:
    """Whether each generated answer is right by the rule named ``score``.

    Raises:
        ValueError: a reference answer does not suit the rule; the message names the sample.
    """
    right = []
    for first in range(0, len(questions), batch_size):
        last = first + batch_size
        some = questions[first:last]
        tokens = [[vision.tokens[tile] for tile in place] for place in vision.places[first:last]]
        prompts = [_prompt(one, processor.image_token_id) for one in some]
        answers = generate_answers(
            model, processor.tokenizer, prompts, tokens, max_new_tokens=max_new_tokens
        )
        for one, answer in zip(some, answers, strict=True):
            turns = one.conversation.turns
            reference = next(turn.text for turn in reversed(turns) if turn.role == "assistant")
            try:
                right.append(RULES[score](answer.text, reference))
            except ValueError as error:
                raise ValueError(f"sample {one.sample.id}: {error}") from error
    return right


def _prompt(question: Question, image_token_id: int) -> torch.Tensor:
    assert question.prompt_ids is not None
    try:
        return expand_placeholders(question.prompt_ids, question.tokens_per_image, image_token_id)
    except ValueError as error:
        raise ValueError(f"sample {question.sample.id}: {error}") from error
