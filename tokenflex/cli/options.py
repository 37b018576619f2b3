"""What the value of an option may be; what it may not is an error that argparse shows."""

from __future__ import annotations

import argparse
from typing import Any

ALLOW_OUTSIDE = "read images that lie outside of the data's folder, which are refused otherwise"


def counts_or_grids(text: str, *words: str) -> list[Any]:
    """Counts and grids, for example 64,12x16, and ``words`` as they are."""
    from tokenflex.counts import parse_count

    try:
        return [part if part in words else parse_count(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error} in {text!r}") from None


def counts_grids_or_auto(text: str) -> list[Any]:
    """Counts and grids, and auto, for example 64,12x16,auto."""
    from tokenflex.counts import AUTO

    return counts_or_grids(text, AUTO)


def comma_separated(text: str) -> list[str]:
    """What stands between commas."""
    return text.split(",")


def positive(text: str) -> int:
    """A whole number from 1 on."""
    return _at_least(1, text)


def non_negative(text: str) -> int:
    """A whole number from 0 on."""
    return _at_least(0, text)


def _at_least(lowest: int, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
    if value < lowest:
        raise argparse.ArgumentTypeError(f"expected at least {lowest}, got {value}")
    return value


def probability(text: str) -> float:
    """A number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text}")
    return value
