"""Data sets of the ``datasets`` library: Arrow folders, Parquet files, the hub."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from tokenflex.data.image_paths import WITH_ARTICLE, ImageFolder, check_paths
from tokenflex.data.media import PICTURE_KEYS, VIDEO_KEYS
from tokenflex.data.records import (
    Record,
    RecordDataset,
    images_of,
    read_record,
    source_of,
    videos_of,
)
from tokenflex.files import excerpt, printable
from tokenflex.videos import EACH_FRAME, FrameSampling

TEXT_COLUMNS = ("messages", "conversations")


class HuggingFaceDataset(RecordDataset):
    """Samples from columns ``images`` and ``messages``, or ``image`` and ``conversations``.

    The first pair is TRL's, the second LLaVA's. The images column (also ``image_path`` or
    ``image_paths``) holds the library's ``Image`` feature, or paths. Rows are read and checked when
    a sample is read. A column ``videos`` or ``video`` holds the ``Video`` feature, or paths.

    Args:
        path: A folder that ``save_to_disk`` wrote, or what ``load_dataset`` takes.
        split: The split.
        allow_outside: Read images that are stored as a path outside of the data set's folder (of
            one from the hub: outside of the libraries' caches). Otherwise such a row is broken.
        sampling: Chooses the frames of videos.

    Raises:
        ValueError: The data set cannot be loaded, is empty, or has other columns.
    """

    def __init__(
        self,
        path: str,
        split: str = "train",
        *,
        allow_outside: bool = False,
        sampling: FrameSampling = EACH_FRAME,
    ) -> None:
        self.path = path
        self.sampling = sampling
        self._folders = image_folders(path, allow_outside)
        self._rows = load_rows(path, split)

    def __len__(self) -> int:
        return len(self._rows)

    def where(self, index: int) -> str:
        """Return the data set and the row's index in it."""
        return f"{self.path}[{index}]"

    def _row(self, index: int) -> dict[str, Any]:
        return self._rows[index]

    def _record(self, index: int) -> Record:
        row, where = self._row(index), self.where(index)
        images, videos = images_of(row, where, takes_videos=True), videos_of(row, where)
        for kind, stored in (("images", images), ("videos", videos)):
            if None in stored:  # in a list; a single image that is null is no image
                raise ValueError(
                    f"{where}: {kind} must hold no null, got one at {stored.index(None)}"
                )
        texts = {k: value for k, value in row.items() if k not in (*PICTURE_KEYS, *VIDEO_KEYS)}
        return read_record(texts, where, stored=images, stored_videos=videos)

    def _media_files(
        self, media: Sequence[Any], where: str
    ) -> Iterator[tuple[Path | BinaryIO, str]]:
        for item in media:
            source, kind = source_of(item)
            name = WITH_ARTICLE[kind]
            yield self._media_file(source, where, kind, name), f"{where}: {name}"

    def _media_file(self, source: Any, where: str, kind: str, name: str) -> Path | BinaryIO:
        if not isinstance(source, dict):
            raise ValueError(f"{where}: {name} must have bytes or a path, got {excerpt(source)}")
        content, path = source.get("bytes"), source.get("path")
        if isinstance(content, bytes):
            return BytesIO(content)
        if content is not None:
            raise ValueError(f"{where}: {name}'s bytes must be bytes, got {excerpt(content)}")
        if path is None:
            raise ValueError(f"{where}: {name} has neither bytes nor a path")
        check_paths([path], where, kind)
        return self._inside(path, where, kind)

    def _check_frame(self, path: Path, where: str) -> None:
        self._inside(str(path.absolute()), where)

    def _inside(self, path: str, where: str, kind: str = "image") -> Path:
        for folder in self._folders[:-1]:
            try:
                return folder.file(path, where, kind)
            except ValueError:
                continue
        return self._folders[-1].file(path, where, kind)


def load_rows(path: str, split: str, *, streaming: bool = False) -> Any:
    """Load a ``Dataset`` or ``IterableDataset`` whose images are bytes, not pixels.

    Raises:
        ValueError: The data set cannot be loaded, or has other columns.
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
    videos = [name for name in VIDEO_KEYS if name in columns]
    if not (pictures or videos) or not set(TEXT_COLUMNS) & set(columns):
        raise ValueError(
            f"data set {path} must have columns images and messages, or image and conversations, "
            f"got {', '.join(columns) or 'none'}"
        )
    lists = (list, datasets.List, datasets.LargeList)
    try:
        for name in (*pictures, *videos):
            # An outline reads only the head of an image.
            media = datasets.Image if name in pictures else datasets.Video
            undecoded = media(decode=False)
            feature = (rows.features or {}).get(name)
            is_list = name.endswith("s") if feature is None else isinstance(feature, lists)
            rows = rows.cast_column(name, datasets.List(undecoded) if is_list else undecoded)
    except Exception as error:  # Arrow has exceptions of its own, too
        reason = printable(str(error), 200)
        raise ValueError(
            f"data set {path}: column {name} must hold images or videos: {reason}"
        ) from error
    return rows


def image_folders(path: str, allow_outside: bool) -> list[ImageFolder]:
    """Return the folders in which the images of a data set may lie as files.

    They are the data set's own folder, or, for one from the hub, the libraries' caches.
    """
    if Path(path).exists():
        folder = Path(path) if Path(path).is_dir() else Path(path).parent
        return [ImageFolder(folder, allow_outside)]
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    caches = (HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE)
    return [ImageFolder(cache, allow_outside) for cache in caches]
