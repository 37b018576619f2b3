"""The router: from an image and a question to the probability of a right answer at each count."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from numbers import Real
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from tokenflex.counts import TokenCount, token_grid, tokens_of
from tokenflex.routing.calibration import calibrated, check_curves
from tokenflex_kernels.checks import check_count


class Router(nn.Module):
    """A gated sum of image and question, and one sigmoid per count: "answered right at n".

    The size is about ``hidden_width * (2 * vision_width + text_width)``. The router runs on the
    host in float32.

    Args:
        counts: Counts to choose from, perfect squares or (height, width) grids.
        vision_width: C, the width of the encoder's features.
        text_width: D, the width of the language model's input embeddings.
        hidden_width: Width of the hidden layer.
        penalty: Default penalty, see :func:`utilities`.
        calibration: Curves of :meth:`probabilities`, one per count, see
            :mod:`tokenflex.routing.calibration`; None leaves them as fitted.
        confidence_calibration: The same for the confidence of the model's answers, which the
            cascade compares with its threshold.

    Raises:
        TypeError: A count or a width is not an int, or the penalty or a curve is not of numbers.
        ValueError: There are fewer than two counts, two have equally many tokens, or a number is
            out of its range.
    """

    image_mean: torch.Tensor
    image_std: torch.Tensor
    question_mean: torch.Tensor
    question_std: torch.Tensor

    def __init__(
        self,
        counts: Sequence[TokenCount],
        vision_width: int,
        text_width: int,
        *,
        hidden_width: int = 16,
        penalty: float = 0.0,
        calibration: Sequence[Sequence[float]] | None = None,
        confidence_calibration: Sequence[Sequence[float]] | None = None,
    ) -> None:
        super().__init__()
        self.counts = check_counts(counts)
        self.vision_width = check_count("vision_width", vision_width)
        self.text_width = check_count("text_width", text_width)
        self.hidden_width = check_count("hidden_width", hidden_width)
        self.penalty = check_penalty(penalty)
        self.calibration = check_curves("calibration", calibration, len(self.counts))
        self.confidence_calibration = check_curves(
            "confidence_calibration", confidence_calibration, len(self.counts)
        )
        for name, width in (("image", 2 * vision_width), ("question", text_width)):
            self.register_buffer(f"{name}_mean", torch.zeros(width))
            self.register_buffer(f"{name}_std", torch.ones(width))
        self.image = nn.Linear(2 * vision_width, hidden_width)
        self.question = nn.Linear(text_width, hidden_width)
        self.right = nn.Linear(hidden_width, len(self.counts))

    def forward(self, images: torch.Tensor, questions: torch.Tensor) -> torch.Tensor:
        """Return logits of "answered right", [pairs, counts].

        Args:
            images: float32 [pairs, 2C], from :func:`tokenflex.routing.features.image_statistics`.
            questions: float32 [pairs, D], from
                :func:`tokenflex.routing.features.question_embeddings`.
        """
        image = self.image((images - self.image_mean) / self.image_std)
        question = self.question((questions - self.question_mean) / self.question_std)
        return self.right(F.gelu(image + question))

    @torch.no_grad()
    def probabilities(self, images: torch.Tensor, questions: torch.Tensor) -> NDArray[np.float64]:
        """Return the probability of a right answer, [pairs, counts], see :meth:`forward`."""
        chances = self(images, questions).double().sigmoid().numpy()
        return chances if self.calibration is None else calibrated(chances, self.calibration)


def utilities(
    probabilities: NDArray[np.float64], counts: Sequence[TokenCount], penalty: float
) -> NDArray[np.float64]:
    """Return p(right at n) - penalty * n / largest count, with n the tokens of a count.

    ``penalty`` is the share of right answers given up to save all tokens of the largest count. At
    0.1, tokens must bring ten points of accuracy per hundred per cent; at 0 they are free.

    Raises:
        TypeError: ``penalty`` is not a number.
        ValueError: ``penalty`` is negative or not finite.
    """
    sizes = np.array([tokens_of(count) for count in counts], dtype=np.float64)
    share = sizes / sizes.max()
    return probabilities - check_penalty(penalty) * share


def best(utility: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the index of each row's highest utility; the smallest index of equal ones."""
    return utility.argmax(-1)


def check_counts(counts: Sequence[TokenCount]) -> tuple[TokenCount, ...]:
    """Return the counts, from the fewest tokens to the most.

    Raises:
        TypeError: A count is neither an int nor a pair of ints.
        ValueError: There are fewer than two counts, two have equally many tokens, or one is no
            perfect square and no grid.
    """
    by_size: dict[int, TokenCount] = {}
    for i, count in enumerate(counts):
        height, width = token_grid(count, name=f"counts[{i}]")
        is_pair = isinstance(count, Sequence)  # a list, where it comes from JSON
        by_size[height * width] = (height, width) if is_pair else height * width
    if len(counts) < 2 or len(by_size) != len(counts):
        raise ValueError(
            f"counts must be two or more of different numbers of tokens, got {list(counts)}"
        )
    return tuple(by_size[size] for size in sorted(by_size))


def check_penalty(penalty: Any) -> float:
    """Return ``penalty`` as a float.

    Raises:
        TypeError: It is not a number.
        ValueError: It is negative or not finite.
    """
    if isinstance(penalty, bool) or not isinstance(penalty, Real):
        raise TypeError(f"penalty must be a number, got {penalty!r}")
    if not isfinite(penalty) or penalty < 0:
        raise ValueError(f"penalty must be finite and at least 0, got {penalty}")
    return float(penalty)
