"""A user need not say what format the data is in."""

from __future__ import annotations

import pytest

from tokenflex.data.formats import detect_format


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b'{"messages": []}\n{}', "messages"),
        (b'\n \n  {"messages": []}', "messages"),
        (b"", "messages"),
        (b"[{}]", "llava"),
        (b"\n [\n{}]", "llava"),
    ],
)
def test_of_a_file(tmp_path, content, name):
    (tmp_path / "data").write_bytes(content)
    assert detect_format(tmp_path / "data") == name


def test_of_a_folder(tmp_path):
    assert detect_format(tmp_path) == "huggingface"


def test_what_is_no_data(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json does not exist"):
        detect_format(tmp_path / "none.json")
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=r"a\.png must begin"):
        detect_format(tmp_path / "a.png")
