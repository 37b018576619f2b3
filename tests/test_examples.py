"""The examples run as they are."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.dropin.tiny import stock_model
from tokenflex import replace_projector
from tokenflex.cli import main
from tokenflex.training.config import load_config

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(monkeypatch, capsys):
    def run_example(name: str, *arguments: object) -> str:
        from tokenflex.dropin import families

        monkeypatch.setattr(families, "_FAMILIES", dict(families._FAMILIES))
        monkeypatch.syspath_prepend(str(EXAMPLES))
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run_example


def test_choose_counts(run):
    lines = run("choose_counts.py", "--counts", 4, 9).splitlines()
    assert [line.split("  ")[0].strip() or line.split()[0] for line in lines[1:]]
    widths = [int(line.split("[")[0].split()[1]) for line in lines[1:3]]
    assert widths[1] - widths[0] == 5  # 9 tokens in place of 4
    assert "[4, 9]" in lines[3]


def test_every_count(run):
    pytest.importorskip("sklearn")
    lines = run("every_count.py", "--counts", "4", "2x3", "--canvases", 2).splitlines()
    assert lines[0] == "| benchmark | metric | 4 | 2x3 |"
    assert lines[2].startswith("| digits | exact_match | ")
    assert lines[3] == "| digits | vision tokens | 4 | 6 |"


def test_tiny_parts_are_what_init_takes(run, tmp_path, monkeypatch, capsys):
    out = run("tiny_parts.py", tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    (words,) = re.findall("tokenflex (init .*)", out)
    assert main(words.split()) == 0
    config = load_config("train.yaml")
    assert config.stages[0].counts == (16, 36, 64)
    assert len(Path("held_out.jsonl").read_text().splitlines()) == 20
    assert "One pass through 100 samples is 4 steps a stage" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run("tiny_parts.py", tmp_path / "here")


def test_convert_and_ask_by_commands_as_by_python(run, tmp_path):
    out = run("convert_and_ask.py", "--out", tmp_path / "converted")
    table, python = out.split("total_s", 1)[1].splitlines()[1:4], out.splitlines()[-4:]
    assert [int(line.split()[0]) for line in table] == [4, 16, 64]
    assert [line.split(maxsplit=3)[3:] for line in table] == [
        line.split(maxsplit=1)[1:] for line in python[:3]
    ]
    assert python[3].split()[0] == "auto"
    assert (tmp_path / "converted" / "config.json").exists()


def test_train_with_trainer(run, tmp_path):
    out = run("train_with_trainer.py", "--steps", 8, "--out", tmp_path)
    before, after = re.findall(r"(\d\.\d{3}) (?:before|after)", out)
    assert float(after) < float(before)
    assert (tmp_path / "config.json").exists()


@pytest.mark.parametrize("trainer", ["transformers", pytest.param("trl", marks=pytest.mark.slow)])
def test_pack_stock_model(run, trainer):
    if trainer == "trl":
        pytest.importorskip("trl")
    out = run("pack_stock_model.py", "--trainer", trainer, "--steps", 6)
    assert re.search(r"160 samples in \d+ rows", out)
    first, last = re.findall(r"(\d\.\d{3}) at", out)
    assert float(last) < float(first)


def test_add_family(run):
    out = run("add_family.py")
    assert "logits (2, 21, 64)" in out
    assert "generated (2, 24)" in out


@pytest.mark.slow
def test_finetune_lora(run, tmp_path):
    pytest.importorskip("peft")
    out = run("finetune_lora.py", "--steps", 10, "--counts", 4, 16, "--out", tmp_path)
    rows = [line.split() for line in out.splitlines()[-2:]]
    assert [row[0] for row in rows] == ["4", "16"]
    for _, before, after, loaded in rows:
        assert float(after) < float(before)
        assert loaded == after
    assert (tmp_path / "model" / "config.json").exists()


def test_finetune_lora_of_a_conversion_is_refused(run, tmp_path, capsys):
    pytest.importorskip("peft")
    replace_projector(stock_model("llava"), num_image_tokens=16).save_pretrained(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        run("finetune_lora.py", "--model", tmp_path)
    assert stopped.value.code == 2
    assert "must be stock weights" in capsys.readouterr().err.splitlines()[-1]


def test_the_notebook_stops_at_the_cell_whose_training_fails(tmp_path, monkeypatch, capsys):
    notebook = json.loads((EXAMPLES / "quick_start.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    (cell,) = [cell for cell in cells if "main(" in cell]
    for shown, tested in {"STEPS = 400": "STEPS = 3", "runs/notebook": str(tmp_path)}.items():
        assert shown in cell
        cell = cell.replace(shown, tested)
    monkeypatch.chdir(EXAMPLES.parent)
    with pytest.raises(AssertionError):
        exec(compile(cell, "quick_start.ipynb", "exec"), {})
    assert "warmup_steps" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("own_accelerator_and_threads")
def test_the_notebook_runs_from_its_first_cell_to_its_last(tmp_path, monkeypatch, capsys):
    """Its cells in order, with a few steps of training and the output in another folder."""
    notebook = json.loads((EXAMPLES / "quick_start.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    assert all(cell["outputs"] == [] for cell in notebook["cells"] if cell["cell_type"] == "code")
    code = "\n".join(cells)
    brief = {
        "STEPS = 400": "STEPS = 3",
        "for stage in (0, 1)]": (
            "for stage in (0, 1)] + [f'stages.{stage}.warmup_steps=1' for stage in (0, 1)]"
        ),
        '"evaluation.data.size=128"': '"evaluation.data.size=4", "encoder_warm_up.steps=2"',
        "runs/notebook": str(tmp_path / "run"),
    }
    for shown, tested in brief.items():
        assert shown in code
        code = code.replace(shown, tested)
    monkeypatch.chdir(EXAMPLES.parent)
    names: dict[str, Any] = {}
    exec(compile(code, "quick_start.ipynb", "exec"), names)
    assert [*names["answers"]] == [4, 9, 16]
    assert "mixed -> (77, 96)" in capsys.readouterr().out
