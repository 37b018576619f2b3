"""The order of images once generate has repeated their prompts."""

from __future__ import annotations

import pytest
import torch

from tests.models.tiny import IMAGE
from tokenflex.models.generation import repeated_images

TEXT = IMAGE + 1


def prompts(*rows: list[int]) -> torch.Tensor:
    """Prompts of one length; each number is a run of as many placeholders, then text."""
    ids = [[token for run in row for token in [*[IMAGE] * run, TEXT]] for row in rows]
    length = max(map(len, ids))
    return torch.tensor([[TEXT] * (length - len(row)) + row for row in ids])


@pytest.mark.parametrize(
    ("rows", "counts", "expected"),
    [
        ([[4], [9]], [4, 9], [0, 0, 1, 1]),
        ([[4, 9]], [4, 9], [0, 1, 0, 1]),
        ([[4, 4], [4]], [4, 4, 4], [0, 1, 0, 1, 2, 2]),
        ([[8], [4]], [4, 4, 4], [0, 1, 0, 1, 2, 2]),  # two tiles of one image
        ([[], [4], []], [4], [0, 0]),
        ([[], []], [], []),
    ],
)
def test_images_of_a_prompt_stay_together(rows, counts, expected):
    assert repeated_images(prompts(*rows) == IMAGE, counts, 2) == expected


def test_images_without_placeholders_are_kept_for_the_forward_to_refuse():
    assert repeated_images(prompts([4], [4]) == IMAGE, [4, 4, 4], 2) == [0, 0, 1, 2, 1, 2]
