"""The report, its pictures and the CSV behind them, from rows as a CSV has them."""

from __future__ import annotations

import csv
import platform

import pytest
import torch

from benchmarks import plots
from benchmarks.machine import ROOT, environment
from benchmarks.report import report, token_savings
from benchmarks.results import COLUMNS, read_csv, write_csv
from benchmarks.targets import verdicts
from tests.benchmarks.rows import row

STEPS = [
    row("end_to_end", "fixed 256", "packed", 100, tokens=1000, mode="forward+backward"),
    row("end_to_end", "mixed 64/144/256 2:3:5", "packed", 90, tokens=800, mode="forward+backward"),
]


def test_what_share_of_the_tokens_saved_becomes_time():
    (line,) = token_savings(STEPS)
    assert line.startswith("packed: mixed counts save 20.0% of the sequence and 10.0% of the time")
    assert line.endswith("50% of the saving becomes time")


def everything():
    """Rows for every picture."""
    rows = [
        row("ceiling", "2 GiB", "copy", 1, gb_per_s=4300),
        row("ceiling", "8192^3", "matmul", 1, tflop_per_s=780),
        *STEPS,
    ]
    for op, case, column in (
        ("pool_norm", "128 images, n=16", "gb_per_s"),
        ("swiglu", "T=8192", "tflop_per_s"),
        ("project_tokens", "8 images, n=16", "tflop_per_s"),
        ("project_tokens", "40 images, mixed", "tflop_per_s"),
        ("project_tokens", "40 images, uniform", "tflop_per_s"),
        ("pack_embeddings", "16x(220 text + 64 vision) D=2048", "gb_per_s"),
    ):
        for variant, p50 in (("tokenflex", 10), ("PyTorch eager", 20), ("quack-kernels", 9)):
            for mode in ("forward", "forward+backward"):
                values = {column: 500, "saved_bytes": 100, "peak_bytes": 300}
                rows.append(row(op, case, variant, p50, mode=mode, **values))
    return rows


def test_every_picture_is_drawn_from_the_csv_alone(tmp_path):
    path = tmp_path / "some-gpu.csv"
    rows = everything()
    write_csv(path, rows, {})
    pictures = plots.draw(read_csv(path), path)
    assert [picture.name for picture in pictures] == [
        f"some-gpu-{name}.png"
        for name in ("throughput", "speed-up", "memory", "mixed-counts", "end-to-end")
    ]
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)


def test_nothing_measured_is_nothing_drawn(tmp_path):
    failed = [one | {"status": "failed: RuntimeError: no"} for one in everything()]
    assert plots.draw(failed, tmp_path / "x.csv") == []


def test_pictures_of_an_earlier_run_do_not_stay_beside_new_rows(tmp_path):
    for name in ("x-memory.png", "x-quick-memory.png"):
        (tmp_path / name).write_bytes(b"old")
    plots.draw(STEPS, tmp_path / "x.csv")  # nothing of memory among them
    assert {path.name for path in tmp_path.iterdir()} == {"x-end-to-end.png", "x-quick-memory.png"}


def test_the_report_has_rows_reasons_and_verdicts_and_draws(capsys, tmp_path):
    skipped = row("pool_norm", "", "liger-kernel", "") | {"status": "not installed"}
    report([*everything(), skipped], tmp_path / "x.csv")
    lines = capsys.readouterr().out.splitlines()
    assert any(
        line.split()[:2] == ["swiglu", "T=8192"] and line.split()[-3:] == ["10.0", "us", "triton"]
        for line in lines
    )
    assert "  pool_norm, forward, liger-kernel: not installed" in lines
    at = lines.index("targets:")
    assert lines[at + len(verdicts([])) + 1].startswith("drew")
    assert any("projector, T >= 2048: >= 1.2x eager" in line and "met" in line for line in lines)
    assert len(list(tmp_path.glob("x-*.png"))) == 5


# ---- files


def test_csv_has_the_environment_and_no_host_name(tmp_path):
    shared = environment("cpu")
    write_csv(tmp_path / "out.csv", [{"a": 1, "b": "x,y"}, {"a": 2, "b": ""}], shared)
    rows = read_csv(tmp_path / "out.csv")
    assert [(one["a"], one["b"]) for one in rows] == [("1", "x,y"), ("2", "")]
    assert rows[0]["torch"] == torch.__version__
    assert list(rows[0]) == ["a", "b", *shared]
    assert platform.node() not in rows[0].values()


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "x.csv"
    write_csv(path, [{"a": 1}], {"b": 2})
    with pytest.raises(ValueError, match="dict contains fields"):
        write_csv(path, [{"a": 3}, {"unknown": 4}], {"b": 2})
    assert read_csv(path) == [{"a": "1", "b": "2"}]
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.csv"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must have the columns of a result, got none called a"),
        ("b\n1\n", "must have the columns of a result, got none called a"),
        ("a,b\n", "must have rows, got none"),
        ("a,b\n1\n", "must have a value for every column"),
        ("a,b\n1,2,3\n", "must have a value for every column"),
    ],
)
def test_what_is_no_csv_of_results_is_refused(tmp_path, text, message):
    path = tmp_path / "x.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_csv(path, ("a",))


RESULTS = sorted((ROOT / "benchmarks/results").glob("*.csv"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_published_results_are_complete(path):
    with path.open(newline="", encoding="utf-8") as file:
        assert next(csv.reader(file))[: len(COLUMNS)] == list(COLUMNS)
    rows = read_csv(path)
    ok = [one for one in rows if one["status"] == "ok"]
    assert {one["op"] for one in ok} >= {"ceiling", "host_cost", "pack_embeddings", "end_to_end"}
    assert all(float(one["p20_us"]) <= float(one["p50_us"]) <= float(one["p80_us"]) for one in ok)
    assert all(one["cpu"] and one["torch"] and one["commit"] for one in rows)
    assert "/" + "tmp" not in path.read_text(encoding="utf-8")
    for name in ("throughput", "speed-up", "memory", "mixed-counts", "end-to-end"):
        assert path.with_name(f"{path.stem}-{name}.png").exists()
