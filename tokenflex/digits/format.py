"""The digits task as a data format."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import Field

from tokenflex.counts import TokenCount
from tokenflex.data.format import DataFormat, FormatOptions, FreshParts
from tokenflex.digits.canvas import CELL_PIXELS, CELLS, SPLITS
from tokenflex.digits.dataset import DigitsDataset
from tokenflex.digits.encoder import warm_up_encoder
from tokenflex.digits.processor import digits_processor


class DigitsOptions(FormatOptions):
    """Keys of ``name: digits``."""

    split: str = "train"
    """Split of the task: "train", "validation" or "test"."""
    size: int = Field(default=100_000, ge=1)
    """Number of canvases."""
    questions: int = Field(default=8, ge=1)
    """Questions about each canvas."""
    cells: int = Field(default=CELLS, ge=4, multiple_of=2)
    """Cells along a side of a canvas."""

    def contradictions(self) -> Iterator[str]:
        if self.split not in SPLITS:
            known = ", ".join(map(repr, SPLITS))
            yield f"split must be one of {known} with name: digits, got {self.split!r}"


def _open(options: DigitsOptions) -> DigitsDataset:
    return DigitsDataset(
        options.split, size=options.size, questions=options.questions, cells=options.cells
    )


def _processor(num_image_tokens: TokenCount, image_size: int) -> Any:
    return digits_processor(num_image_tokens, cells=image_size // CELL_PIXELS)


def _image_problem(options: DigitsOptions, image_size: Any) -> str | None:
    """Compare the canvases with the encoder's images: words for cells follow from its size."""
    pixels = options.cells * CELL_PIXELS
    if pixels == image_size:
        return None
    return (
        f"model.vision.config must have image_size {pixels} for canvases of {options.cells} x "
        f"{options.cells} cells, got {image_size!r}"
    )


FORMATS = (
    DataFormat(
        name="digits",
        open=_open,
        options=DigitsOptions,
        needs_path=False,
        fresh_parts=FreshParts(_processor, warm_up_encoder, _image_problem),
    ),
)
