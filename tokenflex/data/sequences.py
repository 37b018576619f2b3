"""Token sequences of a sample's conversations: cut to a length, their common prefix packed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

IGNORE = -100
"""The label of a token that is not learned."""


@dataclass(frozen=True)
class TokenSequence:
    """A conversation, or a part of one that is packed as a sequence of its own.

    Attributes:
        ids, labels: int64 [length], with one placeholder an image; labels are aligned with the ids,
            and -100 where nothing is learned.
        images: which of the sample's images stand in it.
        is_branch: whether it goes on from the sample's first sequence, which is then their prefix.
    """

    ids: np.ndarray
    labels: np.ndarray
    images: slice
    is_branch: bool = False

    def num_tokens(self, tokens_per_image: Sequence[int]) -> int:
        """Return its rows once the sample's images have so many tokens each."""
        shown = tokens_per_image[self.images]
        return len(self.ids) - len(shown) + sum(shown)

    @cached_property
    def num_targets(self) -> int:
        """Tokens that are learned."""
        return int(np.count_nonzero(self.labels != IGNORE))

    @cached_property
    def first_target(self) -> int:
        """Index of the first token that is learned; the length if none is."""
        return _first(self.labels != IGNORE)


def truncate(
    conversation: TokenSequence,
    tokens_per_image: Sequence[int],
    image_token_id: int,
    max_length: int,
) -> TokenSequence:
    """Return the beginning of a conversation that fits, with whole images only.

    It ends before the first token or image that does not fit, and then after the last token that is
    still learned: a question whose answer is gone, and images that only such a question shows,
    would be rows and tiles that nothing is learned from.

    Args:
        conversation: with the sample's first images.
        tokens_per_image: rows that each image takes, all its tiles together.
        image_token_id: the placeholder.
        max_length: rows at most, text and vision.

    Raises:
        ValueError: nothing that is learned would be left.
    """
    ids, labels = conversation.ids, conversation.labels
    num_tokens = conversation.num_tokens(tokens_per_image)
    if not ids.size and len(tokens_per_image) > 1:
        # Left out when a step is planned; dealt, it would empty a bin when the bin is packed.
        raise ValueError(
            f"a conversation without tokens cannot show {len(tokens_per_image)} images"
        )
    if not ids.size or num_tokens <= max_length:
        return conversation
    is_image = ids == image_token_id
    rows = np.ones_like(ids)
    rows[is_image] = tokens_per_image
    ends = rows.cumsum()  # rows up to and with each token
    learned = np.flatnonzero((labels != IGNORE) & ~is_image & (ends <= max_length))
    # The very first row has none before it to be predicted from.
    if not learned.size or learned[-1] == 0:
        raise ValueError(
            f"max_length of {max_length} leaves nothing to learn of its {num_tokens} rows"
        )
    end = int(learned[-1]) + 1
    return TokenSequence(ids[:end], labels[:end], slice(0, int(is_image[:end].sum())))


def prefix_and_branches(
    conversations: Sequence[TokenSequence], image_token_id: int
) -> list[TokenSequence]:
    """Return a sample's conversations as their common prefix and the rest of each.

    Where they have none in common, they stay whole.

    Args:
        conversations: each with the sample's first images.
        image_token_id: the placeholder.
    """
    length = common_length(conversations)
    if not length:
        return list(conversations)
    ids = conversations[0].ids[:length]
    shown = int((ids == image_token_id).sum())
    prefix = TokenSequence(ids, conversations[0].labels[:length], slice(0, shown))
    branches = [
        TokenSequence(
            conversation.ids[length:],
            conversation.labels[length:],
            slice(shown, conversation.images.stop),
            is_branch=True,
        )
        for conversation in conversations
    ]
    return [prefix, *branches]


def common_length(conversations: Sequence[TokenSequence]) -> int:
    """Return how many leading tokens the conversations can share.

    They are the same in all, and learned in none: what is learned counts once a conversation. Each
    conversation keeps a row of its own before its first learned token, which is predicted there.
    """
    if len(conversations) < 2:
        return 0
    length = min(conversation.first_target for conversation in conversations) - 1
    if length < 1:
        return 0
    heads = np.stack([conversation.ids[:length] for conversation in conversations])
    return _first((heads != heads[0]).any(0))


def _first(marks: np.ndarray) -> int:
    """Return the index of the first True, the length if there is none."""
    return int(marks.argmax()) if marks.any() else len(marks)
