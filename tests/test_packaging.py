"""The files that a release is made of."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

import tokenflex
from tokenflex.cli import main
from tokenflex.cli.extras import PACKAGES

ROOT = Path(__file__).parents[1]


def test_the_command_line_says_its_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"tokenflex {tokenflex.__version__}\n"


def test_citation_and_changelog_are_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == tokenflex.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    latest = re.search(r"^## .*$", changelog, flags=re.MULTILINE)
    assert latest is not None
    assert tokenflex.__version__ in latest.group()


IMPORTED_AS = {"pillow": "PIL", "pyyaml": "yaml", "scikit-learn": "sklearn"}


def test_hints_know_the_packages_of_every_extra():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    listed = {}
    for name, body in re.findall(r"^(\w+) = \[(.*?)\]$", section, re.MULTILINE | re.DOTALL):
        packages = re.findall(r'"([\w-]+)[>\]]', body)
        listed[name] = tuple(IMPORTED_AS.get(p, p.replace("-", "_")) for p in packages)
        assert ("tokenflex[hf]" in body) == (name not in ("hf", "bench", "dev"))
    listed.pop("dev")
    assert listed == PACKAGES


@pytest.mark.parametrize(
    ("command", "module", "hint"),
    [
        ("generate", "transformers.models", "'tokenflex[hf]'"),
        ("evaluate", "PIL", "'tokenflex[train]'"),  # that of the command, which includes hf
        ("evaluate", "matplotlib", "'tokenflex[train]'"),
        ("play", "matplotlib", "'tokenflex[demo]'"),
        ("convert", "pydantic", "'tokenflex[train]'"),  # not hf, the command's
        ("generate", "av", "'tokenflex[video]'"),
        ("serve", "uvicorn", "'tokenflex[serve]'"),
        ("export", "openvino", "'tokenflex[export]'"),
        ("generate", "sentencepiece", "sentencepiece"),  # of no extra
    ],
)
def test_a_missing_package_is_one_line_with_the_command_to_install_it(
    capsys, monkeypatch, command, module, hint
):
    def lacks(options):
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr(f"tokenflex.cli.{command}._{command}", lacks)
    needed = {"generate": ["--model", "m", "--prompt", "p"], "convert": ["m", "o"]}
    needed["evaluate"] = ["m", "--data", "digits", "--counts", "4"]
    needed["export"] = ["m", "--to", "onnx", "--output", "o"]
    assert main([command, *needed.get(command, ["m"])]) == 2
    assert capsys.readouterr().err == f"tokenflex: {command} needs {module}; pip install {hint}\n"


def test_the_source_distribution_holds_every_folder():
    """The packages are found by setuptools; all else must be named."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a clone of the repository")
    folders = {line.partition("/")[0] for line in listed.stdout.splitlines() if "/" in line}
    grafted = set(re.findall(r"^graft (\S+)$", (ROOT / "MANIFEST.in").read_text(), re.MULTILINE))
    assert folders - {"tokenflex", "tokenflex_kernels", ".github"} == grafted


def test_the_workflows_run_commands_that_exist():
    """They run on a public host alone: what they name here must be here."""
    for path in (ROOT / ".github/workflows").glob("*.yml"):
        text = path.read_text(encoding="utf-8")
        assert yaml.safe_load(text)["jobs"]
        for name in re.findall(r"(?:tests|\.ci)/[\w/.]+", text):
            assert (ROOT / name).exists(), f"{path.name} names {name}"
