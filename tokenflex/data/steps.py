"""One optimiser step: counts drawn, samples dealt into bins of equal cost, this rank's bins packed.

Every rank deals the whole step from the samples' outlines (texts and image sizes), which costs no
pixels, and so arrives at the same bins without a word to the others; it then reads the images of
its own bins only. A step is a pure function of its keys.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from tokenflex.counts import TokenCount, TokenCounts, tokens_of
from tokenflex.data.balance import deal
from tokenflex.data.encoding import IGNORE
from tokenflex.data.faults import NO_SAMPLE_TO_BLAME, BrokenSample, leaving_out
from tokenflex.data.packing import DrawnSample, FittedSample, PackedBatch, PackingCollator
from tokenflex.data.samples import Sample, SampleDataset, SampleOutline
from tokenflex_kernels.reference.packing import MAX_INT32

Key = tuple[int, int]  # (epoch, sample index)

Draw: TypeAlias = Literal["sample", "step", "all"]
"""A count for each sample; one for all samples of a step; or every sample at all counts."""


@dataclass(frozen=True)
class PackedStep:
    """What one rank works on in one step.

    Attributes:
        bins: forward passes, as many on every rank; gradients add up over them. A sample that is
            shown at several counts is encoded, and counted below, once for each.
        samples, tokens, tiles, vision_tokens, targets: of all ranks, as planned. Vision tokens are
            counted once per tile, tokens as packed: once, or once per conversation that shows it;
            targets are the answer tokens.
        counts: vision-token count -> samples with images that drew it, over all ranks.
        rank_tokens: rows that this rank's samples were planned to take, those it could read.
        cost_balance: the costliest bin of all ranks over their mean, 1 where all are equal.
        broken: samples that this rank left out.
        teacher_tokens, teacher_vision_tokens: of all ranks, as planned, in the passes of a teacher;
            0 where there is none.
    """

    bins: list[PackedBatch]
    samples: int
    tokens: int
    tiles: int
    vision_tokens: int
    targets: int
    counts: dict[int, int]
    rank_tokens: int
    cost_balance: float
    broken: list[BrokenSample]
    teacher_tokens: int = 0
    teacher_vision_tokens: int = 0

    @property
    def rows(self) -> int:
        """Rows that this rank's forward passes compute, padding and stand-ins included."""
        return sum(batch.plan.num_tokens for batch in self.bins)


@dataclass(frozen=True)
class _Planned:
    """A sample of the step at one count, before its images are read."""

    key: Key
    drawn: TokenCount
    fitted: FittedSample
    count: int  # vision tokens of a tile
    tokens: int
    tiles: int
    targets: int
    teacher_tokens: int
    teacher_vision_tokens: int


class StepPacker:
    """Turns a step's keys into this rank's bins. Runs in data-loader workers.

    Args:
        dataset: where samples come from.
        collator: knows the counts and their odds, encodes texts, packs.
        draw: whether a count is drawn for each sample, as in the paper, or once for the step, or
            every sample is shown at all of them.
        max_tokens: rows of a bin at most, text and vision; None for no bound.
        max_tiles: encoder inputs of a bin at most; None for no bound.
        tile_cost: what encoding a tile costs, in rows of the language model.
        rank: this process.
        num_ranks: how many processes.
    """

    def __init__(
        self,
        dataset: SampleDataset,
        collator: PackingCollator,
        *,
        draw: Draw = "sample",
        max_tokens: int | None = None,
        max_tiles: int | None = None,
        tile_cost: float = 0.0,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        self.dataset = dataset
        self.collator = collator
        self.draw = draw
        self.max_tokens = MAX_INT32 if max_tokens is None else max_tokens
        self.max_tiles = MAX_INT32 if max_tiles is None else max_tiles
        self.tile_cost = tile_cost
        self.rank = rank
        self.num_ranks = num_ranks

    def __call__(self, keys: Sequence[Key]) -> PackedStep:
        """Plan, read and pack one step; samples that cannot be read are left out and named.

        Whatever a sample raises, at whichever stage, it is left out, except for errors that another
        sample would meet as well (:data:`tokenflex.data.faults.NO_SAMPLE_TO_BLAME`).

        Raises:
            ValueError: no sample of the step is left, the message says what is wrong with one.
        """
        broken: list[BrokenSample] = []
        planned: list[_Planned] = []
        for key, drawn in views_of(keys, self.collator.counts, self.draw):
            with leaving_out(self.dataset, key[1], broken):
                planned.append(self._plan(key, drawn))
        dealt = deal(
            [one.tokens for one in planned],
            [one.tiles for one in planned],
            max_tokens=self.max_tokens,
            max_tiles=self.max_tiles,
            tile_cost=self.tile_cost,
            num_ranks=self.num_ranks,
        )
        costs = [sum(self._cost(planned[i]) for i in members) for members in dealt]
        places = [*_places_of(self.rank, len(dealt), self.num_ranks)]
        packed: list[PackedBatch] = []
        read: set[tuple[int, int, TokenCount | None]] = set()
        for place in places:
            batch, members = self._packed([planned[i] for i in dealt[place]], broken)
            packed += [] if batch is None else [batch]
            read |= {(one.epoch, one.index, one.count) for one in members}
        # A rank whose samples are fewer or broken still takes part in every exchange of gradients.
        missing = len(places) - len(packed)
        stand_in = packed[0] if packed else self._any_batch(planned)
        if stand_in is None:
            reason = broken[0].reason if broken else "there are none"
            raise ValueError(f"none of the {len(keys)} samples of a step can be read: {reason}")
        packed += [_without_targets(stand_in)] * missing
        return PackedStep(
            bins=packed,
            samples=len(planned),
            tokens=sum(one.tokens for one in planned),
            tiles=sum(one.tiles for one in planned),
            vision_tokens=sum(one.tiles * one.count for one in planned),
            targets=sum(one.targets for one in planned),
            counts=dict(sorted(Counter(one.count for one in planned if one.tiles).items())),
            rank_tokens=sum(one.tokens for one in planned if (*one.key, one.drawn) in read),
            cost_balance=max(costs) * len(costs) / sum(costs),
            broken=broken,
            teacher_tokens=sum(one.teacher_tokens for one in planned),
            teacher_vision_tokens=sum(one.teacher_vision_tokens for one in planned),
        )

    def _plan(self, key: Key, drawn: TokenCount) -> _Planned:
        outline = outline_of(self.dataset, key[1])
        fitted, count = self.collator.fit(outline, drawn), tokens_of(drawn)
        tiles = sum(fitted.tiles)
        image_counts = [count * one for one in fitted.tiles]
        tokens = sum(one.num_tokens(image_counts) for one in fitted.sequences)
        teacher_tokens = teacher_count = 0
        if self.collator.teacher_count is not None:
            teacher_count = tokens_of(self.collator.teacher_count)
            seen = [teacher_count * one for one in fitted.tiles]
            teacher_tokens = sum(one.num_tokens(seen) for one in fitted.sequences)
        targets = sum(int((one.labels != IGNORE).sum()) for one in fitted.sequences)
        for name, size, bound in (
            ("max_tokens", tokens, self.max_tokens),
            ("max_tiles", tiles, self.max_tiles),
        ):
            if size > bound:
                raise ValueError(f"sample {outline.id} has {size}, more than {name} of {bound}")
        seen_by_teacher = teacher_tokens, teacher_count * tiles
        return _Planned(key, drawn, fitted, count, tokens, tiles, targets, *seen_by_teacher)

    def _packed(
        self, planned: Sequence[_Planned], broken: list[BrokenSample]
    ) -> tuple[PackedBatch | None, list[DrawnSample]]:
        """A bin, and the samples in it; None where none of them can be read."""
        members = []
        for one in planned:
            epoch, index = one.key
            with leaving_out(self.dataset, index, broken):
                sample = self.dataset[index]
                members.append(DrawnSample(index, epoch, sample, one.drawn, one.fitted))
        if not members:
            return None, []
        try:
            return self.collator(members), members
        except NO_SAMPLE_TO_BLAME:
            raise
        except Exception:
            packable = [member for member in members if self._is_packable(member, broken)]
            if len(packable) == len(members):  # none of them is to blame
                raise
            return (self.collator(packable) if packable else None), packable

    def _is_packable(self, member: DrawnSample, broken: list[BrokenSample]) -> bool:
        before = len(broken)
        with leaving_out(self.dataset, member.index, broken):
            self.collator([member])
        return len(broken) == before

    def _any_batch(self, planned: list[_Planned]) -> PackedBatch | None:
        """A batch of the first sample of the step that can be read, whoever's it is."""
        for one in planned:
            batch, _ = self._packed([one], [])
            if batch is not None:
                return batch
        return None

    def _cost(self, one: _Planned) -> float:
        return one.tokens + self.tile_cost * one.tiles


def views_of(keys: Sequence[Key], counts: TokenCounts, draw: Draw) -> list[tuple[Key, TokenCount]]:
    """Each sample of a step with a count to show it at: a pure function of the keys."""
    if draw == "all":
        return [(key, count) for key in keys for count in counts.counts]
    # What a whole step draws is what its first sample draws.
    drawn_from = [keys[0]] * len(keys) if draw == "step" else keys
    return [
        (key, counts.draw(index, epoch))
        for key, (epoch, index) in zip(keys, drawn_from, strict=True)
    ]


def outline_of(dataset: SampleDataset, index: int) -> SampleOutline:
    """The data set's own outline of a sample, or that of the sample read whole."""
    if hasattr(dataset, "outline"):
        return dataset.outline(index)
    sample: Sample = dataset[index]
    sizes = tuple((image.height, image.width) for image in sample.images)
    return SampleOutline(sample.id, sizes, sample.conversations)


def _places_of(rank: int, num_bins: int, num_ranks: int) -> Iterator[int]:
    """The bins of a rank. They come by falling cost: dealt to and fro, so that no rank leads."""
    for turn in range(num_bins // num_ranks):
        yield turn * num_ranks + (num_ranks - 1 - rank if turn % 2 else rank)


def _without_targets(batch: PackedBatch) -> PackedBatch:
    """The same forward pass with nothing to learn."""
    none = batch.targets[:0]
    teacher = batch.teacher
    if teacher is not None:
        row = replace(teacher.row, target_rows=none, targets=none, targets_per_conversation=[])
        teacher = replace(teacher, row=row)
    return replace(
        batch, target_rows=none, targets=none, answers=[], sample_ids=[], teacher=teacher
    )
