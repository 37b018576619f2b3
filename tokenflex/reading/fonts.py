"""Fonts of the pages: those that matplotlib ships, so that every machine draws the same task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from PIL import ImageFont

from tokenflex.reading.content import LETTERS, NUMBERS, VALUES, WORDS

FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSerif")
"""Fonts of the standard task."""
CHARACTERS = "".join(sorted({*"note", *"".join((*WORDS, *NUMBERS, *LETTERS, *VALUES))}))
"""Characters of all pages."""


@cache
def font_path(name: str) -> Path:
    """Return the file of a font.

    Args:
        name: A font that matplotlib ships, such as "DejaVuSerif", or the path of a font file.

    Raises:
        ValueError: There is no such font, or it has other signs in place of letters or digits.
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
    if wrong := _without_glyphs(path):
        raise ValueError(
            f"fonts must have glyphs of all letters and digits, got {name!r} without those of "
            f"{wrong}"
        )
    return path


def _without_glyphs(path: Path) -> str:
    """Return the characters that a font draws as another sign, as the same one, or not at all."""
    from fontTools import agl
    from matplotlib.ft2font import FT2Font

    font = FT2Font(str(path))
    glyphs = font.get_charmap()
    shared = Counter(glyphs[ord(character)] for character in CHARACTERS if ord(character) in glyphs)
    wrong = ""
    for character in CHARACTERS:
        glyph = glyphs.get(ord(character))
        if glyph is None or shared[glyph] > 1:
            wrong += character
        elif character.isalpha():
            # Mathematical fonts hold other signs at the letters' places; the names tell.
            meant = agl.toUnicode(font.get_glyph_name(glyph))
            wrong += character if meant not in ("", character) else ""
    return wrong


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
