"""The registry of data formats: the ``FORMATS`` of every module that defines some."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import tokenflex.data
import tokenflex.digits
import tokenflex.reading
from tokenflex.data.format import DataFormat, FreshParts
from tokenflex.data.json_records import first_byte


def _find_formats() -> dict[str, DataFormat]:
    formats: dict[str, DataFormat] = {}
    for package in (tokenflex.digits, tokenflex.reading, tokenflex.data):
        for module in iter_modules(package.__path__, f"{package.__name__}."):
            for data_format in getattr(import_module(module.name), "FORMATS", ()):
                formats[data_format.name] = data_format
    return formats


FORMATS = _find_formats()
"""The known formats by the name that configurations give them."""

FRESH_PARTS: dict[str, FreshParts] = {
    name: known.fresh_parts for name, known in FORMATS.items() if known.fresh_parts is not None
}
"""Parts of formats for models without pretrained parts, by the formats' names."""


def detect_format(path: str | Path) -> str:
    """Return the name of the format in which the data at ``path`` is.

    Raises:
        FileNotFoundError: Nothing exists at ``path``.
        ValueError: The data is of no format that can be told from its path and beginning.
    """
    path = Path(path)
    if not (path.is_dir() or path.is_file()):
        raise FileNotFoundError(f"data file {path} does not exist")
    for name, known in FORMATS.items():
        if known.recognises(path):
            return name
    with path.open("rb") as file:
        first = first_byte(file)
    raise ValueError(
        f"data file {path} must begin with '{{' (a JSON object a line) or '[' (LLaVA's list), got "
        f"{first!r}"
    )
