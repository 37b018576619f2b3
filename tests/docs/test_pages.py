"""The code on the pages: Python runs, commands and configurations are ones that exist."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from tests.docs.reference import command_parsers
from tests.docs.test_site import PAGES, ROOT, read
from tests.dropin.tiny import stock_model
from tests.models.tiny import tiny_model
from tokenflex import TokenAdaptiveProjector
from tokenflex.cli import command_modules
from tokenflex.cli.parser import CommandLine
from tokenflex.digits.processor import digits_processor
from tokenflex.dropin import families
from tokenflex.training.config import StageConfig, TrainConfig

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)

RUN_ELSEWHERE = {
    "README.md": "tests/test_readme.py",
    "docs/dropin.md": "tests/test_docs.py",
    "docs/evaluation.md": "tests/harnesses/test_vlmevalkit.py",
    "docs/how-to/own-data.md": "tests/training/test_own_data_page.py",
    "docs/models.md": "tests/test_docs.py",
    "docs/packing.md": "tests/packing/test_docs.py",
    "docs/serving/export.md": "tests/serving/test_export_page.py",
    "docs/serving/playground.md": "tests/serving/test_playground.py",
    "docs/serving/server.md": "tests/serving/test_server_docs.py",
}
"""Pages with Python that other tests run."""

NOT_RUN = {"benchmarks/README.md": "a pattern for a file, which needs liger-kernel and a GPU"}


def blocks_of(path: str, *languages: str) -> list[str]:
    """Return the blocks of code of a page in these languages."""
    return [code for language, code in BLOCK.findall(read(path)) if language in languages]


def run_python(path: str, names: dict[str, Any], snippets: list[str] | None = None) -> None:
    """Run the Python of a page in order."""
    for snippet in blocks_of(path, "python") if snippets is None else snippets:
        exec(compile(snippet, path, "exec"), names)


# ---- Python.


def test_every_page_with_python_is_run_by_a_test():
    with_python = {path for path in PAGES if blocks_of(path, "python")}
    assert with_python == {*RUN_HERE, *RUN_ELSEWHERE, *NOT_RUN}
    for page, test in RUN_ELSEWHERE.items():
        assert Path(page).name in read(test)


def _quick_start(folder: Path) -> dict[str, Any]:
    tiny_model().save_pretrained(folder / "runs/demo/checkpoint")
    digits_processor(16).save_pretrained(folder / "runs/demo/checkpoint")
    (folder / "examples").mkdir()
    shutil.copy(ROOT / "examples/digits.png", folder / "examples")
    return {}


def _family(folder: Path) -> dict[str, Any]:
    model = stock_model("llava")
    side = model.config.vision_config.image_size
    return {
        "model": model,
        "image_token": model.config.image_token_id,
        "pixel_values": torch.randn(2, 3, side, side),
    }


def _compiled(folder: Path) -> dict[str, Any]:
    return {"projector": TokenAdaptiveProjector(8, 8), "patches": torch.randn(3 * 27 * 27, 8)}


def _vllm(folder: Path) -> dict[str, Any]:
    return {"picture": object()}


RUN_HERE = {
    "docs/concepts.md": None,
    "docs/how-to/add-a-family.md": _family,
    "docs/how-to/kernels.md": None,
    "docs/how-to/several-gpus.md": None,
    "docs/install.md": None,
    "docs/kernels.md": _compiled,
    "docs/quick-start.md": _quick_start,
    "docs/serving/vllm.md": _vllm,
}
"""Pages whose Python is run here, and what makes the names and files that they take as given."""


@pytest.fixture
def stand_ins(monkeypatch):
    """openai and vllm, which are not installed: they take what the page gives and keep it."""
    calls: list[tuple[str, Any, Any]] = []

    def taking(name: str) -> Any:
        return lambda *given, **named: calls.append((name, given, named))

    completions = SimpleNamespace(create=taking("create"))
    client = SimpleNamespace(chat=SimpleNamespace(completions=completions))
    llm = SimpleNamespace(generate=taking("generate"))
    openai, vllm = ModuleType("openai"), ModuleType("vllm")
    openai.OpenAI = lambda **_: client
    vllm.LLM, vllm.SamplingParams = lambda *_, **__: llm, dict
    monkeypatch.setitem(sys.modules, "openai", openai)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    return calls


@pytest.mark.parametrize("path", RUN_HERE)
def test_python_of_a_page_runs_in_order(path, tmp_path, monkeypatch, stand_ins):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(families, "_FAMILIES", dict(families._FAMILIES))
    torch.manual_seed(0)
    make = RUN_HERE[path]
    run_python(path, {} if make is None else make(tmp_path))
    if path == "docs/serving/vllm.md":
        assert [name for name, *_ in stand_ins] == ["create", "generate"]
        assert stand_ins[0][2]["extra_body"] == {"mm_processor_kwargs": {"num_image_tokens": 16}}


def test_python_of_torch_func_on_the_page_of_packing_runs():
    *_, snippet = blocks_of("docs/packing.md", "python")
    names: dict[str, Any] = {}
    run_python("docs/packing.md", names, [snippet])
    assert names["per_sample"].shape == (3, 10, 8)


def test_every_op_has_a_snippet():
    import tokenflex_kernels

    code = "".join(blocks_of("docs/how-to/kernels.md", "python"))
    made_by_calls = {"PackPlan", "PoolPlan"}
    for name in {*tokenflex_kernels.__all__} - made_by_calls:
        assert f"tk.{name}(" in code


# ---- Commands.


def commands_of(path: str) -> list[str]:
    """Return the calls of tokenflex in the blocks of shell commands of a page."""
    found = []
    for code in blocks_of(path, "", "bash", "console", "sh"):
        for line in code.replace("\\\n", " ").splitlines():
            match = re.match(r"(?:\$ )?(?:\.venv/bin/|.*-m )?tokenflex(?:\.cli)? ([a-z].*)$", line)
            if match is not None and "=" not in line.partition(" ")[0]:
                found.append(match[1])
    return found


@pytest.fixture(scope="module")
def parser():
    line = CommandLine()
    for module in command_modules():
        module.add_to(line)
    return line.parser


COMMANDS = [(path, command) for path in PAGES for command in commands_of(path)]


def test_commands_on_pages_are_ones_that_exist(parser, capsys):
    assert len(COMMANDS) > 40
    for path, command in COMMANDS:
        words = shlex.split(command, comments=True)
        try:
            options = parser.parse_args(words)
        except SystemExit:
            raise AssertionError(f"{path}: {command}: {capsys.readouterr().err}") from None
        assert options.command == words[0]


def test_options_in_texts_are_of_the_command_that_is_named():
    parsers = command_parsers()
    for path in [path for path in PAGES if not path.startswith("benchmarks")]:  # it has row labels
        for code in re.findall(r"`tokenflex ([a-z][^`]*)`", read(path)):
            name, *words = code.split()
            assert name in parsers, f"{path}: tokenflex {code}"
            options = {
                option for action in parsers[name]._actions for option in action.option_strings
            }
            given = {word.partition("=")[0] for word in words if re.match(r"--[a-z]", word)}
            assert given <= options, f"{path}: tokenflex {code}"


def test_targets_of_make_on_pages_are_in_the_makefile():
    targets = set(
        re.findall(r"^([a-z][\w-]*)(?:\s[^:=\n]*)?:(?!=)", read("Makefile"), re.MULTILINE)
    )
    for path in PAGES:
        code = [*re.findall(r"`(make [^`]+)`", read(path))]
        code += [line for block in blocks_of(path, "") for line in block.splitlines()]
        for line in code:
            if match := re.match(r"make ([a-z][\w-]*)", line):
                assert match[1] in targets, f"{path}: {line}"


# ---- Configurations.


def test_yaml_on_pages_is_of_a_configuration():
    demo = yaml.safe_load(read("configs/demo.yaml"))
    checked = 0
    for path in PAGES:
        for block in blocks_of(path, "yaml"):
            values = yaml.safe_load(block)
            if isinstance(values, list):
                for stage in values:
                    StageConfig.model_validate(stage)
            elif {"model", "data", "stages"} <= values.keys():
                TrainConfig.model_validate(values)
            else:
                model = demo["model"] | values.pop("model", {})
                TrainConfig.model_validate(demo | {"model": model} | values)
            checked += 1
    assert checked >= 5


def test_json_on_pages_is_json():
    blocks = [block for path in PAGES for block in blocks_of(path, "") if block.startswith("{")]
    assert blocks
    for block in blocks:
        for line in block.splitlines():
            json.loads(line)
