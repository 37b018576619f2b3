"""Options of the commands: what is wrong is named, and paths are checked before work begins."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

import pytest

from tokenflex_kernels.options import names_of, output_file, output_folder, positive, time_limit


def test_values_that_are_allowed():
    assert positive("3") == 3
    assert time_limit("0.5") == 0.5
    assert time_limit("inf") == math.inf
    assert names_of("abc")("b,a,b") == ["b", "a"]


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (positive, "0", "expected at least 1, got 0"),
        (positive, "1.5", "expected a whole number, got '1.5'"),
        (time_limit, "-1", "expected seconds above 0, got -1"),
        (time_limit, "nan", "expected seconds above 0, got nan"),
        (time_limit, "", "expected a number of seconds, got ''"),
        (names_of("abc"), "a,d,e", "expected names of a, b, c, got d, e"),
        (names_of("abc"), "", "expected names of a, b, c, got an empty name"),
        (names_of("abc"), "a, b", "expected names of a, b, c, got  b"),
    ],
)
def test_others_are_named(kind, text, message):
    with pytest.raises(argparse.ArgumentTypeError) as error:
        kind(text)
    assert str(error.value) == message


@pytest.mark.parametrize("kind", [output_file, output_folder])
class TestPaths:
    def test_nothing_is_made_yet(self, kind, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert kind("new/folder/x.csv") == Path("new/folder/x.csv")
        assert kind("x.csv") == Path("x.csv")
        assert list(tmp_path.iterdir()) == []

    def test_a_file_is_no_folder(self, kind, tmp_path):
        (tmp_path / "file").write_text("", encoding="utf-8")
        with pytest.raises(argparse.ArgumentTypeError, match=r"file' is a file|/file is a file"):
            kind(str(tmp_path / "file" / "x.csv"))

    def test_a_folder_that_is_read_only(self, kind, tmp_path, monkeypatch):
        monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
        for name in ("x.csv", "new/x.csv"):
            with pytest.raises(argparse.ArgumentTypeError, match=f"{tmp_path} is read-only"):
                kind(str(tmp_path / name))

    def test_a_name_that_no_file_can_have(self, kind, tmp_path):
        with pytest.raises(argparse.ArgumentTypeError, match="File name too long"):
            kind(str(tmp_path / ("x" * 300)))


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(argparse.ArgumentTypeError, match="expected a file to write, got the fold"):
        output_file(str(tmp_path))
    assert output_folder(str(tmp_path)) == tmp_path


def test_a_file_that_is_read_only(tmp_path, monkeypatch):
    path = tmp_path / "x.csv"
    path.write_text("", encoding="utf-8")
    assert output_file(str(path)) == path
    monkeypatch.setattr(os, "access", lambda checked, mode: checked != path)
    with pytest.raises(argparse.ArgumentTypeError, match=r"x\.csv', which is read-only"):
        output_file(str(path))
