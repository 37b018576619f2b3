"""Which of the known formats a user's data is in, from what lies at its path."""

from __future__ import annotations

from pathlib import Path

from tokenflex.data.messages import first_byte
from tokenflex.data.records import MAX_RECORD_BYTES
from tokenflex.files import parse_json


def detect_format(path: str | Path) -> str:
    """Return the ``name`` that a :class:`tokenflex.training.config.DataConfig` gives to this data.

    A folder is a data set of the ``datasets`` library. A file that begins with ``[`` (LLaVA's JSON
    list), or with a line that has ``conversations``, is "llava", and any other that begins with
    ``{`` a JSONL file of messages. A byte-order mark and blank lines may come first.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        ValueError: a file begins with something else.
    """
    path = Path(path)
    if path.is_dir():
        return "huggingface"
    if not path.is_file():
        raise FileNotFoundError(f"data file {path} does not exist")
    with path.open("rb") as file:
        first = first_byte(file)
        line = file.readline(MAX_RECORD_BYTES) if first == b"{" else b""
    if first == b"[":
        return "llava"
    if first in (b"{", b""):  # its reader says what an empty file lacks
        return "llava" if _has_conversations(line) else "messages"
    raise ValueError(
        f"data file {path} must begin with '{{' (a JSON object a line) or '[' (LLaVA's list), got "
        f"{first!r}"
    )


def _has_conversations(line: bytes) -> bool:
    try:
        record = parse_json(line, "line")
    except ValueError:  # its reader says what is wrong
        return False
    return isinstance(record, dict) and "messages" not in record and "conversations" in record
