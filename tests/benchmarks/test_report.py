"""Verdicts, pictures and files, from rows as a CSV has them."""

from __future__ import annotations

import csv
import platform

import pytest
import torch

from benchmarks import plots
from benchmarks.environment import ROOT, environment, machine_name, read_csv, write_csv
from benchmarks.harness import COLUMNS
from benchmarks.report import NOT_MEASURED, print_report, token_savings, verdicts


def row(op, case, variant, p50, *, mode="forward", device="cuda", **values):
    fields = dict.fromkeys(COLUMNS, "") | {
        "op": op,
        "case": case,
        "mode": mode,
        "variant": variant,
        "status": "ok",
        "p50_us": str(p50),
        "device": device,
        "tokens": "8192",
        "tokens_per_s": "1000",
        "backend": "triton" if variant.startswith("tokenflex") else "",
        "gpu": "Some GPU" if device == "cuda" else "",
        "cpu": "Some CPU",
        "threads": "2",
        "load": "0.1",
        "torch": "2.11",
        "commit": "abc",
    }
    return fields | {name: str(value) for name, value in values.items()}


def verdict_of(rows, words):
    (found,) = [verdict for verdict in verdicts(rows) if words in verdict.target]
    return found


@pytest.mark.parametrize(("eager", "met"), [(130, True), (110, False)])
def test_a_target_is_judged_by_its_worst_case(eager, met):
    rows = []
    for case, ours in (("8 images, n=16", 50), ("32 images, n=16", 100)):
        rows += [
            row("project_tokens", case, "tokenflex", ours),
            row("project_tokens", case, "PyTorch eager", eager),
        ]
    verdict = verdict_of(rows, "projector, T >= 2048: >= 1.2x eager")
    assert verdict.met is met
    assert verdict.value == pytest.approx(eager / 100)
    assert "32 images, n=16, forward" in str(verdict)
    assert str(verdict).startswith("met, 8.3% to spare" if met else "SHORT by 8.3%")


@pytest.mark.parametrize(("ours", "met"), [(104, True), (108, False)])
def test_bounds_from_above(ours, met):
    rows = [
        row("swiglu", "T=8192", "tokenflex", ours),
        row("swiglu", "T=8192", "bare product", 100),
    ]
    assert verdict_of(rows, "bare product").met is met


@pytest.mark.parametrize(("mixed", "met"), [(104, True), (106, False)])
def test_mixed_counts_are_held_against_the_uniform_batch(mixed, met):
    rows = [
        row("pool_norm", "40 images, mixed", "tokenflex", mixed),
        row("pool_norm", "40 images, uniform", "tokenflex", 100),
        row("pool_norm", "40 images, mixed", "PyTorch eager", 200),
        row("pool_norm", "40 images, uniform", "PyTorch eager", 1),
    ]
    assert verdict_of(rows, "pool_norm, mixed counts: <= 1.05x").met is met
    assert verdict_of(rows, "pool_norm, mixed counts: >= 1.5x").met is True


def test_a_reference_and_a_cpu_meet_no_target_of_the_gpu():
    pair = [("tokenflex", 10), ("PyTorch eager", 100)]
    case = "8 images, n=16"
    on_cpu = [row("project_tokens", case, *one, device="cpu") for one in pair]
    reference = [row("project_tokens", case, *one, backend="reference") for one in pair]
    failed = [row("project_tokens", case, *one) for one in pair]
    failed[0]["status"] = "failed: RuntimeError: no"
    for rows in (on_cpu, reference, failed, []):
        assert {str(verdict) for verdict in verdicts(rows)} == {NOT_MEASURED}


def test_the_cpu_has_a_target_of_its_own():
    case = "16x(220 text + 64/144/256 vision) D=2048"
    rows = [
        row("pack_embeddings", case, "tokenflex", 10, device="cpu", backend="cpp"),
        row("pack_embeddings", case, "embedding + masked_scatter", 15, device="cpu"),
    ]
    assert verdict_of(rows, "pack on the CPU").met is False
    assert str(verdict_of(rows, "pack, T >= 2048: >= 5x")) == NOT_MEASURED


def test_host_cost_is_that_of_the_dearest_op():
    rows = [
        row("host_cost", "no grad", "swiglu", 9, backend="triton"),
        row("host_cost", "no grad", "merge_vision", 16, backend="cuda"),
        row("host_cost", "grad", "swiglu", 90, backend="triton"),
    ]
    verdict = verdict_of(rows, "host cost")
    assert (verdict.value, verdict.met) == (16, False)
    assert "merge_vision, 2 ops" in str(verdict)


def test_saved_memory_and_bandwidth_and_error():
    case, both = "8 images, n=16", {"mode": "forward+backward"}
    rows = [
        row("project_tokens", case, "tokenflex", 10, **both, saved_bytes=50, error=0.002),
        row("project_tokens", case, "tokenflex, save=input", 10, **both, saved_bytes=20),
        row("project_tokens", case, "PyTorch eager", 20, **both, saved_bytes=100, error=0.001),
        row("pool_norm", "128 images, n=16", "tokenflex", 10, share_of_copy=0.9),
    ]
    assert verdict_of(rows, "preactivation").value == pytest.approx(0.5)
    assert verdict_of(rows, "backward, input").met is False
    assert verdict_of(rows, "error against float64").value == pytest.approx(2)
    assert verdict_of(rows, "pool+LN forward").met is True


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
    path = tmp_path / "new" / "some-gpu.csv"
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


def test_the_table_ends_with_the_verdicts(capsys):
    skipped = row("pool_norm", "", "liger-kernel", "") | {"status": "not installed"}
    print_report([*everything(), skipped])
    lines = capsys.readouterr().out.splitlines()
    assert "  pool_norm, forward, liger-kernel: not installed" in lines
    assert lines[-len(verdicts([])) - 1] == "targets:"
    assert any("projector, T >= 2048: >= 1.2x eager" in line and "met" in line for line in lines)


# ---- files


def test_csv_has_the_environment_and_no_host_name(tmp_path):
    shared = environment("cpu")
    write_csv(tmp_path / "out.csv", [{"a": 1, "b": "x,y"}, {"a": 2, "b": ""}], shared)
    rows = read_csv(tmp_path / "out.csv")
    assert [(one["a"], one["b"]) for one in rows] == [("1", "x,y"), ("2", "")]
    assert rows[0]["torch"] == torch.__version__
    assert list(rows[0]) == ["a", "b", *shared]
    assert platform.node() not in rows[0].values()


def test_machines_have_names_of_their_own():
    names = {"gpu": "NVIDIA H200", "cpu": "AMD EPYC", "cores": 2}
    assert machine_name(names) == "nvidia-h200"
    assert machine_name(names | {"gpu": ""}) == "cpu-amd-epyc-2-cores"


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
