"""``python -m benchmarks``: its arguments, a whole run, and what is written when."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import processes
from benchmarks.results import ROOT, new_row, read_csv
from tokenflex_kernels.journal import UNFINISHED


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "swiglu,speed"], "--only must be of ceilings, .*, got speed"),
        (["--only", "", "--out", "x"], "--only must be of ceilings, .*, got ''"),
        (["--dtypes", "float32,int8"], "--dtypes must be of bfloat16, float32, got int8"),
        (["--threads", "0"], "--threads must be numbers above 0, as 1,2, got 0"),
        (["--threads", "1,two"], "--threads must be numbers above 0, as 1,2, got 1,two"),
        (["--seconds", "0"], "--seconds must be positive and finite, got 0"),
        (["--seconds", "nan"], "--seconds must be positive and finite, got nan"),
        (["--seconds", "inf"], "--seconds must be positive and finite, got inf"),
        (["--report", "nowhere.csv"], "--report must be a CSV .*nowhere.csv"),
        (["--report", "README.md"], "--report must be a CSV .*, got none called op"),
    ],
)
def test_misuse_is_one_clear_line(arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(command, "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(SystemExit) as error:
        command.main(arguments)
    assert error.value.code == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there(capsys):
    with pytest.raises(SystemExit):
        command.main(["--device", "cuda"])
    assert "needs a CUDA device, and PyTorch sees none" in capsys.readouterr().err


def test_a_suite_end_to_end(tmp_path):
    """In processes of its own, with a report of what was measured."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks", "--quick", "--device", "cpu"),
            *("--only", "ceilings", "--dtypes", "float32", "--out", str(tmp_path)),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*-quick.csv")
    rows = [(row["variant"], row["threads"], row["timing"]) for row in read_csv(path)]
    one, two = ("1", "cpu"), ("2", "host")
    assert rows == [("copy", *two), ("matmul", *two), ("copy", *one), ("matmul", *one)]
    assert "## Targets" in done.stdout


# ---- a whole run, its suites replaced


def measured(op, variant, **values):
    times = {"timing": "host", "p20_us": 1.0, "p50_us": 1.0, "p80_us": 1.0, "samples": 5}
    return new_row(op=op, variant=variant, status="ok", dtype="float32", **times) | values


CEILINGS = [
    measured("ceiling", "copy", gb_per_s=200.0),
    measured("ceiling", "matmul", tflop_per_s=4.0),
]


@pytest.fixture
def suites_return(monkeypatch):
    """(rows or an exception of each suite) -> they are what ``python -m benchmarks`` runs."""
    for name, value in {"OMP_NUM_THREADS": "1", "TOKENFLEX_COMMIT": "abc"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the command sets it; this puts it back

    def install(**outcomes):
        suite = SimpleNamespace(suite=None, SHARES={"cpu": 1.0})
        monkeypatch.setattr(command, "SUITES", dict.fromkeys(outcomes, suite))

        def rows(name, *_, done, **options):
            for outcome in outcomes[name]:
                if isinstance(outcome, BaseException):
                    raise outcome
                if command.case_of(outcome) not in done:
                    yield [dict(outcome)]

        monkeypatch.setattr(command, "watched_rows", rows)

    return install


def run_into(folder, *arguments, **setting):
    setting = {"dtypes": "float32", "threads": "1", "only": ",".join(command.SUITES)} | setting
    options = [word for name, value in setting.items() for word in (f"--{name}", value)]
    status = command.main(["--device", "cpu", "--out", str(folder), *options, *arguments])
    return status, {path.name for path in folder.iterdir()}


def test_shares_of_the_ceilings_are_in_the_csv(suites_return, tmp_path):
    suites_return(
        ceilings=CEILINGS,
        packing=[measured("pack_embeddings", "tokenflex", gb_per_s=50.0, tokens=8)],
        swiglu=[measured("swiglu", "tokenflex", tflop_per_s=3.0, tokens=8)],
    )
    status, names = run_into(tmp_path / "new" / "folder")
    (csv_name,) = [name for name in names if name.endswith(".csv")]
    assert (status, csv_name.endswith("cores.csv")) == (0, True)
    *_, pack, swiglu = read_csv(tmp_path / "new" / "folder" / csv_name)
    assert (pack["share_of_copy"], swiglu["share_of_matmul"]) == ("0.25", "0.75")


@pytest.mark.parametrize(
    ("row", "status"),
    [
        (measured("swiglu", "liger-kernel", status="failed: RuntimeError: no"), 0),
        (measured("swiglu", "", status="not run: no time left"), 0),
        (measured("swiglu", "tokenflex", status="failed: ValueError: result is off"), 1),
        (measured("swiglu", "tokenflex, no biases", status="failed: ValueError: off"), 1),
        (measured("host_cost", "swiglu", status="failed: ValueError: no"), 1),
        (measured("swiglu suite", "", status="stopped after 3 s"), 1),
    ],
)
def test_exit_status(suites_return, tmp_path, row, status):
    suites_return(ceilings=CEILINGS, swiglu=[row], host_cost=[])
    assert run_into(tmp_path)[0] == status


def test_an_interrupted_run_keeps_its_rows_and_the_results_of_the_last(
    suites_return, tmp_path, capsys
):
    suites_return(ceilings=CEILINGS)
    _, before = run_into(tmp_path)
    (name,) = [name for name in before if name.endswith(".csv")]
    published = (tmp_path / name).read_bytes()
    suites_return(ceilings=CEILINGS, packing=[*CEILINGS, KeyboardInterrupt()])
    status, after = run_into(tmp_path)
    assert status == 130
    assert (tmp_path / name).read_bytes() == published
    unfinished = f"{name}.unfinished"
    assert after - before == {unfinished}
    assert len(read_csv(tmp_path / unfinished)) == 4
    assert f"interrupted: 4 rows in {tmp_path / unfinished}" in capsys.readouterr().err


def test_without_time_nothing_runs(suites_return):
    suites_return(first=[pytest.fail.Exception("ran")])
    ((row,),) = command.run_pieces([("first", "float32", 2)], "cpu", True, 0.5)
    assert (row["op"], row["status"]) == ("first suite", "not run: no time left")
    assert (row["dtype"], row["threads"]) == ("float32", 2)


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_measured(
    suites_return, tmp_path, capsys
):
    suites_return(ceilings=[pytest.fail.Exception("measured")])
    (tmp_path / "file").write_text("taken", encoding="utf-8")
    with pytest.raises(SystemExit) as error:
        run_into(tmp_path / "file")
    assert error.value.code == 2
    assert "--out: expected a folder to write to, got" in capsys.readouterr().err


def test_a_part_replaces_its_own_rows_and_keeps_the_others(suites_return, tmp_path):
    first = measured("swiglu", "tokenflex", tokens=8)
    suites_return(ceilings=CEILINGS, swiglu=[first])
    _, names = run_into(tmp_path, threads="1,2")
    (path,) = [tmp_path / name for name in names if name.endswith(".csv")]
    suites_return(ceilings=CEILINGS, swiglu=[first | {"p50_us": 3.0}])
    run_into(tmp_path, only="swiglu", threads="2")
    rows = read_csv(path)
    assert [(row["op"], row["threads"], row["p50_us"]) for row in rows] == [
        *(("ceiling", threads, "1.0") for threads in "1122"),
        *(("swiglu", "2", "3.0"), ("swiglu", "1", "1.0")),
    ]
    path.write_text(path.read_text(encoding="utf-8").replace("over_ours", "x"), encoding="utf-8")
    with pytest.raises(SystemExit):
        run_into(tmp_path)


def test_every_suite_runs_at_each_setting_and_the_hosts_costs_once():
    settings = list(itertools.product(["bfloat16", "float32"], [2, 1]))
    pieces = command.pieces_of(["host_cost", "swiglu"], settings)
    assert pieces == [("host_cost", "float32", 1), *(("swiglu", *each) for each in settings)]


@pytest.mark.parametrize(("options", "number"), [(["--quick"], 2), ([], 4)])
def test_a_quick_run_measures_half_of_the_settings(options, number, monkeypatch, tmp_path):
    measured = []
    monkeypatch.setattr(command, "measure", lambda pieces, *_: measured.extend(pieces) or 0)
    command.main(["--device", "cpu", "--only", "swiglu", "--out", str(tmp_path), *options])
    assert len(measured) == number
    assert {("swiglu", "bfloat16", 2), ("swiglu", "float32", 1)} <= {*measured}


def test_time_is_that_of_the_promise():
    """Under two minutes (quick) and under ten, a suite that hangs included."""
    assert command.SECONDS[True] + processes.GRACE_SECONDS < 120
    assert command.SECONDS[False] + processes.GRACE_SECONDS < 600
    assert all(suite.SHARES.keys() == {"cuda", "cpu"} for suite in command.SUITES.values())


# ---- a run that continues another


def case(name, status="ok", variant="tokenflex", **values):
    return measured("swiglu", variant, case=name, mode="forward", status=status, **TOKENS, **values)


TOKENS = {"tokens": 8, "tokens_per_s": 1.0}
LATE = "not run: no time left"
STOPPED = measured("swiglu suite", "", status="stopped after 3 s")


def swiglu_rows(folder, pattern="*.csv"):
    (path,) = folder.glob(pattern)
    rows = [row for row in read_csv(path) if row["op"].startswith("swiglu")]
    return [(row["case"], row["variant"], row["status"], row["p50_us"]) for row in rows]


def test_another_run_measures_what_is_missing(suites_return, tmp_path):
    peer = case("one", variant="liger-kernel", status="not installed: no module liger_kernel")
    suites_return(ceilings=CEILINGS, swiglu=[case("one"), peer, case("two", LATE), STOPPED])
    assert run_into(tmp_path, "--resume")[0] == UNFINISHED
    again = [case("one", p50_us=9.0), case("two", p50_us=2.0), case("three", p50_us=3.0)]
    suites_return(ceilings=CEILINGS, swiglu=again)
    assert run_into(tmp_path, "--resume")[0] == 0
    assert sorted(swiglu_rows(tmp_path)) == [
        ("one", "liger-kernel", peer["status"], "1.0"),
        ("one", "tokenflex", "ok", "1.0"),
        ("three", "tokenflex", "ok", "3.0"),
        ("two", "tokenflex", "ok", "2.0"),
    ]


def test_a_case_of_which_one_variant_found_no_time_is_measured_again(suites_return, tmp_path):
    late = case("one", "not run: no time left, stopped while it ran", variant="PyTorch eager")
    suites_return(ceilings=CEILINGS, swiglu=[case("one"), late])
    assert run_into(tmp_path, "--resume")[0] == UNFINISHED
    eager = case("one", variant="PyTorch eager", p50_us=4.0)
    suites_return(ceilings=CEILINGS, swiglu=[case("one", p50_us=3.0), eager])
    assert run_into(tmp_path, "--resume")[0] == 0
    assert [row[1:] for row in swiglu_rows(tmp_path)] == [
        ("tokenflex", "ok", "3.0"),
        ("PyTorch eager", "ok", "4.0"),
    ]


def test_rows_of_a_run_that_was_interrupted_count(suites_return, tmp_path):
    suites_return(ceilings=CEILINGS, swiglu=[case("one"), KeyboardInterrupt()])
    assert run_into(tmp_path, "--resume")[0] == 130
    suites_return(ceilings=CEILINGS, swiglu=[case("one", p50_us=9.0), case("two")])
    assert run_into(tmp_path, "--resume")[0] == 0
    assert [row[0] for row in swiglu_rows(tmp_path)] == ["two", "one"]
    assert swiglu_rows(tmp_path)[1][-1] == "1.0"


@pytest.mark.parametrize(("options", "commit"), [([], "abc"), (["--resume"], "def")])
def test_rows_of_another_commit_or_without_resume_are_measured_again(
    suites_return, tmp_path, monkeypatch, options, commit
):
    suites_return(ceilings=CEILINGS, swiglu=[case("one")])
    run_into(tmp_path, "--resume")
    monkeypatch.setenv("TOKENFLEX_COMMIT", commit)
    suites_return(ceilings=CEILINGS, swiglu=[case("one", p50_us=9.0)])
    assert run_into(tmp_path, *options)[0] == 0
    assert swiglu_rows(tmp_path) == [("one", "tokenflex", "ok", "9.0")]


def test_a_wrong_result_fails_a_run_that_continues_too(suites_return, tmp_path):
    suites_return(ceilings=CEILINGS, swiglu=[case("one", "failed: ValueError: result is off")])
    assert run_into(tmp_path, "--resume")[0] == 1
    assert run_into(tmp_path, "--resume")[0] == 1  # it is kept, and still wrong


def test_rows_name_the_table_of_configs(suites_return, tmp_path, monkeypatch):
    suites_return(ceilings=CEILINGS, swiglu=[case("one")])
    run_into(tmp_path / "shipped")
    table = tmp_path / "table.json"
    table.write_text("{}", encoding="utf-8")
    monkeypatch.setenv("TOKENFLEX_LAUNCH_CONFIGS", str(table))
    run_into(tmp_path / "tuned")
    names = []
    for folder in ("shipped", "tuned"):
        (path,) = (tmp_path / folder).glob("*.csv")
        names += {row["configs"] for row in read_csv(path)}
    assert names[0] == "shipped"
    assert re.fullmatch("table [0-9a-f]{8}", names[1])
