"""Right or wrong: by the likeliest tokens of one forward pass, or by what the model generates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from tokenflex.data.rows import plan_row
from tokenflex.data.sequences import TokenSequence, prefix_and_branches
from tokenflex.evaluation.generation import generate_answers
from tokenflex.evaluation.questions import Question, QuestionImages
from tokenflex.evaluation.scoring import RULES
from tokenflex.prompts import expand_placeholders

ROWS_AT_ONCE = 256
"""Rows of logits that become probabilities at once."""


@dataclass(frozen=True)
class ForcedGrades:
    """Grades of answers of which each token follows the right tokens before it.

    Attributes:
        right: bool [questions], True where each token of the answers is the likeliest.
        confidence: float32 [questions], the lowest probability of a likeliest token. Up to a first
            mistake it equals that of generation.
    """

    right: torch.Tensor
    confidence: torch.Tensor


def grade_forced(
    model: Any, processor: Any, questions: Sequence[Question], images: QuestionImages
) -> ForcedGrades:
    """Grade forced answers in one forward pass.

    All questions stand in one packed row, and none sees another. Questions about the same images at
    the same counts share the rows of the images if the model can.

    Args:
        model: A :class:`tokenflex.TokenFlexForConditionalGeneration` in evaluation mode.
        processor: Its processor.
        questions: One or more encoded questions; those of a sample are next to each other.
        images: The images of the questions.

    Returns:
        Tensors on the host.
    """
    samples: list[tuple[list[TokenSequence], int]] = []
    tokens_per_image: list[int] = []
    first_images: dict[range, int] = {}
    asked = zip(questions, images.tiles, strict=True)
    for _, group in groupby(asked, key=lambda pair: (pair[0].sample.index, pair[0].grids)):
        members = list(group)
        sequences = [question.encoded for question, _ in members if question.encoded is not None]
        if model.takes_shared_prefixes:
            sequences = prefix_and_branches(sequences, processor.image_token_id)
        question, tiles = members[0]
        if tiles not in first_images:
            first_images[tiles] = len(tokens_per_image)
            tokens_per_image += question.tokens_per_image
        samples.append((sequences, first_images[tiles]))
    row = plan_row(samples, tokens_per_image, processor.image_token_id)
    batch = row.to(model.device)
    logits = model(
        plan=batch.plan,
        encoded_images=images.encoded,
        num_image_tokens=images.grids,
        shared_prefixes=batch.shared_prefixes,
        logits_to_keep=batch.target_rows,
        output_image_hidden_states=False,
    ).logits[0]
    hits = (logits.argmax(-1) == batch.targets).cpu().split(row.targets_per_conversation)
    # In parts, because the probabilities of all rows would be another copy of the logits.
    highest = [part.float().softmax(-1).amax(-1) for part in logits.split(ROWS_AT_ONCE)]
    certain = torch.cat(highest).cpu().split(row.targets_per_conversation)
    return ForcedGrades(
        torch.stack([of_question.all() for of_question in hits]),
        torch.stack([of_question.min() for of_question in certain]),
    )


def grade_generated(
    model: Any,
    processor: Any,
    questions: Sequence[Question],
    images: QuestionImages,
    score: str,
    *,
    batch_size: int,
    max_new_tokens: int,
) -> list[bool]:
    """Return whether each generated answer is right by the rule named ``score``.

    Raises:
        ValueError: A reference answer does not suit the rule; the message names the sample.
    """
    projected = model.get_image_features(
        num_image_tokens=images.grids, encoded_images=images.encoded
    ).pooler_output
    right = []
    for first in range(0, len(questions), batch_size):
        batch = questions[first : first + batch_size]
        tiles = images.tiles[first : first + batch_size]
        tokens = [[projected[tile] for tile in of_question] for of_question in tiles]
        prompts = [_prompt(question, processor.image_token_id) for question in batch]
        answers = generate_answers(
            model, processor.tokenizer, prompts, tokens, max_new_tokens=max_new_tokens
        )
        for question, answer in zip(batch, answers, strict=True):
            turns = question.conversation.turns
            reference = next(turn.text for turn in reversed(turns) if turn.role == "assistant")
            try:
                right.append(RULES[score](answer.text, reference))
            except ValueError as error:
                raise ValueError(f"sample {question.sample.id}: {error}") from error
    return right


def _prompt(question: Question, image_token_id: int) -> torch.Tensor:
    assert question.prompt_ids is not None
    try:
        return expand_placeholders(question.prompt_ids, question.tokens_per_image, image_token_id)
    except ValueError as error:
        raise ValueError(f"sample {question.sample.id}: {error}") from error
