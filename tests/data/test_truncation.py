"""Truncation: what is left is a beginning that fits, with whole images, and ends in an answer."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models.tiny import picture
from tokenflex import TokenCounts
from tokenflex.data.packing import DrawnSample, PackingCollator
from tokenflex.data.samples import Conversation, Sample, Turn
from tokenflex.data.sequences import IGNORE, TokenSequence, truncate
from tokenflex.data.steps import StepPacker
from tokenflex.digits.processor import digits_processor

IMAGE = 3


@st.composite
def conversations(draw):
    """(ids, labels, image lengths): "q" is asked, "a" learned, "i" an image."""
    kinds = draw(st.text("qqaai", min_size=1, max_size=30))
    images = kinds.count("i")
    lengths = draw(st.lists(st.integers(1, 12), min_size=images, max_size=images))
    ids = np.array([IMAGE if kind == "i" else 10 + i for i, kind in enumerate(kinds)])
    labels = np.array([int(ids[i]) if k == "a" else IGNORE for i, k in enumerate(kinds)])
    return ids, labels, lengths


def rows(ids: np.ndarray, lengths: list[int]) -> int:
    images = int((ids == IMAGE).sum())
    return len(ids) - images + sum(lengths[:images])


@given(conversations(), st.integers(1, 80))
@settings(deadline=None, max_examples=300)
def test_the_longest_beginning_with_whole_images_that_ends_in_an_answer(conversation, max_length):
    ids, labels, lengths = conversation
    whole = TokenSequence(ids, labels, slice(0, len(lengths)))
    if rows(ids, lengths) <= max_length:
        assert truncate(whole, lengths, IMAGE, max_length) is whole
        return
    # By hand: every beginning that ends with a learned token and fits; the last is wanted.
    fitting = [
        end
        for end in range(2, len(ids) + 1)
        if labels[end - 1] != IGNORE and rows(ids[:end], lengths) <= max_length
    ]
    if not fitting:
        with pytest.raises(ValueError, match=f"max_length of {max_length} leaves nothing"):
            truncate(whole, lengths, IMAGE, max_length)
        return
    kept = truncate(whole, lengths, IMAGE, max_length)
    assert np.array_equal(kept.ids, ids[: fitting[-1]])
    assert np.array_equal(kept.labels, labels[: fitting[-1]])
    assert kept.images == slice(0, int((kept.ids == IMAGE).sum()))


def test_a_sample_without_tokens_is_left_out_before_bins_are_dealt():
    """Its images stand in no turn: dealt as a sample, it would change the bins of the others."""
    silent = Sample("silent", (picture(1), picture(2)), (Conversation((Turn("user", "odd"),)),))
    collator = PackingCollator(digits_processor(), TokenCounts((4,), (1.0,)), max_length=40)
    step = StepPacker([silent, two_questions()], collator)([(0, 0), (0, 1)])
    assert [sample.index for sample in step.broken] == [0]
    assert "without tokens cannot show 2 images" in step.broken[0].reason
    assert step.samples == 1
    assert [batch.sample_ids for batch in step.bins] == [["two"]]


# ---- in the collator: "<image> odd" -> "3 <eos>", twice


def two_questions(name: str = "two") -> Sample:
    turns = (
        Turn("user", "<image> odd"),
        Turn("assistant", "3"),
        Turn("user", "<image> count"),
        Turn("assistant", "5 7"),
    )
    return Sample(name, (picture(1), picture(2)), (Conversation(turns),))


def collated(sample: Sample, count: int, max_length: int | None):
    collator = PackingCollator(
        digits_processor(), TokenCounts((count,), (1.0,)), max_length=max_length
    )
    return collator([DrawnSample(0, 0, sample)])


def words(batch) -> list[str]:
    return digits_processor().tokenizer.convert_ids_to_tokens(batch.targets.tolist())


@pytest.mark.parametrize(
    ("max_length", "answers", "images"),
    [
        (None, ["3", "<eos>", "5", "7", "<eos>"], 2),
        (15, ["3", "<eos>", "5", "7", "<eos>"], 2),  # 2 * (4 + 1) of images and questions + 5
        (14, ["3", "<eos>", "5", "7"], 2),
        (13, ["3", "<eos>", "5"], 2),
        (12, ["3", "<eos>"], 1),  # the second question alone teaches nothing: no tile for it
        (10, ["3", "<eos>"], 1),  # the second image would be cut in half
        (7, ["3", "<eos>"], 1),
        (6, ["3"], 1),
    ],
)
def test_images_that_do_not_fit_are_not_encoded(max_length, answers, images):
    batch = collated(two_questions(), 4, max_length)
    assert words(batch) == answers
    assert batch.num_image_tokens == [4] * images
    assert len(batch.pixel_values) == images
    assert len(batch.plan.vision_rows) == 4 * images
    if max_length is not None:
        assert batch.plan.num_tokens <= max_length


def test_what_is_cut_leaves_the_rest_as_it_was():
    whole, cut = collated(two_questions(), 4, None), collated(two_questions(), 4, 10)
    assert np.array_equal(cut.pixel_values, whole.pixel_values[:1])
    assert np.array_equal(cut.plan.input_ids, whole.plan.input_ids[: cut.plan.num_tokens])
    assert np.array_equal(cut.plan.labels, whole.plan.labels[: cut.plan.num_tokens])


def test_the_cut_follows_the_count_that_was_drawn():
    assert words(collated(two_questions(), 4, 15)) == ["3", "<eos>", "5", "7", "<eos>"]
    assert words(collated(two_questions(), 9, 15)) == ["3", "<eos>"]
    with pytest.raises(ValueError, match=r"sample two: max_length of 15 leaves nothing.*39 rows"):
        collated(two_questions(), 16, 15)


def test_an_image_that_another_conversation_still_shows_is_encoded_once():
    """One conversation is cut before the second image, the other is not."""
    first = two_questions().conversations[0]
    second = Conversation((Turn("user", "<image> <image> odd"), Turn("assistant", "3")))
    sample = Sample("both", (picture(1), picture(2)), (first, second))
    batch = collated(sample, 4, 11)
    assert batch.num_image_tokens == [4, 4]
    assert batch.plan.image_index == (0, 0, 1)
    assert [targets for _, targets in batch.answers] == [2, 2]


class CutAtNine:
    """Whole at 4 tokens a tile. At 9, one conversation loses an image that the other shows, and the
    last sample has nothing left.
    """

    def outline(self, index: int) -> Sample:
        return self[index].outline()

    def __getitem__(self, index: int) -> Sample:
        images = 3 if index == 20 else 2
        turns = (Turn("user", "<image> " * images + "odd"), Turn("assistant", "3"))
        talks = [Conversation(turns)]
        if index < 20:
            talks += two_questions().conversations
        return Sample(f"s{index}", tuple(picture(i) for i in range(images)), tuple(talks))


def test_a_step_is_planned_as_it_is_packed_and_names_what_is_left_out():
    counts = TokenCounts((4, 9), (0.5, 0.5), seed=1)
    keys = [(0, index) for index in range(21)]
    assert counts.draw(20, 0) == 9  # else choose another seed
    assert {counts.draw(index, 0) for index in range(20)} == {4, 9}
    collator = PackingCollator(digits_processor(), counts, max_length=20)
    step = StepPacker(CutAtNine(), collator)(keys)
    (batch,) = step.bins
    assert step.tokens == batch.plan.num_tokens
    assert step.tiles == len(batch.num_image_tokens) == 40
    assert step.vision_tokens == sum(batch.num_image_tokens)
    assert len(batch.plan.vision_rows) < 2 * step.vision_tokens  # some show one image of two
    (broken,) = step.broken
    assert broken.index == 20
    assert broken.reason.startswith("sample s20: max_length of 20 leaves nothing to learn")
