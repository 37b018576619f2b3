"""The written pages of docs/reference/ and the drawings are current, and say what the code does."""

from __future__ import annotations

import argparse
import re

import pytest

from tests.docs import drawings, reference
from tokenflex.training.config import TrainConfig


@pytest.mark.parametrize("name", [*reference.MODULES, "configuration.md", "commands.md"])
def test_written_pages_are_current(name):
    """``python -m tests.docs.reference`` writes them."""
    page = (reference.FOLDER / name).read_text(encoding="utf-8")
    assert page == reference.pages()[name]


@pytest.mark.parametrize("name", drawings.DRAWINGS)
def test_drawings_are_current(name):
    """``python -m tests.docs.drawings`` writes them."""
    written = (drawings.FOLDER / name).read_text(encoding="utf-8")
    assert written == drawings.DRAWINGS[name]()


def test_no_written_page_is_left_over():
    pages = {path.name for path in reference.FOLDER.glob("*.md")}
    assert pages == {"README.md", *reference.pages()}


def test_every_public_name_has_one_directive():
    text = "".join(map(reference.names_page, reference.MODULES.values()))
    directives = re.findall(r"^::: (\S+)$", text, flags=re.MULTILINE)
    assert len(directives) == len({*directives})
    for module in reference.MODULES.values():
        for value in reference.public_names(module).values():
            assert reference._where(value) in directives


def test_every_key_is_described():
    page = reference.configuration_page()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    schema = TrainConfig.model_json_schema()
    models = [schema, *schema["$defs"].values()]
    assert len(rows) == sum(len(model["properties"]) for model in models)
    assert [row for row in rows if len(re.split(r"(?<!\\)\|", row)) != 6] == []
    assert [row for row in rows if re.search(r"\| \|$", row)] == []  # without a meaning


def test_every_option_is_described():
    page = reference.commands_page()
    for name, parser in reference.command_parsers().items():
        section = page.split(f"## tokenflex {name}\n")[1].split("\n## ")[0]
        for action in parser._actions:
            if action.dest not in ("help", "debug"):
                names = action.option_strings or [(action.metavar or action.dest).upper()]
                assert all(f"`{option}`" in section for option in names)
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert [row for row in rows if re.search(r"\| \|$", row)] == []


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "integer", "minimum": 1}, "integer, at least 1"),
        ({"type": "number", "exclusiveMinimum": 0, "lt": float("inf")}, "number, above 0"),
        ({"enum": ["a", "b", "c"]}, '`"a"`, `"b"` or `"c"`'),
        ({"const": "a"}, '`"a"`'),
        ({"anyOf": [{"type": "boolean"}, {"type": "null"}]}, "true or false or `null`"),
        (
            {"$ref": "#/$defs/PartConfig"},
            "keys of [model.vision and model.text](#modelvision-and-modeltext)",
        ),
        ({"type": "array", "items": {"type": "string"}}, "list: text"),
        ({"type": "array", "prefixItems": [{"type": "integer"}] * 2}, "[integer, integer]"),
    ],
)
def test_a_key_s_values_in_words(schema, words):
    assert reference._kind(schema) == words


def test_cells_show_characters_of_markdown():
    assert reference.cell("a|b <x> *c* `<y> *d*`") == r"a\|b &lt;x> \*c\* `<y> *d*`"


def test_arguments_in_words():
    parser = argparse.ArgumentParser()
    flag = parser.add_argument("--flag", action="store_true")
    many = parser.add_argument("--many", nargs="+", default=["a", "b"])
    needed = parser.add_argument("-n", "--needed", required=True, metavar="X")
    folder = parser.add_argument("folder", default=None)
    assert [reference._names(a) for a in (flag, needed, folder)] == [
        "`--flag`",
        "`-n`, `--needed`",
        "`FOLDER`",
    ]
    assert [reference._value(a) for a in (flag, many, needed, folder)] == [
        "",
        "`MANY ...`",
        "`X`",
        "",
    ]
    assert [reference._shown_default(a) for a in (flag, many, needed, folder)] == [
        "",
        "`a,b`",
        "must be given",
        "",
    ]
