"""Data sets of the ``datasets`` library: Arrow folders, Parquet files, the hub."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from tokenflex.data.llava import as_messages
from tokenflex.data.messages import record_of
from tokenflex.data.samples import Conversation, Sample, SampleOutline
from tokenflex.images import image_size, open_image


class HuggingFaceDataset:
    """Samples from columns ``images`` and ``messages``, or ``image`` and ``conversations``.

    The first pair is what TRL takes, the second LLaVA's; both images columns hold the library's
    ``Image`` feature. Rows are read and checked when they are asked for.

    Args:
        path: a folder that ``save_to_disk`` wrote, or what ``load_dataset`` takes.
        split: which split of it.

    Raises:
        ValueError: it cannot be loaded, which one that is empty cannot, or has other columns.
    """

    def __init__(self, path: str, split: str = "train") -> None:
        self.path = path
        self._rows = load_rows(path, split)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        return sample_of(self._rows[index], f"{self.path}[{index}]")

    def outline(self, index: int) -> SampleOutline:
        """The row's text and the sizes that its images' heads state."""
        return outline_of_row(self._rows[index], f"{self.path}[{index}]")


def load_rows(path: str, split: str, *, streaming: bool = False) -> Any:
    """A ``Dataset`` or ``IterableDataset`` whose images are bytes, not pixels.

    Raises:
        ValueError: it cannot be loaded, or has other columns.
    """
    import datasets

    try:
        if (Path(path) / "state.json").exists():
            rows = datasets.load_from_disk(path)
        elif (Path(path) / "dataset_dict.json").exists():
            rows = datasets.load_from_disk(path)[split]
        else:
            rows = datasets.load_dataset(path, split=split, streaming=streaming)
        if streaming and isinstance(rows, datasets.Dataset):
            rows = rows.to_iterable_dataset()
    except Exception as error:  # the library has exceptions of its own
        reason = " ".join(str(error).split())
        raise ValueError(f"data set {path} cannot be loaded, split {split!r}: {reason}") from error
    # An outline reads no more than an image's head.
    undecoded = datasets.Image(decode=False)
    columns = rows.column_names or []
    if {"images", "messages"} <= set(columns):
        return rows.cast_column("images", datasets.List(undecoded))
    if {"image", "conversations"} <= set(columns):
        return rows.cast_column("image", undecoded)
    raise ValueError(
        f"data set {path} must have columns images and messages, or image and conversations, got "
        f"{', '.join(columns) or 'none'}"
    )


def sample_of(row: dict[str, Any], where: str) -> Sample:
    """A row with its pixels.

    Raises:
        ValueError: it is not of either layout, or an image cannot be read; names ``where``.
    """
    name, images, conversation = _parts(row, where)
    pixels = tuple(open_image(image, f"{where}: an image") for image in images)
    return Sample(name, pixels, (conversation,))


def outline_of_row(row: dict[str, Any], where: str) -> SampleOutline:
    """A row without its pixels; raises as :func:`sample_of` does."""
    name, images, conversation = _parts(row, where)
    sizes = tuple(image_size(image, f"{where}: an image") for image in images)
    return SampleOutline(name, sizes, (conversation,))


def _parts(row: dict[str, Any], where: str) -> tuple[str, list[Path | BinaryIO], Conversation]:
    if "messages" not in row:
        row = as_messages(row, where)
    images = [image for image in row.get("images") or [] if image is not None]
    name, _, conversation = record_of({**row, "images": [where] * len(images)}, where)
    return name, [_file_of(image, where) for image in images], conversation


def _file_of(stored: dict[str, Any], where: str) -> Path | BinaryIO:
    if stored.get("bytes") is not None:
        return BytesIO(stored["bytes"])
    if stored.get("path") is not None:
        return Path(stored["path"])
    raise ValueError(f"{where}: an image has neither bytes nor a path")
