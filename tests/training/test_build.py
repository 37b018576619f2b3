"""Pretrained parts from disk: what separates SigLIP-400M + Qwen2.5 from the demo model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, CLIPVisionModel, GenerationConfig, SiglipModel

from tokenflex.cli import main
from tokenflex.digits.processor import digits_processor
from tokenflex.training.build import build_model, build_processor, empty_model
from tokenflex.training.config import ModelConfig
from tokenflex.training.data_config import DataConfig


def config_of(parts: Path, vision: str = "siglip", **options: object) -> ModelConfig:
    paths = {"vision": {"path": str(parts / vision)}, "text": {"path": str(parts / "text")}}
    return ModelConfig.model_validate({**paths, "num_image_tokens": 4, **options})


@pytest.mark.parametrize("vision", ["siglip", "clip"])
def test_weights_are_those_on_disk_in_float32(parts: Path, vision: str) -> None:
    config = config_of(parts, vision)
    model = build_model(config, build_processor(config))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    language_model = AutoModelForCausalLM.from_pretrained(parts / "text", dtype=torch.float32)
    expected = language_model.base_model.state_dict()
    actual = model.model.language_model.state_dict()
    assert all(torch.equal(actual[name], value) for name, value in expected.items())
    assert torch.equal(model.lm_head.weight, language_model.lm_head.weight)
    whole = SiglipModel if vision == "siglip" else CLIPVisionModel
    on_disk = dict(whole.from_pretrained(parts / vision).named_parameters())
    name = next(name for name in on_disk if name.endswith("patch_embedding.weight"))
    patch_embedding = next(
        value
        for name, value in model.model.vision_model.named_parameters()
        if name.endswith("patch_embedding.weight")
    )
    assert torch.equal(patch_embedding, on_disk[name])


def test_a_new_image_token_grows_the_vocabulary(parts: Path) -> None:
    config = config_of(parts, image_token="<picture>")
    processor = build_processor(config)
    model = build_model(config, processor)
    assert processor.image_token_id == len(digits_processor().tokenizer)
    assert model.get_input_embeddings().num_embeddings == len(processor.tokenizer)
    assert model.lm_head.out_features == len(processor.tokenizer)


def test_answers_end_where_the_tokenizer_says_or_the_language_model(parts: Path) -> None:
    """``generate`` needs no ``eos_token_id`` from its caller, and a model's own list stays."""
    config = config_of(parts)
    processor = build_processor(config)
    ends = build_model(config, processor).generation_config
    assert ends.eos_token_id == processor.tokenizer.eos_token_id is not None
    assert ends.pad_token_id == processor.tokenizer.pad_token_id
    GenerationConfig(eos_token_id=[5, 7], pad_token_id=3).save_pretrained(parts / "text")
    try:
        ends = build_model(config, processor).generation_config
    finally:
        (parts / "text" / "generation_config.json").unlink()
    assert (ends.eos_token_id, ends.pad_token_id) == ([5, 7], 3)


def test_own_data_trains_evaluates_and_generates(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The README's way for a user's own data, from files to an answer."""
    rng = np.random.default_rng(0)
    lines = []
    for index in range(6):
        pixels = rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
        messages = [{"role": "user", "content": "odd"}, {"role": "assistant", "content": "3"}]
        lines.append(json.dumps({"images": [f"{index}.png"], "messages": messages}))
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(lines), encoding="utf-8")
    config = {
        "output": str(tmp_path / "run"),
        "workers": 0,
        "model": config_of(parts, "clip").model_dump(exclude_none=True),
        "data": {"name": "messages", "path": str(data)},
        "stages": [
            {
                "name": "alignment",
                "steps": 60,
                "batch_size": 4,
                "learning_rate": {"projector": 0.01, "text": 0.01},
                "counts": [1, 4, 9],
                "weights": [1, 1, 1],
            }
        ],
    }
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")
    assert main(["train", str(path)]) == 0
    checkpoint = str(tmp_path / "run" / "checkpoint")
    report = tmp_path / "report.json"
    evaluate = ["evaluate", "--model", checkpoint, "--data", str(data), "--counts", "1,4,9,16"]
    assert main([*evaluate, "--output", str(report)]) == 0
    accuracy = json.loads(report.read_text(encoding="utf-8"))["accuracy"]
    assert accuracy == {"1": 1.0, "4": 1.0, "9": 1.0, "16": 1.0}
    capsys.readouterr()
    ask = ["generate", "--model", checkpoint, "--image", str(tmp_path / "0.png")]
    assert main([*ask, "--prompt", "odd", "--tokens", "1,4"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [(tokens, answer) for tokens, *_, answer in rows] == [("1", "3"), ("4", "3")]


def test_tiles_and_trained_counts_reach_processor_and_model(parts: Path) -> None:
    config = config_of(parts, max_tiles=6, use_thumbnail=True)
    processor = build_processor(config)
    assert (processor.max_tiles, processor.use_thumbnail) == (6, True)
    model = build_model(config, processor, {9, 4})
    assert model.config.trained_num_image_tokens == [4, 9]
    model = build_model(config, processor, {9, (1, 4), 4})
    assert model.config.trained_num_image_tokens == [(1, 4), 4, 9]
    assert build_model(config, processor).config.trained_num_image_tokens is None


def test_positions_reach_the_model(parts: Path) -> None:
    config = config_of(parts, projector_position="normalized", image_positions="shared")
    for model in (build_model(config, build_processor(config)), empty_model(config)):
        assert model.config.image_positions == "shared"
        assert model.model.projector.position is not None


def test_digits_are_not_cut() -> None:
    part = {"config": {"model_type": "siglip_vision_model"}}
    with pytest.raises(ValueError, match="max_tiles must be 1 with processor 'digits', got 2"):
        ModelConfig.model_validate(
            {"vision": part, "text": part, "processor": "digits", "max_tiles": 2}
        )


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ([{}], (32, None)),
        ([{"max_frames": 4}], (4, None)),
        ([{"fps": 2}], (32, 2.0)),
        ([{"max_frames": 4, "fps": 2}, {"max_frames": 8, "fps": 2}], (8, 2.0)),
        ([{"max_frames": 8, "fps": 1}, {"max_frames": 4, "fps": 2}], (8, 1.0)),
        ([{}, {"max_frames": 4, "fps": 2}], (4, 2.0)),  # the first one holds pictures
    ],
)
@pytest.mark.parametrize("are_parts", [False, True])
def test_a_trained_processor_shows_the_frames_of_its_data(parts, data, expected, are_parts):
    sets = [{"name": "messages", "path": f"{i}.jsonl", **keys} for i, keys in enumerate(data)]
    if are_parts:
        sets = [{"name": "mixture", "parts": sets}]
    configs = [DataConfig.model_validate(values) for values in sets]
    processor = build_processor(config_of(parts), configs)
    assert (processor.max_frames, processor.fps) == expected
