"""What a configuration says of data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from tokenflex.training.strict import Float, Int, Strict

DIGITS_SPLITS = ("train", "validation", "test")
SHUFFLE_BUFFER = 1000  # rows

# Which keys have an effect with which name, besides path, epochs and weight.
KEYS_OF: dict[str, set[str]] = {
    "digits": {"split", "size", "questions", "cells"},
    "messages": {"image_folder", "allow_outside"},
    "llava": {"image_folder", "allow_outside"},
    "webdataset": set(),
    "huggingface": {"split", "streaming", "shuffle_buffer", "allow_outside"},
    "mixture": set(),
}


class DataConfig(Strict):
    """A data set.

    ``name`` is "digits", the offline task; "messages", a JSONL file (``MessagesDataset``); "llava",
    a file in LLaVA's layout; "webdataset", tars (``WebDataset``); "huggingface", a data set of
    the ``datasets`` library, read as it comes with ``streaming``, the next row drawn from
    ``shuffle_buffer`` of them; "mixture", several ``parts``, each drawn from in proportion to its
    ``weight``. Training may go through it ``epochs`` times; without a bound it does so as often as
    the stages' steps ask. Images of "messages" and "llava" lie in ``image_folder``, or beside the
    file; one that lies outside of that folder (of "huggingface": of the data set's own) is a broken
    sample, unless ``allow_outside`` is true. ``cells`` are those of a canvas of "digits", per side.
    """

    name: Literal["digits", "messages", "llava", "webdataset", "huggingface", "mixture"]
    path: Path | None = None
    image_folder: Path | None = None
    # Like ``epochs``, no part of what a state is compared by.
    allow_outside: bool = Field(default=False, exclude=True)
    split: str = "train"
    cells: Int = Field(default=4, ge=4, multiple_of=2)
    streaming: bool = False
    shuffle_buffer: Int = Field(default=SHUFFLE_BUFFER, ge=1)
    # A bound changes no sample before it: a run that ended at one may go on with another. So it is
    # no part of what a state is compared by.
    epochs: Int | None = Field(default=None, ge=1, exclude=True)
    size: Int = Field(default=100_000, ge=1)
    questions: Int = Field(default=8, ge=1)
    parts: tuple[DataConfig, ...] = ()
    weight: Float = Field(default=1.0, gt=0, lt=float("inf"))

    def contradictions(self) -> Iterator[str]:
        if (self.name in ("digits", "mixture")) != (self.path is None):
            yield (
                "path must be given with name: messages, llava, webdataset or huggingface, and "
                f"only there, got name={self.name!r} and "
                f"path={None if self.path is None else str(self.path)!r}"
            )
        if (self.name == "mixture") != bool(self.parts):
            yield (
                "parts must be given with name: mixture, and only there, got "
                f"name={self.name!r} and {len(self.parts)} parts"
            )
        if any(part.name == "mixture" for part in self.parts):
            yield "parts must not be mixtures themselves, got one that is"
        elsewhere = set().union(*KEYS_OF.values()) - KEYS_OF[self.name]
        for key in sorted(elsewhere & self.model_fields_set):
            if getattr(self, key) != type(self).model_fields[key].default:
                users = ", ".join(name for name, keys in KEYS_OF.items() if key in keys)
                yield (
                    f"{key} must be given with name: {users} only, got name={self.name!r} and "
                    f"{key}={getattr(self, key)!r}"
                )
        if self.shuffle_buffer != SHUFFLE_BUFFER and not self.streaming:
            yield (
                f"shuffle_buffer needs streaming: true, got shuffle_buffer={self.shuffle_buffer}"
            )
        if self.name == "mixture" and self.epochs is not None:
            yield (
                f"epochs must be given to the parts of a mixture, got epochs={self.epochs} beside "
                "them"
            )
        if self.name == "digits" and self.split not in DIGITS_SPLITS:
            known = ", ".join(repr(split) for split in DIGITS_SPLITS)
            yield f"split must be one of {known} with name: digits, got {self.split!r}"
