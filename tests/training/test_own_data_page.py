"""docs/how-to/own-data.md, from its data to its report, with tiny parts."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image

from tokenflex.cli import main

PAGE = (Path(__file__).parents[2] / "docs/how-to/own-data.md").read_text(encoding="utf-8")


@pytest.mark.release
def test_the_page_from_data_to_report(parts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(parts / "siglip", "models/siglip")
    shutil.copytree(parts / "text", "models/qwen")
    for seed, name in enumerate(("cat.png", "dog.png")):
        Image.new("RGB", (40, 30), (90 * seed, 60, 120)).save(name)
    for snippet in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        exec(compile(snippet, "docs/how-to/own-data.md", "exec"), {})
    shutil.copy("data.jsonl", "held_out.jsonl")
    commands = re.findall(r"^tokenflex (.+)$", PAGE, flags=re.MULTILINE)
    assert [command.split()[0] for command in commands] == [
        *("init", "train", "train", "train", "generate", "evaluate")
    ]
    for command in commands:
        assert main(shlex.split(command, comments=True)) == 0, capsys.readouterr().err
    assert Path("runs/try/checkpoint/model.safetensors").is_file()
    assert Path("runs/train/metrics.jsonl").is_file()
    assert Path("runs/report/report.md").is_file()
