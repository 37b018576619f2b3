"""Progress bars and tables that suit the terminal, or its absence.

Bars are drawn on the standard error, and only where it is a terminal that can redraw a line:
files and pipes get none. ``TQDM_DISABLE=1`` draws none anywhere. No colours are used.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

if TYPE_CHECKING:
    from tqdm import tqdm

T = TypeVar("T")
WORK_SHOWN_AFTER = 1.0
"""Seconds that work inside of the library takes before its bar appears."""
_COLUMNS, _LINES = 80, 24
"""Size of a terminal that does not say its own."""
_GAP = 2
"""Blanks between the columns of a table."""

_shows_work = False


def show_work() -> None:
    """Show the bars of :func:`work_bar` and :func:`working` from now on, as commands do.

    Of several processes of a run, the first shows them.
    """
    global _shows_work
    _shows_work = os.environ.get("RANK", "0") == "0"


def can_draw() -> bool:
    """Return whether bars can be drawn on the standard error, and are wanted."""
    if os.environ.get("TQDM_DISABLE", "").lower() not in ("", "0", "false"):
        return False
    return os.environ.get("TERM") != "dumb" and sys.stderr is not None and sys.stderr.isatty()


def progress_bar(
    name: str,
    total: float | None,
    *,
    done: int = 0,
    unit: str = "step",
    shown: bool = True,
    leave: bool = True,
    delay: float = 0.0,
    bar_format: str | None = None,
) -> tqdm:
    """Return a progress bar over ``total`` of ``unit``, of which ``done`` are done.

    Args:
        name: What is done, in front of the bar.
        total: Number of units; None if unknown.
        done: Units that were done before.
        unit: Name of a unit; "token" and "B" are shown with prefixes, such as 1.2M.
        shown: Draw the bar, if :func:`can_draw`.
        leave: Keep the bar at the end; otherwise it vanishes.
        delay: Seconds before the bar appears.
        bar_format: See :class:`tqdm.tqdm`.
    """
    from tqdm import tqdm

    has_size = _has_size(sys.stderr)
    given = os.environ.get("COLUMNS", "")
    columns = None if has_size else _COLUMNS - 1
    if given.isdecimal() and int(given) > 1:
        columns = int(given) - 1
    return tqdm(
        total=total,
        initial=done,
        desc=name,
        unit=unit,
        unit_scale=unit in ("token", "B"),
        disable=not (shown and can_draw()),
        leave=leave,
        delay=delay,
        ncols=columns,
        nrows=None if has_size else _LINES,
        dynamic_ncols=columns is None,  # it would override ncols
        bar_format=bar_format,
    )


def _has_size(stream: TextIO) -> bool:
    """Return whether a terminal knows its size; tqdm draws nothing on one that says 0 x 0."""
    try:
        return min(os.get_terminal_size(stream.fileno())) > 0
    except (OSError, ValueError, AttributeError):
        return False


def work_bar(
    name: str, total: float | None = None, *, unit: str, delay: float = WORK_SHOWN_AFTER
) -> tqdm:
    """Return a bar for work inside of the library, which a program's user did not ask for.

    Commands show it once the work takes longer than ``delay`` seconds; it vanishes at the end.
    Programs that import the package never show it, unless they call :func:`show_work`.
    """
    return progress_bar(name, total, unit=unit, shown=_shows_work, leave=False, delay=delay)


def watched(
    items: Iterable[T],
    name: str,
    total: float | None = None,
    *,
    unit: str,
    delay: float = WORK_SHOWN_AFTER,
) -> Iterator[T]:
    """Yield ``items``, and show them in a :func:`work_bar`.

    Args:
        items: Anything iterable.
        name: What is done.
        total: Number of items; None if unknown.
        unit: Name of an item.
        delay: Seconds before the bar appears; 0 where the first item may take long.
    """
    with work_bar(name, total, unit=unit, delay=delay) as bar:
        for item in items:
            yield item
            bar.update()


@contextmanager
def working(name: str) -> Iterator[None]:
    """Show the name of work without steps while it lasts, where :func:`work_bar` shows bars."""
    bar = progress_bar(f"{name} ...", None, shown=_shows_work, leave=False, bar_format="{desc}")
    with bar:
        yield


@contextmanager
def progress_of_parts(unit: str) -> Iterator[Callable[[str, int, int], None]]:
    """Yield a function that shows one bar after the other, for work of several parts.

    It takes the name of the part, the number of units that are done, and their total.
    """
    shown: tuple[str, int] | None = None
    bar: Any = None

    def show(name: str, done: int, total: int) -> None:
        nonlocal shown, bar
        if (name, total) != shown:
            if bar is not None:
                bar.close()
            shown, bar = (name, total), progress_bar(name, total, unit=unit)
        bar.update(done - bar.n)

    try:
        yield show
    finally:
        if bar is not None:
            bar.close()


def say(line: str) -> None:
    """Print a line to the standard output, above the bars that are drawn."""
    from tqdm import tqdm

    tqdm.write(line)
    sys.stdout.flush()


def width_of(stream: TextIO) -> int | None:
    """Return the columns of the terminal behind ``stream``; None for a file or a pipe.

    ``COLUMNS`` overrides the width of a terminal.
    """
    return shutil.get_terminal_size().columns if stream.isatty() else None


def text_table(
    rows: Sequence[Sequence[str]],
    *,
    left: int = 1,
    width: int | None = None,
    widths: Sequence[int] = (),
) -> str:
    """Format rows of as many cells as columns of text.

    Args:
        rows: The rows, the first of which is the head.
        left: Number of columns that are aligned left; all others are aligned right.
        width: Characters of a line; by default those of the terminal that the standard output is,
            if it is one. Columns of the table that do not fit beside the others follow below,
            beside the columns that are aligned left again, or beside the first of them if they
            would take more than half of the width.
        widths: Least widths of the columns.
    """
    width = width_of(sys.stdout) if width is None else width
    least = [*widths, *[0] * (len(rows[0]) - len(widths))]
    sizes = [
        max(size, *map(len, column))
        for size, column in zip(least, zip(*rows, strict=True), strict=True)
    ]
    keys = [0]
    if width is None or sum(sizes[:left]) <= width / 2:
        keys = [*range(max(left, 1))]
    blocks: list[list[int]] = []
    room = 0
    for column in range(len(keys), len(sizes)):
        needed = _GAP + sizes[column]
        if not blocks or (width is not None and needed > room):
            blocks.append([*keys])
            if width is not None:
                room = width - sum(sizes[key] + _GAP for key in keys) + _GAP
        blocks[-1].append(column)
        room -= needed
    tables = [
        "\n".join(
            (" " * _GAP)
            .join(row[i].ljust(sizes[i]) if i < left else row[i].rjust(sizes[i]) for i in block)
            .rstrip()
            for row in rows
        )
        for block in blocks or [keys]
    ]
    return "\n\n".join(tables)
