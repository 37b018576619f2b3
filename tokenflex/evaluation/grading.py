"""Right or wrong: by the likeliest tokens of one forward pass, or by what the model generates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from tokenflex.data.rows import plan_row
from tokenflex.data.sequences import IGNORE, TokenSequence, prefix_and_branches
from tokenflex.evaluation.generation import generate_answers
from tokenflex.evaluation.questions import Question, QuestionImages
from tokenflex.evaluation.scoring import RULES
from tokenflex.models.vision import on_device
from tokenflex.prompts import expand_placeholders, left_padded

ROWS_AT_ONCE = 256
"""Rows of logits that become probabilities at once."""
QUESTIONS_AT_ONCE = 16
"""Questions of a padded batch."""


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
    the same counts share the rows of the images if the model can. A converted stock model takes no
    such row: it reads its questions in padded batches.

    Args:
        model: A :class:`tokenflex.TokenFlexForConditionalGeneration` or a converted stock model, in
            evaluation mode.
        processor: Its processor.
        questions: One or more encoded questions; those of a sample are next to each other.
        images: The images of the questions.

    Returns:
        Tensors on the host.
    """
    if not hasattr(model, "takes_shared_prefixes"):
        return _grade_padded(model, processor, questions, images)
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


def _grade_padded(
    model: Any, processor: Any, questions: Sequence[Question], images: QuestionImages
) -> ForcedGrades:
    """Grade forced answers of a model whose forward takes padded batches."""
    right, certain = [], []
    pad = processor.tokenizer.pad_token_id or 0
    for first in range(0, len(questions), QUESTIONS_AT_ONCE):
        batch = questions[first : first + QUESTIONS_AT_ONCE]
        rows = [_expanded(question, model.config.image_token_id) for question in batch]
        ids, mask = left_padded([ids for ids, _ in rows], pad)
        labels, _ = left_padded([labels for _, labels in rows], IGNORE)
        is_learned = labels[:, 1:] != IGNORE  # a first token is not predicted
        kept = labels.shape[1] - int(is_learned.nonzero()[:, 1].min())
        logits = model(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            logits_to_keep=kept,
            **on_device(model.prefix_types(labels != IGNORE), model.device),
            **images.of(range(first, first + len(batch))),
        ).logits[:, -kept:-1]
        is_learned, targets = is_learned[:, 1 - kept :], labels[:, 1 - kept :]
        hits = (logits.argmax(-1).cpu() == targets) | ~is_learned
        highest = torch.stack([row.float().softmax(-1).amax(-1) for row in logits]).cpu()
        right.append(hits.all(1))
        certain.append(highest.masked_fill(~is_learned, 1.0).amin(1))
    return ForcedGrades(torch.cat(right), torch.cat(certain))


def _expanded(question: Question, image_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens and labels of a question with its placeholders repeated."""
    assert question.encoded is not None
    ids = torch.from_numpy(question.encoded.ids.copy())
    labels = torch.from_numpy(question.encoded.labels.copy())
    runs = question.tokens_per_run
    # The position of each token travels along, and finds its label.
    is_image = ids == image_token_id
    positions = torch.where(is_image, -1, torch.arange(len(ids)))
    positions = expand_placeholders(positions, runs, -1)
    labels = torch.where(positions < 0, IGNORE, labels[positions.clamp(min=0)])
    return expand_placeholders(ids, runs, image_token_id), labels


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
    right = []
    for first in range(0, len(questions), batch_size):
        batch = questions[first : first + batch_size]
        prompts = [_prompt(question, model.config.image_token_id) for question in batch]
        answers = generate_answers(
            model,
            processor.tokenizer,
            prompts,
            **images.of(range(first, first + len(batch))),
            max_new_tokens=max_new_tokens,
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
        return expand_placeholders(question.prompt_ids, question.tokens_per_run, image_token_id)
    except ValueError as error:
        raise ValueError(f"sample {question.sample.id}: {error}") from error
