"""Token ids of prompts: every placeholder is repeated for its own image, and rows end together."""

from __future__ import annotations

import pytest
import torch

from tokenflex.prompts import expand_placeholders, left_padded

IMAGE = 3


def test_each_placeholder_is_repeated_for_its_image():
    ids = torch.tensor([5, IMAGE, IMAGE, 6, IMAGE])
    expanded = expand_placeholders(ids, [2, 1, 3], IMAGE)
    assert expanded.tolist() == [5, *[IMAGE] * 2, IMAGE, 6, *[IMAGE] * 3]
    assert expanded.dtype == torch.int64
    assert expand_placeholders(torch.tensor([5, 6]), [], IMAGE).tolist() == [5, 6]


@pytest.mark.parametrize("tokens", [[], [4, 4]])
def test_placeholders_and_images_must_be_equally_many(tokens):
    words = rf"holds 1 placeholders for {len(tokens)} images"
    with pytest.raises(ValueError, match=words):
        expand_placeholders(torch.tensor([5, IMAGE]), tokens, IMAGE)


def test_rows_are_padded_on_the_left():
    ids, mask = left_padded([torch.tensor([5]), torch.tensor([6, 7, 8])], 9)
    assert ids.tolist() == [[9, 9, 5], [6, 7, 8]]
    assert mask.tolist() == [[0, 0, 1], [1, 1, 1]]
    assert ids.dtype == mask.dtype == torch.int64
