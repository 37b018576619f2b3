"""One table from the harnesses' results, with missing scores marked."""

from __future__ import annotations

import pytest

from tokenflex.harnesses.table import (
    CountTable,
    Score,
    lmms_eval_scores,
    merge,
    vlmevalkit_scores,
)


def test_lmms_evals_metrics_with_their_standard_errors():
    results = {
        "results": {
            "mmstar": {
                "alias": "mmstar",
                "samples": 1500,
                "average,none": 0.5,
                "average_stderr,none": 0.02,
                "average_stderr_clt,none": 0.03,
                "exact_match,strict": 0.25,
                "exact_match_stderr,strict": "N/A",
                "submission,none": None,
            },
            "group": {"alias": "group", " ": " "},
        }
    }
    assert lmms_eval_scores(results) == {
        "mmstar": {"average": Score(0.5, 0.02), "exact_match (strict)": Score(0.25)}
    }


def test_every_filter_has_its_own_standard_error():
    values = {
        "exact_match,none": 0.1,
        "exact_match,strict": 0.2,
        "exact_match,flexible": 0.3,
        "exact_match,last": 0.4,
        "f1,strict": 0.5,
        "exact_match_stderr,flexible": 0.03,
        "exact_match_stderr,none": 0.01,
        "exact_match_stderr,strict": 0.02,
        "f1_stderr,strict": 0.05,
    }
    assert lmms_eval_scores({"results": {"b": values}}) == {
        "b": {
            "exact_match": Score(0.1, 0.01),
            "exact_match (strict)": Score(0.2, 0.02),
            "exact_match (flexible)": Score(0.3, 0.03),
            "exact_match (last)": Score(0.4),
            "f1 (strict)": Score(0.5, 0.05),
        }
    }


def test_a_benchmark_by_count_table_names_its_holes():
    table = merge(
        {
            "64": {"b": {"acc": Score(0.5, 0.01)}},
            "144": {"b": {"acc": Score(0.75)}, "a": {"acc": Score(1.0)}},
        },
        ["a", "b", "c"],
    )
    assert table.markdown() == (
        "| benchmark | metric | 64 | 144 |\n"
        "|---|---|---|---|\n"
        "| a | acc | missing | 1 |\n"
        "| b | acc | 0.5 ± 0.01 | 0.75 |\n"
        "| c | - | missing | missing |\n"
    )
    assert table.missing == [("a", "acc", "64"), ("c", "-", "64"), ("c", "-", "144")]
    assert {
        "benchmark": "b",
        "metric": "acc",
        "count": "64",
        "value": 0.5,
        "standard_error": 0.01,
    } in table.as_json()
    assert {row["value"] for row in table.as_json() if row["benchmark"] == "c"} == {None}


def test_vlmevalkits_files_go_to_the_benchmark_they_are_of(tmp_path):
    files = {
        "M_MMBench_DEV_EN_V11_acc.csv": '"split","Overall","AR"\n"dev","0.75","0.5"\n',
        "M_MMBench_DEV_EN_acc.csv": '"split","Overall"\n"dev","0.25"\n',
        "M_MathVista_MINI_gpt-4o-mini_score.csv": (
            '"Task&Skill","tot","acc"\n"Overall","1000","60.5"\n"geometry","10","50"\n'
        ),
        "M_OCRBench_score.json": '{"Final Score": 800, "Final Score Norm": 80.0, "note": "x"}',
        "M_OCRBench.xlsx": "predictions",
        "M_MMStar.json": '{"prediction": 1}',
        "Other_MMStar_acc.csv": '"Overall"\n"0.1"\n',
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    asked = ["MMBench_DEV_EN", "MMBench_DEV_EN_V11", "MathVista_MINI", "OCRBench", "MMStar"]
    assert vlmevalkit_scores(tmp_path, "M", asked) == {
        "MMBench_DEV_EN_V11": {"Overall": Score(0.75), "AR": Score(0.5)},
        "MMBench_DEV_EN": {"Overall": Score(0.25)},
        "MathVista_MINI": {
            "Overall tot": Score(1000),
            "Overall acc": Score(60.5),
            "geometry tot": Score(10),
            "geometry acc": Score(50),
        },
        "OCRBench": {"Final Score": Score(800), "Final Score Norm": Score(80)},
    }


def test_the_picture_has_a_panel_for_each_benchmark(tmp_path, monkeypatch):
    from tokenflex.harnesses import figure as module

    drawn = []
    monkeypatch.setattr(module, "save_figure", lambda figure, path: drawn.append(figure))
    rows = {
        ("gqa", "exact"): {"4": Score(0.5), "auto": Score(0.7)},
        ("mme", "cognition"): {"4": Score(300.0, 2.0)},
        ("mme", "per$ception"): {"4": Score(1400.0), "auto": Score(1500.0)},
        ("failed", "-"): {},
    }
    table = CountTable(["4", "9", "auto"], rows)
    module.plot_table(table, tmp_path / "table.png")
    panels = {axes.get_title("left"): axes for axes in drawn[0].axes}
    assert [*panels] == ["gqa", "mme"]
    lines = {bars.get_label(): bars[0] for axes in panels.values() for bars in axes.containers}
    assert [*lines] == ["exact", "cognition", "per$ception"]
    assert lines["exact"].get_xydata().tolist() == [[0, 0.5], [2, 0.7]]  # 9 is missing
    assert [tick.get_text() for tick in panels["mme"].get_xticklabels()] == table.counts
    module.plt.close(drawn[0])
    with pytest.raises(ValueError, match="at least one score"):
        module.plot_table(CountTable(["4"], {("failed", "-"): {}}), tmp_path / "table.png")


def test_a_terminal_gets_a_folded_table_and_a_pipe_markdown(monkeypatch):
    table = CountTable(["4", "9"], {("gqa", "exact"): {"4": Score(0.5)}})
    assert table.text() + "\n" == table.markdown()
    monkeypatch.setattr("tokenflex.harnesses.table.width_of", lambda stream: 30)
    monkeypatch.setattr("tokenflex.terminal.width_of", lambda stream: 30)
    assert table.text().splitlines() == [
        "benchmark  metric    4",
        "gqa        exact   0.5",
        "",
        "benchmark  metric        9",
        "gqa        exact   missing",
    ]
