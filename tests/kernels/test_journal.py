"""Results that a killed process leaves behind, and what the next one makes of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tokenflex_kernels.journal import Journal

COLUMNS = ("name", "value")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results" / "times.csv"


def journal(path, setting="one GPU"):
    return Journal(path, COLUMNS, setting)


def values(rows):
    return [(row["name"], row["value"]) for row in rows]


def test_rows_are_on_the_disk_at_once_and_are_read_again(path):
    first = journal(path)
    first.add("a, b", 1.5)
    assert values(journal(path).rows) == values(first.rows) == [("a, b", "1.5")]
    journal(path).add("c", "x\ny")
    assert values(journal(path).rows) == [("a, b", "1.5"), ("c", "x y")]


def test_rows_of_another_setting_stay_and_are_not_read(path):
    journal(path).add("a", 1)
    other = journal(path, "another GPU")
    assert other.rows == []
    other.add("a", 2)
    assert values(journal(path).rows) == [("a", "1")]


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_row_that_was_cut_off_is_ignored(path, cut):
    journal(path).add("a", 1)
    whole = path.read_bytes()
    journal(path).add("b", 2)
    path.write_bytes(path.read_bytes()[:-cut])
    again = journal(path)
    assert values(again.rows) == [("a", "1")]
    again.add("c", 3)
    assert values(journal(path).rows) == [("a", "1"), ("c", "3")]
    assert path.read_bytes().startswith(whole)


def test_a_file_of_other_columns_is_refused_and_left_alone(path):
    path.parent.mkdir()
    path.write_text("stage,dtype\n", encoding="utf-8")
    with pytest.raises(ValueError, match="must have the columns name, value, setting, got stage"):
        journal(path)
    assert path.read_text(encoding="utf-8") == "stage,dtype\n"


def test_without_a_path_nothing_is_written(tmp_path):
    memory = journal(None)
    with memory.measuring("a"):
        memory.add("a", 1)
    assert values(memory.rows) == [("a", "1")]
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_was_measuring_is_known(path):
    code = f"""
import os, signal
from pathlib import Path
from tokenflex_kernels.journal import Journal
journal = Journal(Path({str(path)!r}), {COLUMNS!r}, "one GPU")
journal.add("a", 1)
with journal.measuring("b"):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": root}, check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert (journal(path).lost, values(journal(path).rows)) == ("b", [("a", "1")])


def test_what_ends_by_an_exception_is_not_lost(path):
    with pytest.raises(KeyboardInterrupt), journal(path).measuring("a"):
        raise KeyboardInterrupt
    assert journal(path).lost == ""
