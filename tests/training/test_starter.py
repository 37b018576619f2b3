"""``tokenflex init``: the configuration it writes, which trains as it is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tokenflex.cli import main
from tokenflex.training.config import load_config
from tokenflex.training.starter import _counts_for


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three samples whose images lie in a folder of their own."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "images").mkdir()
    lines = []
    for index in range(3):
        pixels = np.full((20, 30, 3), 80 * index, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{index}.png")
        messages = [{"role": "user", "content": "odd"}, {"role": "assistant", "content": "3"}]
        lines.append(json.dumps({"images": [f"{index}.png"], "messages": messages}))
    (folder / "own.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def arguments(parts: Path, data: Path) -> list[str]:
    return [
        *("init", "--vision", str(parts / "siglip"), "--text", str(parts / "text")),
        *("--data", str(data / "own.jsonl"), "--image-folder", str(data / "images")),
    ]


def test_what_is_written_trains_as_it_is(parts, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments(parts, data)) == 0
    said = capsys.readouterr().out
    config = load_config("train.yaml")
    assert [stage.steps for stage in config.stages] == [1, 1]  # one pass through three samples
    assert [stage.learning for stage in config.stages] == [("projector",), ("projector", "text")]
    assert config.stages[0].counts == (4, 9, 16)  # of a grid of 4 x 4 patches
    assert config.model.image_token == "<image>"
    text = Path("train.yaml").read_text(encoding="utf-8")
    assert "# 3 samples" in text
    assert "the encoder has 4 x 4 patches" in text
    assert "tokenflex train train.yaml" in said
    asked = {"name": "messages", "path": data / "own.jsonl", "image_folder": data / "images"}
    changes = [f"evaluation.data.{key}={value}" for key, value in asked.items()]
    changes.append("evaluation.counts=[4, 9]")
    options = [word for change in changes for word in ("--set", change)]
    assert main(["train", "train.yaml", *options]) == 0
    checkpoint = tmp_path / "runs/train/checkpoint"
    assert (checkpoint / "model.safetensors").is_file()
    card = (checkpoint / "README.md").read_text(encoding="utf-8")
    assert "# train\n" in card
    assert "| vision tokens | 4 | 9 |" in card
    assert "from `siglip`" in card
    assert (checkpoint / "accuracy.png").is_file()


def test_a_file_that_exists_stays(parts, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("train.yaml").write_text("mine")
    assert main(arguments(parts, data)) == 2
    assert "--config train.yaml exists" in capsys.readouterr().err
    assert Path("train.yaml").read_text() == "mine"
    assert main([*arguments(parts, data), "--config", "new/own.yaml", "--output", "here"]) == 0
    assert load_config("new/own.yaml").output == Path("here")


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--vision", "nowhere", "path 'nowhere' cannot be loaded"),
        ("--text", "nowhere", "path 'nowhere' cannot be loaded"),
        ("--data", "nowhere.jsonl", "data file nowhere.jsonl does not exist"),
        ("--data", "digits", "--data must be a path, got the name of a format, 'digits'"),
    ],
)
def test_what_cannot_be_read_is_named_and_nothing_is_written(
    parts, data, tmp_path, monkeypatch, capsys, option, value, expected
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = arguments(parts, data)
    words[words.index(option) + 1] = value
    if value == "digits":
        del words[words.index("--image-folder") :]
    assert main(words) == 2
    assert expected in capsys.readouterr().err
    assert not Path("train.yaml").exists()


@pytest.mark.parametrize(
    ("side", "counts"),
    [(27, [64, 144, 256]), (16, [64, 144, 256]), (8, [16, 36, 64]), (3, [1, 4, 9])],
)
def test_counts_fit_the_encoder_s_grid(side, counts):
    assert _counts_for(side, "encoder") == counts


def test_a_grid_too_small_for_three_counts_is_named():
    with pytest.raises(ValueError, match=r"'encoder' must have at least 3 x 3 .* got 2 x 2"):
        _counts_for(2, "encoder")
