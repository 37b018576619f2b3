"""``python -m tests.ptx``: its arguments, and what it says of the cases that it ran."""

from __future__ import annotations

import csv
import re

import pytest

from tests.ptx import __main__ as command
from tests.ptx.cases import Outcome, Result, cases_of
from tests.ptx.parse import PtxError


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--architectures", "sm_75"], "--architectures: expected names of .*sm_90.*, got sm_75"),
        (["--architectures", "gfx942"], "--architectures: expected names of .*, got gfx942"),
        (["--architectures", ""], "--architectures: expected names of .*, got an empty name"),
        (["--only", "nothing_such"], "--only must be part of a case's name, got 'nothing_such'"),
        (["--out", "/dev/null/x.csv"], "--out: expected a file to write, got .*/dev/null is a"),
    ],
)
def test_misuse_is_refused_before_anything_is_executed(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(command.Case, "run", lambda case: pytest.fail("executed"))
    with pytest.raises(SystemExit) as exited:
        command.main(arguments)
    assert exited.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_the_interpreter_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit) as exited:
        command.main([])
    assert exited.value.code == 2
    assert "TRITON_INTERPRET=1" in capsys.readouterr().err


def test_the_cases_that_ran_are_counted(monkeypatch, tmp_path, capsys):
    """One case is right, one is wrong, and the others cannot be executed."""
    names = [case.name for case in cases_of("sm_80") if "pool-sums-bfloat16" in case.name]
    assert len(names) > 2

    def run(case):
        index = names.index(case.name)
        if index > 1:
            raise PtxError("no such instruction")
        return Outcome({"result": Result(float(index), 0.5)}, [])

    monkeypatch.setattr(command.Case, "run", run)
    arguments = ["--architectures", "sm_80", "--only", "pool-sums-bfloat16"]
    out = tmp_path / "new" / "x.csv"
    assert command.main([*arguments, "--out", str(out)]) == 1
    *lines, summary = capsys.readouterr().out.splitlines()
    assert [line.split(" s  ")[1] for line in lines] == [
        "right",
        "result: error 1, allowed 0.5",
        *["no such instruction"] * (len(names) - 2),
    ]
    assert summary == f"{len(names)} cases, {len(names) - 1} with faults"
    with out.open(newline="", encoding="utf-8") as file:
        assert tuple(csv.DictReader(file).fieldnames) == command.COLUMNS
    monkeypatch.setattr(command.Case, "run", lambda case: Outcome({"x": Result(0.0, 1.0)}, []))
    assert command.main(arguments) == 0
