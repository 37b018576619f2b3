"""A CSV that grows row by row while a command measures, so that a later call can continue.

Results belong to a setting: GPU, versions and sources. Rows of other settings stay in the file and
count as not measured.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

UNFINISHED = 75  # exit status: time ended before all was measured; EX_TEMPFAIL of sysexits.h
SETTING = "setting"
LOST = "hung, or ended its process"


class DeviceLost(Exception):
    """A kernel ended all use of the GPU by this process."""


class Journal:
    """Rows of results, each on the disk as soon as it is added.

    What is being measured is named in a file of its own. If the process is killed meanwhile, the
    next one reads the name in ``lost`` and can go on without it.

    Args:
        path: The CSV, or None to keep rows in memory alone.
        columns: Of a row, without the setting.
        setting: Under which rows are added and read.

    Attributes:
        rows: Rows of the setting, every value as a string.
        lost: What a killed process was measuring; empty for nothing.

    Raises:
        ValueError: The file has other columns.
    """

    def __init__(self, path: Path | None, columns: Sequence[str], setting: str) -> None:
        self.rows: list[dict[str, str]] = []
        self.lost = ""
        self._path, self._setting = path, setting
        self._columns = (*columns, SETTING)
        if path is None:
            return
        self._marker = path.with_name(f"{path.name}.running")
        if self._marker.exists():
            self.lost = self._marker.read_text(encoding="utf-8")
            self._marker.unlink()
        if path.exists() and path.stat().st_size > 0:
            self._read(path)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._append(self._columns)

    def _read(self, path: Path) -> None:
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        reader = csv.DictReader(io.StringIO(whole.decode()))
        if tuple(reader.fieldnames or ()) != self._columns:
            raise ValueError(
                f"{path} must have the columns {', '.join(self._columns)}, got "
                f"{', '.join(reader.fieldnames or ())}"
            )
        if len(whole) < len(content):  # the last row was cut off by a kill
            os.truncate(path, len(whole))
        self.rows += [row for row in reader if row[SETTING] == self._setting]

    def add(self, *values: object) -> None:
        """Add a row: a value for each column, of which line breaks become spaces."""
        whole = [" ".join(str(value).splitlines()) for value in (*values, self._setting)]
        self.rows.append(dict(zip(self._columns, whole, strict=True)))
        self._append(whole)

    def _append(self, values: Sequence[str]) -> None:
        if self._path is None:
            return
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(values)
        with self._path.open("a", newline="", encoding="utf-8") as file:
            file.write(line.getvalue())
            file.flush()
            os.fsync(file.fileno())

    @contextmanager
    def measuring(self, name: str) -> Iterator[None]:
        """Name what is being measured; the name outlives a process that is killed meanwhile."""
        if self._path is None:
            yield
            return
        self._marker.write_text(name, encoding="utf-8")
        try:
            yield
        finally:
            self._marker.unlink(missing_ok=True)


def setting_of_gpu() -> str:
    """Return the GPU, versions and sources that a measured kernel depends on."""
    import triton

    name = torch.cuda.get_device_name()
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    return f"{name}, {versions}, kernels {digest_of_kernels()}"


def digest_of_kernels() -> str:
    """Return a short digest of the sources from which kernels are compiled and launched."""
    folder = Path(__file__).parent
    files = [folder / f"{name}.py" for name in ("launch", "layout", "stage_calls", "tiles")]
    files += sorted(folder.glob("*/*.py"))  # of each op
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def device_is_lost() -> bool:
    """Return whether an error has ended all use of the GPU by this process."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def restart(module: str, arguments: Sequence[str]) -> None:
    """Replace this process by a new one of ``python -m module``, which gets the GPU anew."""
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])
