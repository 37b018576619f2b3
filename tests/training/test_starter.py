"""``tokenflex init``: the configuration it writes, which trains as it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tokenflex.cli import main
from tokenflex.training import starter
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
        ("--text", "nowhere", "path 'nowhere' cannot be loaded: no such folder exists, and as a"),
        ("--text", "{misspelt}", "txet does not exist\n"),
        ("--vision", "{text}", "must be a vision encoder, got a model of type 'qwen2'"),
        ("--vision", "{bare}", "cannot be loaded: Can't load image processor"),
        ("--text", "{clip}", "must be a language model, got a model of type 'clip_vision_model'"),
        ("--text", "{silent}", "must have a chat template"),
        ("--data", "{lost}", "must have samples that can be read, got none among the first 2"),
        ("--data", "nowhere.jsonl", "data file nowhere.jsonl does not exist"),
        ("--data", "digits", "--data must be a path, got the name of a format, 'digits'"),
    ],
)
def test_what_cannot_be_read_is_named_and_nothing_is_written(
    parts, data, tmp_path, monkeypatch, capsys, option, value, expected
):
    monkeypatch.chdir(tmp_path)
    made = {name: parts / name for name in ("text", "clip")}
    made |= {name: tmp_path / name for name in ("bare", "silent", "lost")}
    shutil.copytree(parts / "clip", made["bare"])
    (made["bare"] / "preprocessor_config.json").unlink()
    shutil.copytree(parts / "text", made["silent"], ignore=lambda *_: ["chat_template.jinja"])
    lines = (data / "own.jsonl").read_text(encoding="utf-8").splitlines()
    made["misspelt"] = parts / "txet"
    made["lost"] = made["lost"].with_suffix(".jsonl")
    made["lost"].write_text("\n".join(lines[:2]).replace("png", "gone"), encoding="utf-8")
    value = value.format_map(made)
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


def test_paths_with_yaml_s_own_signs_are_written_as_they_are(parts, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"siglip": "a, [b]: {c} # é", "text": "d}, 'e' \"f\" ✓"}
    for part, name in names.items():
        shutil.copytree(parts / part, name)
    output = "run, {g}: [h]"
    words = ["--vision", names["siglip"], "--text", names["text"], "--output", output]
    assert main([*arguments(parts, data), *words]) == 0
    config = load_config("train.yaml")
    assert config.model.vision.path == names["siglip"]
    assert config.model.text.path == names["text"]
    assert config.output == Path(output)
    assert "é" in Path("train.yaml").read_text(encoding="utf-8")


def own_data(folder: Path, images: list[str]) -> list[str]:
    """Write a sample of each image, and return the options that name the data."""
    messages = [{"role": "user", "content": "odd"}, {"role": "assistant", "content": "3"}]
    lines = [json.dumps({"images": [image], "messages": messages}) for image in images]
    (folder / "own.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return ["--data", str(folder / "own.jsonl"), "--image-folder", str(folder)]


@pytest.mark.parametrize(
    ("samples", "steps", "passes"),
    [(32, 1, "one pass"), (33, 2, "1.94 passes"), (64, 2, "one pass")],
)
def test_a_stage_passes_through_all_of_the_data(
    parts, data, tmp_path, monkeypatch, samples, steps, passes
):
    monkeypatch.chdir(tmp_path)
    options = own_data(tmp_path, [str(data / "images/1.png")] * samples)
    assert main([*arguments(parts, data), *options, "--allow-outside"]) == 0
    config = load_config("train.yaml")
    assert [stage.steps for stage in config.stages] == [steps, steps]
    assert config.stages[0].batch_size == 32
    assert config.data.allow_outside
    assert f"# {passes} through the data; few" in Path("train.yaml").read_text(encoding="utf-8")


def test_samples_that_cannot_be_read_are_not_counted(parts, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copy(data / "images/1.png", tmp_path)
    options = own_data(tmp_path, ["1.png", "gone.png"])
    with (tmp_path / "own.jsonl").open("a", encoding="utf-8") as file:
        file.write("\nno JSON")
    assert main([*arguments(parts, data), *options]) == 0
    assert "# 1 sample; 2 more cannot be read\n" in Path("train.yaml").read_text(encoding="utf-8")
    assert load_config("train.yaml").stages[0].batch_size == 1
    said = capsys.readouterr().out
    assert "2 samples cannot be read; the first: " in said
    assert "own.jsonl:3 is not JSON" in said
    assert "One pass through 1 sample is 1 step a stage, few for a projector" in said


def test_few_steps_are_named(parts, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(starter, "MOST_SAMPLES_A_STEP", 1)
    for few, expected in ((3, False), (4, True)):
        monkeypatch.setattr(starter, "FEW_STEPS", few)
        Path("train.yaml").unlink(missing_ok=True)
        assert main(arguments(parts, data)) == 0
        said = capsys.readouterr().out
        assert ("One pass through 3 samples is 3 steps a stage" in said) is expected
        assert ("; few:" in Path("train.yaml").read_text(encoding="utf-8")) is expected
