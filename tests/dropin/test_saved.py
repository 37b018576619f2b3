"""Files of conversions: tokenflex loads them, and plain transformers gets no random projector."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    LlavaForConditionalGeneration,
)

import tokenflex
from tests.dropin.processors import stock_processor
from tests.dropin.tiny import PROMPTS, batch, stock_model
from tokenflex import from_pretrained, replace_projector, restore_projector
from tokenflex.dropin.saved import MODEL_TYPE, STUB

LOAD = """
import transformers
for options in ({{}}, {{"trust_remote_code": True}}):
    try:
        loaded = transformers.AutoModelForImageTextToText.from_pretrained({folder!r}, **options)
        print("\\nOUTCOME", type(loaded).__name__, loaded.projector.down.weight.sum().item())
    except ValueError as error:
        print("\\nOUTCOME refused", str(error).replace("\\n", " "))
"""


def converted(name: str):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return replace_projector(stock_model(name), num_image_tokens=(4, 4))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A conversion, and the folder that holds it with its processor."""
    folder = tmp_path_factory.mktemp("saved")
    model, processor = stock_model("llava"), stock_processor("llava")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        replace_projector(model, processor, num_image_tokens=16)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, folder


@pytest.mark.slow
def test_plain_transformers_refuses_and_finds_the_installed_package_where_it_is_trusted(
    saved, tmp_path
):
    model, folder = saved
    done = subprocess.run(
        [sys.executable, "-c", LOAD.format(folder=str(folder))],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        cwd=Path(tokenflex.__file__).parents[1],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path)},
        check=True,
    )
    refused, trusted = [line for line in done.stdout.splitlines() if line.startswith("OUTCOME")]
    assert refused.startswith("OUTCOME refused")
    assert "trust_remote_code=True" in refused
    assert trusted.split()[1] == "LlavaForConditionalGeneration"
    assert float(trusted.split()[2]) == pytest.approx(model.projector.down.weight.sum().item())


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3"])  # with and without old keys
def test_auto_classes_load_a_conversion_as_tokenflex_does(name, tmp_path):
    model = converted(name)
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["model_type"] == MODEL_TYPE
    assert (tmp_path / STUB).exists()
    inputs = batch(name, PROMPTS)
    with torch.no_grad():
        expected = model(**inputs).logits
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
        assert torch.equal(loaded.eval()(**inputs).logits, expected)
    assert loaded.config.model_type == model.config.model_type
    assert loaded.config.tokenflex["num_image_tokens"] in ((4, 4), [4, 4])
    loaded.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    for key in ("model_type", "architectures", "auto_map", "tokenflex"):
        assert again[key] == values[key]
    new = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(tmp_path))
    assert {*new.state_dict()} == {*model.state_dict()}


def test_the_stock_class_reads_the_stock_values_and_says_that_the_projector_is_new(saved):
    """Not the defaults of its config, which may be those of a model of many gigabytes."""
    model, folder = saved
    loaded, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert [p.shape for p in loaded.lm_head.parameters()] == [
        p.shape for p in model.lm_head.parameters()
    ]
    assert loaded.config.text_config.num_hidden_layers == model.config.text_config.num_hidden_layers
    assert {"linear_1", "linear_2"} <= {key.split(".")[-2] for key in info["missing_keys"]}


def test_conversions_of_earlier_versions_load(saved, tmp_path):
    model, folder = saved
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    values = json.loads((tmp_path / "config.json").read_text())
    assert values.pop("auto_map")
    values["model_type"] = values["tokenflex"].pop("stock_model_type")
    values["architectures"] = values["tokenflex"].pop("stock_architectures")
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / STUB).unlink()
    loaded, processor = from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert processor.num_image_tokens == 16


def test_a_config_survives_copies_and_is_a_stock_one_after_restoring(saved, tmp_path):
    model, folder = saved
    for config in (copy.deepcopy(model.config), pickle.loads(pickle.dumps(model.config))):
        assert type(config) is type(model.config)
        assert config.to_dict() == model.config.to_dict()
    assert type(from_pretrained(folder)[0].config) is type(model.config)
    other = converted("llava")
    stock = type(stock_model("llava").config)
    restore_projector(other)
    assert type(other.config) is stock
    other.config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llava"
    assert not (tmp_path / STUB).exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stock_model_type": "no_such"}, "have a stock_model_type in tokenflex, got 'no_such'"),
        ({"patch_merge": None}, "patch_merge is missing"),
    ],
)
def test_a_broken_config_is_one_clear_error(saved, tmp_path, change, words):
    _, folder = saved
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    values = json.loads((tmp_path / "config.json").read_text())
    values["tokenflex"] |= change
    values["tokenflex"] = {k: v for k, v in values["tokenflex"].items() if v is not None}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=words):
        from_pretrained(tmp_path)
