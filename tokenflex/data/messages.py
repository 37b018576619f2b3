"""A user's own data: one JSON object a line, with messages and image paths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from tokenflex.data.samples import IMAGE_MARK, Conversation, Sample, Turn

ROLES = ("system", "user", "assistant")


class MessagesDataset:
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
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"data file {self.path} does not exist")
        self._records = []
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    self._records.append(_parse(line, f"{self.path}:{number}"))
        if not self._records:
            raise ValueError(f"data file {self.path} holds no samples")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Sample:
        sample_id, paths, conversation = self._records[index]
        images = tuple(open_image(self.path.parent / path) for path in paths)
        return Sample(sample_id, images, (conversation,))


def open_image(path: str | Path) -> Image.Image:
    """An image file, read whole, as RGB.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not an image, or is cut off.
    """
    path = Path(path)
    if not path.is_file():
        problem = "is not a file" if path.exists() else "does not exist"
        raise FileNotFoundError(f"image file {path} {problem}")
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # each format's decoder raises its own kinds
        raise ValueError(f"image file {path} cannot be read as an image: {error}") from error


def _parse(line: bytes, where: str) -> tuple[str, list[str], Conversation]:
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{where}: not JSON in UTF-8: {error}") from error
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
