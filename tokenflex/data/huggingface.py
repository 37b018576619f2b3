"""Data sets of the ``datasets`` library: Arrow folders, Parquet files, the hub."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from tokenflex.data.messages import ImageFolder
from tokenflex.data.records import PICTURE_KEYS, Record, check_paths, read_record
from tokenflex.data.samples import Sample
from tokenflex.files import excerpt, printable
from tokenflex.images import image_size, open_image

TEXT_COLUMNS = ("messages", "conversations")


class HuggingFaceDataset:
    """Samples from columns ``images`` and ``messages``, or ``image`` and ``conversations``.

    The first pair is what TRL takes, the second LLaVA's. The images column (also ``image_path`` or
    ``image_paths``) holds the library's ``Image`` feature, or paths. Rows are read and checked when
    they are asked for.

    Args:
        path: a folder that ``save_to_disk`` wrote, or what ``load_dataset`` takes.
        split: which split of it.
        allow_outside: read images that are stored as a path outside of the data set's folder (of
            one from the hub: outside of the libraries' caches). Otherwise such a row is broken.

    Raises:
        ValueError: it cannot be loaded, which one that is empty cannot, or has other columns.
    """

    def __init__(self, path: str, split: str = "train", *, allow_outside: bool = False) -> None:
        self.path = path
        self._folders = image_folders(path, allow_outside)
        self._rows = load_rows(path, split)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        return sample_of(self._rows[index], self.where(index), self._folders)

    def where(self, index: int) -> str:
        """Return the data set and the row's place in it."""
        return f"{self.path}[{index}]"

    def outline(self, index: int) -> Sample:
        """The row's text and the sizes that its images' heads state."""
        return outline_of_row(self._rows[index], self.where(index), self._folders)


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
    columns = rows.column_names or []
    pictures = [name for name in PICTURE_KEYS if name in columns]
    if not pictures or not set(TEXT_COLUMNS) & set(columns):
        raise ValueError(
            f"data set {path} must have columns images and messages, or image and conversations, "
            f"got {', '.join(columns) or 'none'}"
        )
    # An outline reads no more than an image's head.
    undecoded = datasets.Image(decode=False)
    try:
        for name in pictures:
            feature = (rows.features or {}).get(name)
            is_list = name.endswith("s") if feature is None else _is_list(feature)
            rows = rows.cast_column(name, datasets.List(undecoded) if is_list else undecoded)
    except Exception as error:  # Arrow's own kinds
        reason = printable(str(error), 200)
        raise ValueError(f"data set {path}: column {name} must hold images: {reason}") from error
    return rows


def _is_list(feature: Any) -> bool:
    import datasets

    return isinstance(feature, (list, datasets.List, datasets.LargeList))


def image_folders(path: str, allow_outside: bool) -> list[ImageFolder]:
    """Return the folders in which the images of a data set may lie as files.

    They are its own, and for one from the hub those that the libraries download to.
    """
    if Path(path).exists():
        folder = Path(path) if Path(path).is_dir() else Path(path).parent
        return [ImageFolder(folder, allow_outside)]
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    caches = (HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE)
    return [ImageFolder(cache, allow_outside) for cache in caches]


def sample_of(row: dict[str, Any], where: str, folders: Sequence[ImageFolder]) -> Sample:
    """A row with its pixels.

    Args:
        row: of the table.
        where: what errors call it.
        folders: where images may lie that are stored as paths.

    Raises:
        ValueError: it is not of either layout, or an image cannot be read; names ``where``.
    """
    name, images, conversation = _record(row, where)
    pixels = tuple(
        open_image(_file_of(image, where, folders), f"{where}: an image") for image in images
    )
    return Sample(name, pixels, (conversation,))


def outline_of_row(row: dict[str, Any], where: str, folders: Sequence[ImageFolder]) -> Sample:
    """A row without its pixels; arguments and errors are those of :func:`sample_of`."""
    name, images, conversation = _record(row, where)
    sizes = tuple(
        image_size(_file_of(image, where, folders), f"{where}: an image") for image in images
    )
    return Sample(name, sizes, (conversation,))


def _record(row: dict[str, Any], where: str) -> Record:
    columns = {key: row[key] for key in PICTURE_KEYS if row.get(key)}
    lists = [value if isinstance(value, list) else [value] for value in columns.values()]
    stored = lists[0] if lists else []
    if not all(_are_same(images, stored) for images in lists[1:]):
        raise ValueError(f"{where}: {' and '.join(columns)} hold different images")
    if None in stored:  # in a list; a single image that is null is no image
        raise ValueError(f"{where}: images must hold no null, got one at {stored.index(None)}")
    texts = {key: value for key, value in row.items() if key not in PICTURE_KEYS}
    return read_record(texts, where, stored=stored)


def _are_same(images: list[Any], others: list[Any]) -> bool:
    """Compare images by their bytes, or by their paths where they are stored as files."""
    return [_content(image) for image in images] == [_content(image) for image in others]


def _content(image: Any) -> Any:
    if isinstance(image, dict) and image.get("bytes") is not None:
        return image["bytes"]
    return image.get("path") if isinstance(image, dict) else image


def _file_of(stored: Any, where: str, folders: Sequence[ImageFolder]) -> Path | BinaryIO:
    if not isinstance(stored, dict):
        raise ValueError(f"{where}: an image must have bytes or a path, got {excerpt(stored)}")
    if stored.get("bytes") is not None:
        return BytesIO(stored["bytes"])
    path = stored.get("path")
    if path is None:
        raise ValueError(f"{where}: an image has neither bytes nor a path")
    check_paths([path], where)
    for folder in folders[:-1]:
        try:
            return folder.file(path, where)
        except ValueError:
            continue
    return folders[-1].file(path, where)
