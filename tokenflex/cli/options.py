"""Types of options; argparse shows the error of a value that is not allowed."""

from __future__ import annotations

import argparse
from typing import Any

ALLOW_OUTSIDE = "also read images outside of the data's folder (default: refuse them)"


def counts_or_grids(text: str, *words: str) -> list[Any]:
    """Parse counts and grids, for example 64,12x16; return ``words`` unchanged."""
    from tokenflex.counts import parse_count

    try:
        return [part if part in words else parse_count(part) for part in text.split(",")]
    except ValueError as error:
        place = f" in {text!r}" if "," in text else ""
        raise argparse.ArgumentTypeError(f"{error}{place}") from None


def counts_grids_or_auto(text: str) -> list[Any]:
    """Parse counts, grids and count policies, for example 64,12x16,auto."""
    from tokenflex.routing.policies import policy_names

    return counts_or_grids(text, *policy_names())


def comma_separated(text: str) -> list[str]:
    """Split at commas."""
    return text.split(",")


def positive(text: str) -> int:
    """Parse an int of at least 1."""
    return _at_least(1, text)


def non_negative(text: str) -> int:
    """Parse an int of at least 0."""
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
    """Parse a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text}")
    return value
