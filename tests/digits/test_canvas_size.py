"""Canvases of more cells; those of 16 are what they always were."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from tests.training.runs import tiny_values, write_config
from tokenflex.digits.canvas import BLANK, cell_name, draw_canvas
from tokenflex.digits.dataset import DigitsDataset
from tokenflex.digits.processor import digits_processor, digits_vocabulary
from tokenflex.training.config import load_config


def test_the_demos_canvases_and_words_have_not_changed():
    """Their hash from before canvases had a size: published numbers were measured on these."""
    whole = hashlib.sha256()
    for split in ("train", "test"):
        dataset = DigitsDataset(split, size=20)
        for index in range(20):
            sample = dataset[index]
            whole.update(np.asarray(sample.images[0]).tobytes())
            whole.update(repr(sample.conversations).encode())
    whole.update(repr(digits_vocabulary()).encode())
    assert whole.hexdigest() == "281efa03ac06ff28d645174bd891bcee7513c7f195f80f815458787fd99996b5"


def test_a_sample_is_the_same_at_every_asking():
    dataset = DigitsDataset(size=2000)
    first = dataset[3]
    for index in range(1100):  # more than it remembers
        dataset[index]
    again = dataset[3]
    assert again.conversations == first.conversations
    assert np.array_equal(np.asarray(again.images[0]), np.asarray(first.images[0]))


def test_larger_canvases_hold_as_many_digits_a_cell():
    canvases = [draw_canvas(np.random.default_rng(i), "train", 8) for i in range(60)]
    numbers = [int((canvas.digits != BLANK).sum()) for canvas in canvases]
    assert canvases[0].pixels.shape == (64, 64, 3)
    assert 12 <= min(numbers) < 18
    assert 30 < max(numbers) <= 36


def test_a_cell_of_a_larger_canvas_is_where_its_name_says():
    canvas = draw_canvas(np.random.default_rng(0), "train", 8)
    assert (cell_name(0, 8), cell_name(9, 8), cell_name(63, 8)) == ("r1c1", "r2c2", "r8c8")
    bright = canvas.pixels.reshape(8, 8, 8, 8, 3).max(axis=(1, 3, 4)).flatten() > 128
    assert np.array_equal(bright, canvas.digits != BLANK)
    yellow = int(np.flatnonzero(canvas.colours == 3)[0])
    vertical = "top" if yellow < 32 else "bottom"
    horizontal = "left" if yellow % 8 < 4 else "right"
    assert canvas.answer("where") == f"{vertical}-{horizontal}"


def test_every_word_of_a_larger_canvas_is_one_token():
    processor = digits_processor(16, cells=8)
    dataset = DigitsDataset("train", size=40, cells=8)
    for index in range(40):
        for conversation in dataset[index].conversations:
            for turn in conversation.turns:
                ids = processor.tokenizer(turn.text)["input_ids"]
                assert len(ids) == len(turn.text.split())
                assert processor.tokenizer.unk_token_id not in ids
    data, tiles = processor.process_images([dataset[0].images[0]])
    assert data["pixel_values"].shape == (1, 3, 64, 64)
    assert tiles == [1]


@pytest.mark.parametrize("cells", [2, 5, 0])
def test_cells_must_be_even_and_at_least_four(cells):
    with pytest.raises(ValueError, match=f"cells must be an even number from 4 on, got {cells}"):
        DigitsDataset(cells=cells)


@pytest.mark.parametrize("where", ["data", "evaluation", "stage"])
def test_canvases_must_fit_the_encoder(tmp_path, where):
    values = tiny_values(tmp_path)
    larger = {"name": "digits", "cells": 8}
    if where == "data":
        values["data"] = larger
    elif where == "evaluation":
        values["evaluation"]["data"] = larger
    else:
        values["stages"][1]["data"] = larger
    with pytest.raises(ValueError, match=r"image_size 64 for canvases of 8 x 8 cells, got 32"):
        load_config(write_config(tmp_path / "run.yaml", values))
