"""Check that the installed releases of other packages are new enough."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version


def require(package: str, oldest: str, needed_by: str = "tokenflex") -> None:
    """Refuse an installed release that is too old; a missing package is not an error here.

    Args:
        package: name of its distribution.
        oldest: the first release that works, for example ``"5.17"``.
        needed_by: what needs it, as the message names it.

    Raises:
        ImportError: the installed release is older.
    """
    if is_older(package, oldest):
        raise ImportError(f"{needed_by} needs {package} >= {oldest}, found {version(package)}")


def is_older(package: str, release: str) -> bool:
    """Return whether the installed release of a package is older; False if it is missing."""
    try:
        return _numbers(version(package)) < _numbers(release)
    except PackageNotFoundError:
        return False


def is_release(package: str, release: str) -> bool:
    """Return whether the installed release of a package begins with these numbers: 3.7.1 with 3.7.

    False if the package is missing.
    """
    numbers = _numbers(release)
    try:
        return _numbers(version(package))[: len(numbers)] == numbers
    except PackageNotFoundError:
        return False


def _numbers(release: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: (2, 13, 0) of ``2.13.0a1+cpu``."""
    numbers = re.match(r"\d+(?:\.\d+)*", release)
    return tuple(int(number) for number in numbers[0].split(".")) if numbers else ()
