"""Packing a step: every sample once, bins within bounds and of equal cost, broken samples named."""

from __future__ import annotations

import numpy as np
import pytest

from tests.models.tiny import picture
from tokenflex import TokenCounts
from tokenflex.data.packing import PackingCollator
from tokenflex.data.samples import (
    Conversation,
    DataExhaustedError,
    Sample,
    StreamError,
    Turn,
)
from tokenflex.data.steps import BrokenSample, PackedStep, StepPacker
from tokenflex.digits.processor import digits_processor

COUNTS = TokenCounts((4, 9, 16), (0.2, 0.3, 0.5), seed=7)
KEYS = [(1, index) for index in range(96)]


class MixedSizes:
    """One to four pictures a sample, answers of one to eight words; some cannot be read."""

    def __init__(
        self, *, no_outline: tuple[int, ...] = (), no_pixels: tuple[int, ...] = ()
    ) -> None:
        self.no_outline = no_outline
        self.no_pixels = no_pixels
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(KEYS)

    def _images(self, index: int) -> int:
        return 1 + index % 4

    def outline(self, index: int) -> Sample:
        if index in self.no_outline:
            raise FileNotFoundError(f"{index}.png does not exist")
        answer = " ".join(["3"] * (1 + index * 7 % 8))
        talk = Conversation((Turn("user", "odd"), Turn("assistant", answer)))
        return Sample(f"sample-{index}", ((32, 32),) * self._images(index), (talk,))

    def __getitem__(self, index: int) -> Sample:
        outline = self.outline(index)
        if index in self.no_pixels:
            raise ValueError(f"{index}.png is cut off")
        self.read.append(index)
        images = tuple(picture(index + i) for i in range(self._images(index)))
        return Sample(outline.id, images, outline.conversations)


@pytest.fixture(scope="module")
def collator() -> PackingCollator:
    return PackingCollator(digits_processor(), COUNTS)


def ids(step: PackedStep) -> list[int]:
    return [int(name.removeprefix("sample-")) for one in step.bins for name in one.sample_ids]


def packed(collator, dataset=None, keys=KEYS, **options) -> PackedStep:
    return StepPacker(dataset or MixedSizes(), collator, **options)(keys)


def test_without_bounds_a_step_is_one_forward_pass(collator):
    step = packed(collator)
    assert len(step.bins) == 1
    assert sorted(ids(step)) == list(range(96))
    assert step.cost_balance == 1
    assert step.broken == []


def test_facts_are_those_of_the_packed_rows(collator):
    step = packed(collator)
    (batch,) = step.bins
    assert step.tokens == batch.plan.num_tokens
    assert step.tiles == len(batch.num_image_tokens)
    assert step.vision_tokens == sum(batch.num_image_tokens)


def test_grids_cost_the_tokens_they_stand_for():
    processor = digits_processor()
    squares = PackingCollator(processor, TokenCounts((4, 16), (1, 1), seed=7))
    grids = PackingCollator(processor, TokenCounts(((1, 4), (8, 2)), (1, 1), seed=7))
    bounds = {"max_tokens": 400, "tile_cost": 20.0}
    expected, step = packed(squares, **bounds), packed(grids, **bounds)
    assert (step.tokens, step.vision_tokens) == (expected.tokens, expected.vision_tokens)
    assert ids(step) == ids(expected)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_ranks_share_a_step_completely_and_within_bounds(collator, num_ranks):
    bounds = {"max_tokens": 400, "max_tiles": 30, "tile_cost": 20.0}
    steps = [packed(collator, num_ranks=num_ranks, rank=r, **bounds) for r in range(num_ranks)]
    assert sorted(index for step in steps for index in ids(step)) == list(range(96))
    assert len({len(step.bins) for step in steps}) == 1
    assert len({(step.tokens, step.tiles, step.cost_balance) for step in steps}) == 1
    for batch in (batch for step in steps for batch in step.bins):
        assert batch.plan.num_tokens <= 400
        assert len(batch.num_image_tokens) <= 30


@pytest.mark.parametrize("tile_cost", [0.0, 20.0, 200.0])
def test_ranks_get_the_same_cost(collator, tile_cost):
    """At most 3 % above the mean, in bins and over the ranks' sums; tokens alone are far off."""
    steps = [packed(collator, tile_cost=tile_cost, num_ranks=4, rank=r) for r in range(4)]
    costs = [
        [b.plan.num_tokens + tile_cost * len(b.num_image_tokens) for b in step.bins]
        for step in steps
    ]
    bins = np.concatenate(costs)
    assert bins.max() / bins.mean() == pytest.approx(steps[0].cost_balance)
    assert steps[0].cost_balance <= 1.03
    sums = np.array([sum(one) for one in costs])
    assert sums.max() / sums.mean() <= 1.03


def test_no_rank_reads_the_images_of_another(collator):
    datasets = [MixedSizes() for _ in range(2)]
    for rank, dataset in enumerate(datasets):
        packed(collator, dataset, rank=rank, num_ranks=2)
    assert sorted(datasets[0].read + datasets[1].read) == list(range(96))


def test_no_rank_always_has_the_costliest_bin(collator):
    options = {"max_tokens": 200, "num_ranks": 2, "tile_cost": 20.0}
    first, second = (packed(collator, rank=rank, **options) for rank in range(2))
    assert len(first.bins) > 2
    costs = [
        [b.plan.num_tokens + 20.0 * len(b.num_image_tokens) for b in step.bins]
        for step in (first, second)
    ]
    leads = {np.sign(a - b) for a, b in zip(*costs, strict=True)} - {0.0}
    assert leads == {-1.0, 1.0}


class ManyQuestions(MixedSizes):
    """Up to eight questions about the pictures of a sample."""

    def outline(self, index: int) -> Sample:
        outline = super().outline(index)
        talks = tuple(
            Conversation((Turn("user", f"read r{1 + i // 4}c{1 + i % 4}"), Turn("assistant", "3")))
            for i in range(1 + index % 8)
        )
        return Sample(outline.id, outline.images, talks)


@pytest.mark.parametrize("share_prefix", [False, True])
def test_rows_are_planned_as_they_are_packed(share_prefix):
    """Shared rows once: in the step's facts, its bounds and its balance."""
    collator = PackingCollator(digits_processor(), COUNTS, share_prefix=share_prefix)
    step = packed(collator, ManyQuestions(), max_tokens=600, tile_cost=20.0)
    assert sorted(ids(step)) == list(range(96))
    rows = [batch.plan.num_tokens for batch in step.bins]
    assert sum(rows) == step.tokens
    assert max(rows) <= 600
    costs = [b.plan.num_tokens + 20.0 * len(b.num_image_tokens) for b in step.bins]
    assert max(costs) / (sum(costs) / len(costs)) == pytest.approx(step.cost_balance)
    assert step.vision_tokens == sum(sum(batch.num_image_tokens) for batch in step.bins)


def test_a_sample_that_fits_only_shared_is_kept():
    keys = [(1, 7)]  # four pictures under eight questions
    shared = PackingCollator(digits_processor(), TokenCounts((16,), (1,)), share_prefix=True)
    repeated = PackingCollator(digits_processor(), TokenCounts((16,), (1,)))
    step = packed(shared, ManyQuestions(), keys=keys, max_tokens=100)
    assert step.tokens == 4 * 16 + 1 + 8 * 3  # "read" is the same in all of them
    with pytest.raises(ValueError, match="has 544, more than max_tokens of 100"):
        packed(repeated, ManyQuestions(), keys=keys, max_tokens=100)


def test_broken_samples_are_left_out_and_named(collator):
    dataset = MixedSizes(no_outline=(3,), no_pixels=(5, 40))
    step = packed(collator, dataset)
    assert sorted(ids(step)) == [i for i in range(96) if i not in (3, 5, 40)]
    assert sorted(step.broken, key=lambda one: one.index) == [
        BrokenSample(3, "3.png does not exist"),
        BrokenSample(5, "5.png is cut off"),
        BrokenSample(40, "40.png is cut off"),
    ]


class Raising(MixedSizes):
    """Sample 3 raises ``error`` when its ``stage`` is reached."""

    def __init__(self, error: BaseException, stage: str) -> None:
        super().__init__()
        self.error, self.stage = error, stage

    def outline(self, index: int) -> Sample:
        if (self.stage, index) == ("outline", 3):
            raise self.error
        return super().outline(index)

    def __getitem__(self, index: int) -> Sample:
        if (self.stage, index) == ("pixels", 3):
            raise self.error
        return super().__getitem__(index)


@pytest.mark.parametrize("stage", ["outline", "pixels"])
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (TypeError("argument of another type"), "TypeError: argument of another type"),
        (RecursionError("maximum depth"), "RecursionError: maximum depth"),
        (KeyError("role"), "KeyError: 'role'"),
        (ValueError(), "ValueError: "),
        (OverflowError("too large"), "OverflowError: too large"),
        (ValueError("two\nlines \ud83d"), "two lines \\ud83d"),
        (OSError(5, "disk"), "[Errno 5] disk"),
    ],
    ids=repr,
)
def test_whatever_a_sample_raises_it_is_left_out_with_the_reason(collator, stage, error, reason):
    step = packed(collator, Raising(error, stage), keys=KEYS[:8])
    assert step.broken == [BrokenSample(3, reason.strip())]
    assert sorted(ids(step)) == [0, 1, 2, 4, 5, 6, 7]


@pytest.mark.parametrize("stage", ["outline", "pixels"])
@pytest.mark.parametrize(
    "error",
    [
        StreamError("broke off"),
        DataExhaustedError("no more"),
        MemoryError(),
        KeyboardInterrupt(),
        SystemExit(),
    ],
    ids=repr,
)
def test_what_another_sample_would_meet_as_well_is_no_broken_sample(collator, stage, error):
    with pytest.raises(type(error)) as raised:
        packed(collator, Raising(error, stage), keys=KEYS[:8])
    assert raised.value is error


def test_a_reason_is_short(collator):
    step = packed(collator, Raising(ValueError("x" * 10_000), "outline"), keys=KEYS[:8])
    assert len(step.broken[0].reason) <= 500


def test_a_picture_that_cannot_be_processed_is_found_among_those_of_its_bin(collator, monkeypatch):
    process = collator.processor.process_images

    def failing(images, **options):
        if any(image.tobytes() == picture(3).tobytes() for image in images):
            raise RuntimeError("no such picture")
        return process(images, **options)

    monkeypatch.setattr(collator.processor, "process_images", failing)
    step = packed(collator, keys=KEYS[:8])
    reason = "RuntimeError: no such picture"  # it is the first of sample 3, the second of sample 2
    broken = sorted(step.broken, key=lambda one: one.index)
    assert broken == [BrokenSample(2, reason), BrokenSample(3, reason)]
    assert sorted(ids(step)) == [0, 1, 4, 5, 6, 7]


def test_an_error_that_no_sample_has_alone_is_not_hidden(collator, monkeypatch):
    process = collator.processor.process_images

    def failing(images, **options):
        if len(images) > 10:
            raise RuntimeError("a fault of ours")
        return process(images, **options)

    monkeypatch.setattr(collator.processor, "process_images", failing)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        packed(collator, keys=KEYS[:12])


@pytest.mark.parametrize("token", ["<image>", "<IMG_CONTEXT>", "<|picture|>"])
@pytest.mark.parametrize("turn", [0, 1])
@pytest.mark.parametrize("images", [0, 1])
def test_a_processors_placeholder_in_a_text_is_a_broken_sample(token, turn, images):
    """Each would be a row for which there is no vision token."""
    processor = digits_processor()
    processor.tokenizer.add_special_tokens({"additional_special_tokens": [token]})
    processor.image_token = token
    processor.image_token_id = processor.tokenizer.convert_tokens_to_ids(token)
    own = PackingCollator(processor, COUNTS)

    class Texts(MixedSizes):
        def outline(self, index: int) -> Sample:
            texts = ["odd", "3"]
            if index == 3:
                texts[turn] += f" {token}" * 2
            talk = Conversation((Turn("user", texts[0]), Turn("assistant", texts[1])))
            return Sample(f"sample-{index}", ((32, 32),) * self._images(index), (talk,))

        def _images(self, index: int) -> int:
            return images

    step = packed(own, Texts(), keys=KEYS[:8])
    assert [one.index for one in step.broken] == [3]
    assert "placeholder" in step.broken[0].reason
    assert sorted(ids(step)) == [0, 1, 2, 4, 5, 6, 7]


def test_a_sample_that_fits_no_bin_is_broken(collator):
    step = packed(collator, max_tiles=3)
    assert {one.index for one in step.broken} == set(range(3, 96, 4))
    assert step.broken[0].reason == "sample sample-3 has 4, more than max_tiles of 3"


def test_a_rank_without_a_sample_of_its_own_has_as_many_passes_as_the_others(collator):
    """It would otherwise miss the exchange of gradients, and the others wait for ever."""
    keys = KEYS[:3]
    steps = [packed(collator, keys=keys, num_ranks=4, rank=rank) for rank in range(4)]
    assert {len(step.bins) for step in steps} == {1}
    assert sorted(len(step.bins[0].targets) for step in steps)[0] == 0
    assert sorted(index for step in steps for index in ids(step)) == [0, 1, 2]


def test_a_step_of_broken_samples_is_an_error_that_names_one(collator):
    dataset = MixedSizes(no_pixels=(0, 1, 2))
    with pytest.raises(ValueError, match=r"none of the 3 samples of a step.*\d\.png is cut off"):
        packed(collator, dataset, keys=KEYS[:3])


def test_a_data_set_without_outlines_packs_the_same(collator):
    class Whole:
        def __getitem__(self, index: int) -> Sample:
            return MixedSizes()[index]

    options = {"max_tokens": 400, "tile_cost": 20.0}
    assert ids(packed(collator, Whole(), **options)) == ids(packed(collator, **options))


# ---- at which count a sample is shown


def shown_at(step: PackedStep) -> list[tuple[int, int]]:
    """(sample, count) of everything that one rank shows, from what it packed."""
    pairs = []
    for batch in step.bins:
        tiles = iter(batch.num_image_tokens)
        for name in batch.sample_ids:
            index = int(name.removeprefix("sample-"))
            (count,) = {next(tiles) for _ in range(1 + index % 4)}
            pairs.append((index, count))
    return sorted(pairs)


def test_a_count_for_each_sample_is_drawn_as_the_counts_draw_it(collator):
    assert shown_at(packed(collator)) == [(i, COUNTS.draw(i, 1)) for i in range(96)]


def test_one_count_for_a_step(collator):
    """It is a function of the step's keys, follows the odds over steps, and holds on every rank."""
    drawn = []
    for first in range(0, 96, 4):
        keys = KEYS[first : first + 4]
        shown = [
            pair
            for rank in range(2)
            for pair in shown_at(packed(collator, keys=keys, draw="step", num_ranks=2, rank=rank))
        ]
        assert sorted(index for index, _ in shown) == [index for _, index in keys]
        (count,) = {count for _, count in shown}
        drawn.append(count)
    assert drawn == [COUNTS.draw(first, 1) for first in range(0, 96, 4)]
    assert {*drawn} == {4, 9, 16}


def test_one_count_for_a_step_stays_when_its_first_sample_is_broken(collator):
    whole, broken = (
        packed(collator, MixedSizes(no_outline=missing), keys=KEYS[:8], draw="step")
        for missing in ((), (0,))
    )
    assert shown_at(broken) == shown_at(whole)[1:]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_every_sample_at_all_counts(collator, num_ranks):
    """Each view is a sample of its own: in facts, in bounds, among the ranks."""
    options = {"max_tokens": 300, "draw": "all", "num_ranks": num_ranks}
    steps = [packed(collator, keys=KEYS[:20], rank=r, **options) for r in range(num_ranks)]
    shown = sorted(pair for step in steps for pair in shown_at(step))
    assert shown == [(index, count) for index in range(20) for count in (4, 9, 16)]
    batches = [batch for step in steps for batch in step.bins]
    assert max(batch.plan.num_tokens for batch in batches) <= 300
    assert [step.rank_tokens for step in steps] == [step.rows for step in steps]
    assert steps[0].tiles == sum(len(batch.num_image_tokens) for batch in batches)
    assert steps[0].vision_tokens == sum(sum(batch.num_image_tokens) for batch in batches)
