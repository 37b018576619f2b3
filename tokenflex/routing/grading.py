"""Every question of a data set at every count, from one pass of the encoder: what selectors are
trained on and measured by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from tokenflex.counts import token_grid
from tokenflex.data.encoding import ConversationEncoder
from tokenflex.data.faults import (
    MAX_BROKEN_SAMPLES,
    BrokenSample,
    BrokenSamplesError,
    broken_records,
    check_broken,
    leaving_out,
    warn_of_broken,
)
from tokenflex.data.samples import SampleDataset
from tokenflex.evaluation.grading import grade_forced
from tokenflex.evaluation.questions import (
    PreparedBatch,
    Question,
    ReadBatch,
    project,
    text_before_answers,
)
from tokenflex.routing.features import image_statistics, question_embeddings
from tokenflex.routing.router import check_counts


@dataclass(frozen=True)
class Grades:
    """What a model knew at which count, and what a router may see of each question.

    Questions and images are numbered in the data set's order; a pair is a question and one of the
    images it is about.

    Attributes:
        counts: K counts, rising.
        right: bool [questions, K], answered right with all its images at that count.
        confidence: float32 [questions, K], see
            :class:`tokenflex.evaluation.grading.ForcedGrades`, as is ``right``.
        tiles: int64 [questions], of all its images: its vision tokens at n are n * tiles.
        samples: int64 [questions], the sample it is from.
        kinds: of each question.
        images: float32 [images, 2C], their statistics.
        questions: float32 [questions, D], their embeddings.
        pair_images: int64 [pairs].
        pair_questions: int64 [pairs].
    """

    counts: tuple[int, ...]
    right: torch.Tensor
    confidence: torch.Tensor
    tiles: torch.Tensor
    samples: torch.Tensor
    kinds: tuple[str, ...]
    images: torch.Tensor
    questions: torch.Tensor
    pair_images: torch.Tensor
    pair_questions: torch.Tensor

    def __len__(self) -> int:
        return len(self.kinds)

    def weights(self) -> torch.Tensor:
        """float64 [questions], adding up to 1: every kind weighs the same, as in evaluation."""
        sizes = Counter(self.kinds)
        shares = [1 / (len(sizes) * sizes[kind]) for kind in self.kinds]
        return torch.tensor(shares, dtype=torch.float64)

    def of_samples(self, chosen: torch.Tensor) -> Grades:
        """The questions of some samples.

        Args:
            chosen: bool [samples].
        """
        kept = chosen[self.samples]
        place = kept.cumsum(0) - 1
        pairs = kept[self.pair_questions]
        return replace(
            self,
            right=self.right[kept],
            confidence=self.confidence[kept],
            tiles=self.tiles[kept],
            samples=self.samples[kept],
            kinds=tuple(kind for kind, keep in zip(self.kinds, kept.tolist(), strict=True) if keep),
            questions=self.questions[kept],
            pair_images=self.pair_images[pairs],
            pair_questions=place[self.pair_questions[pairs]],
        )


@torch.no_grad()
def grade(
    model: Any,
    processor: Any,
    dataset: SampleDataset,
    counts: Sequence[int],
    *,
    batch_size: int = 64,
    max_broken_samples: int | None = MAX_BROKEN_SAMPLES,
    on_samples: Callable[[int], object] = lambda samples: None,
) -> Grades:
    """Ask everything at every count, as evaluation does.

    Args:
        model: a :class:`tokenflex.TokenFlexForConditionalGeneration`; its mode is left as it was.
        processor: its processor.
        dataset: what to ask.
        counts: two or more perfect squares.
        batch_size: samples a pass.
        max_broken_samples: samples that cannot be read or encoded are left out with a warning, at
            most so many; None for no bound.
        on_samples: called with the number of samples after each pass.

    Raises:
        TypeError: a count is not an int.
        BrokenSamplesError: more samples than allowed are broken, or all of them; one is named.
        ValueError: counts are fewer than two.
    """
    counts = check_counts(counts)
    was_training = model.training
    model.eval()
    encode = ConversationEncoder(processor.tokenizer, processor.image_prompt, processor.image_token)
    read = ReadBatch(dataset, processor, max_tiles=None)
    parts: list[Grades] = []
    broken: list[BrokenSample] = []
    check_broken(broken_records(dataset), max_broken_samples)
    try:
        for first in range(0, len(dataset), batch_size):
            indices = range(first, min(first + batch_size, len(dataset)))
            batch = read([(0, index) for index in indices])
            part = _grade_batch(model, processor, encode, dataset, batch, counts)
            parts += [] if part is None else [part]
            broken += batch.broken
            check_broken(broken, max_broken_samples)
            on_samples(len(indices))
    finally:
        model.train(was_training)
    warn_of_broken(broken)
    if broken and not parts:
        raise BrokenSamplesError(
            f"none of the {len(dataset)} samples can be asked: {broken[0].reason}", broken
        )
    return _joined(parts)


def _grade_batch(
    model: Any,
    processor: Any,
    encode: ConversationEncoder,
    dataset: SampleDataset,
    batch: PreparedBatch,
    counts: tuple[int, ...],
) -> Grades | None:
    """None where no sample of the batch can be asked; those that cannot join ``batch.broken``."""
    questions_of: dict[int, list[Question]] = {}  # by the sample's index
    for sample in batch.samples:
        with leaving_out(dataset, sample.index, batch.broken):
            questions_of[sample.index] = [
                Question(sample, conversation, encoded=sample.encoded(encode, conversation))
                for conversation in sample.conversations
            ]
    if not questions_of:
        return None
    encoded = model.encode_images(batch.pixel_values.to(model.device), batch.grids)
    asked: list[Question] = []
    pairs: list[tuple[int, int]] = []
    tiles: list[int] = []  # of every image
    for sample in batch.samples:
        images = range(len(tiles), len(tiles) + len(sample.tiles))
        tiles += sample.tiles
        for question in questions_of.get(sample.index, []):
            pairs += [(image, len(asked)) for image in images]
            asked.append(question)
    graded = []
    for count in counts:
        grid = token_grid(count)
        questions = [replace(one, grids=(grid,) * len(one.sample.tiles)) for one in asked]
        vision = project(model, encoded, questions)
        graded.append(grade_forced(model, processor, questions, vision))
    pair_images, pair_questions = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).unbind(1)
    words = [_question(one, processor.image_token_id) for one in asked]
    return Grades(
        counts=counts,
        right=torch.stack([one.right for one in graded], dim=1),
        confidence=torch.stack([one.confidence for one in graded], dim=1),
        tiles=torch.tensor([sum(one.sample.tiles) for one in asked]),
        samples=torch.tensor([one.sample.index for one in asked]),
        kinds=tuple(one.conversation.kind for one in asked),
        images=image_statistics(encoded, tiles),
        questions=question_embeddings(model.get_input_embeddings(), words),
        pair_images=pair_images,
        pair_questions=pair_questions,
    )


def _question(question: Question, image_token_id: int) -> torch.Tensor:
    """The words before the first answer."""
    assert question.encoded is not None
    asked = text_before_answers(question.encoded, image_token_id)
    return asked[asked != image_token_id]


def _joined(parts: Sequence[Grades]) -> Grades:
    if not parts:
        raise ValueError("dataset must hold samples to grade, got none")
    images = questions = 0
    pair_images, pair_questions = [], []
    for part in parts:
        pair_images.append(part.pair_images + images)
        pair_questions.append(part.pair_questions + questions)
        images += len(part.images)
        questions += len(part)
    return Grades(
        counts=parts[0].counts,
        right=torch.cat([part.right for part in parts]),
        confidence=torch.cat([part.confidence for part in parts]),
        tiles=torch.cat([part.tiles for part in parts]),
        samples=torch.cat([part.samples for part in parts]),
        kinds=tuple(kind for part in parts for kind in part.kinds),
        images=torch.cat([part.images for part in parts]),
        questions=torch.cat([part.questions for part in parts]),
        pair_images=torch.cat(pair_images),
        pair_questions=torch.cat(pair_questions),
    )
