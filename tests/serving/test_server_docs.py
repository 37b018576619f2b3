"""The pages about serving are true: links, the snippet, the options and the measured table."""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
import urllib.request
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from experiments.serving.pages import TABLES, with_table
from tests.serving.server_tools import running, tiny_served
from tokenflex.cli.parser import CommandLine
from tokenflex.cli.serve import add_to

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs/serving"
PAGE = (FOLDER / "server.md").read_text(encoding="utf-8")
RESULT = json.loads((ROOT / "docs/results/serving/server.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["server.md", "README.md", "vllm.md"])
def test_links_lead_somewhere(name):
    text = (FOLDER / name).read_text(encoding="utf-8")
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    assert targets
    assert [t for t in targets if not (FOLDER / t).exists()] == []
    headings = re.findall(r"^#+ (.+)$", PAGE, flags=re.MULTILINE)
    anchors = {heading.lower().replace(" ", "-") for heading in headings}
    assert {*re.findall(r"\]\(#([^)]+)\)", PAGE)} <= anchors


def test_the_quick_start_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(sys.modules, "openai", openai_stand_in())
    snippets = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    served = tiny_served()
    with running(served) as client:
        printed, names = io.StringIO(), {}
        with contextlib.redirect_stdout(printed):
            for snippet in snippets:
                exec(snippet.replace("127.0.0.1:8000", f"127.0.0.1:{client.port}"), names)
    with_urllib, with_openai = printed.getvalue().splitlines()
    assert "'image_tokens': [9], 'encoder_passes': 1" in with_urllib
    assert "image_tokens=[9], encoder_passes=0" in with_openai


def openai_stand_in() -> ModuleType:
    """Return a module openai, which is not installed: its calls on the page, over HTTP as well."""

    def fetch(address: str, body: dict | None = None) -> SimpleNamespace:
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(address, data) as answer:
            return json.load(answer, object_hook=lambda values: SimpleNamespace(**values))

    def client(base_url: str, api_key: str) -> SimpleNamespace:
        def create(extra_body: dict, **fields: object) -> SimpleNamespace:
            return fetch(f"{base_url}/chat/completions", fields | extra_body)

        models = SimpleNamespace(list=lambda: fetch(f"{base_url}/models"))
        completions = SimpleNamespace(create=create)
        return SimpleNamespace(models=models, chat=SimpleNamespace(completions=completions))

    module = ModuleType("openai")
    module.OpenAI = client
    return module


def test_the_table_of_bounds_holds_the_defaults():
    line = CommandLine()
    add_to(line)
    options = vars(line.parser.parse_args(["serve", "MODEL"]))
    rows = re.findall(r"^\| `--([a-z-]+)` \| ([^|]+) \|", PAGE, flags=re.MULTILINE)
    assert len(rows) == 10
    for name, default in rows:
        value = options[name.replace("-", "_")]
        assert default == ("the model's positions" if value is None else str(value))
    for name in re.findall(r"`--([a-z-]+)`", PAGE):
        assert name.replace("-", "_") in options


@pytest.mark.parametrize("name", TABLES)
def test_measured_tables_are_those_of_the_results(name):
    page = (FOLDER / name).read_text(encoding="utf-8")
    assert with_table(page, TABLES[name]()) == page


def test_what_was_measured_is_whole():
    """No answer was lost or unlike generate's; pictures that were known cost no encoding."""
    asked = RESULT["requests_a_round"] * RESULT["rounds"]
    assert RESULT["answers"] == asked * len(RESULT["rows"])
    assert RESULT["answers_unlike_generate"] == 0
    rows = {(row["counts"], row["pictures"]): row for row in RESULT["rows"]}
    assert {*rows} == {
        *((name, "new") for name in ("4", "9", "16", "mixed")),
        ("mixed", "asked again"),
    }
    for (name, pictures), row in rows.items():
        assert row["requests"] == asked
        if name != "mixed":
            assert row["vision_tokens"] == int(name) * asked
        if pictures == "new":
            assert row["encoder_passes"] == asked
        else:
            assert row["encoder_passes"] < asked / 2
