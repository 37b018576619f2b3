"""A saved checkpoint leads transformers' Auto classes to ours, or to an error, never elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    pipeline,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import is_torchvision_available

import tokenflex
from tests.models.tiny import picture, tiny_config, tiny_model
from tokenflex.digits.processor import digits_processor
from tokenflex.models.auto_map import STUB
from tokenflex.models.modeling import TokenFlexModel

CLASSES = {
    "AutoConfig": "TokenFlexConfig",
    "AutoModel": "TokenFlexModel",
    "AutoModelForImageTextToText": "TokenFlexForConditionalGeneration",
    "AutoModelForMultimodalLM": "TokenFlexForConditionalGeneration",
    "AutoProcessor": "TokenFlexProcessor",
}
KNOWN = {auto: name for auto, name in CLASSES.items() if hasattr(transformers, auto)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    tiny_model().save_pretrained(folder)
    digits_processor(4).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def modules_cache(tmp_path, monkeypatch) -> Path:
    """The folder that transformers copies the code of checkpoints to."""
    cache = tmp_path / "modules"
    monkeypatch.setenv("HF_MODULES_CACHE", str(cache))
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(cache))
    return cache


def python(code: str, **environment: str) -> str:
    """The output of a process of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        cwd=Path(tokenflex.__file__).parents[1],
        env={
            **os.environ,
            **{"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "warning"},
            **environment,
        },
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


LOAD_EACH = f"""
def load_each(mark, folder, **options):
    import transformers
    for name in {list(KNOWN)!r}:
        try:
            loaded = getattr(transformers, name).from_pretrained(folder, **options)
            print(mark, name, type(loaded).__module__, type(loaded).__name__)
        except Exception as error:
            print(mark, name, type(error).__name__, str(error).replace("\\n", " "))
"""


def loaded_by(output: str, mark: str) -> dict[str, str]:
    """By Auto class: the class that came, or the error."""
    lines = [line[line.index(mark) :].split(" ", 3) for line in output.splitlines() if mark in line]
    assert len(lines) == len(KNOWN)
    return {name: f"{where} {what}" for _, name, where, what in lines}


class Stranger(NamedTuple):
    """The output of a process that did not import us, and the folder that it saved to."""

    output: str
    again: Path
    modules_cache: Path


@pytest.fixture(scope="module")
def stranger(folder, tmp_path_factory) -> Stranger:
    """One process: it loads by each class, then again trusting the checkpoint, and saves."""
    place = tmp_path_factory.mktemp("stranger")
    again, cache = place / "again", place / "modules"
    output = python(
        f"""
{LOAD_EACH}
import os
load_each("UNKNOWN", {str(folder)!r})
print("CODE", os.path.exists({str(cache)!r}))
options = {{"trust_remote_code": True}}
load_each("TRUSTED", {str(folder)!r}, **options)
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, pipeline
for auto in (AutoConfig, AutoModelForImageTextToText, AutoProcessor):
    auto.from_pretrained({str(folder)!r}, **options).save_pretrained({str(again)!r})
ask = pipeline("image-text-to-text", {str(folder)!r}, **options)
assert type(ask.model).__name__ == "TokenFlexForConditionalGeneration"
assert type(ask.processor).__name__ == "TokenFlexProcessor"
""",
        HF_MODULES_CACHE=str(cache),
    )
    return Stranger(output, again, cache)


def test_a_process_that_does_not_know_us_is_told_so(folder, stranger):
    for name, outcome in loaded_by(stranger.output, "UNKNOWN").items():
        assert outcome.startswith("ValueError"), name
        assert "trust_remote_code=True" in outcome
        assert str(folder) in outcome
    assert "CODE False" in stranger.output


def test_a_process_that_trusts_the_checkpoint_gets_our_classes(stranger):
    loaded = loaded_by(stranger.output, "TRUSTED")
    assert {name: outcome.split()[1] for name, outcome in loaded.items()} == KNOWN
    assert all(outcome.startswith("tokenflex.models.") for outcome in loaded.values())
    assert list(stranger.modules_cache.rglob(STUB))


def test_what_was_loaded_so_is_saved_as_any_other(folder, stranger):
    again = stranger.again
    assert {file.name for file in again.iterdir()} == {file.name for file in folder.iterdir()}
    for name in ("config.json", "processor_config.json"):
        maps = [json.loads((place / name).read_text())["auto_map"] for place in (folder, again)]
        assert maps[0] == maps[1], name
    assert (again / STUB).read_text() == (folder / STUB).read_text()


# Some libraries hold the package that transformers replaced by a second one.
NAMES_LOAD_NOTHING = """
import sys
import transformers
import tokenflex
held = transformers
assert "torch" not in sys.modules
from transformers import LlamaForCausalLM
for package in (held, transformers, sys.modules["transformers"]):
    assert package.TokenFlexForConditionalGeneration.__module__ == "tokenflex.models.modeling"
assert LlamaForCausalLM.__name__ == "LlamaForCausalLM"
"""


@pytest.mark.parametrize(
    ("before", "options"),
    [
        pytest.param("import tokenflex", {}, marks=pytest.mark.release),
        (NAMES_LOAD_NOTHING, {"trust_remote_code": True}),
    ],
    ids=["alone", "after transformers, whose names load nothing before they are used"],
)
def test_a_process_that_knows_us_runs_no_code_of_the_checkpoint(
    folder, tmp_path, before, options, modules_cache
):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / STUB).write_text("raise RuntimeError('code of the checkpoint was run')")
    output = python(f"{before}\n{LOAD_EACH}\nload_each('LOADED', {str(broken)!r}, **{options})")
    loaded = loaded_by(output, "LOADED")
    assert {name: outcome.split()[1] for name, outcome in loaded.items()} == KNOWN
    assert not modules_cache.exists()


def test_loading_here_neither_asks_nor_warns(folder, recwarn, monkeypatch, modules_cache):
    def ask(_):
        raise AssertionError("asked for trust_remote_code")

    monkeypatch.setattr("builtins.input", ask)
    for auto, name in KNOWN.items():
        for options in ({}, {"trust_remote_code": True}):
            loaded = getattr(transformers, auto).from_pretrained(folder, **options)
            assert type(loaded).__name__ == name
    pipeline("image-text-to-text", model=str(folder))
    assert not [warning for warning in recwarn if "FutureWarning" not in str(warning)]
    assert not modules_cache.exists()


@pytest.mark.parametrize("kind", ["model", "configuration", "processor"])
def test_whatever_is_saved_brings_the_map_and_its_module(tmp_path, kind):
    if kind == "model":
        tiny_model().save_pretrained(tmp_path)
    elif kind == "configuration":
        tiny_config().save_pretrained(tmp_path)
    else:
        digits_processor(4).save_pretrained(tmp_path)
    file = "processor_config.json" if kind == "processor" else "config.json"
    expected = {auto: f"{STUB.removesuffix('.py')}.{name}" for auto, name in CLASSES.items()}
    if kind == "processor":
        expected = {"AutoProcessor": expected["AutoProcessor"]}
    assert json.loads((tmp_path / file).read_text())["auto_map"] == expected
    names: dict = {}
    exec((tmp_path / STUB).read_text(), names)
    for reference in expected.values():
        assert names[reference.split(".")[1]].__module__.startswith("tokenflex.models.")


def test_checkpoints_saved_without_a_map_still_load(folder, tmp_path):
    older = tmp_path / "older"
    shutil.copytree(folder, older)
    (older / STUB).unlink()
    for file in ("config.json", "processor_config.json"):
        values = json.loads((older / file).read_text())
        del values["auto_map"]
        (older / file).write_text(json.dumps(values))
    generation = json.loads((older / "generation_config.json").read_text())
    del generation["suppress_tokens"]
    (older / "generation_config.json").write_text(json.dumps(generation))
    assert type(AutoConfig.from_pretrained(older)) is tokenflex.TokenFlexConfig
    assert type(AutoModel.from_pretrained(older)) is TokenFlexModel
    model = AutoModelForImageTextToText.from_pretrained(older)
    assert type(model) is tokenflex.TokenFlexForConditionalGeneration
    assert type(AutoProcessor.from_pretrained(older)) is tokenflex.TokenFlexProcessor


def test_an_architecture_is_found_by_its_name_on_the_package():
    architecture = "TokenFlexForConditionalGeneration"
    assert getattr(transformers, architecture) is tokenflex.TokenFlexForConditionalGeneration
    assert transformers.TokenFlexModel is TokenFlexModel
    assert transformers.TokenFlexConfig is tokenflex.TokenFlexConfig
    assert transformers.TokenFlexProcessor is tokenflex.TokenFlexProcessor
    assert not hasattr(transformers, "TokenFlexForNothing")
    assert not hasattr(transformers.models, architecture)
    assert MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["tokenflex"] == architecture


needs_multimodal = pytest.mark.skipif(
    "AutoModelForMultimodalLM" not in KNOWN, reason="this transformers has no such class"
)


@needs_multimodal
def test_servers_know_a_model_of_any_modality_by_its_name():
    names = transformers.models.auto.modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
    assert names["tokenflex"] == "TokenFlexForConditionalGeneration"


@needs_multimodal
@pytest.mark.skipif(not is_torchvision_available(), reason="the pipeline needs torchvision")
def test_the_pipeline_of_any_modality_answers(folder):
    ask = pipeline("any-to-any", model=str(folder))
    assert type(ask.model) is tokenflex.TokenFlexForConditionalGeneration
    chat = [
        {
            "role": "user",
            "content": [{"type": "image", "image": picture(1)}, {"type": "text", "text": " odd"}],
        }
    ]
    same = pipeline("image-text-to-text", model=str(folder))
    options = {"max_new_tokens": 3, "return_full_text": False}
    answer, expected = (one(text=chat, **options)[0]["generated_text"] for one in (ask, same))
    assert answer == expected
