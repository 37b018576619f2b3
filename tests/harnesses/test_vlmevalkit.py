"""The adapter for VLMEvalKit: one entry per count, for all benchmarks."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

from tests.harnesses.names import Unreadable, arbitrary_names
from tests.models.tiny import picture

pytestmark = pytest.mark.usefixtures("standins")


@pytest.fixture
def toolkit():
    return importlib.import_module("tokenflex.harnesses.vlmevalkit")


@pytest.fixture
def images(tmp_path):
    paths = [str(tmp_path / f"{seed}.png") for seed in (1, 2)]
    for seed, path in zip((1, 2), paths, strict=True):
        picture(seed).save(path)
    return paths


def test_an_entry_a_count(toolkit, checkpoint):
    names = toolkit.register(checkpoint, [4, "2x3", "auto"], max_tiles=2)
    assert names == ["TokenFLEX-n4", "TokenFLEX-n2x3", "TokenFLEX-nauto"]
    entries = sys.modules["vlmeval.config"].supported_VLM
    assert [*entries] == names
    assert [entries[name].keywords["tokens"] for name in names] == [4, "2x3", "auto"]
    assert {entries[name].keywords["max_tiles"] for name in names} == {2}


@pytest.mark.parametrize(("tokens", "count"), [(4, 4), ("2x3", (2, 3))])
def test_an_interleaved_message_is_answered_in_its_order(
    toolkit, checkpoint, images, greedy, tokens, count
):
    supported = {}
    (name,) = toolkit.register(checkpoint, [tokens], supported=supported, max_new_tokens=4)
    model = supported[name]()
    assert model.INTERLEAVE
    message = [
        {"type": "text", "value": "odd"},
        {"type": "image", "value": images[0]},
        {"type": "text", "value": "where"},
        {"type": "image", "value": images[1]},
    ]
    expected = greedy([picture(1), picture(2)], "odd<image>where<image>", count, 4)[0]
    assert model.generate(message) == expected


def test_the_name_of_the_benchmark_is_never_looked_at(toolkit, checkpoint, images, monkeypatch):
    model = toolkit.TokenFlex(checkpoint, 9, max_new_tokens=1)
    read, reply = [], model.assistant.reply

    def record(conversations, **options):
        replies = reply(conversations, **options)
        read.extend((one.vision_tokens, one.prompt_tokens) for one in replies)
        return replies

    monkeypatch.setattr(model.assistant, "reply", record)
    message = [{"type": "image", "value": images[0]}, {"type": "text", "value": "odd"}]
    for benchmark in (Unreadable(), *arbitrary_names(3, 4), None):
        model.generate(message, dataset=benchmark)
        assert not model.use_custom_prompt(benchmark)
    assert {*read} == {(9, 10)}


def test_what_it_cannot_do_is_said(toolkit, checkpoint, tmp_path):
    model = toolkit.TokenFlex(checkpoint, 4)
    with pytest.raises(AssertionError, match="video"):  # the toolkit's own way
        model.generate([{"type": "video", "value": "a.mp4"}])
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        model.generate([{"type": "image", "value": str(tmp_path / "none.png")}])


def test_without_the_toolkit_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "vlmeval.vlm.base", None)
    monkeypatch.delitem(sys.modules, "tokenflex.harnesses.vlmevalkit", raising=False)
    with pytest.raises(ImportError, match="VLMEvalKit"):
        importlib.import_module("tokenflex.harnesses.vlmevalkit")


def test_the_snippet_of_the_page_runs(toolkit, checkpoint, tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs/evaluation.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "CHECKPOINT").symlink_to(checkpoint)
    exec(compile(snippet, "docs/evaluation.md", "exec"), {})
