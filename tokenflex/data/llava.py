"""LLaVA's layout: one JSON list of ``{id, image, conversations: [{from, value}]}``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenflex.data.messages import ImageFilesDataset, record_of
from tokenflex.files import read_json

ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


class LlavaDataset(ImageFilesDataset):
    """Samples from a LLaVA JSON file.

    ``image`` is a path, a list of paths, or missing where a conversation has none; ``value`` holds
    ``<image>`` where they stand. The whole file is read and checked at once.

    Args:
        path: the JSON file.
        image_folder: what image paths are relative to; the file's own folder if None.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a record is not of this form; the message names the file and the record.
    """

    def __init__(self, path: str | Path, image_folder: str | Path | None = None) -> None:
        path = Path(path)
        values = read_json(path, "data file")
        if not isinstance(values, list) or not values:
            raise ValueError(f"data file {path} must hold a list with at least one sample")
        super().__init__(
            path.parent if image_folder is None else Path(image_folder),
            [
                record_of(as_messages(value, f"{path}[{i}]"), f"{path}[{i}]")
                for i, value in enumerate(values)
            ],
        )


def as_messages(value: Any, where: str) -> dict[str, Any]:
    """A LLaVA record in the layout of :class:`tokenflex.data.messages.MessagesDataset`.

    Raises:
        ValueError: it is not of LLaVA's form; the message begins with ``where``.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(value).__name__}")
    turns = value.get("conversations")
    if not isinstance(turns, list):
        raise ValueError(f"{where}: conversations must be a list of turns, got {turns!r}")
    messages = []
    for turn in turns:
        if not isinstance(turn, dict) or turn.get("from") not in ROLES:
            raise ValueError(
                f"{where}: a turn must be from one of {', '.join(ROLES)}, got {turn!r}"
            )
        messages.append({"role": ROLES[turn["from"]], "content": turn.get("value")})
    image = value.get("image")
    images = [] if image is None else image if isinstance(image, list) else [image]
    record = {"images": images, "messages": messages}
    return record | {"id": value["id"]} if "id" in value else record
