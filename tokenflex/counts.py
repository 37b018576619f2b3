"""Token counts: their grids, their text form, and the stochastic draw of training."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import isqrt, sqrt
from numbers import Integral, Real
from typing import Any, Literal, TypeAlias

import numpy as np
import torch

Grid: TypeAlias = tuple[int, int]
TokenCount: TypeAlias = int | Grid  # a perfect square, or (height, width)
ImageTokenCounts: TypeAlias = "TokenCount | Sequence[TokenCount] | torch.Tensor"
AUTO: Literal["auto"] = "auto"
"""Stands in place of a count that :mod:`tokenflex.routing` chooses for each image."""


def join_calls(values: Any, number: int) -> Any:
    """Join lists that several calls of a processor gave and that were batched into a list.

    A pipeline makes ``[[4, 9], [16]]`` of two calls with three images. The number of images tells
    that from ``[[2, 3], [4, 4]]``, two grids.

    Args:
        values: Lists, one per call, of one value per image; anything else is returned as it is.
        number: Images of all calls together.
    """
    if not isinstance(values, list) or not all(isinstance(value, list) for value in values):
        return values
    joined = [entry for value in values for entry in value]
    if len(joined) != number or (len(values) == number and all(len(v) == 2 for v in values)):
        return values
    return joined


def _is_int(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _check_int(name: str, value: object) -> None:
    if not _is_int(value):
        raise TypeError(f"{name} must be an int, got {value!r}")


def token_grid(count: object, *, name: str = "num_tokens") -> Grid:
    """Return the (height, width) grid of ``count`` tokens.

    Args:
        count: A perfect square n*n, or a (height, width) pair, of host ints.
        name: Name of the argument in errors.

    Raises:
        TypeError: ``count`` is neither an int nor a pair of ints.
        ValueError: A side is below 1, or an int is not a perfect square (the message holds the
            nearest squares).
    """
    if _is_int(count):
        number = int(count)  # type: ignore[call-overload]
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
        # A compiler cannot trace isqrt; sqrt is exact below 2^52.
        side = int(sqrt(number)) if torch.compiler.is_compiling() else isqrt(number)
        if side * side != number:
            raise ValueError(
                f"{name} must be a perfect square or a (height, width) pair, got {number}; "
                f"the nearest squares are {side * side} and {(side + 1) ** 2}"
            )
        return side, side
    if isinstance(count, Sequence) and len(count) == 2 and all(_is_int(side) for side in count):
        height, width = int(count[0]), int(count[1])
        if height < 1 or width < 1:
            raise ValueError(f"{name} must have sides of at least 1, got {(height, width)}")
        return height, width
    raise TypeError(
        f"{name} must be an int (a perfect square) or a (height, width) pair, got {count!r}"
    )


def parse_count(text: str | int, *, name: str = "a count") -> TokenCount:
    """Parse a count, ``64``, or a grid of height x width, ``12x16``.

    Raises:
        ValueError: The text is neither, or the count is not a perfect square.
    """
    try:
        sides = [int(side) for side in str(text).split("x")]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2):
        raise ValueError(
            f"{name} must be like 64 or 144, or a grid of height x width like 2x3, got {text!r}"
        )
    count = sides[0] if len(sides) == 1 else (sides[0], sides[1])
    token_grid(count, name=name)
    return count


def tokens_of(count: TokenCount) -> int:
    """Return the number of tokens of a valid count: the count itself, or h * w of a grid."""
    return count[0] * count[1] if isinstance(count, Sequence) else int(count)


def tokens_of_images(tiles: Sequence[int], grids: Sequence[Grid]) -> list[int]:
    """Return the vision tokens of each image, from its number of tiles and the grid of each."""
    return [n * height * width for n, (height, width) in zip(tiles, grids, strict=True)]


def is_one_count(counts: object) -> bool:
    """Return whether ``counts`` is one count for all images: an int, or a tuple of two ints.

    A list always has one entry per image, and a tuple of two ints is always a grid.
    """
    return _is_int(counts) or (
        isinstance(counts, tuple) and len(counts) == 2 and all(_is_int(side) for side in counts)
    )


def token_grids(counts: object, num_images: int, *, name: str = "num_tokens") -> list[Grid]:
    """Return one grid per image.

    Args:
        counts: An int or a (height, width) tuple for all images, or a list, 1-D tensor or other
            sequence with one of those per image. A tuple of two ints is a grid.
        num_images: Number of images.
        name: Name of the argument in errors.

    Raises:
        TypeError: An entry is not a count.
        ValueError: The number of entries is not ``num_images``, or an entry is not a valid count.
    """
    counts = join_calls(counts, num_images)
    if is_one_count(counts):
        return [token_grid(counts, name=name)] * num_images
    if isinstance(counts, torch.Tensor):
        if not counts.ndim:
            raise TypeError(f"{name} must be a host int for all images, got {counts!r}")
        counts = counts.tolist()
    if isinstance(counts, np.ndarray) and counts.ndim:
        counts = counts.tolist()
    if isinstance(counts, str) or not isinstance(counts, Sequence):
        raise TypeError(
            f"{name} must be an int, a (height, width) tuple, or one of those per image, "
            f"got {counts!r}"
        )
    entries = list(counts)
    if len(entries) != num_images:
        raise ValueError(
            f"{name} must have one entry per image: got {len(entries)} entries for "
            f"{num_images} images"
        )
    return [token_grid(entry, name=f"{name}[{i}]") for i, entry in enumerate(entries)]


_MASK = (1 << 64) - 1


def stateless_random(*key: int) -> float:
    """Return a number in [0, 1) that is a pure function of the integers of ``key``.

    It is the finaliser of SplitMix64 (Steele, Lea & Flood, 2014), chained over the key.
    """
    state = 0
    for part in key:
        state = (state + (int(part) & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return (state >> 11) / (1 << 53)


@dataclass(frozen=True)
class TokenCounts:
    """The stochastic vision-token count of training (arXiv 2504.03154: 64, 144, 256 at 2:3:5).

    Args:
        counts: Counts to draw from: perfect squares, or (height, width) pairs.
        weights: Odds of the counts, non-negative, in any scale.
        seed: Seed of the draws.

    Raises:
        TypeError: A count is not an int or a pair of ints, or a weight is not a number.
        ValueError: There are no counts, the numbers of counts and weights differ, a count is not a
            valid one, a weight is negative, or all weights are zero.
    """

    counts: tuple[TokenCount, ...] = (64, 144, 256)
    weights: tuple[float, ...] = (0.2, 0.3, 0.5)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("counts", "weights"):
            value = getattr(self, name)
            if isinstance(value, str) or not isinstance(value, Sequence):
                raise TypeError(f"{name} must be a sequence of numbers, got {value!r}")
            object.__setattr__(self, name, tuple(value))
        _check_int("seed", self.seed)
        if not self.counts or len(self.counts) != len(self.weights):
            raise ValueError(
                "counts and weights must have one entry each per choice, got "
                f"{len(self.counts)} counts and {len(self.weights)} weights"
            )
        for i, count in enumerate(self.counts):
            token_grid(count, name=f"counts[{i}]")
        # Lists of YAML become tuples, which can be hashed.
        counts = (tuple(n) if isinstance(n, Sequence) else n for n in self.counts)
        object.__setattr__(self, "counts", tuple(counts))
        for i, weight in enumerate(self.weights):
            if isinstance(weight, bool) or not isinstance(weight, Real):
                raise TypeError(f"weights[{i}] must be a number, got {weight!r}")
            if not 0 <= weight < float("inf"):
                raise ValueError(f"weights[{i}] must be finite and at least 0, got {weight}")
        if not 0 < sum(self.weights) < float("inf"):
            raise ValueError(
                f"weights must not all be zero, and have a finite sum, got {self.weights}"
            )

    def draw(self, sample_index: int, epoch: int = 0) -> TokenCount:
        """Return the count of a sample, a pure function of (seed, epoch, sample_index).

        It is the same in every worker, rank and resumed run.

        Raises:
            TypeError: ``sample_index`` or ``epoch`` is not an int.
        """
        _check_int("sample_index", sample_index)
        _check_int("epoch", epoch)
        point = stateless_random(self.seed, epoch, sample_index) * sum(self.weights)
        choice = bisect_right(list(accumulate(self.weights)), point)
        return self.counts[min(choice, len(self.counts) - 1)]

    @property
    def expected(self) -> float:
        """Mean number of tokens under the odds."""
        pairs = zip(self.counts, self.weights, strict=True)
        return sum(tokens_of(count) * weight for count, weight in pairs) / sum(self.weights)
