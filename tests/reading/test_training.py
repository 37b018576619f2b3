"""The reading task in configurations and commands: options, tiles, grids, pairs, training."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from tests.training.runs import write_config
from tokenflex.cli import main
from tokenflex.formats import FORMATS
from tokenflex.reading.content import LAYOUTS, TextPage, all_words, draw_page
from tokenflex.reading.dataset import ReadingDataset
from tokenflex.reading.drawing import PAGE_PIXELS, draw
from tokenflex.reading.encoder import CLASSES, patch_labels
from tokenflex.reading.format import reading_processor
from tokenflex.training.build import build_model, build_processor
from tokenflex.training.config import TrainConfig, load_config
from tokenflex.training.data_config import DataConfig

SIDE = 8  # patches of a page
CONFIG = Path(__file__).parents[2] / "configs" / "reading.yaml"


def tiny_values(output: Path, **changes: Any) -> dict[str, Any]:
    """configs/reading.yaml with a narrow model and a few steps."""
    values = copy.deepcopy(yaml.safe_load(CONFIG.read_text(encoding="utf-8")))
    for part in ("vision", "text"):
        values["model"][part]["config"] |= {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }
    values["model"]["vision"]["config"]["patch_size"] = 16
    values["model"]["text"]["config"]["num_key_value_heads"] = 1
    values["model"]["projector_hidden_width"] = 32
    rate = {"vision": 0.003, "projector": 0.003, "text": 0.003}
    stage = {"batch_size": 6, "learning_rate": rate, "counts": [4, 9, [2, 3]]}
    values |= {
        "output": str(output),
        "workers": 0,
        "log_every": 1,
        "encoder_warm_up": {"steps": 2, "batch_size": 3, "learning_rate": 0.003},
        "stages": [{"name": "all", "steps": 40, "weights": [1, 1, 1], **stage}],
        "evaluation": {
            "data": {"name": "reading", "split": "test", "size": 8, "questions": 3},
            "counts": [4, 9, [2, 3]],
        },
    }
    return {**values, **changes}


def test_the_shipped_configuration_is_valid_and_uses_what_the_task_offers():
    config = load_config(CONFIG)
    counts = {count for stage in config.stages for count in stage.drawn_counts}
    assert {16, 36, 64} < counts
    assert any(isinstance(count, tuple) for count in counts)  # grids
    assert config.model.max_tiles == 2
    assert {layout for part in config.data.parts for layout in part.layouts} == {*LAYOUTS}
    assert config.model.text.config["vocab_size"] >= len(reading_processor().tokenizer)


def test_every_word_is_one_token():
    words = all_words()
    assert len(set(words)) == len(words)
    tokenizer = reading_processor().tokenizer
    dataset = ReadingDataset(size=60, questions=4)
    for index in range(60):
        for talk in dataset.outline(index).conversations:
            for turn in talk.turns:
                ids = tokenizer(turn.text)["input_ids"]
                assert tokenizer.unk_token_id not in ids
                assert len(ids) == len(turn.text.split()) <= 2


@pytest.mark.parametrize(
    ("layout", "tiles"), [("page", [1]), ("wide", [1]), ("tall", [2]), ("pair", [1, 1])]
)
def test_tiles_of_a_layout(tmp_path, layout, tiles):
    config = TrainConfig.model_validate(tiny_values(tmp_path))
    processor = build_processor(config.model)
    sample = ReadingDataset(size=1, layouts=[layout])[0]
    data, found = processor.process_images(sample.images)
    assert found == tiles
    assert data["pixel_values"].shape == (sum(tiles), 3, PAGE_PIXELS, PAGE_PIXELS)
    if layout == "tall":  # each tile is a half, as it was drawn
        halves = np.array(sample.images[0]).reshape(2, PAGE_PIXELS, PAGE_PIXELS, 3)
        pixels = torch.as_tensor(data["pixel_values"]).permute(0, 2, 3, 1) * 127.5 + 127.5
        assert torch.equal(pixels.round().to(torch.uint8), torch.from_numpy(halves))


def test_options_of_a_configuration():
    options = DataConfig(
        name="reading",
        split="test",
        size=7,
        questions=2,
        layouts=("tall",),
        fonts=("DejaVuSans",),
        placement="free",
    )
    dataset = FORMATS["reading"].open(FORMATS["reading"].options_of(options))
    sample = dataset[6]
    assert (len(dataset), len(sample.conversations)) == (7, 2)
    assert sample.image_sizes == ((2 * PAGE_PIXELS, PAGE_PIXELS),)
    for key, wrong in (
        ("split", "tset"),
        ("size", 0),
        ("questions", 0),
        ("layouts", ("page", "poster")),
        ("layouts", ()),
        ("layouts", ("page", "page")),
        ("fonts", ("Helvetica",)),
        ("fonts", ()),
        ("placement", "anywhere"),
        ("cells", 8),
    ):
        with pytest.raises(ValueError, match=key):
            DataConfig(name="reading", **{key: wrong})
        if key != "cells":
            with pytest.raises(ValueError, match=key):
                ReadingDataset(**{key: wrong})
    with pytest.raises(IndexError, match=r"0\.\.99999, got 100000"):
        ReadingDataset()[100_000]


def test_pages_must_fit_the_encoder(tmp_path):
    values = tiny_values(tmp_path)
    values["model"]["vision"]["config"]["image_size"] = 64
    with pytest.raises(ValueError, match=r"image_size 96 for the pages of name: reading, got 64"):
        load_config(write_config(tmp_path / "run.yaml", values))


def test_tiles_are_for_formats_that_have_larger_pictures(tmp_path):
    values = tiny_values(tmp_path)
    load_config(write_config(tmp_path / "run.yaml", values))
    values["model"]["processor"] = "digits"
    with pytest.raises(ValueError, match=r"max_tiles must be 1 with processor 'digits', got 2"):
        load_config(write_config(tmp_path / "run.yaml", values))


@pytest.mark.parametrize("layout", ["page", "wide", "table", "chart"])
def test_labels_of_patches_are_those_of_the_text_at_their_centres(layout):
    names = [*CLASSES]
    for index in range(6):
        rng = np.random.default_rng((5, index))
        page = draw_page(rng, layout, "train")
        drawing = draw(rng, page, ["DejaVuSans"])
        labels = patch_labels(drawing, SIDE).reshape(SIDE, SIDE, len(CLASSES))
        assert labels.min() == 0
        assert (labels < np.array([*CLASSES.values()])).all()
        width, height = drawing.image.size
        texts = {}
        for box in drawing.boxes:
            if box.role in ("bar", "point"):
                continue
            x, y = (box.edges[0] + box.edges[2]) / 2, (box.edges[1] + box.edges[3]) / 2
            label = dict(
                zip(
                    names,
                    labels[int(y * SIDE / height), int(x * SIDE / width)].tolist(),
                    strict=True,
                )
            )
            if box.role == "letter":
                assert label["value"] == page.values[page.letters.index(box.text)]
            else:
                assert label["value"] == 0
            if box.role not in ("note", "footnote"):  # two of them may share a patch
                assert (label["line"], label["column"]) == (box.line + 1, box.column + 1)
                assert texts.setdefault(box.text, label["text"]) == label["text"] > 0
        assert len({*texts.values()}) == len(texts)
        if isinstance(page, TextPage) and page.footnote is None:
            assert not labels[SIDE - 1].any()


def test_a_run_trains_with_tiles_grids_and_pairs_and_is_evaluated(tmp_path, capsys):
    """Tiny: one run by the command, then evaluation and generation of its checkpoint."""
    path = write_config(tmp_path / "run.yaml", tiny_values(tmp_path / "run"))
    assert main(["train", str(path)]) == 0
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert {*report["accuracy"]} == {"4", "9", "2x3"}
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    assert np.mean([line["loss"] for line in lines[-5:]]) < 0.6 * lines[0]["loss"]
    assert sum(line["tiles"] for line in lines) > sum(line["samples"] for line in lines)
    capsys.readouterr()
    checkpoint = str(tmp_path / "run/checkpoint")
    counts = ["--counts", "4,2x3", "--output", str(tmp_path / "report.json")]
    assert main(["evaluate", checkpoint, "--data", "reading", "--size", "12", *counts]) == 0
    assert "value" in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert sum(report["questions"].values()) == 96
    sample = ReadingDataset("test", size=1, layouts=["tall"])[0]
    sample.images[0].save(tmp_path / "page.png")
    question = sample.conversations[0].turns[0].text
    picture = ["--image", str(tmp_path / "page.png"), "--prompt", question]
    assert main(["generate", "--model", checkpoint, *picture, "--tokens", "4,9"]) == 0
    printed = capsys.readouterr().out
    assert "8" in printed.split()  # two tiles of four tokens
    assert "18" in printed.split()
    command = ["evaluate", checkpoint, *counts, "--size", "3"]
    tall = [*command, "--data", "reading", "--layouts", "tall"]
    per_question = {}
    for most in ("1", "2"):
        assert main([*tall, "--max-tiles", most]) == 0
        report = json.loads((tmp_path / "report.json").read_text())
        assert all(kind.startswith("tall ") for kind in report["questions"])
        per_question[most] = report["vision_tokens_per_question"]
    assert per_question == {"1": {"4": 4, "2x3": 6}, "2": {"4": 8, "2x3": 12}}
    capsys.readouterr()
    for wrong, expected in (
        (["--data", "reading", "--split", "tset"], "split must be one of 'train', 'validation'"),
        (["--data", "reading", "--layouts", "poster"], "layouts must be one or more of page, wide"),
        (["--data", "digits", "--layouts", "tall"], "--layouts does not fit data of format digits"),
    ):
        assert main([*command, *wrong]) == 2
        assert expected in capsys.readouterr().err


def test_the_warm_up_teaches_the_encoder(tmp_path):
    """In a few steps the loss of a page's text and places falls well below the first one."""
    config = TrainConfig.model_validate(tiny_values(tmp_path))
    torch.manual_seed(0)
    processor = build_processor(config.model)
    model = build_model(config.model, processor)
    losses: list[float] = []
    FORMATS["reading"].fresh_parts.warm_up(
        model.model.vision_model,
        processor,
        steps=60,
        batch_size=4,
        learning_rate=0.005,
        seed=0,
        on_step=losses.append,
    )
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:3])
    assert all(parameter.grad is None for parameter in model.parameters())
