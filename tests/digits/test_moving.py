"""Clips of a moving digit: the answers are true of the frames, and a run trains on them."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tokenflex.data.steps import outline_of
from tokenflex.digits.canvas import CELL_PIXELS, CELLS, QUADRANTS, SPLITS, scans
from tokenflex.digits.moving import FRAMES, MOST_DIGITS, MovingDataset, moving_processor
from tokenflex.formats import FORMATS
from tokenflex.training.data_config import DataConfig


def yellow_cell(frame: Image.Image) -> tuple[int, np.ndarray]:
    """The cell of the yellow digit, and its scan as it was drawn."""
    pixels = np.asarray(frame).astype(float) / 255
    yellow = np.minimum(pixels[..., 0], pixels[..., 1]) - pixels[..., 2]
    cells = yellow.reshape(CELLS, CELL_PIXELS, CELLS, CELL_PIXELS).swapaxes(1, 2)
    cell = int(cells.mean((2, 3)).argmax())
    return cell, cells.reshape(-1, CELL_PIXELS, CELL_PIXELS)[cell] / 0.85


def digit_of(scan: np.ndarray, split: str) -> int:
    """The digit of the split's scan that is nearest."""
    pictures, labels = scans()
    low, high = SPLITS[split]
    return int(labels[low:high][((pictures[low:high] - scan) ** 2).sum((1, 2)).argmin()])


@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_are_true_of_the_frames(split):
    answers: dict[str, set[str]] = {}
    for index in range(40):
        sample = MovingDataset(split, size=40)[index]
        seen = [yellow_cell(frame) for frame in sample.images]
        digits = [digit_of(scan, split) for _, scan in seen]
        rows, columns = zip(*(divmod(cell, CELLS) for cell, _ in seen), strict=True)
        quadrants = [
            QUADRANTS[2 * (row >= CELLS // 2) + (column >= CELLS // 2)]
            for row, column in zip(rows, columns, strict=True)
        ]
        expected = {
            "start": quadrants[0],
            "end": quadrants[-1],
            "first": str(digits[0]),
            "last": str(digits[-1]),
            "many": str(len({*digits})),
        }
        for talk in sample.conversations:
            question, answer = talk.turns
            assert question.text == f"<video:{FRAMES}> {talk.kind}"
            assert answer.text == expected[talk.kind]
            answers.setdefault(talk.kind, set()).add(answer.text)
        # It moves in a line: no step of more than a cell, and never back.
        for line in (rows, columns):
            steps = np.diff(line)
            assert abs(steps).max() <= 1
            assert abs(steps.sum()) == abs(steps).sum()
    assert answers["many"] == {str(n) for n in range(1, MOST_DIGITS + 1)}
    assert answers["start"] == answers["end"] == {*QUADRANTS}


def test_fewer_frames_are_of_the_same_clip():
    whole, few = MovingDataset(size=3)[2], MovingDataset(size=3, frames=4)[2]
    chosen = [0, 5, 10, 15]
    assert [image.tobytes() for image in few.images] == [whole.images[i].tobytes() for i in chosen]
    assert [talk.turns[1] for talk in few.conversations] == [
        talk.turns[1] for talk in whole.conversations
    ]
    assert few.conversations[0].turns[0].text.startswith("<video:4> ")
    outline = outline_of(MovingDataset(size=3, frames=4), 2)
    assert (outline.image_sizes, outline.conversations) == (few.image_sizes, few.conversations)


def test_all_words_are_known():
    processor = moving_processor()
    for talk in MovingDataset(size=5)[4].conversations:
        words = " ".join(turn.text for turn in talk.turns).split()[1:]
        assert processor.tokenizer.unk_token_id not in (
            processor.tokenizer.convert_tokens_to_ids(words)
        )


def test_it_is_a_format_of_configurations():
    options = DataConfig(name="moving", split="test", size=7, frames=2)
    dataset = FORMATS["moving"].open(FORMATS["moving"].options_of(options))
    assert (len(dataset), len(dataset[6].images)) == (7, 2)
    for wrong in ({"frames": 17}, {"frames": 0}, {"split": "tset"}, {"cells": 8}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            DataConfig(name="moving", **wrong)
    for wrong in ({"split": "x"}, {"size": 0}, {"frames": 17}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            MovingDataset(**wrong)
