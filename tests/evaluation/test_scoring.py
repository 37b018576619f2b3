"""The rules that call a generated answer right."""

from __future__ import annotations

import pytest

from tokenflex.evaluation.scoring import choice, contains, exact, option_letter


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("A cat.", "a cat", True),
        ("  A  cat ", "a cat", True),
        ('"A cat."', "A cat", True),
        ("\uff21 cat", "a cat", True),  # full width
        ("a cat!?", "a cat", True),
        ("the cat", "a cat", False),
        ("-5", "5", False),
        (".5", "5", False),
        ("5%", "5", False),
        ("", "a cat", False),
    ],
)
def test_exact_up_to_case_and_punctuation(answer, reference, right):
    assert exact(answer, reference) is right


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ("B. A cat", "B"),
        ("(C) a cat", "C"),
        ("The answer is B.", "B"),
        ("Answer: (D)", "D"),
        ("answer is A, no: the answer is C", "C"),
        ("It must be (B), of course", "B"),
        ("It is (B) or (C)", None),
        ("A cat", None),
        ("The answer is a cat", None),
        ("I see a cat", None),
        ("The answer is Bob", None),
        ("cat", None),
        ("", None),
    ],
)
def test_option_letters(text, letter):
    assert option_letter(text) == letter


def test_choice_compares_letters():
    assert choice("The answer is (B)", "B. a cat")
    assert not choice("A", "B")
    assert not choice("a cat", "B")
    with pytest.raises(ValueError, match="'a cat'"):
        choice("B", "a cat")


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("It is a cat.", "A cat", True),
        ("It is 3.", "3", True),
        ("3, I think", "3", True),
        ("It is 13", "3", False),
        ("It is 3.5", "3", False),
        ("It is 2.3", "3", False),
        ("It is 1,300", "300", False),
        ("It is -3", "3", False),
        ("concatenate", "cat", False),
        ("a well-known cat", "known", True),
        ("(a+b)", "a+b", True),
    ],
)
def test_contains_whole_words_and_numbers(answer, reference, right):
    assert contains(answer, reference) is right


def test_contains_needs_something_to_look_for():
    with pytest.raises(ValueError, match="not empty"):
        contains("a cat", " . ")
