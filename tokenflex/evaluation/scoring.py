"""Rules that compare a generated answer with its reference, without a judge."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

FORCED = "forced"
"""The score without a generated text, see :func:`tokenflex.evaluation.evaluate`."""

_QUOTES = "\"'`\u201c\u201d\u2018\u2019\u00ab\u00bb"  # straight, curly and angular
_ENDS = ".,;:!?"
_LETTER = r"\(?\b([A-Z])\b\)?"
_STATED = re.compile(rf"\b(?i:answer|option|choice)\b(?:\s+is)?\s*:?\s*{_LETTER}(?![\w'])")
_ALONE = re.compile(rf"{_LETTER}[.:)]?")
_LEADING = re.compile(r"(?:\(([A-Z])\)|([A-Z])[.:)])(?=\s|$)")
_BRACKETED = re.compile(r"\(([A-Z])\)")


def normalise(text: str) -> str:
    """Drop case, white space, outer quotes and closing punctuation; keep signs and units."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    while (shorter := text.strip(_QUOTES).rstrip(_ENDS).strip()) != text:
        text = shorter
    return text


def option_letter(text: str) -> str | None:
    """Return the option that a multiple-choice answer names, or None.

    ``B``, ``(B)``, ``B. A cat``, ``The answer is B`` and ``It must be (B)`` all name B. ``A cat``
    and a text with two different letters in brackets name none.
    """
    text = text.strip().strip(_QUOTES).strip()
    if alone := _ALONE.fullmatch(text.rstrip(_ENDS).upper()):
        return alone[1]
    if leading := _LEADING.match(text):
        return leading[1] or leading[2]
    if stated := _STATED.findall(text):
        return stated[-1].upper()
    bracketed = {*_BRACKETED.findall(text)}
    return bracketed.pop() if len(bracketed) == 1 else None


def exact(answer: str, reference: str) -> bool:
    """Return whether both texts are equal after :func:`normalise`."""
    return normalise(answer) == normalise(reference)


def choice(answer: str, reference: str) -> bool:
    """Return whether both texts name the same option letter.

    Raises:
        ValueError: The reference names none.
    """
    wanted = option_letter(reference)
    if wanted is None:
        raise ValueError(f"score choice needs answers that name an option, got {reference!r}")
    return option_letter(answer) == wanted


def contains(answer: str, reference: str) -> bool:
    """Return whether the answer has the reference as whole words; 13, 3.5 and -3 do not have 3.

    Raises:
        ValueError: The reference is empty.
    """
    wanted = normalise(reference)
    if not wanted:
        raise ValueError(f"score contains needs answers that are not empty, got {reference!r}")
    before = r"(?<!\w)" + (r"(?<!-)(?<!\d[.,])" if wanted[0].isdigit() else "")
    after = r"(?!\w)" + (r"(?![.,]\d)" if wanted[-1].isdigit() else "")
    return re.search(before + re.escape(wanted) + after, normalise(answer)) is not None


RULES: dict[str, Callable[[str, str], bool]] = {
    "exact": exact,
    "choice": choice,
    "contains": contains,
}
SCORES = (FORCED, *RULES)
