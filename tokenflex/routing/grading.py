"""Grades of every question at every count, which routers are trained on and measured by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tokenflex.counts import TokenCount, token_grid, tokens_of
from tokenflex.data.faults import MAX_BROKEN_SAMPLES, warn_of_broken
from tokenflex.data.samples import Conversation, SampleDataset
from tokenflex.evaluation.encoding import QuestionEncoder
from tokenflex.evaluation.grading import grade_forced
from tokenflex.evaluation.questions import (
    PreparedSample,
    Question,
    images_of,
    read_questions,
    text_before_answers,
)
from tokenflex.models.vision import on_device
from tokenflex.routing.features import image_statistics, question_embeddings
from tokenflex.routing.router import Router, best, check_counts, utilities

Choice = NDArray[np.int64]
"""[questions], the index of each question's count."""
FEW_SAMPLES = 50
"""Samples below which a standard error over samples is not to be relied on: between 20 and 50, says
section VI of Cameron and Miller 2015, A practitioner's guide to cluster-robust inference."""


@dataclass(frozen=True)
class Grades:
    """The questions that a model answers right at each count, and the router's view of them.

    Questions and images are numbered in the data set's order. A pair is a question and one of its
    images.

    Attributes:
        counts: K counts, from the fewest tokens to the most.
        right: bool [questions, K], answered right with all images at that count.
        confidence: float32 [questions, K], see
            :class:`tokenflex.evaluation.grading.ForcedGrades`.
        tiles: int64 [questions], tiles of all images; a question has n * tiles vision tokens at n.
        samples: int64 [questions], index of the sample.
        kinds: Kind of each question.
        images: float32 [images, 2C], statistics of the images.
        questions: float32 [questions, D], embeddings of the questions.
        pair_images: int64 [pairs].
        pair_questions: int64 [pairs].
    """

    counts: tuple[TokenCount, ...]
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

    @property
    def sizes(self) -> list[int]:
        """Tokens of each count."""
        return [tokens_of(count) for count in self.counts]

    def weights(self) -> torch.Tensor:
        """Return the weight of each question, float64 [questions]; kinds have equal weights."""
        sizes = Counter(self.kinds)
        shares = [1 / (len(sizes) * sizes[kind]) for kind in self.kinds]
        return torch.tensor(shares, dtype=torch.float64)

    def of_samples(self, chosen: torch.Tensor) -> Grades:
        """Return the questions of the samples that ``chosen``, bool [samples], marks."""
        kept = chosen[self.samples]
        new_index = kept.cumsum(0) - 1
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
            pair_questions=new_index[self.pair_questions[pairs]],
        )


@torch.no_grad()
def grade(
    model: Any,
    processor: Any,
    dataset: SampleDataset,
    counts: Sequence[TokenCount],
    *,
    batch_size: int = 64,
    max_broken_samples: int | None = MAX_BROKEN_SAMPLES,
    on_samples: Callable[[int], object] = lambda samples: None,
) -> Grades:
    """Grade every question at every count, as evaluation does, with one pass of the encoder.

    Args:
        model: A :class:`tokenflex.TokenFlexForConditionalGeneration` or a converted stock model;
            its mode is restored.
        processor: Its processor.
        dataset: The questions with their answers.
        counts: Two or more perfect squares or grids, of different numbers of tokens.
        batch_size: Samples of a pass.
        max_broken_samples: Largest number of samples left out, with a warning, because they cannot
            be read or encoded; None for no bound.
        on_samples: Called with the number of samples after each pass.

    Raises:
        TypeError: A count is neither an int nor a pair of ints.
        BrokenSamplesError: More samples than allowed are broken, or all of them; the message names
            one.
        ValueError: There are fewer than two counts, two have equally many tokens, or the data set
            is empty.
    """
    counts = check_counts(counts)
    image_token_id = model.config.image_token_id

    def to_question(
        encode: QuestionEncoder, sample: PreparedSample, conversation: Conversation
    ) -> Question:
        encoded = sample.encoded(encode, conversation)
        text = text_before_answers(encoded, image_token_id)
        return Question(sample, conversation, prompt_ids=text, encoded=encoded)

    right, confidence, images, embeddings = [], [], [], []
    tiles: list[int] = []
    samples: list[int] = []
    kinds: list[str] = []
    pairs: list[tuple[int, int]] = []
    num_images = 0
    batches = read_questions(
        model,
        processor,
        dataset,
        to_question,
        [],
        batch_size=batch_size,
        max_broken_samples=max_broken_samples,
    )
    with closing(batches):
        for batch in batches:
            warn_of_broken(batch.broken)
            if batch.questions:
                encoded = model.encode_images(**on_device(batch.image_inputs, model.device))
                indices_of = {}
                for sample in batch.samples:
                    indices_of[sample.index] = range(num_images, num_images + len(sample.tiles))
                    num_images += len(sample.tiles)
                asked = [question for of_sample in batch.questions for question in of_sample]
                for question in asked:
                    sample = question.sample
                    pairs += [(image, len(kinds)) for image in indices_of[sample.index]]
                    tiles.append(sum(sample.tiles))
                    samples.append(sample.index)
                    kinds.append(question.conversation.kind)
                graded = []
                for count in counts:
                    grid = token_grid(count)
                    at_count = [replace(q, grids=(grid,) * len(q.sample.tiles)) for q in asked]
                    graded.append(
                        grade_forced(model, processor, at_count, images_of(encoded, at_count))
                    )
                right.append(torch.stack([grades.right for grades in graded], dim=1))
                confidence.append(torch.stack([grades.confidence for grades in graded], dim=1))
                tiles_per_image = [n for sample in batch.samples for n in sample.tiles]
                images.append(image_statistics(encoded, tiles_per_image))
                ids = [question.prompt_ids for question in asked]
                words = [text[text != image_token_id] for text in ids if text is not None]
                embeddings.append(question_embeddings(model.get_input_embeddings(), words))
            on_samples(batch.num_samples)
    pair_images, pair_questions = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).unbind(1)
    return Grades(
        counts=counts,
        right=torch.cat(right),
        confidence=torch.cat(confidence),
        tiles=torch.tensor(tiles),
        samples=torch.tensor(samples),
        kinds=tuple(kinds),
        images=torch.cat(images),
        questions=torch.cat(embeddings),
        pair_images=pair_images,
        pair_questions=pair_questions,
    )


def mean_chances(router: Router, grades: Grades) -> NDArray[np.float64]:
    """Return the mean probability of a right answer over each question's images.

    Returns:
        [questions, counts]; 0 for a question without images.

    Raises:
        ValueError: The router's counts differ from those of the grades.
    """
    if router.counts != grades.counts:
        raise ValueError(
            f"grades must be at the router's counts, {router.counts}, got {grades.counts}"
        )
    owners = grades.pair_questions.numpy()
    sums = np.zeros((len(grades), len(grades.counts)))
    images, questions = grades.images[grades.pair_images], grades.questions[grades.pair_questions]
    np.add.at(sums, owners, router.probabilities(images, questions))
    num_images = np.bincount(owners, minlength=len(grades)).clip(1)
    return sums / num_images[:, None]


def routed(router: Router, grades: Grades, penalty: float) -> Choice:
    """Return the router's choice at a penalty.

    A question about several images gets one count for all of them, by the mean of their
    probabilities, because it was graded that way. ``generate`` chooses for each image.

    Raises:
        ValueError: The router's counts differ from those of the grades.
    """
    return best(utilities(mean_chances(router, grades), grades.counts, penalty))


def drop_of(
    grades: Grades, choice: Choice, weights: torch.Tensor | None = None
) -> tuple[float, float]:
    """Return the accuracy of the largest count minus that of a choice, and its standard error.

    Both are of the same questions, and the error takes a sample's questions together: those about
    one image are right or wrong together. It is that of a mean of each kind's mean, by
    linearisation; with other weights than those of kinds, of the weighted mean. It is at least
    :func:`least_error`, because a few answers without a difference do not prove that there is none.

    Args:
        grades: K questions of S samples.
        choice: Choice for each question.
        weights: float64 [K], adding up to 1; if None, every kind has the same weight.
    """
    chosen = grades.right.gather(1, torch.from_numpy(choice)[:, None]).squeeze(1)
    lost = grades.right[:, -1].double() - chosen.double()
    kinds = grades.kinds if weights is None else ("",) * len(grades)
    weights = grades.weights() if weights is None else weights
    index = {kind: i for i, kind in enumerate(dict.fromkeys(kinds))}
    kind_of = torch.tensor([index[kind] for kind in kinds])
    zeros = torch.zeros(len(index), dtype=torch.float64)
    means = zeros.index_add(0, kind_of, weights * lost) / zeros.index_add(0, kind_of, weights)
    samples, sample_of = grades.samples.unique(return_inverse=True)
    by_sample = torch.zeros(len(samples), dtype=torch.float64)
    by_sample.index_add_(0, sample_of, weights * (lost - means[kind_of]))
    variance = float(by_sample.square().sum()) * len(samples) / max(len(samples) - 1, 1)
    error = max(variance**0.5, least_error(grades, choice, weights))
    return float((weights * lost).sum()), error


def least_error(grades: Grades, choice: Choice, weights: torch.Tensor) -> float:
    """Return the standard error that a drop has if no answer differs from the largest count's.

    n answers at smaller counts get two pseudo-observations, of which one is half a loss and half a
    gain (Agresti and Min 2005, Simple improved confidence intervals for comparing matched
    proportions), which is an error of 1 / (n + 2). With unequal weights, n is the effective number
    (Kish 1965). Of fewer than ``FEW_SAMPLES`` samples, too few to tell how alike the answers about
    one image are, n counts samples in place of questions.

    Args:
        grades: K questions of S samples.
        choice: Choice for each question.
        weights: float64 [K], adding up to 1.
    """
    smaller = (torch.from_numpy(choice) < len(grades.counts) - 1) & (grades.tiles > 0)
    if not bool(smaller.any()):
        return 0.0
    samples, sample_of = grades.samples.unique(return_inverse=True)
    shares = weights * smaller
    if len(samples) < FEW_SAMPLES:
        by_sample = torch.zeros(len(samples), dtype=torch.float64)
        shares = by_sample.index_add_(0, sample_of, shares)
    total = float(shares.sum())
    return total / (total**2 / float(shares.square().sum()) + 2)


def score(
    grades: Grades, choice: Choice, weights: torch.Tensor | None = None
) -> tuple[float, float]:
    """Return accuracy and vision tokens per question at a choice of counts.

    Args:
        grades: K questions.
        choice: Choice for each question.
        weights: float64 [K], adding up to 1; if None, every kind has the same weight.
    """
    weights = grades.weights() if weights is None else weights
    index = torch.from_numpy(choice)
    right = grades.right.gather(1, index[:, None]).squeeze(1)
    tokens = torch.tensor(grades.sizes)[index] * grades.tiles
    return float((weights * right).sum()), float((weights * tokens).sum())
