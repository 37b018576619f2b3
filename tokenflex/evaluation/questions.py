"""From samples to questions whose images are encoded, and to their vision tokens at a count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tokenflex.counts import Grid
from tokenflex.data.encoding import IGNORE, ConversationEncoder
from tokenflex.data.faults import NO_SAMPLE_TO_BLAME, BrokenSample, leaving_out
from tokenflex.data.samples import Conversation, Sample, SampleDataset
from tokenflex.data.sequences import TokenSequence
from tokenflex.models.vision import EncodedImages


@dataclass(frozen=True)
class PreparedSample:
    """A sample whose images have become tiles of its batch.

    Attributes:
        index: in the data set.
        id: for messages.
        tiles: how many each image became.
        first_tile: where the first stands among those of the batch.
        conversations: what is asked.
    """

    index: int
    id: str
    tiles: tuple[int, ...]
    first_tile: int
    conversations: tuple[Conversation, ...]

    @property
    def tile_range(self) -> range:
        """Its tiles among those of the batch."""
        return range(self.first_tile, self.first_tile + sum(self.tiles))

    def prompt_ids(self, encode: ConversationEncoder, conversation: Conversation) -> torch.Tensor:
        """int64 [length]: the prompt for the conversation's last answer, a placeholder an image.

        Raises:
            ValueError: there is no answer, or images stand behind it.
        """
        turns = conversation.turns
        answers = [place for place, turn in enumerate(turns) if turn.role == "assistant"]
        if not answers:
            raise ValueError(f"sample {self.id}: a conversation holds no answer to compare with")
        asked = Conversation(turns[: answers[-1]], conversation.kind)
        try:
            prompt = encode.prompt(asked, len(self.tiles))
            ids = encode.tokenizer(prompt, add_special_tokens=False)["input_ids"]
            encode.check_placeholders(ids, len(self.tiles))
        except ValueError as error:
            raise ValueError(f"sample {self.id}: {error}") from error
        return torch.tensor(ids, dtype=torch.int64)

    def encoded(self, encode: ConversationEncoder, conversation: Conversation) -> TokenSequence:
        """The conversation with its answers, as training reads it.

        Raises:
            ValueError: it cannot be encoded, or holds no answer.
        """
        try:
            ids, labels = encode(conversation, len(self.tiles))
        except ValueError as error:
            raise ValueError(f"sample {self.id}: {error}") from error
        if not (labels[1:] != IGNORE).any():  # what nothing precedes is not predicted
            raise ValueError(f"sample {self.id}: a conversation holds no answer to grade")
        return TokenSequence(ids, labels, slice(0, len(self.tiles)))


@dataclass(frozen=True)
class PreparedBatch:
    """The encoder's inputs, the questions about them, and the samples that were left out."""

    pixel_values: torch.Tensor
    grids: list[Grid] | None
    samples: list[PreparedSample]
    broken: list[BrokenSample]


class ReadBatch:
    """Reads samples and processes their images. Runs in data-loader workers.

    Args:
        dataset: where samples come from.
        processor: a :class:`tokenflex.TokenFlexProcessor`.
        max_tiles: as it takes it.
    """

    def __init__(self, dataset: SampleDataset, processor: Any, max_tiles: int | None) -> None:
        self.dataset = dataset
        self.processor = processor
        self.max_tiles = max_tiles

    def __call__(self, keys: Sequence[tuple[int, int]]) -> PreparedBatch:
        """Read the samples of these (epoch, index) keys; those that cannot be are left out."""
        broken: list[BrokenSample] = []
        samples: list[tuple[int, Sample]] = []
        for _, index in keys:
            with leaving_out(self.dataset, index, broken):
                sample = self.dataset[index]
                if not sample.conversations:
                    raise ValueError(f"sample {sample.id}: holds no conversation to ask")
                samples.append((index, sample))
        try:
            return self._prepared(samples, broken)
        except NO_SAMPLE_TO_BLAME:
            raise
        except Exception:
            before = len(broken)
            for index, sample in samples:
                with leaving_out(self.dataset, index, broken):
                    self._prepared([(index, sample)], [])
            if len(broken) == before:  # none of them is to blame
                raise
            left_out = {one.index for one in broken}
            return self._prepared([one for one in samples if one[0] not in left_out], broken)

    def _prepared(
        self, samples: Sequence[tuple[int, Sample]], broken: list[BrokenSample]
    ) -> PreparedBatch:
        images = [image for _, sample in samples for image in sample.images]
        data: dict[str, Any] = {"pixel_values": torch.zeros(0, 3, 1, 1)}
        tiles: list[int] = []
        if images:
            data, tiles = self.processor.process_images(images, max_tiles=self.max_tiles)
        left, first = iter(tiles), 0
        prepared = []
        for index, sample in samples:
            own = tuple(next(left) for _ in sample.images)
            prepared.append(PreparedSample(index, sample.id, own, first, sample.conversations))
            first += sum(own)
        return PreparedBatch(data["pixel_values"], data.get("grids"), prepared, broken)


def text_before_answers(encoded: TokenSequence, image_token_id: int) -> torch.Tensor:
    """int64 [length]: a conversation up to its first answer, with a placeholder for every image.

    This is what there is when its images' counts are chosen. Placeholders of images in later turns
    stand at the end.

    Args:
        encoded: see :meth:`PreparedSample.encoded`.
        image_token_id: the placeholder.
    """
    ids = encoded.ids
    first = int((encoded.labels != IGNORE).nonzero()[0])
    later = ids[first:]
    return torch.cat([ids[:first], later[later == image_token_id]])


@dataclass(frozen=True)
class Question:
    """One conversation at one choice of counts.

    Attributes:
        sample: whose images it shows.
        conversation: the question with its answer.
        prompt_ids: what counts are chosen by: :func:`text_before_answers` where answers are
            forced, else the prompt of the answer that is generated, see
            :meth:`PreparedSample.prompt_ids`; None where answers are forced and nothing chooses.
        encoded: see :meth:`PreparedSample.encoded`; None where answers are generated.
        grids: (height, width) vision tokens of each image's tiles; empty until they are chosen.
    """

    sample: PreparedSample
    conversation: Conversation
    prompt_ids: torch.Tensor | None = None
    encoded: TokenSequence | None = None
    grids: tuple[Grid, ...] = ()

    @property
    def tokens_per_image(self) -> list[int]:
        """Vision tokens of each image, all its tiles together."""
        pairs = zip(self.sample.tiles, self.grids, strict=True)
        return [tiles * height * width for tiles, (height, width) in pairs]


@dataclass(frozen=True)
class ProjectedImages:
    """Vision tokens of a batch's images, each image projected once per grid that is asked of it.

    Attributes:
        tokens: [count, D] of every projected tile.
        places: for each question, which of ``tokens`` are its tiles, in order.
    """

    tokens: list[torch.Tensor]
    places: list[range]


def project(model: Any, encoded: EncodedImages, questions: Sequence[Question]) -> ProjectedImages:
    """The vision tokens of every question; those about one sample at the same grids share theirs.

    Args:
        model: a :class:`tokenflex.TokenFlexForConditionalGeneration`.
        encoded: the tiles of the batch.
        questions: those of the batch.
    """
    ranges: dict[tuple[int, tuple[Grid, ...]], range] = {}
    tiles: list[int] = []
    grids: list[Grid] = []
    for one in questions:
        key = (one.sample.index, one.grids)
        if key not in ranges:
            ranges[key] = range(len(tiles), len(tiles) + sum(one.sample.tiles))
            tiles += one.sample.tile_range
            for count, grid in zip(one.sample.tiles, one.grids, strict=True):
                grids += [grid] * count
    images = encoded if tiles == [*range(len(encoded))] else encoded.select(tiles)
    projected = model.get_image_features(num_image_tokens=grids, encoded_images=images)
    places = [ranges[one.sample.index, one.grids] for one in questions]
    return ProjectedImages(projected.pooler_output, places)
