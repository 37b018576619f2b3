"""Prefixes that a sample's conversations share, written out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from tokenflex.data.sequences import TokenSequence, common_length, prefix_and_branches

IMAGE = 3


def encoded(ids: str, learned: str = "") -> TokenSequence:
    """Letters as ids, "I" an image; under each learned one stands a "^"."""
    tokens = np.array([IMAGE if one == "I" else ord(one) for one in ids], np.int64)
    is_learned = np.array([one == "^" for one in learned.ljust(len(ids))], bool)
    labels = np.where(is_learned, tokens, -100)
    return TokenSequence(tokens, labels, slice(0, ids.count("I")))


@pytest.mark.parametrize(
    ("conversations", "length"),
    [
        ([("sIabX", "    ^"), ("sIcdX", "    ^")], 2),
        ([("sIabX", "    ^"), ("sIadX", "    ^"), ("sIaaaaX", "      ^")], 3),
        # The same question twice: each keeps the row that its own answer follows.
        ([("sIabX", "    ^"), ("sIabY", "    ^")], 3),
        ([("sIabX", "    ^"), ("sIabX", "    ^")], 3),
        # The answer right after the image: its row stays with each.
        ([("sIX", "  ^"), ("sIY", "  ^")], 1),
        # What is learned in either is not shared, however much they have in common.
        ([("sIabX", "  ^ ^"), ("sIabY", "    ^")], 1),
        ([("sIaXbY", "   ^ ^"), ("sIaXcZ", "   ^ ^")], 2),
        ([("sIaXbY", "   ^ ^"), ("sIaXcZ", "     ^")], 2),
        # Nothing learned at all: one row of its own is left.
        ([("sIab", ""), ("sI", "")], 1),
        # Nothing in common, nothing before the first learned token, one conversation, none.
        ([("aIX", "  ^"), ("bIX", "  ^")], 0),
        ([("IX", " ^"), ("IY", " ^")], 0),
        ([("X", "^"), ("X", "^")], 0),
        ([("", ""), ("ab", "")], 0),
        ([("sIabX", "    ^")], 0),
        ([], 0),
    ],
)
def test_common_length(conversations, length):
    assert common_length([encoded(*one) for one in conversations]) == length
    assert common_length([encoded(*one) for one in conversations[::-1]]) == length


def parts(sequences, images: list[str]) -> list[tuple[str, list[str], bool]]:
    return [
        (
            "".join("I" if i == IMAGE else chr(i) for i in one.ids.tolist()),
            images[one.images],
            one.is_branch,
        )
        for one in sequences
    ]


def test_images_stand_where_their_placeholders_do():
    talks = [encoded("sIaIbX", "     ^"), encoded("sIaIcY", "     ^")]
    assert parts(prefix_and_branches(talks, IMAGE), ["first", "second"]) == [
        ("sIaI", ["first", "second"], False),
        ("bX", [], True),
        ("cY", [], True),
    ]


def test_images_after_what_is_common_are_repeated():
    talks = [encoded("sIaIX", "    ^"), encoded("sIbIIY", "     ^")]
    assert parts(prefix_and_branches(talks, IMAGE), ["first", "second", "third"]) == [
        ("sI", ["first"], False),
        ("aIX", ["second"], True),
        ("bIIY", ["second", "third"], True),
    ]


@pytest.mark.parametrize("num_talks", [1, 2])
def test_conversations_with_nothing_in_common_stay_whole(num_talks):
    talks = [encoded("aIX", "  ^"), encoded("bIY", "  ^")][:num_talks]
    sequences = prefix_and_branches(talks, IMAGE)
    expected = [("aIX", ["first"], False), ("bIY", ["first"], False)]
    assert parts(sequences, ["first"]) == expected[:num_talks]


def test_labels_go_with_their_tokens():
    talks = [encoded("sIabX", "    ^"), encoded("sIcYd", "   ^ ")]
    prefix, first, second = prefix_and_branches(talks, IMAGE)
    assert prefix.labels.tolist() == [-100, -100]
    assert first.labels.tolist() == [-100, -100, ord("X")]
    assert second.labels.tolist() == [-100, ord("Y"), -100]


def test_rows_count_the_tokens_of_the_images_that_stand_in_a_sequence():
    talks = [encoded("sIaIX", "    ^"), encoded("sIbIY", "    ^")]
    prefix, first, second = prefix_and_branches(talks, IMAGE)
    assert [one.num_tokens([9, 16]) for one in (prefix, first, second)] == [1 + 9, 2 + 16, 2 + 16]


def test_a_conversation_that_was_cut_off_shows_the_images_it_has_left():
    talks = [encoded("sIaIX", "    ^"), encoded("sIbY", "   ^")]
    assert parts(prefix_and_branches(talks, IMAGE), ["first", "second"]) == [
        ("sI", ["first"], False),
        ("aIX", ["second"], True),
        ("bY", [], True),
    ]
