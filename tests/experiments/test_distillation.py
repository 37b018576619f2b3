"""The study of distillation runs, and its page holds its figures."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_drop_in_s_page_has_the_figures_of_the_report():
    report = json.loads((ROOT / "docs/results/distillation/report.json").read_text("utf-8"))
    page = (ROOT / "docs/dropin.md").read_text("utf-8")
    assert f"share of {report['questions']:,} questions" in page
    for name, row in report["accuracy"].items():
        figures = [f"{accuracy['all']:.3f}" for accuracy in row.values()]
        assert f"| {name} | {' | '.join(figures)} |" in page


@pytest.mark.parametrize("name", ["report", "seed1"])
def test_distillation_beats_resizing_and_loses_nothing_at_the_stock_model_s_own_count(name):
    report = json.loads((ROOT / f"docs/results/distillation/{name}.json").read_text("utf-8"))
    resized, distilled, adapted = (
        report["accuracy"][name]
        for name in ("stock, picture resized", "distilled", "distilled, with LoRA")
    )
    for count in ("4", "9"):
        assert distilled[count]["all"] > resized[count]["all"] + 0.04
        assert adapted[count]["all"] > distilled[count]["all"]
    for name in ("distilled", "distilled, with LoRA"):
        error = report["standard_error"][name]["16"]
        lost = resized["16"]["all"] - report["accuracy"][name]["16"]["all"]
        assert lost < 2 * 2**0.5 * error  # two standard errors of the difference of two shares
        share, number = report["accuracy"][name]["16"]["all"], report["questions"]
        assert error == pytest.approx((share * (1 - share) / number) ** 0.5)


@pytest.mark.slow
def test_the_study_writes_its_report(tmp_path, monkeypatch, capsys):
    pytest.importorskip("peft")
    from experiments.distillation import __main__ as study

    small = {"warm-up": 1, "stock-steps": 2, "prompts": 16, "steps": 2, "canvases": 2}
    words = [word for name, value in small.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr("sys.argv", ["distillation", "--out", str(tmp_path / "r.json"), *words])
    study.main()
    report = json.loads((tmp_path / "r.json").read_text("utf-8"))
    assert (tmp_path / "r.png").read_bytes()[:4] == b"\x89PNG"
    assert [*report["accuracy"]] == [
        "stock, picture resized",
        "fitted",
        "distilled",
        "distilled, with LoRA",
    ]
    assert all([*row] == ["4", "9", "16"] for row in report["accuracy"].values())
    assert re.search(r"^ +4 +9 +16$", capsys.readouterr().out, re.MULTILINE)
