"""Digests of a run's data files, by which a resumed run notices that its data has changed.

The order of samples follows from their number, so other data under the same names would make
another run. A digest covers

- a whole file that its reader reads whole anyway, such as a file of records;
- a whole file of any other kind (a tar, a file of rows) up to 256 MiB, among the first 2 GiB of
  such files;
- of a larger file, its size, both ends and 16 blocks of 64 KiB spread evenly over it.

Pictures in files of their own are not covered, nor are data sets on a hub.

States of earlier versions have only the digest of blocks for files above 4 MiB. So both digests are
computed, and compared if a state has them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from io import RawIOBase
from pathlib import Path
from typing import Any, TypeAlias

from tokenflex.terminal import watched
from tokenflex.training.data_config import DataConfig

SAMPLED = 4 << 20  # bytes above which there is a digest of blocks
WHOLE = 256 << 20  # bytes up to which a file of rows is read whole
ALL_WHOLE = 2 << 30  # bytes of such files together; 1 GB takes about 2 s at each start
_BLOCK = 64 << 10
_BLOCKS = 16
_READ = 4 << 20

Digests: TypeAlias = "dict[str, tuple[int, str] | tuple[int, str, str]]"
"""Path -> size and digest; for a file with a digest of blocks, that one and the whole file's."""


def digests_of(configs: Iterable[DataConfig]) -> Digests:
    """Return the digests of the files of several data sets.

    Raises:
        OSError: A file cannot be read.
    """
    digests: Digests = {}
    budget = ALL_WHOLE
    files = [file for config in configs for file in _files_of(config)]
    for path, is_read_whole in watched(files, "hashing the data", len(files), unit="file"):
        digest = _digest_of(path, whole=is_read_whole, most=min(WHOLE, budget))
        budget -= digest[0] if len(digest) == 3 else 0
        digests[str(path)] = digest
    return digests


def check_unchanged(saved: Mapping[str, Any], current: Digests) -> None:
    """Compare the digests in a state with the current ones.

    Raises:
        ValueError: A file has changed, is gone or is new; the message names the first.
    """
    for path in [*saved, *(path for path in current if path not in saved)]:
        if path not in current:
            change = "is gone"
        elif path not in saved:
            change = "is new"
        elif any(then != now for then, now in zip(saved[path], current[path], strict=False)):
            sizes = saved[path][0], current[path][0]
            change = "holds other bytes of the same number"
            if sizes[0] != sizes[1]:
                change = f"had {sizes[0]} bytes and has {sizes[1]}"
        else:
            continue
        raise ValueError(
            f"data file {path} has changed since the state was saved: it {change}; the run would "
            "go on with other samples. Put the file back, or give --accept-changed-data to "
            "continue with it as it is, or --fresh to begin anew"
        )


def _files_of(config: DataConfig) -> Iterator[tuple[Path, bool]]:
    """Yield the files of a data set, and whether its reader reads them whole."""
    for part in config.parts:
        yield from _files_of(part)
    if config.path is not None:
        for path in config.format.files(config.path):
            yield path, config.format.reads_whole_files


def _digest_of(path: Path, *, whole: bool, most: int) -> tuple[int, str] | tuple[int, str, str]:
    with path.open("rb", buffering=0) as file:
        size = file.seek(0, 2)
        if whole or size <= SAMPLED:
            return size, _whole_digest(file)
        digest, last = hashlib.blake2b(digest_size=16), size - _BLOCK
        for number in range(_BLOCKS + 2):
            file.seek(last * number // (_BLOCKS + 1))
            digest.update(file.read(_BLOCK))
        if size > most:
            return size, digest.hexdigest()
        return size, digest.hexdigest(), _whole_digest(file)


def _whole_digest(file: RawIOBase) -> str:
    digest = hashlib.blake2b(digest_size=16)
    file.seek(0)
    while block := file.read(_READ):
        digest.update(block)
    return digest.hexdigest()
