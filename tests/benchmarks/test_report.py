"""The report, and the published CSVs."""

from __future__ import annotations

import csv
import sys

import pytest

from benchmarks import plots
from benchmarks import report as module
from benchmarks.comparisons import Results
from benchmarks.report import report
from benchmarks.results import COLUMNS, RESULTS, read_csv, write_csv
from benchmarks.targets import verdicts
from tests.benchmarks.rows import row

PUBLISHED = sorted(RESULTS.glob("*.csv"))
PICTURES = ("speed-up",)


def everything():
    """Rows for every section and picture."""
    rows = [
        row("ceiling", "2 GiB", "copy", 1, gb_per_s=4300),
        row("ceiling", "8192^3", "matmul", 1, tflop_per_s=780),
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
                values = {column: 500, "saved_bytes": 2**19, "peak_bytes": 3 * 2**20}
                rows.append(row(op, case, variant, p50, mode=mode, **values))
    return rows


def cells_of(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_report_has_rows_reasons_losses_and_verdicts_and_draws(capsys, tmp_path):
    skipped = row("pool_norm", "", "liger-kernel", "") | {"status": "not installed"}
    report([*everything(), skipped], tmp_path / "x.csv")
    text = (tmp_path / "x.md").read_text(encoding="utf-8")
    lines = [cells_of(line) for line in text.splitlines()]
    assert "- pool_norm, forward, liger-kernel: not installed" in text.splitlines()
    assert "A peer is faster in 12 of 24 comparisons; 0 are within noise." in text
    names = {verdict.name for verdict in verdicts([]) if verdict.device in ("", "cuda")}
    assert names == {line[0] for line in lines[-len(names) :]}
    printed = capsys.readouterr().out
    assert printed.startswith(text)
    assert printed.count("drew ") == len(list(tmp_path.glob("x-*.png"))) == len(PICTURES)


def test_a_report_without_matplotlib_says_so(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "benchmarks.plots", None)
    report(everything(), tmp_path / "x.csv")
    assert "is not installed (pip install 'tokenflex[bench]')" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["x.md"]


def test_every_picture_is_drawn_from_the_csv_alone(tmp_path):
    path = tmp_path / "some-gpu.csv"
    write_csv(path, everything(), {})
    pictures = plots.draw(read_csv(path), path)
    assert [picture.name for picture in pictures] == [f"some-gpu-{name}.png" for name in PICTURES]
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)


def test_nothing_measured_is_nothing_drawn(tmp_path):
    failed = [line | {"status": "failed: RuntimeError: no"} for line in everything()]
    assert plots.draw(failed, tmp_path / "x.csv") == []


def test_pictures_of_an_earlier_run_do_not_stay_beside_new_rows(tmp_path):
    for name in ("x-speed-up.png", "x-quick-speed-up.png"):
        (tmp_path / name).write_bytes(b"old")
    plots.draw([row("swiglu", "T=8192", "tokenflex", 1, tflop_per_s=9)], tmp_path / "x.csv")
    assert {path.name for path in tmp_path.iterdir()} == {"x-quick-speed-up.png"}


def timed(variant, p50, case="4x", **values):
    return row("merge_vision", case, variant, p50, **values)


def test_every_loss_is_listed_worst_first():
    rows = [
        timed("tokenflex", 1000),
        timed("index_put", 800),
        timed("masked_scatter", 500),
        timed("nested", 1500),
        row("swiglu", "T=8", "tokenflex", 9),
        row("swiglu", "T=8", "PyTorch eager", 9.5),
    ]
    interval = {"over_ours": "0.9", "over_ours_low": "0.7", "over_ours_high": "1.1"}
    rows.append(timed("vLLM index mask", 900, **interval))
    count, _, _, _, *lines = module.losses(Results(rows)).splitlines()
    assert count == "A peer is faster in 2 of 5 comparisons; 1 are within noise."
    case = ["merge_vision", "4x", "forward", "", "2"]
    assert [cells_of(line) for line in lines] == [
        [*case, "masked_scatter", "1000.0", "500.0", "0.50"],
        [*case, "index_put", "1000.0", "800.0", "0.80"],
    ]


def test_an_overview_has_the_worst_and_the_best_case():
    rows = []
    for case, ours, peer in (("8 images", 10, 5), ("16 images", 10, 30)):
        rows += [row("project_tokens", case, "tokenflex", ours)]
        rows += [row("project_tokens", case, "PyTorch eager", peer)]
    _, _, line = module.overview(Results(rows)).splitlines()
    ours = ["project_tokens (triton)", "PyTorch eager"]
    figures = ["0.50", "1.75", "3.00", "1 of 2", "0 of 2", "8 images, forward"]
    assert cells_of(line) == [*ours, *figures]


def test_controls_tell_how_far_an_interval_may_be_trusted():
    rows = []
    for case, low, high in (("4x", "0.99", "1.01"), ("5x", "1.05", "1.08")):
        figures = {"over_ours": low, "over_ours_low": low, "over_ours_high": high, "case": case}
        rows += [timed("index_put", 100, case=case), timed("index_put, again", 101, **figures)]
    line = module.noise(Results(rows)).splitlines()[-1]
    assert cells_of(line) == ["packing", "2", "1 of 2", "3.0%", "5.0%"]
    assert module.noise(Results(rows[::2])) == ""


def test_the_machine_stands_beside_how_much_to_trust():
    rows = [
        row("a", "", "tokenflex", 1, samples=3, cores=2, sets=7),
        row("a", "", "", "", status="not run: no time left"),
    ]
    text = module.machine(Results(rows))
    assert text.startswith("Measured on Some GPU;")
    assert "1 rows have times, 1 of them from fewer than 5 samples; 1 found no time left." in text
    assert text.endswith("up to 7 sets of buffers.")


# ---- published CSVs


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.name)
def test_published_results_are_complete(path):
    with path.open(newline="", encoding="utf-8") as file:
        assert next(csv.reader(file))[: len(COLUMNS)] == list(COLUMNS)
    rows = read_csv(path)
    ok = [line for line in rows if line["status"] == "ok"]
    ops = {"ceiling", "host_cost", "pack_embeddings", "pool_norm", "swiglu", "project_tokens"}
    assert {line["op"] for line in ok} >= ops
    assert all(
        float(line["p20_us"]) <= float(line["p50_us"]) <= float(line["p80_us"]) for line in ok
    )
    assert all(line["cpu"] and line["torch"] and line["commit"] for line in rows)
    assert "/" + "tmp" not in path.read_text(encoding="utf-8")
    assert path.with_suffix(".md").read_text(encoding="utf-8") == module.report_text(rows)
    for name in PICTURES:
        assert path.with_name(f"{path.stem}-{name}.png").exists()


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.name)
def test_rates_and_shares_in_the_csv_are_those_of_its_times(path):
    """A figure or a column that was changed by hand does not fit the others."""
    rows = [line for line in read_csv(path) if line["status"] == "ok"]
    ceilings = {
        (line["variant"], line["threads"], line["dtype"]): line
        for line in rows
        if line["op"] == "ceiling"
    }
    for line in rows:
        setting = line["threads"], line["dtype"]
        p50 = float(line["p50_us"])
        if line["ideal_bytes"]:
            rate = float(line["ideal_bytes"]) / p50 / 1e3
            assert float(line["gb_per_s"]) == pytest.approx(rate, rel=1e-3, abs=2e-3), line
            copy = float(ceilings[("copy", *setting)]["gb_per_s"])
            assert float(line["share_of_copy"]) == pytest.approx(rate / copy, rel=1e-2, abs=1e-3)
        if line["flops"]:
            rate = float(line["flops"]) / p50 / 1e6
            assert float(line["tflop_per_s"]) == pytest.approx(rate, rel=1e-3, abs=2e-5), line
            share = line["share_of_matmul"]
            matmul = float(ceilings[("matmul", *setting)]["tflop_per_s"])
            assert float(share) == pytest.approx(rate / matmul, rel=1e-2, abs=1e-3)
        if line["tokens_per_s"]:
            tokens = 1e6 * float(line["tokens"]) / p50
            assert float(line["tokens_per_s"]) == pytest.approx(tokens, rel=1e-3, abs=1)
        assert p50 > 0
