"""A user's own data: one JSON object a line, with messages and image paths."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

from tokenflex.data.samples import IMAGE_MARK, Conversation, Sample, SampleOutline, Turn
from tokenflex.files import parse_json
from tokenflex.images import image_size, open_image

ROLES = ("system", "user", "assistant")


Record: TypeAlias = "tuple[str, list[str], Conversation]"  # id, image paths, what is said


class ImageFilesDataset:
    """Samples whose texts are in memory and whose images are files.

    Args:
        folder: what image paths are relative to.
        records: id, image paths and conversation of each sample.
    """

    def __init__(self, folder: Path, records: list[Record]) -> None:
        self.folder = folder
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Sample:
        sample_id, paths, conversation = self._records[index]
        images = tuple(open_image(self.folder / path) for path in paths)
        return Sample(sample_id, images, (conversation,))

    def outline(self, index: int) -> SampleOutline:
        """The sample's text and the sizes that its image files state; no pixels are read."""
        sample_id, paths, conversation = self._records[index]
        sizes = tuple(image_size(self.folder / path) for path in paths)
        return SampleOutline(sample_id, sizes, (conversation,))


class MessagesDataset(ImageFilesDataset):
    """Samples from a JSONL file.

    A line is ``{"images": ["a.png"], "messages": [{"role": "user", "content": "What is it?"},
    {"role": "assistant", "content": "A cat."}]}``. Paths are relative to the file. ``content`` is a
    string, with ``<image>`` where images stand (before the first user turn if nowhere), or a list
    of ``{"type": "image"}`` and ``{"type": "text", "text": ...}`` parts. ``id`` and ``kind`` (a
    label to group accuracies by) may be given. The whole file is read and checked at once; images
    are opened when they are asked for.

    Args:
        path: the JSONL file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not of this form; the message names the file and the line.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"data file {path} does not exist")
        with path.open("rb") as lines:
            records = [
                _parse(line, f"{path}:{number}")
                for number, line in enumerate(lines, start=1)
                if line.strip()
            ]
        if not records:
            raise ValueError(f"data file {path} holds no samples")
        super().__init__(path.parent, records)


def _parse(line: bytes, where: str) -> Record:
    return record_of(parse_json(line, where), where)


def record_of(record: Any, where: str) -> Record:
    """One sample in the layout of :class:`MessagesDataset`, checked.

    Raises:
        ValueError: it is not of this form; the message begins with ``where``.
    """
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(record).__name__}")
    images = record.get("images", [])
    if not isinstance(images, list) or not all(isinstance(path, str) for path in images):
        raise ValueError(f"{where}: images must be a list of paths, got {images!r}")
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: messages must be a list with at least one, got {messages!r}")
    turns = tuple(_turn(message, f"{where}: messages[{i}]") for i, message in enumerate(messages))
    marks = sum(turn.text.count(IMAGE_MARK) for turn in turns)
    if marks not in (0, len(images)):
        raise ValueError(
            f"{where}: messages hold {IMAGE_MARK} {marks} times for {len(images)} images"
        )
    roles = [turn.role for turn in turns]
    if "assistant" not in roles:
        raise ValueError(f"{where}: messages hold no assistant turn to learn from")
    if "user" not in roles or roles.index("assistant") < roles.index("user"):
        raise ValueError(f"{where}: a user turn must come before the assistant's, got {roles}")
    conversation = Conversation(turns, kind=str(record.get("kind", "")))
    return str(record.get("id", where)), images, conversation


def _turn(message: Any, where: str) -> Turn:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise ValueError(f"{where} must have a role out of {', '.join(ROLES)}, got {message!r}")
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_part(part, where) for part in content)
    if not isinstance(content, str):
        raise ValueError(f"{where}.content must be a string or a list of parts, got {content!r}")
    return Turn(message["role"], content)


def _part(part: Any, where: str) -> str:
    if isinstance(part, dict) and part.get("type") == "image":
        return IMAGE_MARK
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    raise ValueError(f"{where}: a part must be an image or a text, got {part!r}")
