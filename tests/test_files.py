"""Excerpts of values from strangers: short, printable, and of nothing deep or large."""

from __future__ import annotations

from typing import Any

import pytest

from tokenflex.files import excerpt, parse_json, printable


def deep(depth: int = 100_000) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "described"),
    [
        ("cat", "'cat'"),
        (7, "7"),
        (1.5, "1.5"),
        (None, "None"),
        (True, "True"),
        ([1, "a"], "[1, 'a']"),
        ([], "an empty list"),
        ([[1]], "a list of 1"),
        ([0] * 9, "a list of 9"),
        ({}, "an object without keys"),
        ({"a": deep(), "b": 1}, "an object with keys a, b"),
        ("\ud83d\n", r"'\ud83d\n'"),
        ([10**5000], "[an integer of man...]"),
        (object(), "a object"),
        (b"\xff" * 1234, "1,234 bytes"),
        ("data:image/png;base64," + "Qm" * 2095, "a data URL of 4,212 characters"),
        ("Qm" * 500, "base64 of 1,000 characters"),
        ("Data: 1, 2", "'Data: 1, 2'"),
        ("images/train/a.png", "'images/train/a.png'"),
    ],
    ids=range(19),
)
def test_a_value_is_described(value, described):
    assert excerpt(value) == described


@pytest.mark.parametrize(
    "value",
    [
        "x" * 10**6,
        b"\xff" * 10**6,
        deep(),
        [deep()] * 3,
        {"k" * 10**6: 1},
        dict.fromkeys(range(10**5)),
    ],
)
def test_no_description_is_long(value):
    assert len(excerpt(value)) <= 80
    assert excerpt(value).isprintable()
    assert len(excerpt(value, 20)) <= 20


def test_a_text_becomes_one_printable_line():
    assert printable("two\nlines \ud83d", 100) == "two lines \\ud83d"
    assert printable("x" * 100, 10) == "xxxxxxx..."


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[" * 100_000 + b"]" * 100_000, "too deeply"),
        (b"9" * 5000, "digits"),
        (b"\xff", "UTF-8"),
        (b"{", "not JSON"),
    ],
)
def test_what_cannot_be_parsed_is_a_value_error_that_quotes_nothing(content, words):
    with pytest.raises(ValueError, match=words) as error:
        parse_json(content, "report x")
    assert len(str(error.value)) < 250


def test_a_byte_order_mark_is_no_part_of_json():
    assert parse_json(b"\xef\xbb\xbf[1]\r\n", "x") == [1]
