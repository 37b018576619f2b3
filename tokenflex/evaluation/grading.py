"""Right or wrong: by the likeliest tokens of one forward pass, or by what the model generates."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, groupby
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tokenflex.counts import Grid
from tokenflex.data.encoding import IGNORE, ConversationEncoder
from tokenflex.data.sharing import (
    EncodedConversation,
    TokenSequence,
    prefix_and_branches,
    whole_conversations,
)
from tokenflex.evaluation.generation import expand_placeholders, generate_answers
from tokenflex.evaluation.questions import ProjectedImages, Question
from tokenflex.evaluation.scoring import RULES
from tokenflex.models.prefixes import share_prefixes
from tokenflex_kernels import plan_packing


def grade_forced(
    model: Any,
    processor: Any,
    encode: ConversationEncoder,
    questions: Sequence[Question],
    vision: ProjectedImages,
) -> list[bool]:
    """Whether every token of each conversation's answers is the likeliest after those before it.

    All questions stand in one packed row and do not see each other.

    Raises:
        ValueError: a conversation cannot be encoded, or holds no answer; the message names it.
    """
    ends = [0, *accumulate(len(tokens) for tokens in vision.tokens)]
    sequences: list[TokenSequence] = []
    parents: list[int] = []
    placeholder_counts: list[int] = []
    shown: list[torch.Tensor] = []
    answer_lengths: list[int] = []
    # Questions about one sample at the same grids share the rows of its images.
    for _, group in groupby(zip(questions, vision.places, strict=True), key=_shown_alike):
        asked, places = zip(*group, strict=True)
        encoded = [_encoded(one, encode) for one in asked]
        answer_lengths += [int((learned[1:] != IGNORE).sum()) for _, learned, _ in encoded]
        if model.takes_shared_prefixes:
            parts = prefix_and_branches(encoded, processor.image_token_id)
        else:
            parts = whole_conversations(encoded)
        counts = asked[0].tokens_per_image
        rows = torch.arange(ends[places[0].start], ends[places[0].stop]).split(counts)
        first = len(sequences)
        for one in parts:
            sequences.append(one)
            parents.append(first if one.is_branch else -1)
            placeholder_counts += counts[one.images]
            shown += rows[one.images]
    plan = plan_packing(
        [one.ids for one in sequences],
        placeholder_counts,
        processor.image_token_id,
        labels=[one.labels for one in sequences],
    )
    shares = any(parent >= 0 for parent in parents)
    prefixes = share_prefixes(plan, parents).to(model.device) if shares else None
    # Row t predicts the label of row t + 1.
    learned_rows = (plan.labels[1:] != IGNORE).nonzero().squeeze(1)
    targets = plan.labels[learned_rows + 1].to(model.device)
    logits = model(
        plan=plan.to(model.device),
        mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=vision.tokens)},
        vision_index=torch.cat([torch.zeros(0, dtype=torch.int64), *shown]).to(model.device),
        shared_prefixes=prefixes,
        logits_to_keep=learned_rows.to(model.device),
    ).logits[0]
    hits = (logits.argmax(-1) == targets).cpu()
    return [bool(answer.all()) for answer in hits.split(answer_lengths)]


def _shown_alike(asked: tuple[Question, range]) -> tuple[int, tuple[Grid, ...]]:
    return asked[0].sample.index, asked[0].grids


def _encoded(question: Question, encode: ConversationEncoder) -> EncodedConversation:
    sample = question.sample
    try:
        ids, learned = encode(question.conversation, len(sample.tiles))
    except ValueError as error:
        raise ValueError(f"sample {sample.id}: {error}") from error
    if not bool((learned[1:] != IGNORE).any()):  # what nothing precedes is not predicted
        raise ValueError(f"sample {sample.id}: a conversation holds no answer to grade")
    return ids, learned, len(sample.tiles)


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
