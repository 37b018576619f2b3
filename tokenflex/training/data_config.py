"""A data set in a configuration."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, create_model

from tokenflex.data.format import DataFormat
from tokenflex.formats import FORMATS
from tokenflex.hub import is_absent
from tokenflex.training.strict import Float, Int, Strict

MIXTURE = "mixture"
DATA = "data"
"""The kind of files that data is read from, see :meth:`Strict.absent_files`."""

_PATTERN = frozenset("*?[]{}")


def _format_keys() -> dict[str, Any]:
    """Return the keys of all formats, as pydantic's ``create_model`` takes them."""
    numbers: dict[Any, Any] = {int: Int, float: Float}
    keys: dict[str, Any] = {}
    for known in FORMATS.values():
        for key, field in known.keys.items():
            annotation = numbers.get(field.annotation, field.annotation)
            for bound in field.metadata:
                annotation = Annotated[annotation, bound]
            options = {"default": field.default, "exclude": field.exclude}
            keys[key] = (annotation, Field(**options, description=_description(key)))
    return keys


def _description(key: str) -> str:
    """Return what the formats say of a key, each text with the names of its formats."""
    formats: dict[str, list[str]] = {}
    for known in FORMATS.values():
        if key in known.keys:
            formats.setdefault(known.keys[key].description or "", []).append(known.name)
    texts = (f"{text} For {', '.join(names)}." for text, names in formats.items())
    return " ".join(texts).lstrip()


_FORMAT_KEYS = _format_keys()
_NAMES: Any = Literal[(*FORMATS, MIXTURE)]
_NAME = (_NAMES, Field(description='Name of a registered format, or "mixture".'))
_FormatKeys: Any = create_model("_FormatKeys", __base__=Strict, name=_NAME, **_FORMAT_KEYS)


class DataConfig(_FormatKeys):
    """A data set.

    Beside the keys below, data takes those of its format's ``options``; see
    :mod:`tokenflex.formats`.
    """

    path: Path | None = None
    """Path of the data, for formats that are read from one."""
    epochs: Int | None = Field(default=None, ge=1, exclude=True)
    """Most passes of training through the data; None for as many as its stages need. A bound
    changes no sample before it, so a run that ended at one may continue with another."""
    parts: tuple[DataConfig, ...] = ()
    """Data sets of a mixture."""
    weight: Float = Field(default=1.0, gt=0, lt=float("inf"))
    """Share of samples drawn from a part of a mixture, relative to the other parts' weights."""

    @property
    def format(self) -> DataFormat:
        """The format of data that is not a mixture."""
        return FORMATS[self.name]

    def contradictions(self) -> Iterator[str]:
        is_mixture = self.name == MIXTURE
        if (self.path is None) != (is_mixture or not self.format.needs_path):
            *names, last = [name for name, known in FORMATS.items() if known.needs_path]
            yield (
                f"path must be given with name: {', '.join(names)} or {last}, and only there, got "
                f"name={self.name!r} and path={None if self.path is None else str(self.path)!r}"
            )
        if is_mixture != bool(self.parts):
            yield (
                "parts must be given with name: mixture, and only there, got "
                f"name={self.name!r} and {len(self.parts)} parts"
            )
        if any(part.name == MIXTURE for part in self.parts):
            yield "parts must not be mixtures themselves, got one that is"
        for key in sorted(self.model_fields_set & _FORMAT_KEYS.keys()):
            users = [name for name, known in FORMATS.items() if key in known.keys]
            default = DataConfig.model_fields[key].default
            if self.name not in users and getattr(self, key) != default:
                yield (
                    f"{key} must be given with name: {', '.join(users)} only, got "
                    f"name={self.name!r} and {key}={getattr(self, key)!r}"
                )
        if is_mixture and self.epochs is not None:
            yield (
                f"epochs must be given to the parts of a mixture, got epochs={self.epochs} beside "
                "them"
            )
        if not is_mixture:
            yield from self.format.options_of(self).contradictions()

    def absent_files(self, needed: Collection[str]) -> Iterator[str]:
        if DATA not in needed or self.path is None:
            return
        if self.format.reads_whole_files:
            is_lacking = not self.path.exists()
        else:  # maybe a pattern, or a name on a hub
            is_lacking = _PATTERN.isdisjoint(str(self.path)) and is_absent(self.path)
        if is_lacking:
            yield f"data file {self.path} does not exist"
