"""Every question of a data set at every count, from one pass of the encoder: what selectors are
trained on and measured by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from tokenflex.data.encoding import IGNORE, ConversationEncoder
from tokenflex.data.samples import Sample, SampleDataset
from tokenflex.models.vision import EncodedImages
from tokenflex.selection.features import image_statistics, question_embeddings
from tokenflex.selection.router import check_counts
from tokenflex_kernels import plan_packing


@dataclass(frozen=True)
class Grades:
    """What a model knew at which count, and what a router may see of each question.

    Questions and images are numbered in the data set's order; a pair is a question and one of the
    images it is about.

    Attributes:
        counts: K counts, rising.
        right: bool [questions, K], answered right with all its images at that count.
        confidence: float32 [questions, K], the probability of the least certain token of the
            answer, each after the right tokens before it. It is generation's own up to a first
            mistake.
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
    on_samples: Callable[[int], object] = lambda samples: None,
) -> Grades:
    """Ask everything at every count; right means what it does in :mod:`tokenflex.evaluation`.

    Args:
        model: a :class:`tokenflex.TokenFlexForConditionalGeneration`; its mode is left as it was.
        processor: its processor.
        dataset: what to ask.
        counts: two or more perfect squares.
        batch_size: samples a pass.
        on_samples: called with the number of samples after each pass.

    Raises:
        TypeError: a count is not an int.
        ValueError: counts are fewer than two, or a sample cannot be encoded; it is named.
    """
    counts = check_counts(counts)
    was_training = model.training
    model.eval()
    encode = ConversationEncoder(processor.tokenizer, processor.image_prompt)
    parts: list[Grades] = []
    try:
        for first in range(0, len(dataset), batch_size):
            indices = range(first, min(first + batch_size, len(dataset)))
            samples = [dataset[i] for i in indices]
            parts.append(_grade_batch(model, processor, encode, samples, first, counts))
            on_samples(len(samples))
    finally:
        model.train(was_training)
    return _joined(parts)


def _grade_batch(
    model: Any,
    processor: Any,
    encode: ConversationEncoder,
    samples: Sequence[Sample],
    first_sample: int,
    counts: tuple[int, ...],
) -> Grades:
    images = [image for sample in samples for image in sample.images]
    encoded, tiles = _encoded(model, processor, images)
    sequences: list[torch.Tensor] = []
    labels: list[torch.Tensor] = []
    owners: list[int] = []
    shown: list[range] = []  # each question's images, as places among all
    kinds: list[str] = []
    seen = 0
    for i, sample in enumerate(samples):
        for conversation in sample.conversations:
            try:
                ids, learned = encode(conversation, len(sample.images))
            except ValueError as error:
                raise ValueError(f"sample {sample.id}: {error}") from error
            if not bool((learned != IGNORE).any()):
                raise ValueError(f"sample {sample.id} holds a conversation without an answer")
            sequences.append(ids)
            labels.append(learned)
            owners.append(first_sample + i)
            shown.append(range(seen, seen + len(sample.images)))
            kinds.append(conversation.kind)
        seen += len(sample.images)
    graded = [
        _graded_at(model, processor, count, encoded, tiles, sequences, labels, shown)
        for count in counts
    ]
    pairs = [(image, question) for question, span in enumerate(shown) for image in span]
    pair_images, pair_questions = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).unbind(1)
    asked = [
        _question(ids, learned, processor.image_token_id)
        for ids, learned in zip(sequences, labels, strict=True)
    ]
    return Grades(
        counts=counts,
        right=torch.stack([right for right, _ in graded], dim=1),
        confidence=torch.stack([confidence for _, confidence in graded], dim=1),
        tiles=torch.tensor([sum(tiles[i] for i in span) for span in shown]),
        samples=torch.tensor(owners),
        kinds=tuple(kinds),
        images=image_statistics(encoded, tiles),
        questions=question_embeddings(model.get_input_embeddings(), asked),
        pair_images=pair_images,
        pair_questions=pair_questions,
    )


def _encoded(model: Any, processor: Any, images: Sequence[Any]) -> tuple[EncodedImages, list[int]]:
    if not images:
        width = model.config.vision_config.hidden_size
        return EncodedImages(torch.zeros(0, width, device=model.device), ()), []
    data, tiles = processor.process_images(images)
    return model.encode_images(data["pixel_values"].to(model.device), data.get("grids")), tiles


def _graded_at(
    model: Any,
    processor: Any,
    count: int,
    encoded: EncodedImages,
    tiles: Sequence[int],
    sequences: Sequence[torch.Tensor],
    labels: Sequence[torch.Tensor],
    shown: Sequence[range],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Right or wrong, and the least certain token's probability, of every question at a count."""
    placeholders = [count * tiles[image] for span in shown for image in span]
    plan = plan_packing(sequences, placeholders, processor.image_token_id, labels=labels)
    # Questions about an image show the same projected rows; an image's follow one another.
    starts = torch.tensor([0, *tiles]).cumsum(0) * count
    rows = [torch.arange(int(starts[span.start]), int(starts[span.stop])) for span in shown]
    learned = plan.labels != IGNORE
    target_rows = learned[1:].nonzero().squeeze(1)  # row t predicts the label of row t + 1
    targets = plan.labels[target_rows + 1]
    per_question = torch.stack([part.sum() for part in learned.split(plan.lengths)]).tolist()
    device = model.device
    logits = model(
        encoded_images=encoded,
        num_image_tokens=count,
        plan=plan.to(device),
        vision_index=torch.cat(rows).to(device),
        logits_to_keep=target_rows.to(device),
    ).logits[0]
    highest, said = logits.float().softmax(-1).max(-1)
    hits = (said.cpu() == targets).split(per_question)
    certain = highest.cpu().split(per_question)
    return (
        torch.stack([hit.all() for hit in hits]),
        torch.stack([one.min() for one in certain]),
    )


def _question(ids: torch.Tensor, labels: torch.Tensor, image_token_id: int) -> torch.Tensor:
    """The text before the first answer: what the prompt holds when it is asked."""
    first = int((labels != IGNORE).nonzero()[0])
    asked = ids[:first]
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
