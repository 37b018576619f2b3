"""Bars and tables on terminals of any width, on dumb ones, and where there is none."""

from __future__ import annotations

import contextlib
import io
import os
import re
import select
from collections.abc import Iterator

import pytest

from tests.test_cli import COMMANDS, checkpoint  # noqa: F401  # a fixture
from tokenflex import terminal
from tokenflex.cli import main
from tokenflex.terminal import (
    can_draw,
    progress_bar,
    progress_of_parts,
    say,
    show_work,
    text_table,
    watched,
    work_bar,
    working,
)

ESCAPE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch):
    for name in ("COLUMNS", "NO_COLOR", "TQDM_DISABLE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(terminal, "_shows_work", False)


@contextlib.contextmanager
def screen() -> Iterator[Terminal]:
    """Make the standard error a terminal; pytest would undo it in a fixture."""
    with contextlib.redirect_stderr(Terminal()) as stream:
        yield stream


def advance(**options) -> None:
    with progress_bar("training", 3, **options) as bar:
        for _ in range(3):
            bar.update()


# ---- bars


def test_a_bar_is_drawn_on_a_terminal_without_colours():
    with screen() as drawn:
        advance()
    assert "training: 100%" in drawn.getvalue()
    assert "3/3" in drawn.getvalue()
    assert not ESCAPE.search(drawn.getvalue())


@pytest.mark.parametrize(
    ("name", "value"), [("TERM", "dumb"), ("TQDM_DISABLE", "1"), ("TQDM_DISABLE", "true")]
)
def test_no_bar_is_drawn_where_it_is_not_wanted(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with screen() as drawn:
        assert not can_draw()
        advance()
    assert drawn.getvalue() == ""


def test_a_switch_that_is_off_disables_nothing(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "0")
    with screen():
        assert can_draw()


def test_files_and_pipes_get_no_bar():
    show_work()
    with contextlib.redirect_stderr(io.StringIO()) as written:
        advance()
        with working("loading"):
            assert [*watched("ab", "reading", unit="record", delay=0)] == ["a", "b"]
    assert written.getvalue() == ""


@pytest.mark.parametrize("columns", [20, 40, 120])
def test_a_bar_has_the_width_of_the_terminal(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    with screen() as drawn:
        advance()
        with progress_bar("a" * 50, 3) as bar:
            bar.update()
    shown = re.split(r"[\r\n]", drawn.getvalue())
    assert columns - 1 <= max(map(len, shown)) <= columns


def test_libraries_show_their_work_in_commands_only():
    def work() -> str:
        with screen() as drawn:
            assert [*watched("ab", "reading", unit="record", delay=0)] == ["a", "b"]
            with working("loading m"):
                pass
        return drawn.getvalue()

    assert work() == ""
    show_work()
    shown = work()
    assert "reading: 0record" in shown
    assert "loading m ..." in shown
    assert shown.endswith("\r")  # both have vanished


def test_of_several_processes_the_first_shows_its_work(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    show_work()
    with screen() as drawn, working("loading m"):
        pass
    assert drawn.getvalue() == ""


def test_short_work_shows_no_bar():
    show_work()
    with screen() as drawn, work_bar("hashing", 10, unit="B") as bar:
        bar.update(10)
    assert drawn.getvalue() == ""


def test_work_that_fails_leaves_no_bar():
    show_work()
    with screen() as drawn, pytest.raises(ValueError, match="broken"), working("loading m"):
        raise ValueError("broken")
    assert drawn.getvalue().endswith("\r")


def test_work_of_several_parts_shows_a_bar_of_each():
    with screen() as drawn, progress_of_parts("question") as show:
        for name, total in (("answers", 2), ("steps", 3), ("answers", 2)):
            for done in range(1, total + 1):
                show(name, done, total)
    ended = re.findall(r"(\w+): 100%[^\r]*?(\d+/\d+)", drawn.getvalue())
    assert [*dict.fromkeys(ended)] == [("answers", "2/2"), ("steps", "3/3")]
    assert drawn.getvalue().count("\n") == 3


def test_lines_are_printed_above_the_bars():
    out = io.StringIO()
    with screen() as drawn, contextlib.redirect_stdout(out), progress_bar("training", 2) as bar:
        say("step 1: fine")
        bar.update(2)
    assert out.getvalue() == "step 1: fine\n"
    assert drawn.getvalue().count("training: ") > 1


# ---- tables

ROWS = [["tokens", "4", "9", "16"], ["all", "0.125", "0.5", "0.75"]]


def test_a_table_that_fits_is_whole():
    assert text_table(ROWS, width=24) == text_table(ROWS)
    assert text_table(ROWS).splitlines() == ["tokens      4    9    16", "all     0.125  0.5  0.75"]


@pytest.mark.parametrize("width", range(1, 30))
def test_columns_that_do_not_fit_follow_below(width):
    text = text_table(ROWS, width=width)
    # A column alone may be wider than the terminal, but no column is joined to it then.
    assert all(len(line) <= max(width, 13) for line in text.splitlines())
    parts = [part.splitlines() for part in text.split("\n\n")]
    assert [cell for head, _ in parts for cell in head.split()[1:]] == ROWS[0][1:]
    assert [cell for _, row in parts for cell in row.split()[1:]] == ROWS[1][1:]
    assert all([line.split()[0] for line in part] == ["tokens", "all"] for part in parts)


def test_names_of_two_columns_are_repeated_where_they_leave_room():
    rows = [["a", "b", "accuracy", "tokens"], ["one", "two", "0.5", "7"]]
    for width, names in ((19, ["one", "two"]), (11, ["one"])):
        last = text_table(rows, left=2, width=width).splitlines()[-1].split()
        assert last == [*names, "7"]


def test_a_table_follows_the_terminal_and_is_whole_in_a_file(monkeypatch):
    monkeypatch.setenv("COLUMNS", "12")
    with contextlib.redirect_stdout(Terminal()):
        assert text_table(ROWS).count("\n\n") == 2
    with contextlib.redirect_stdout(io.StringIO()):
        assert "\n\n" not in text_table(ROWS)


# ---- commands


@pytest.mark.parametrize("columns", [40, 200])
@pytest.mark.parametrize("name", [*COMMANDS, ""])
def test_help_fits_the_terminal(monkeypatch, name, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    out = Terminal()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        main([*[name] * bool(name), "--help"])
    lines = ESCAPE.sub("", out.getvalue()).splitlines()
    assert [line for line in lines if len(line) > columns] == []
    assert len(lines) > 4


@pytest.mark.parametrize("columns", [40, 200])
def test_a_command_under_a_terminal(checkpoint, monkeypatch, columns):  # noqa: F811
    """Its bars are on the standard error, its table on the other fits, and neither has colours."""
    ours, theirs = os.openpty()
    monkeypatch.setenv("COLUMNS", str(columns))
    out = Terminal()
    command = ["evaluate", str(checkpoint), "--data", "digits", "--size", "2", "--counts"]
    with open(theirs, "w", encoding="utf-8") as stream:
        with contextlib.redirect_stderr(stream), contextlib.redirect_stdout(out):
            assert main([*command, "1,4,9,16,1x2,2x2"]) == 0
        stream.flush()
        read = b""
        while select.select([ours], [], [], 0.1)[0]:  # a terminal gives pieces
            read += os.read(ours, 65536)
        drawn = read.decode()
    os.close(ours)
    assert "evaluation: 100%" in drawn
    assert "loading" in drawn
    assert not ESCAPE.search(drawn + out.getvalue())
    lines = out.getvalue().splitlines()
    table = [line for line in lines if not re.match(r"\d+ questions", line)]
    assert max(map(len, table)) <= columns
    heads = [line for line in lines if line.startswith("vision tokens")]
    assert len(heads) == (2 if columns == 40 else 1)
    assert " ".join(heads).split().count("16") == 1


def test_a_command_without_a_terminal(checkpoint, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setenv("COLUMNS", "40")
    command = ["evaluate", str(checkpoint), "--data", "digits", "--size", "2", "--counts"]
    assert main([*command, "1,4,9,16,1x2"]) == 0
    out, errors = capsys.readouterr()
    assert errors == ""
    assert out.splitlines()[0].split() == ["vision", "tokens", "1", "4", "9", "16", "1x2"]
