"""A sample's conversations as sequences: what they have in common stands once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch

from tokenflex.data.encoding import IGNORE

# ids and labels, int64 [length] each, and how many of the sample's images stand in them, the first
EncodedConversation: TypeAlias = "tuple[torch.Tensor, torch.Tensor, int]"


@dataclass(frozen=True)
class TokenSequence:
    """A conversation, or a part of one that is packed as a sequence of its own.

    Attributes:
        ids, labels: int64 [length], with one placeholder an image.
        images: which of the sample's images stand in it.
        is_branch: whether it goes on from the sample's first sequence, which is then their prefix.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    images: slice
    is_branch: bool = False

    def num_tokens(self, tokens_per_image: Sequence[int]) -> int:
        """Its rows once the sample's images have so many tokens each."""
        shown = tokens_per_image[self.images]
        return len(self.ids) - len(shown) + sum(shown)


def whole_conversations(encoded: Sequence[EncodedConversation]) -> list[TokenSequence]:
    """Each conversation by itself, with its images."""
    return [TokenSequence(ids, labels, slice(0, images)) for ids, labels, images in encoded]


def prefix_and_branches(
    encoded: Sequence[EncodedConversation], image_token_id: int
) -> list[TokenSequence]:
    """The conversations' common prefix, then the rest of each; whole ones if there is no such.

    Args:
        encoded: a sample's conversations.
        image_token_id: the placeholder's.
    """
    length = common_length(encoded)
    if not length:
        return whole_conversations(encoded)
    ids, labels, _ = encoded[0]
    shown = int((ids[:length] == image_token_id).sum())
    prefix = TokenSequence(ids[:length], labels[:length], slice(0, shown))
    branches = [
        TokenSequence(own[length:], learned[length:], slice(shown, images), True)
        for own, learned, images in encoded
    ]
    return [prefix, *branches]


def common_length(encoded: Sequence[EncodedConversation]) -> int:
    """How many leading tokens the conversations can share, 0 for none.

    They are the same in all, and learned in none: what is learned counts once a conversation. Each
    conversation keeps a row of its own before its first learned token, which is predicted there.
    """
    if len(encoded) < 2:
        return 0
    length = min(_unlearned(labels) for _, labels, _ in encoded) - 1
    if length < 1:
        return 0
    heads = np.stack([ids[:length].numpy() for ids, *_ in encoded])
    return _first((heads != heads[0]).any(0))


def _unlearned(labels: torch.Tensor) -> int:
    """How many tokens stand before the first that is learned."""
    return _first(labels.numpy() != IGNORE)


def _first(marks: np.ndarray) -> int:
    """Where the first True stands; the length if there is none."""
    return int(marks.argmax()) if marks.any() else len(marks)
