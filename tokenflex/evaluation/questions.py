"""Samples become questions with encoded images, at a choice of counts."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from tokenflex.counts import Grid, tokens_of_images
from tokenflex.data.faults import (
    NO_SAMPLE_TO_BLAME,
    BrokenSample,
    BrokenSamplesError,
    broken_records,
    check_broken,
    leaving_out,
)
from tokenflex.data.order import load_in_order
from tokenflex.data.samples import Conversation, Sample, SampleDataset
from tokenflex.data.sequences import IGNORE, TokenSequence
from tokenflex.evaluation.encoding import QuestionEncoder
from tokenflex.models.vision import EncodedImages
from tokenflex.prompts import tokens_of_runs


@dataclass(frozen=True)
class PreparedSample:
    """A sample whose images are tiles of its batch.

    Attributes:
        index: Index in the data set.
        id: Name in messages.
        tiles: Number of tiles of each image.
        first_tile: Index of the first tile within the batch.
        conversations: The questions with their answers.
    """

    index: int
    id: str
    tiles: tuple[int, ...]
    first_tile: int
    conversations: tuple[Conversation, ...]

    @property
    def tile_range(self) -> range:
        """Indices of the sample's tiles within the batch."""
        return range(self.first_tile, self.first_tile + sum(self.tiles))

    def prompt_ids(self, encode: QuestionEncoder, conversation: Conversation) -> torch.Tensor:
        """Return the prompt of the last answer, with its placeholders not repeated, int64 [length].

        Raises:
            ValueError: The conversation has no answer, or shows images after it.
        """
        turns = conversation.turns
        answers = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
        if not answers:
            raise ValueError(f"sample {self.id}: a conversation holds no answer to compare with")
        question = Conversation(turns[: answers[-1]], conversation.kind)
        try:
            ids = encode.prompt_ids(question, self.tiles)
        except ValueError as error:
            raise ValueError(f"sample {self.id}: {error}") from error
        return ids

    def encoded(self, encode: QuestionEncoder, conversation: Conversation) -> TokenSequence:
        """Return the conversation with its answers as in training.

        Raises:
            ValueError: It cannot be encoded, or has no answer.
        """
        try:
            encoded = encode.sequence(conversation, self.tiles)
        except ValueError as error:
            raise ValueError(f"sample {self.id}: {error}") from error
        if not (encoded.labels[1:] != IGNORE).any():  # a first token is not predicted
            raise ValueError(f"sample {self.id}: a conversation holds no answer to grade")
        return encoded


@dataclass(frozen=True)
class Batch:
    """Inputs of the encoder and the questions about them.

    Attributes:
        image_inputs: Inputs of the encoder by name, as the processor returns them.
        samples: The samples that could be read.
        broken: The samples that are left out.
        questions: Questions of each sample that can be asked; no entry for other samples.
        num_samples: Samples of the data set that the batch covers, broken ones included.
    """

    image_inputs: dict[str, Any]
    samples: list[PreparedSample]
    broken: list[BrokenSample]
    questions: list[list[Question]] = field(default_factory=list)
    num_samples: int = 0


class ReadBatch:
    """Reads samples and processes their images, in data-loader workers too.

    Args:
        dataset: The samples.
        processor: A :class:`tokenflex.TokenFlexProcessor`.
        max_tiles: Largest number of tiles of an image, see the processor.
    """

    def __init__(self, dataset: SampleDataset, processor: Any, max_tiles: int | None) -> None:
        self.dataset = dataset
        self.processor = processor
        self.max_tiles = max_tiles

    def __call__(self, keys: Sequence[tuple[int, int]]) -> Batch:
        """Read the samples of (epoch, index) keys, leaving out those that cannot be read."""
        broken: list[BrokenSample] = []
        samples: list[tuple[int, Sample]] = []
        for _, index in keys:
            with leaving_out(self.dataset, index, broken):
                sample = self.dataset[index]
                if not sample.conversations:
                    raise ValueError(f"sample {sample.id}: holds no conversation to ask")
                samples.append((index, sample))
        try:
            return self._processed(samples, broken, len(keys))
        except NO_SAMPLE_TO_BLAME:
            raise
        except Exception:
            before = len(broken)
            for index, sample in samples:
                with leaving_out(self.dataset, index, broken):
                    self._processed([(index, sample)], [], 1)
            if len(broken) == before:  # no single sample is to blame
                raise
            left_out = {sample.index for sample in broken}
            rest = [(index, sample) for index, sample in samples if index not in left_out]
            return self._processed(rest, broken, len(keys))

    def _processed(
        self, samples: Sequence[tuple[int, Sample]], broken: list[BrokenSample], num_samples: int
    ) -> Batch:
        images = [list(sample.images) for _, sample in samples]
        data: dict[str, Any] = {"pixel_values": torch.zeros(0, 3, 1, 1)}
        tiles: list[int] = []
        if any(images):
            limits: Any = self.max_tiles
            # An image processor of transformers has no limit for each image: frames are as images.
            if hasattr(self.processor, "show_frames"):
                limits = [
                    self.max_tiles if limit is None else limit
                    for _, sample in samples
                    for limit in sample.max_tiles
                ]
            data, tiles = self.processor.process_images(images, max_tiles=limits)
        remaining, first = iter(tiles), 0
        prepared = []
        for index, sample in samples:
            of_sample = tuple(next(remaining) for _ in sample.images)
            prepared.append(
                PreparedSample(index, sample.id, of_sample, first, sample.conversations)
            )
            first += sum(of_sample)
        return Batch(data, prepared, broken, num_samples=num_samples)


def read_questions(
    model: Any,
    processor: Any,
    dataset: SampleDataset,
    to_question: Callable[[QuestionEncoder, PreparedSample, Conversation], Question],
    broken: list[BrokenSample],
    *,
    batch_size: int,
    workers: int = 0,
    max_tiles: int | None = None,
    max_broken_samples: int | None,
) -> Generator[Batch, None, None]:
    """Read a data set in batches, with the model in evaluation mode until the iterator is closed.

    Args:
        model: A :class:`tokenflex.TokenFlexForConditionalGeneration` or a converted stock model;
            its mode is restored.
        processor: Its processor.
        dataset: The samples.
        to_question: Makes the question of a conversation; a sample is left out if it raises.
        broken: Receives the samples that are left out.
        batch_size: Samples of a batch.
        workers: Data-loader processes.
        max_tiles: Largest number of tiles of an image; the processor's default if None.
        max_broken_samples: Largest number of samples to leave out; None for no bound.

    Raises:
        BrokenSamplesError: More samples than allowed are broken, or all of them; the message names
            one.
        ValueError: The data set is empty.
    """
    if not len(dataset):
        raise ValueError("dataset must hold at least one sample, got none")
    check_broken(broken_records(dataset), max_broken_samples)
    encode = QuestionEncoder(processor)
    keys = [(0, index) for index in range(len(dataset))]
    batches = load_in_order(
        ReadBatch(dataset, processor, max_tiles),
        [keys[first : first + batch_size] for first in range(0, len(keys), batch_size)],
        workers=workers,
    )
    was_training = model.training
    model.eval()
    num_asked = 0
    try:
        for batch in batches:
            for sample in batch.samples:
                with leaving_out(dataset, sample.index, batch.broken):
                    batch.questions.append(
                        [to_question(encode, sample, talk) for talk in sample.conversations]
                    )
            num_asked += len(batch.questions)
            broken += batch.broken
            check_broken(broken, max_broken_samples)
            yield batch
    finally:
        batches.close()
        model.train(was_training)
    if not num_asked:
        raise BrokenSamplesError(
            f"none of the {len(dataset)} samples can be asked: {broken[0].reason}", broken
        )


def text_before_answers(encoded: TokenSequence, image_token_id: int) -> torch.Tensor:
    """Return a conversation up to its first answer, with a placeholder for every image.

    Counts are chosen by this text. Placeholders of images in later turns stand at the end.

    Args:
        encoded: See :meth:`PreparedSample.encoded`.
        image_token_id: The placeholder.

    Returns:
        int64 [length].
    """
    before, later = np.split(encoded.ids, [encoded.first_target])
    return torch.from_numpy(np.concatenate([before, later[later == image_token_id]]))


@dataclass(frozen=True)
class Question:
    """One conversation at one choice of counts.

    Attributes:
        sample: The sample with the images.
        conversation: The question with its answer.
        prompt_ids: The text that counts are chosen by: :func:`text_before_answers` of forced
            answers, :meth:`PreparedSample.prompt_ids` of generated ones; None for forced answers
            at given counts.
        encoded: See :meth:`PreparedSample.encoded`; None for generated answers.
        grids: (height, width) vision tokens of each image's tiles; empty before the choice.
    """

    sample: PreparedSample
    conversation: Conversation
    prompt_ids: torch.Tensor | None = None
    encoded: TokenSequence | None = None
    grids: tuple[Grid, ...] = ()

    @property
    def tokens_per_image(self) -> list[int]:
        """Vision tokens of each image, all its tiles together."""
        return tokens_of_images(self.sample.tiles, self.grids)

    @property
    def tokens_per_run(self) -> list[int]:
        """Vision tokens of each run of placeholders."""
        return tokens_of_runs(self.sample.tiles, self.tokens_per_image)


@dataclass(frozen=True)
class QuestionImages:
    """Images of a batch's questions, each once per grid.

    Attributes:
        encoded: Their tiles.
        grids: (height, width) vision tokens of each tile.
        tiles: Indices of each question's tiles, in order.
    """

    encoded: EncodedImages
    grids: list[Grid]
    tiles: list[range]

    def of(self, questions: range) -> dict[str, Any]:
        """Return the images of some questions, as a model's inputs by name; each tile once."""
        shown = [tile for question in questions for tile in self.tiles[question]]
        if not shown:
            return {}
        used = sorted({*shown})
        place = {tile: i for i, tile in enumerate(used)}
        return {
            "encoded_images": self.encoded.select(used),
            "num_image_tokens": [self.grids[tile] for tile in used],
            "image_index": [place[tile] for tile in shown],
        }


def images_of(encoded: EncodedImages, questions: Sequence[Question]) -> QuestionImages:
    """Return the images of every question; questions about one sample at equal grids share them.

    Args:
        encoded: The tiles of the batch.
        questions: The questions of the batch.
    """
    ranges: dict[tuple[int, tuple[Grid, ...]], range] = {}
    tiles: list[int] = []
    grids: list[Grid] = []
    for question in questions:
        sample = question.sample
        key = (sample.index, question.grids)
        if key not in ranges:
            ranges[key] = range(len(tiles), len(tiles) + sum(sample.tiles))
            tiles += sample.tile_range
            for count, grid in zip(sample.tiles, question.grids, strict=True):
                grids += [grid] * count
    if tiles != [*range(len(encoded))]:
        encoded = encoded.select(tiles)
    of_questions = [ranges[question.sample.index, question.grids] for question in questions]
    return QuestionImages(encoded, grids, of_questions)
