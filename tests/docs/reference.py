"""The pages of docs/reference/, written from docstrings, configuration classes and parsers.

    python -m tests.docs.reference

writes them. Pages of Python names hold a table of first sentences, and directives of mkdocstrings
that the site fills with whole docstrings.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenflex.cli import command_modules
from tokenflex.cli.parser import CommandLine
from tokenflex.training.config import TrainConfig

FOLDER = Path(__file__).parents[2] / "docs/reference"

MODULES = {
    "tokenflex.md": "tokenflex",
    "dropin.md": "tokenflex.dropin",
    "packing.md": "tokenflex.packing",
    "evaluation.md": "tokenflex.evaluation",
    "kernels.md": "tokenflex_kernels",
}
"""Each page of Python names, and the module whose ``__all__`` it describes."""

MORE_NAMES = {
    "tokenflex": ("tokenflex.images.load_image", "tokenflex.videos.load_video"),
}
"""Public names of modules without a page, by the page that describes them."""

SECTIONS = {
    "TrainConfig": "The run",
    "ModelConfig": "`model`",
    "ConvertedModelConfig": "`model` of a conversion",
    "PartConfig": "`model.vision` and `model.text`",
    "DataConfig": "`data`",
    "StageConfig": "`stages`",
    "PeftConfig": "`peft`",
    "EncoderWarmUpConfig": "`encoder_warm_up`",
    "EvaluationConfig": "`evaluation`",
    "SampleConfig": "`sample`",
}
"""The configuration classes in the order of the page, and their headings."""

_ROLE = re.compile(r":[a-z]+:`~?([^`]+)`")
_WRITTEN = "<!-- written by `python -m tests.docs.reference`; a test keeps it current -->"


def pages() -> dict[str, str]:
    """Return the text of each page by its name."""
    written = {name: names_page(module) for name, module in MODULES.items()}
    written["configuration.md"] = configuration_page()
    written["commands.md"] = commands_page()
    return written


def plain(text: str) -> str:
    """Return a docstring's text as Markdown in one line: roles become code."""
    return re.sub(r"\s+", " ", _ROLE.sub(r"`\1`", text).replace("``", "`")).strip()


def cell(text: str) -> str:
    """Return the text of a table's cell, where characters of Markdown and HTML stand for itself."""
    parts = re.split(r"(`[^`]*`)", text)
    parts[::2] = [part.replace("<", "&lt;").replace("*", r"\*") for part in parts[::2]]
    return "".join(parts).replace("|", r"\|")


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table."""
    header = [*header]
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "|".join(["", *(f" {entry} " if entry else " " for entry in line), ""]) for line in lines
    )


# ---- Python names.


def public_names(module: str) -> dict[str, Any]:
    """Return the public objects of a page by the name under which users import them."""
    loaded = importlib.import_module(module)
    paths = [f"{module}.{name}" for name in loaded.__all__] + [*MORE_NAMES.get(module, ())]
    objects = {}
    for path in paths:
        parent, _, name = path.rpartition(".")
        objects[path] = getattr(importlib.import_module(parent), name)
    return objects


def names_page(module: str) -> str:
    """Return the page of a module's public names; a name of an earlier page refers to it."""
    earlier: dict[str, str] = {}
    for page, other in MODULES.items():
        if other == module:
            break
        for value in public_names(other).values():
            earlier.setdefault(_where(value), f"; see [{other}]({page})")
    objects = public_names(module)
    summary, _, rest = (inspect.getdoc(importlib.import_module(module)) or "").partition("\n\n")
    rows = [
        (
            f"`{path.removeprefix(f'{module}.')}`",
            cell(plain(_summary(value))).rstrip(".") + earlier.get(_where(value), "") + ".",
        )
        for path, value in objects.items()
    ]
    parts = [f"# {module}", _WRITTEN, plain(summary)]
    parts += [plain(part) for part in rest.split("\n\n") if part]
    parts.append(table(("name", "what it is"), rows))
    parts += [f"::: {_where(value)}" for value in objects.values() if _where(value) not in earlier]
    return "\n\n".join(parts) + "\n"


def _where(value: Any) -> str:
    """Return the path of the module that defines a class or function, and its name."""
    return f"{value.__module__}.{value.__qualname__}"


def _summary(value: Any) -> str:
    return (value.__doc__ or "").strip().partition("\n\n")[0]


# ---- Configuration.


def configuration_page() -> str:
    """Return the page of all keys of a configuration."""
    schema = TrainConfig.model_json_schema()
    models = {"TrainConfig": schema, **schema["$defs"]}
    if models.keys() != SECTIONS.keys():
        raise ValueError(f"SECTIONS must name {', '.join(models)}, got {', '.join(SECTIONS)}")
    parts = [
        "# Keys of a configuration",
        _WRITTEN,
        "`tokenflex train CONFIG.yaml` reads these keys. A key without a default must be given. "
        "An unknown key is an error. Where a text says None, YAML has `null`. "
        "[Training](../training.md) explains how the keys work together.",
    ]
    for name, heading in SECTIONS.items():
        model = models[name]
        required = model.get("required", ())
        rows = [
            (f"`{key}`", _kind(field), _default(key, field, required), _meaning(field))
            for key, field in model["properties"].items()
        ]
        texts = [plain(text) for text in model["description"].split("\n\n")]
        parts += [f"## {heading}", *texts, table(("key", "value", "default", "meaning"), rows)]
    return "\n\n".join(parts) + "\n"


def _meaning(field: Mapping[str, Any]) -> str:
    text = plain(field.get("description", ""))
    free = text.endswith("*Free.*")
    return cell(text.removesuffix("*Free.*").strip()) + (" *Free.*" if free else "")


def _default(key: str, field: Mapping[str, Any], required: Iterable[str]) -> str:
    return "" if key in required else f"`{json.dumps(field.get('default'))}`"


def _kind(field: Mapping[str, Any]) -> str:
    """Return what a key may hold, in words."""
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        heading = SECTIONS[name].replace("`", "")
        return f"keys of [{heading}](#{_slug(heading)})"
    if choices := field.get("anyOf") or field.get("oneOf"):
        return " or ".join(map(_kind, choices))
    if "const" in field or "enum" in field:
        choices = [f'`"{choice}"`' for choice in field.get("enum", [field.get("const")])]
        return " or ".join(filter(None, [", ".join(choices[:-1]), choices[-1]]))
    if "prefixItems" in field:
        return f"[{', '.join(_kind(entry) for entry in field['prefixItems'])}]"
    kind = field.get("type")
    if kind == "array":
        return f"list: {_kind(field['items'])}"
    if kind == "object" and "propertyNames" in field:
        return f"for {_kind(field['propertyNames'])}: {_kind(field['additionalProperties'])}"
    words = {"boolean": "true or false", "null": "`null`", "object": "keys", "string": "text"}
    word = "path" if field.get("format") == "path" else words.get(str(kind), str(kind))
    return ", ".join([word, *_bounds(field)])


def _bounds(field: Mapping[str, Any]) -> Iterator[str]:
    for keys, words in (
        (("minimum", "ge"), "at least"),
        (("exclusiveMinimum", "gt"), "above"),
        (("maximum", "le"), "at most"),
        (("exclusiveMaximum", "lt"), "below"),
        (("multipleOf", "multiple_of"), "a multiple of"),
    ):
        for bound in {field[key] for key in keys if key in field} - {float("inf")}:
            yield f"{words} {bound:g}" if bound < 2**31 - 1 else f"{words} {bound}"


def _slug(heading: str) -> str:
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


# ---- Commands.


def command_parsers() -> dict[str, argparse.ArgumentParser]:
    """Return the parser of each command, the repository's included, and its one-line summary."""
    line = CommandLine()
    for module in command_modules():
        module.add_to(line)
    return dict(line._commands.choices)


def commands_page() -> str:
    """Return the page of all commands and their options."""
    parts = [
        "# Commands",
        _WRITTEN,
        "Every command has `--help`, and `--debug`, which shows the traceback of an error. The "
        "exit code is 0, 2 for what a user can mend (one line says what), and 1 for a fault of "
        "the program. `tokenflex --version` prints the version. `ablate` needs a clone of the "
        "repository.",
    ]
    for name, parser in sorted(command_parsers().items()):
        example = (parser.epilog or "").partition("\n")[2].strip()
        summary = plain(parser.description or "")
        parts += [
            f"## tokenflex {name}",
            f"{cell(summary[:1].upper() + summary[1:])}.",
            f"```\n{example}\n```",
        ]
        rows = [
            (_names(action), _value(action), _shown_default(action), _help(parser, action))
            for action in parser._actions
            if action.dest not in ("help", "debug")
        ]
        if rows:
            parts.append(table(("argument", "value", "default", "meaning"), rows))
        for group in parser._mutually_exclusive_groups:
            options = " and ".join(
                f"`{action.option_strings[0]}`" for action in group._group_actions
            )
            parts.append(f"{'Exactly' if group.required else 'At most'} one of {options}.")
    return "\n\n".join(parts) + "\n"


def _names(action: argparse.Action) -> str:
    if action.option_strings:
        return ", ".join(f"`{option}`" for option in action.option_strings)
    return f"`{(action.metavar or action.dest).upper()}`"


def _value(action: argparse.Action) -> str:
    if action.choices is not None:
        return ", ".join(f"`{choice}`" for choice in action.choices)
    if action.nargs == 0:
        return ""
    many = {"*": " ...", "+": " ..."}.get(str(action.nargs), "")
    if action.option_strings:
        return f"`{action.metavar or action.dest.upper()}{many}`"
    return many.strip()


def _shown_default(action: argparse.Action) -> str:
    if action.option_strings and action.required:
        return "must be given"
    if action.default in (None, False, argparse.SUPPRESS) or action.default == []:
        return ""
    if isinstance(action.default, list | tuple):
        return f"`{','.join(map(str, action.default))}`"
    return f"`{action.default}`"


def _help(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    return cell(plain(parser._get_formatter()._expand_help(action) if action.help else ""))


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
