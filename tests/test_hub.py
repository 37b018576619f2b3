"""Models by name: ``org/name`` on the Hugging Face Hub, here a cache laid out as its client does.

No network is used: the cache stands for what was downloaded, and the client is told to be offline.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from tests.models.tiny import tiny_model
from tests.test_cli import command  # noqa: F401  # a fixture
from tests.test_front_door import converted, pictures, stock  # noqa: F401  # fixtures
from tokenflex import from_pretrained
from tokenflex.checkpoints import load_model
from tokenflex.digits.processor import digits_processor
from tokenflex.hub import checkpoint_config, is_hub_name, local_checkpoint
from tokenflex.models.loading import is_conversion_config
from tokenflex.training.config import load_config

pytestmark = pytest.mark.usefixtures("own_accelerator_and_threads")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Return a function that puts a folder into the cache as the repository of a name."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)

    def put(name: str, folder: Path) -> str:
        repository = cache / f"models--{name.replace('/', '--')}"
        shutil.copytree(folder, repository / "snapshots" / COMMIT)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(COMMIT)
        return name

    return put


@pytest.fixture
def own(tmp_path) -> Path:
    tiny_model().save_pretrained(tmp_path / "own")
    digits_processor(9).save_pretrained(tmp_path / "own")
    return tmp_path / "own"


def test_a_stock_model_of_the_hub_is_converted(command, hub, stock, pictures, tmp_path):  # noqa: F811
    name = hub("org/tiny-llava", stock)
    code, out, errors_ = command(
        *("convert", name, tmp_path / "out", "--images", pictures, "--tokens", "16")
    )
    assert (code, errors_) == (0, [])
    assert "loading the llava of org/tiny-llava" in out
    model, processor = load_model(tmp_path / "out")
    assert processor.num_image_tokens == 16
    model, _ = from_pretrained(name, num_image_tokens=4)
    assert model.config.tokenflex["num_image_tokens"] == 4
    code, _, (line,) = command("generate", "--model", name, "--prompt", "what")
    assert code == 2
    assert "org/tiny-llava holds a stock llava: convert it first, with `tokenflex convert " in line


def test_a_conversion_of_the_hub_is_taken_as_a_folder(command, hub, converted, pictures, tmp_path):  # noqa: F811
    name = hub("org/converted", converted)
    assert is_conversion_config(checkpoint_config(name))
    answers = []
    for model in (converted, name):
        code, out, errors_ = command(
            *("generate", "--model", model, "--image", pictures / "0.png"),
            *("--prompt", "which colour is this", "--tokens", "4,16", "--max-new-tokens", 2),
        )
        assert (code, errors_) == (0, [])
        answers.append([(line.split()[0], line.split()[3:]) for line in out.splitlines()])
    assert answers[0] == answers[1]
    model, processor = from_pretrained(name)
    assert processor.num_image_tokens == 64
    code, _, (line,) = command("convert", name, tmp_path / "again", "--init", "random")
    assert (code, "org/converted is a conversion already" in line) == (2, True)
    code, _, (line,) = command("route", "--model", name, "--data", "digits", "--counts", "4,9")
    assert (code, "checkpoint folder org/converted does not exist" in line) == (2, True)


def run_file(path: Path, start: str, **changes: object) -> Path:
    stage = {"name": "all", "steps": 1, "batch_size": 2, "learning_rate": {"projector": 0.001}}
    values = {
        "output": str(path.parent / "run"),
        "model": {"start": start},
        "data": {"name": "digits", "size": 2, "questions": 1},
        "stages": [{**stage, "counts": [4], "weights": [1]}],
        "evaluation": {"data": {"name": "digits", "size": 2}, "counts": [4]},
        **changes,
    }
    path.write_text(json.dumps({**values, "threads": 1, "workers": 0}))
    return path


def test_a_conversion_of_the_hub_is_trained(command, hub, converted, tmp_path, monkeypatch):  # noqa: F811
    name = hub("org/converted", converted)
    config = run_file(tmp_path / "run.yaml", name)
    with monkeypatch.context() as alone:
        alone.setattr(huggingface_hub, "snapshot_download", None)
        alone.setattr(huggingface_hub, "hf_hub_download", None)
        assert str(load_config(config).model.start) == name  # checked without the Hub
    code, _, errors_ = command("train", config)
    assert (code, errors_) == (0, [])
    _, processor = load_model(tmp_path / "run" / "checkpoint")
    assert processor.num_image_tokens == 64
    assert name in (tmp_path / "run" / "checkpoint" / "README.md").read_text()


@pytest.mark.parametrize("kind", ["none", "stock"])
def test_a_run_cannot_start_from_another_name(command, hub, stock, tmp_path, kind):  # noqa: F811
    name = hub("org/stock", stock) if kind == "stock" else "org/none"
    code, _, (line,) = command("train", run_file(tmp_path / "run.yaml", name))
    words = {"none": "is no folder, and cannot be read", "stock": "must be a conversion made by"}
    assert (code, words[kind] in line, name in line) == (2, True, True)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_ours_on_the_hub_is_taken_as_a_folder(command, hub, own, tmp_path):  # noqa: F811
    name = hub("org/own_1.5", own)
    report = tmp_path / "report.json"
    code, _, errors_ = command(
        *("evaluate", name, "--data", "digits", "--size", 2, "--counts", "4,9"),
        *("--output", report),
    )
    assert (code, errors_) == (0, [])
    assert [*json.loads(report.read_text())["accuracy"]] == ["4", "9"]
    for place in (name, own):
        model, processor = from_pretrained(place)
        assert type(model).__name__ == "TokenFlexForConditionalGeneration"
        assert (processor.num_image_tokens, model.training) == (9, False)
    model, processor = from_pretrained(name, num_image_tokens=4)
    assert (processor.num_image_tokens, model.config.num_image_tokens) == (4, 4)
    with pytest.raises(ValueError, match="init is for stock weights"):
        from_pretrained(name, init="random")


def test_a_name_that_cannot_be_fetched_is_one_line(command, hub, tmp_path):  # noqa: F811
    for arguments in (
        ("convert", "org/none", tmp_path / "out", "--init", "random"),
        ("generate", "--model", "org/none", "--prompt", "what"),
        ("evaluate", "org/none", "--data", "digits", "--counts", "4"),
    ):
        code, _, (line,) = command(*arguments)
        assert code == 2
        assert line == (
            "tokenflex: org/none is no folder, and cannot be read from the Hugging Face Hub: the "
            "Hub cannot be reached, and the cache on this machine does not hold it"
        )
    assert not (tmp_path / "out").exists()
    assert huggingface_hub.logging.get_verbosity() == logging.ERROR  # no line for each retry


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (errors.RepositoryNotFoundError, "no repository has that name, or it is private"),
        (errors.GatedRepoError, "access to it is restricted"),
        (errors.RemoteEntryNotFoundError, "the repository has no config.json"),
        (errors.HfHubHTTPError, "HfHubHTTPError: 503 Service Unavailable"),
        (ConnectionError, "ConnectionError: 503 Service Unavailable"),
    ],
)
def test_what_the_hub_answers_is_told_in_words(monkeypatch, kind, words):
    message = "\n503 Service Unavailable\nmore"
    response = SimpleNamespace(status_code=503, headers={}, request=None)
    error = kind(message) if kind is ConnectionError else kind(message, response=response)

    def hf_hub_download(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    with pytest.raises(FileNotFoundError, match="org/none is no folder") as caught:
        load_model("org/none")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "path", ["name", "a/b/c", "/org/name", "./name", "../name", "~/name", "org/..", "runs/mine", ""]
)
def test_paths_of_this_machine_are_not_looked_for_on_the_hub(path, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    assert not is_hub_name(path)
    if path:
        with pytest.raises(FileNotFoundError, match=r"checkpoint folder .* does not exist"):
            local_checkpoint(path if path != "../name" else "../no-name")


def test_only_data_is_fetched(hub, converted, monkeypatch):  # noqa: F811
    asked = {}

    def snapshot_download(name, *, allow_patterns):
        asked.update(name=name, patterns=allow_patterns)
        return str(converted)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert local_checkpoint("org/name") == converted
    names = ["a.py", "b.bin", "c.pt", "d.pkl", "model.safetensors", "config.json", "router/r.json"]
    kept = huggingface_hub.utils.filter_repo_objects(names, allow_patterns=asked["patterns"])
    assert [*kept] == ["model.safetensors", "config.json", "router/r.json"]


@pytest.mark.parametrize("by", ["command", "library"])
def test_code_of_a_repository_is_not_run(command, hub, stock, tmp_path, by):  # noqa: F811
    folder = tmp_path / "with-code"
    shutil.copytree(stock, folder)
    values = json.loads((folder / "config.json").read_text())
    values |= {"model_type": "unknown_vlm", "auto_map": {"AutoConfig": "code.Config"}}
    (folder / "config.json").write_text(json.dumps(values))
    ran = tmp_path / "ran"
    (folder / "code.py").write_text(f"open({str(ran)!r}, 'w')\nclass Config: pass\n")
    name = hub("org/with-code", folder)
    if by == "command":
        code, _, (line,) = command("convert", name, tmp_path / "out", "--init", "random")
        assert code == 2
    else:
        with pytest.raises(ValueError, match="trust_remote_code") as error:
            from_pretrained(name)
        line = str(error.value)
    assert "contains custom code" in line
    assert not ran.exists()


@pytest.mark.parametrize("config", [None, {"output": "runs/train"}])
def test_the_folder_of_a_run_names_its_checkpoint(tmp_path, config):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint/config.json").write_text("{}")
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"folder of a run; its model is in .*checkpoint$"):
        checkpoint_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    assert checkpoint_config(tmp_path) == {"model_type": "qwen2"}
