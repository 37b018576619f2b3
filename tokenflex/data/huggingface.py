"""Data sets of the ``datasets`` library: Arrow folders, Parquet files, the hub."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from tokenflex.data.llava import as_messages
from tokenflex.data.messages import record_of
from tokenflex.data.samples import Conversation, Sample, SampleOutline


class HuggingFaceDataset:
    """Samples from columns ``images`` and ``messages``, or ``image`` and ``conversations``.

    The first pair is what TRL takes, the second LLaVA's; both images columns hold the library's
    ``Image`` feature. Rows are read and checked when they are asked for.

    Args:
        path: a folder that ``save_to_disk`` wrote, or what ``load_dataset`` takes.
        split: which split of it.

    Raises:
        ValueError: it cannot be loaded, or has other columns.
    """

    def __init__(self, path: str, split: str = "train") -> None:
        import datasets

        self.path = path
        try:
            if (Path(path) / "state.json").exists():
                rows = datasets.load_from_disk(path)
            elif (Path(path) / "dataset_dict.json").exists():
                rows = datasets.load_from_disk(path)[split]
            else:
                rows = datasets.load_dataset(path, split=split)
        except Exception as error:  # the library has exceptions of its own
            reason = " ".join(str(error).split())
            raise ValueError(
                f"data set {path} cannot be loaded, split {split!r}: {reason}"
            ) from error
        # Bytes, not pixels: an outline reads no more than an image's head.
        undecoded = datasets.Image(decode=False)
        if {"images", "messages"} <= set(rows.column_names):
            rows = rows.cast_column("images", datasets.List(undecoded))
        elif {"image", "conversations"} <= set(rows.column_names):
            rows = rows.cast_column("image", undecoded)
        else:
            raise ValueError(
                f"data set {path} must have columns images and messages, or image and "
                f"conversations, got {', '.join(rows.column_names)}"
            )
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        name, images, conversation = self._row(index)
        return Sample(name, tuple(one.convert("RGB") for one in images), (conversation,))

    def outline(self, index: int) -> SampleOutline:
        """The row's text and the sizes that its images' heads state."""
        name, images, conversation = self._row(index)
        sizes = tuple((one.height, one.width) for one in images)
        return SampleOutline(name, sizes, (conversation,))

    def _row(self, index: int) -> tuple[str, list[Image.Image], Conversation]:
        where = f"{self.path}[{index}]"
        row: dict[str, Any] = self._rows[index]
        if "messages" not in row:
            row = as_messages(row, where)
        images = [one for one in row.get("images") or [] if one is not None]
        record = {**row, "images": [where] * len(images)}
        name, _, conversation = record_of(record, where)
        return name, [_opened(one, where) for one in images], conversation


def _opened(stored: dict[str, Any], where: str) -> Image.Image:
    try:
        content = stored["bytes"]
        return Image.open(BytesIO(content) if content is not None else stored["path"])
    except Exception as error:  # each format's decoder raises its own kinds
        raise ValueError(f"{where}: an image cannot be read: {error}") from error
