"""Right or wrong: by the likeliest tokens of one forward pass, or by what the model generates."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, groupby
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tokenflex.data.encoding import IGNORE, ConversationEncoder
from tokenflex.data.layout import RowLayout
from tokenflex.data.sharing import (
    EncodedConversation,
    prefix_and_branches,
    whole_conversations,
)
from tokenflex.evaluation.generation import expand_placeholders, generate_answers
from tokenflex.evaluation.questions import ProjectedImages, Question
from tokenflex.evaluation.scoring import RULES


def grade_forced(
    model: Any,
    processor: Any,
    encode: ConversationEncoder,
    questions: Sequence[Question],
    vision: ProjectedImages,
) -> list[bool]:
    """Whether every token of each conversation's answers is the likeliest after those before it.

    All questions stand in one packed row, and none sees another; those about the same images at
    the same counts share their rows where the model can.

    Raises:
        ValueError: a conversation cannot be encoded, or holds no answer; the message names it.
    """
    layout = RowLayout(processor.image_token_id)
    ends = [0, *accumulate(len(tokens) for tokens in vision.tokens)]
    asked = zip(questions, vision.places, strict=True)
    for _, group in groupby(asked, key=lambda pair: (pair[0].sample.index, pair[0].grids)):
        members = list(group)
        encoded = [_encode(encode, question) for question, _ in members]
        if model.takes_shared_prefixes:
            sequences = prefix_and_branches(encoded, processor.image_token_id)
        else:
            sequences = whole_conversations(encoded)
        question, place = members[0]
        shown = torch.arange(ends[place.start], ends[place.stop])
        layout.add(sequences, shown.split(question.tokens_per_image))
    row = layout.plan()
    batch = row.to(model.device)
    logits = model(
        plan=batch.plan,
        mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=vision.tokens)},
        vision_index=batch.vision_index,
        shared_prefixes=batch.shared_prefixes,
        logits_to_keep=batch.target_rows,
    ).logits[0]
    hits = (logits.argmax(-1) == batch.targets).cpu()
    return [bool(answer.all()) for answer in hits.split(row.targets_per_conversation)]


def _encode(encode: ConversationEncoder, question: Question) -> EncodedConversation:
    sample = question.sample
    try:
        ids, labels = encode(question.conversation, len(sample.tiles))
    except ValueError as error:
        raise ValueError(f"sample {sample.id}: {error}") from error
    if not (labels[1:] != IGNORE).any():  # what nothing precedes is not predicted
        raise ValueError(f"sample {sample.id}: a conversation holds no answer to grade")
    return ids, labels, len(sample.tiles)


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
