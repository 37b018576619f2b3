"""One optimiser step: counts drawn, samples dealt into bins of equal cost, this rank's bins packed.

Every rank deals the whole step from the samples' outlines (texts and image sizes), which takes no
pixels. So all ranks arrive at the same bins without communication, and each reads the images of its
own bins only. A step is a pure function of its keys.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from operator import mul
from typing import Any, Literal, Protocol, TypeAlias

import torch

from tokenflex.counts import TokenCount, TokenCounts, tokens_of
from tokenflex.data.faults import NO_SAMPLE_TO_BLAME, BrokenSample, leaving_out
from tokenflex.data.packing import DrawnSample, PackingCollator
from tokenflex.data.rows import PackedRow
from tokenflex.data.samples import Sample, SampleDataset
from tokenflex_kernels import balance_bins

MAX_INT32 = 2**31 - 1

Key = tuple[int, int]  # (epoch, sample index)

Draw: TypeAlias = Literal["sample", "step", "all"]
"""A count for each sample; one for all samples of a step; or every sample at all counts."""


class Bin(Protocol):
    """One forward pass of a step, for a model of any kind.

    Attributes:
        targets: int64 [targets]; answer tokens.
        answers: for each conversation its ``kind`` and how many targets are its.
        sample_ids: for messages.
        teacher: the row of a teacher; None where there is no teacher.
        num_rows: rows of the language model that it computes, padding included.
    """

    @property
    def targets(self) -> torch.Tensor: ...
    @property
    def answers(self) -> list[tuple[str, int]]: ...
    @property
    def sample_ids(self) -> list[str]: ...
    @property
    def teacher(self) -> PackedRow | None: ...
    @property
    def num_rows(self) -> int: ...
    def to(self, device: torch.device | str) -> Bin:
        """Return the bin with its tensors on ``device``."""

    def model_inputs(self) -> dict[str, Any]:
        """Return keyword arguments of the model, without targets and their weights."""

    def without_targets(self) -> Bin:
        """Return the same forward pass with nothing to learn."""

    def with_every_gradient(self, model: Any, count: TokenCount) -> Bin:
        """Return a bin whose loss has a gradient, maybe zero, in all that images pass."""


@dataclass(frozen=True)
class PackedStep:
    """The work of one rank in one step.

    Attributes:
        bins: forward passes, as many on every rank; gradients add up over them. A sample that is
            shown at several counts is encoded, and counted below, once for each.
        samples, tokens, tiles, vision_tokens, targets: of all ranks, as planned. Vision tokens are
            counted once per tile, tokens as packed: once, or once per conversation that shows it;
            targets are the answer tokens.
        counts: vision-token count -> samples with images that drew it, over all ranks.
        rank_tokens: rows that this rank's samples were planned to take, those it could read.
        cost_balance: the costliest bin of all ranks over their mean, 1 where all are equal.
        broken: samples that this rank has left out.
        teacher_tokens, teacher_vision_tokens: of all ranks, as planned, in the passes of a teacher;
            0 where there is none.
    """

    bins: list[Bin]
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
        return sum(batch.num_rows for batch in self.bins)


class StepPacker:
    """Turns a step's keys into this rank's bins. Runs in data-loader workers.

    Args:
        dataset: the samples.
        collator: draws counts, encodes texts, packs.
        draw: "sample" draws a count for each sample, as in the paper; "step" draws one for the
            step; "all" shows every sample at all counts.
        max_tokens: rows of a bin at most, text and vision; None for no bound.
        max_tiles: encoder inputs of a bin at most; None for no bound.
        tile_cost: the cost of encoding a tile, in rows of the language model.
        rank: the index of this process.
        num_ranks: number of processes.
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
            ValueError: no sample of the step is left; the message says what is wrong with one.
        """
        broken: list[BrokenSample] = []
        planned: list[DrawnSample] = []
        for (epoch, index), count in views_of(keys, self.collator.counts, self.draw):
            with leaving_out(self.dataset, index, broken):
                outline = outline_of(self.dataset, index)
                planned.append(self._fit(DrawnSample(index, epoch, outline, count)))
        counts = [sample.tokens_per_tile for sample in planned]
        tokens = [sample.num_tokens for sample in planned]
        tiles = [sum(sample.tiles) for sample in planned]
        bins = balance_bins(
            tokens,
            tiles,
            max_tokens=self.max_tokens,
            max_tiles=self.max_tiles,
            tile_cost=self.tile_cost,
            multiple_of=self.num_ranks,
            exchange=True,
        )
        costs = [sum(tokens[i] + self.tile_cost * tiles[i] for i in members) for members in bins]
        packed: list[Bin] = []
        rank_tokens = 0
        rank_bins = [*_bins_of(self.rank, len(bins), self.num_ranks)]
        for number in rank_bins:
            # In the order of the step, whatever order they were dealt in.
            batch, members = self._pack([planned[i] for i in sorted(bins[number])], broken)
            packed += [] if batch is None else [batch]
            rank_tokens += sum(sample.num_tokens for sample in members)
        # A rank whose samples are fewer or broken still takes part in every exchange of gradients.
        missing = len(rank_bins) - len(packed)
        stand_in = packed[0] if packed else self._any_batch(planned)
        if stand_in is None:
            reason = broken[0].reason if broken else "there are none"
            raise ValueError(f"none of the {len(keys)} samples of a step can be read: {reason}")
        packed += [stand_in.without_targets()] * missing
        teacher = self.collator.teacher_count
        seen_by_teacher = 0 if teacher is None else tokens_of(teacher)
        return PackedStep(
            bins=packed,
            samples=len(planned),
            tokens=sum(tokens),
            tiles=sum(tiles),
            vision_tokens=sum(map(mul, tiles, counts)),
            targets=sum(sample.num_targets for sample in planned),
            counts=dict(sorted(Counter(compress(counts, tiles)).items())),
            rank_tokens=rank_tokens,
            cost_balance=max(costs) * len(costs) / sum(costs),
            broken=broken,
            teacher_tokens=sum(
                sample.num_tokens_at(seen_by_teacher) for sample in planned if teacher
            ),
            teacher_vision_tokens=sum(tiles) * seen_by_teacher,
        )

    def _fit(self, drawn: DrawnSample) -> DrawnSample:
        fitted = self.collator.fit(drawn)
        for name, size, bound in (
            ("max_tokens", fitted.num_tokens, self.max_tokens),
            ("max_tiles", sum(fitted.tiles), self.max_tiles),
        ):
            if size > bound:
                raise ValueError(
                    f"sample {drawn.sample.id} has {size}, more than {name} of {bound}"
                )
        return fitted

    def _pack(
        self, planned: Sequence[DrawnSample], broken: list[BrokenSample]
    ) -> tuple[Bin | None, list[DrawnSample]]:
        """Pack a bin: the batch and the samples in it, None where none of them can be read."""
        members = []
        for sample in planned:
            with leaving_out(self.dataset, sample.index, broken):
                members.append(replace(sample, sample=self.dataset[sample.index]))
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

    def _any_batch(self, planned: list[DrawnSample]) -> Bin | None:
        """Pack the first sample of the step that can be read, whichever rank it is of."""
        for sample in planned:
            batch, _ = self._pack([sample], [])
            if batch is not None:
                return batch
        return None


def views_of(keys: Sequence[Key], counts: TokenCounts, draw: Draw) -> list[tuple[Key, TokenCount]]:
    """Return each sample of a step with a count to show it at: a pure function of the keys."""
    if draw == "all":
        return [(key, count) for key in keys for count in counts.counts]
    # What a whole step draws is what its first sample draws.
    drawn_from = [keys[0]] * len(keys) if draw == "step" else keys
    return [
        (key, counts.draw(index, epoch))
        for key, (epoch, index) in zip(keys, drawn_from, strict=True)
    ]


def outline_of(dataset: SampleDataset, index: int) -> Sample:
    """Return the data set's own outline of a sample, or that of the sample read whole."""
    return dataset.outline(index) if hasattr(dataset, "outline") else dataset[index].outline()


def _bins_of(rank: int, num_bins: int, num_ranks: int) -> Iterator[int]:
    """Yield the bins of a rank.

    They come by falling cost and are dealt to and fro, so that no rank leads.
    """
    for turn in range(num_bins // num_ranks):
        yield turn * num_ranks + (num_ranks - 1 - rank if turn % 2 else rank)
