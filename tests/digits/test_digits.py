"""The digits task: what is asked about a canvas is true of its pixels, and nothing leaks."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from transformers import SiglipVisionModel

from tests.models.tiny import vision_config
from tokenflex.data.encoding import ConversationEncoder
from tokenflex.data.samples import Conversation, Sample, Turn
from tokenflex.data.sequences import IGNORE
from tokenflex.digits.canvas import (
    BLANK,
    CELLS,
    COLOURS,
    QUADRANTS,
    QUESTION_ODDS,
    QUESTIONS,
    SPLITS,
    Canvas,
    cell_name,
    draw_canvas,
    draw_question,
)
from tokenflex.digits.dataset import DigitsDataset
from tokenflex.digits.encoder import warm_up_encoder
from tokenflex.digits.processor import digits_processor, digits_vocabulary

CANVASES = 150
# How bright each colour is in red, green and blue, as a person would say it.
BRIGHTNESS = {"red": "HLL", "green": "LHL", "blue": "LLH", "yellow": "HHL"}


def canvases(split: str = "train", number: int = CANVASES) -> list[Canvas]:
    return [draw_canvas(np.random.default_rng((5, i)), split) for i in range(number)]


Seen = list[tuple[int, int, str] | None]  # of each cell: number of the scan, digit, colour


@cache
def scans() -> tuple[np.ndarray, np.ndarray]:
    """The pictures [1797, 64] in [0, 1] and their digits, from the source."""
    digits = load_digits()
    return digits.images.reshape(-1, 64) / 16, digits.target


def cells_of(pixels: np.ndarray) -> np.ndarray:
    """uint8 [32, 32, 3] -> float [16, 8, 8, 3], cell by cell, written out."""
    return np.stack(
        [pixels[r : r + 8, c : c + 8] for r in range(0, 32, 8) for c in range(0, 32, 8)]
    ) / np.float64(255)


def see(pixels: np.ndarray) -> Seen:
    """Return the content of each cell from pixels alone; None if it is blank."""
    pictures, digits = scans()
    seen: Seen = []
    for cell in cells_of(pixels):
        brightest = cell.max(axis=2)
        if brightest.max() < 0.5:
            seen.append(None)
            continue
        scan = int(((pictures - brightest.reshape(64)) ** 2).sum(1).argmin())
        ink = pictures[scan].reshape(8, 8) > 0.5
        channels = cell[ink].mean(0) / cell[ink].mean(0).max()
        letters = "".join("H" if value > 0.65 else "L" for value in channels)
        colour = next(name for name, wanted in BRIGHTNESS.items() if wanted == letters)
        seen.append((scan, int(digits[scan]), colour))
    return seen


# ---- canvases


def test_arrays_say_what_the_pixels_show():
    for canvas in canvases():
        for cell, seen in enumerate(see(canvas.pixels)):
            digit, colour = canvas.digits[cell], canvas.colours[cell]
            if seen is None:
                assert (digit, colour) == (BLANK, BLANK)
            else:
                assert (digit, COLOURS[colour]) == seen[1:]


def test_a_canvas_is_what_its_description_says():
    sizes = Counter()
    for canvas in canvases():
        assert canvas.pixels.shape == (32, 32, 3)
        assert canvas.pixels.dtype == np.uint8
        colours = [COLOURS[c] for c in canvas.colours if c != BLANK]
        assert colours.count("yellow") == 1
        sizes[len(colours)] += 1
    assert set(sizes) == set(range(3, 10))


def test_yellow_and_blanks_are_anywhere():
    yellow, filled = Counter(), Counter()
    for canvas in canvases():
        yellow[int(np.flatnonzero(canvas.colours == COLOURS.index("yellow"))[0])] += 1
        filled.update(np.flatnonzero(canvas.digits != BLANK).tolist())
    assert set(yellow) == set(range(16)) == set(filled)


def test_splits_show_no_scan_of_each_other():
    """By pixels: every cell of a split is nearest to a scan that no other split shows."""
    shown = {
        split: {
            seen[0]
            for canvas in canvases(split, 60)
            for seen in see(canvas.pixels)
            if seen is not None
        }
        for split in SPLITS
    }
    assert all(len(scan_numbers) > 100 for scan_numbers in shown.values())
    for one, other in itertools.combinations(shown.values(), 2):
        assert not one & other


def test_split_ranges_partition_the_scans():
    ranges = sorted(SPLITS.values())
    assert ranges[0][0] == 0
    assert ranges[-1][1] == len(load_digits().target)
    assert all(end == start for (_, end), (start, _) in itertools.pairwise(ranges))


# ---- answers


def true_answer(seen: Seen, kind: str, cell: int | None) -> set[str]:
    """Right answers by eye: several where colours tie for the majority."""
    yellow = next(i for i, one in enumerate(seen) if one is not None and one[2] == "yellow")
    if kind in ("read", "colour"):
        one = seen[cell]
        return {"blank" if one is None else str(one[1]) if kind == "read" else one[2]}
    if kind == "odd":
        return {str(seen[yellow][1])}
    if kind == "where":
        vertical = "top" if yellow < 8 else "bottom"
        horizontal = "left" if yellow % 4 < 2 else "right"
        return {f"{vertical}-{horizontal}"}
    if kind == "count":
        return {str(sum(one is not None for one in seen))}
    votes = Counter(one[2] for one in seen if one is not None and one[2] != "yellow")
    most = max(votes.values())
    return {colour for colour, number in votes.items() if number == most}


def test_every_answer_is_true_of_the_pixels():
    for canvas in canvases():
        seen = see(canvas.pixels)
        for kind in QUESTIONS:
            for cell in range(16) if kind in ("read", "colour") else [None]:
                assert canvas.answer(kind, cell) in true_answer(seen, kind, cell)


def test_the_majority_has_one_right_answer():
    """A tie has no answer that a picture can tell."""
    ties = [c for c in canvases() if len(true_answer(see(c.pixels), "majority", None)) > 1]
    assert len(ties) == 0, f"{len(ties)} of {CANVASES} canvases have no most frequent colour"


@pytest.mark.parametrize("kind", ["read", "colour"])
def test_questions_about_a_cell_need_one(kind):
    with pytest.raises(ValueError, match="cell"):
        canvases(number=1)[0].answer(kind)


def test_unknown_question_names_the_known_ones():
    with pytest.raises(ValueError, match=r"read, colour, odd.*'colour of'"):
        canvases(number=1)[0].answer("colour of")


# ---- questions


def test_questions_come_as_often_as_their_odds_say():
    rng, canvas = np.random.default_rng(0), canvases(number=1)[0]
    number = 4000
    kinds = Counter(draw_question(rng, canvas)[0] for _ in range(number))
    for kind, odds in zip(QUESTIONS, QUESTION_ODDS, strict=True):
        deviation = (odds * (1 - odds) / number) ** 0.5
        assert abs(kinds[kind] / number - odds) < 4 * deviation, kind


def test_questions_about_cells_reach_all_cells_and_mostly_filled_ones():
    rng, canvas = np.random.default_rng(0), canvases(number=1)[0]
    cells, blank, asked = set(), 0, 0
    for _ in range(3000):
        kind, prompt, answer = draw_question(rng, canvas)
        if kind in ("read", "colour"):
            cells.add(prompt.split()[1])
            asked += 1
            blank += answer == "blank"
    assert cells == {cell_name(cell) for cell in range(16)}
    share_blank = float((canvas.digits == BLANK).mean())
    assert blank / asked == pytest.approx(0.15 * share_blank, abs=0.03)


def test_a_prompt_and_its_answer_belong_together():
    rng = np.random.default_rng(1)
    names = {
        f"r{row}c{column}": 4 * (row - 1) + column - 1
        for row in range(1, 5)
        for column in range(1, 5)
    }
    for canvas in canvases(number=60):
        kind, prompt, answer = draw_question(rng, canvas)
        first, *rest = prompt.split()
        assert first == kind
        assert answer == canvas.answer(kind, names[rest[0]] if rest else None)


# ---- the vocabulary


def test_vocabulary_covers_every_question_and_answer():
    answers = {*map(str, range(10)), *COLOURS, "blank", *QUADRANTS}
    cells = [cell_name(cell) for cell in range(CELLS * CELLS)]
    prompts = [f"{kind} {cell}" for kind in ("read", "colour") for cell in cells]
    prompts += [kind for kind in QUESTIONS if kind not in ("read", "colour")]
    tokenizer = digits_processor().tokenizer
    for prompt in prompts:
        ids = tokenizer(prompt)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert len(ids) == len(prompt.split())
    for answer in answers:
        assert len(tokenizer(answer)["input_ids"]) == 1
        assert tokenizer.unk_token_id not in tokenizer(answer)["input_ids"]
    assert len(set(digits_vocabulary().values())) == len(digits_vocabulary()) == len(tokenizer)


def test_no_sample_holds_an_unknown_word():
    processor, dataset = digits_processor(), DigitsDataset(size=40)
    encode = ConversationEncoder(processor.tokenizer, processor.image_token)
    for i in range(len(dataset)):
        conversations = dataset[i].conversations
        for conversation, encoded in zip(conversations, encode(conversations, 1), strict=True):
            assert processor.tokenizer.unk_token_id not in encoded.ids.tolist()
            answer = processor.tokenizer.decode(encoded.labels[encoded.labels != IGNORE])
            assert answer.split() == [conversation.turns[1].text, "<eos>"]


def test_pixels_reach_the_model_at_full_size_and_scaled():
    canvas = canvases(number=1)[0]
    image = Image.fromarray(canvas.pixels)
    pixels = digits_processor().image_processor([image], return_tensors="pt")["pixel_values"][0]
    expected = torch.from_numpy(canvas.pixels.astype(np.float32)).permute(2, 0, 1) / 127.5 - 1
    assert torch.allclose(pixels, expected, atol=1e-6)


# ---- the data set


def fingerprint(sample: Sample) -> tuple:
    return sample.id, np.asarray(sample.images[0]).tobytes(), sample.conversations


def test_a_sample_depends_on_seed_split_and_index_only():
    first = DigitsDataset("train", size=20, questions=3, seed=1)
    again = DigitsDataset("train", size=99, questions=3, seed=1)
    forward = [fingerprint(first[i]) for i in range(6)]
    assert [fingerprint(again[i]) for i in reversed(range(6))] == forward[::-1]
    pictures = {
        fingerprint(DigitsDataset(split, size=20, seed=seed)[index])[1]
        for split in SPLITS
        for seed in range(3)
        for index in range(3)
    }
    assert len(pictures) == 27


def test_more_questions_are_about_the_same_canvas():
    few, many = (DigitsDataset(size=5, questions=n)[3] for n in (2, 6))
    assert np.array_equal(np.asarray(few.images[0]), np.asarray(many.images[0]))
    assert many.conversations[:2] == few.conversations


def test_a_sample_is_one_image_and_its_questions():
    dataset = DigitsDataset("test", size=7, questions=5)
    assert len(dataset) == 7
    sample = dataset[6]
    assert isinstance(sample, Sample)
    assert {field.name for field in dataclasses.fields(sample)} == {"id", "images", "conversations"}
    assert sample.id == "digits-test-6"
    assert sample.images[0].size == (32, 32)
    assert sample.images[0].mode == "RGB"
    assert len(sample.conversations) == 5
    for conversation in sample.conversations:
        assert isinstance(conversation, Conversation)
        assert conversation.kind in QUESTIONS
        assert [type(turn) for turn in conversation.turns] == [Turn, Turn]
        assert [turn.role for turn in conversation.turns] == ["user", "assistant"]


def test_questions_of_a_sample_are_true_of_its_image():
    dataset = DigitsDataset("validation", size=40)
    for i in range(len(dataset)):
        sample = dataset[i]
        seen = see(np.asarray(sample.images[0]))
        for conversation in sample.conversations:
            kind, *cell = conversation.turns[0].text.split()
            number = 4 * (int(cell[0][1]) - 1) + int(cell[0][3]) - 1 if cell else None
            right = true_answer(seen, kind, number)
            assert conversation.turns[1].text in right


def test_iteration_ends():
    """Python walks over what has no __iter__ until IndexError."""
    dataset = DigitsDataset(size=3, questions=1)
    walked = list(itertools.islice(iter(dataset), 5))
    assert [sample.id for sample in walked] == [f"digits-train-{i}" for i in range(3)]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"split": "dev"}, "train, validation, test.*'dev'"),
        ({"size": 0}, "size=0"),
        ({"questions": 0}, "questions=0"),
    ],
)
def test_what_the_data_set_refuses(arguments, match):
    with pytest.raises(ValueError, match=match):
        DigitsDataset(**arguments)


# ---- the encoder's warm-up


def warm_up(steps: int, seed: int = 0, on_step=lambda loss: None) -> SiglipVisionModel:
    torch.manual_seed(0)
    encoder = SiglipVisionModel(vision_config()).eval()
    warm_up_encoder(
        encoder,
        digits_processor(),
        steps=steps,
        batch_size=8,
        learning_rate=3e-3,
        seed=seed,
        on_step=on_step,
    )
    return encoder


def test_warm_up_lowers_the_loss_and_reports_every_step():
    losses: list[float] = []
    warm_up(40, on_step=losses.append)
    assert len(losses) == 40
    # 11 digits and 5 colours at chance; most cells are blank, which is soon known
    assert np.mean(losses[:3]) > 3.5
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:3])


def test_warm_up_is_a_function_of_its_seed():
    first, again, other = warm_up(2), warm_up(2), warm_up(2, seed=1)
    name = "embeddings.patch_embedding.weight"
    weights = [dict(m.named_parameters()) for m in (first, again, other)]
    name = next(key for key in weights[0] if key.endswith(name))
    assert torch.equal(weights[0][name], weights[1][name])
    assert not torch.equal(weights[0][name], weights[2][name])
