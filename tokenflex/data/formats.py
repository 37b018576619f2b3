"""Which of the known formats a user's data is in, from what lies at its path."""

from __future__ import annotations

from pathlib import Path


def detect_format(path: str | Path) -> str:
    """The ``name`` that a :class:`tokenflex.training.config.DataConfig` gives to this data.

    A folder is a data set of the ``datasets`` library, a file that begins with ``[`` LLaVA's JSON
    list, one that begins with ``{`` a JSONL file of messages.

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
        first = next((byte for line in file for byte in line.split()[:1]), b"")[:1]
    if first == b"[":
        return "llava"
    if first in (b"{", b""):  # its reader says what an empty file lacks
        return "messages"
    raise ValueError(
        f"data file {path} must begin with '{{' (a JSON object a line) or '[' (LLaVA's list), got "
        f"{first!r}"
    )
