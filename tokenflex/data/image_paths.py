"""Paths of images in records of strangers, which should stay inside the data's folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenflex.files import check_utf8, excerpt

MAX_PATH_LENGTH = 4096

MAX_NAME_BYTES = 255
"""Bytes of each file's or folder's name in a path, as file systems have it."""

WITH_ARTICLE = {"image": "an image", "video": "a video"}
"""Names of an image and a video in error messages."""


def check_paths(paths: Sequence[Any], where: str, kind: str = "image") -> None:
    """Check that the images, or the videos, of a record are given as paths of files.

    Raises:
        ValueError: One is given otherwise. The message begins with ``where``.
    """
    for path in paths:
        is_path = isinstance(path, str) and 0 < len(path) <= MAX_PATH_LENGTH and "\0" not in path
        if not is_path:
            raise ValueError(f"{where}: {kind}s must be paths, got {excerpt(path)}")
        if "://" in path[:32] or path.lstrip()[:5].lower() == "data:":
            raise ValueError(
                f"{where}: {kind}s must be files, which are not fetched, got {excerpt(path, 40)}"
            )
        longest = max(len(name.encode("utf-8", "surrogatepass")) for name in path.split("/"))
        if longest > MAX_NAME_BYTES:
            raise ValueError(
                f"{where}: names in {WITH_ARTICLE[kind]}'s path must have at most "
                f"{MAX_NAME_BYTES} bytes, got one of {longest:,}"
            )
        check_utf8(path, f"{where}: the path of {WITH_ARTICLE[kind]}")


class ImageFolder:
    """A folder that the image paths of a data set are relative to.

    Args:
        path: The folder.
        allow_outside: Allow paths that leave the folder.
    """

    def __init__(self, path: str | Path, allow_outside: bool = False) -> None:
        self.path = Path(path)
        self.allow_outside = allow_outside
        self._real = self.path.resolve()

    def check(self, path: str, where: str, kind: str = "image") -> None:
        """Check a path by its text, and on the disk only where the text seems to leave the folder.

        Raises:
            ValueError: The path leaves the folder. The message begins with ``where``.
        """
        if path.startswith("/") or ".." in path:
            self.file(path, where, kind)

    def file(self, path: str, where: str, kind: str = "image") -> Path:
        """Return the file at ``path``, of an image or a video.

        Raises:
            ValueError: The file is outside of the folder, also by a symbolic link.
        """
        file = self.path / path
        length = len(os.fsencode(file))
        if length >= MAX_PATH_LENGTH:
            raise ValueError(
                f"{where}: the path of {WITH_ARTICLE[kind]} must have fewer than "
                f"{MAX_PATH_LENGTH} bytes with its folder, got {length:,}"
            )
        try:
            inside = self.allow_outside or file.resolve().is_relative_to(self._real)
        except (OSError, RuntimeError) as error:  # links in a circle, or too long
            reason = getattr(error, "strerror", None) or "its links go in a circle"
            raise ValueError(f"{where}: {kind} {excerpt(path)} cannot be found: {reason}") from None
        if not inside:
            raise ValueError(
                f"{where}: {kind} {excerpt(path)} is outside of the data's folder {self.path}; "
                "allow_outside permits that"
            )
        return file
