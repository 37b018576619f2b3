"""Fonts of the pages: those that matplotlib ships, so that every machine draws the same task."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from PIL import ImageFont

FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSerif")
"""Fonts of the standard task."""


@cache
def font_path(name: str) -> Path:
    """Return the file of a font.

    Args:
        name: A font that matplotlib ships, such as "DejaVuSerif", or the path of a font file.

    Raises:
        ValueError: There is no such font.
    """
    import matplotlib

    shipped = Path(matplotlib.get_data_path(), "fonts/ttf")
    path = shipped / f"{name}.ttf"
    if not path.is_file():
        path = Path(name)
    if path.suffix.lower() not in (".ttf", ".otf", ".ttc") or not path.is_file():
        raise ValueError(
            f"fonts must be names of fonts that matplotlib ships, such as {FONTS[0]!r}, or paths "
            f"of .ttf or .otf files, got {name!r}"
        )
    try:
        ImageFont.truetype(str(path), 8)
    except OSError as error:
        raise ValueError(f"fonts must be font files, got {name!r}: {error}") from error
    return path


def check_fonts(names: Sequence[str]) -> None:
    """Raise ValueError unless there is at least one font and each can be opened."""
    if not names:
        raise ValueError("fonts must name at least one font, got none")
    for name in names:
        font_path(name)


@cache
def font_of(name: str, size: int) -> ImageFont.FreeTypeFont:
    """Return a font at ``size`` pixels. Letters are laid out one after another, without Raqm."""
    return ImageFont.truetype(str(font_path(name)), size, layout_engine=ImageFont.Layout.BASIC)
