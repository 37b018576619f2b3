"""Locks on folders, which the end of the holding process releases."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import stat
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenflex.errors import ReportedError

NAME = ".tokenflex.lock"
PATIENCE = 1.0  # seconds; the workers of a killed process hold its lock until they end
_RETRY_AFTER = 0.05  # seconds
_MAX_BYTES = 400  # of a lock file
_CONTENT = re.compile(rb"(process \d+ on [^\n]*)?")
_HELD = (errno.EWOULDBLOCK, errno.EACCES)
_UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class FolderInUseError(ReportedError):
    """Another process writes into the folder."""


class FolderLock:
    """An exclusive lock on a folder, which is created if it does not exist.

    The lock is ``flock`` on a file in the folder. The kernel releases it when the process ends in
    any way. On NFS it also holds between machines if the server's lock service runs. A file system
    without locks gives a warning that nothing is guarded. A link, or a file with other content than
    a lock's, is neither written nor deleted.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / NAME
        self._descriptor: int | None = None
        self._process = os.getpid()
        self._created: list[Path] = []

    def acquire(self) -> None:
        """Lock the folder.

        Raises:
            FolderInUseError: Another process holds the lock; the message names it.
            FileExistsError: The lock's file exists and is not a lock.
            OSError: The folder cannot be created or written.
        """
        give_up = time.monotonic() + PATIENCE
        while self._descriptor is None:
            self._create_folder()
            descriptor = self._open()
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_current(descriptor):
                    self._descriptor, descriptor = descriptor, -1
            except OSError as error:
                if error.errno in _UNSUPPORTED:
                    warnings.warn(
                        f"the file system of {self.folder} has no locks ({error}): nothing keeps "
                        "a second process from writing into it",
                        stacklevel=2,
                    )
                    return
                if error.errno not in _HELD:
                    raise
                if time.monotonic() > give_up:
                    holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
                    raise FolderInUseError(
                        f"folder {self.folder} is in use by another process"
                        + (f" ({holder})" if holder else "")
                        + "; give another output, or wait for its end"
                    ) from None
                time.sleep(_RETRY_AFTER)
            finally:
                if descriptor >= 0:
                    os.close(descriptor)
        content = f"process {os.getpid()} on {socket.gethostname()}".encode()
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, content[: _MAX_BYTES - 1], 0)

    def release(self, *, undo: bool = False) -> None:
        """Unlock the folder.

        Args:
            undo: Also delete the folders that :meth:`acquire` created, if they are empty.
        """
        if self._descriptor is not None:
            if self._is_current(self._descriptor):
                self.path.unlink(missing_ok=True)
            # Forked children share the lock, so closing alone would not release it.
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            os.close(self._descriptor)
            self._descriptor = None
        if undo:
            for folder in reversed(self._created):
                try:
                    folder.rmdir()
                except OSError:
                    break
        self._created = []

    def _open(self) -> int:
        """Open the lock file, or create it.

        Raises:
            FileExistsError: It is a link, a folder, or a file that no lock has written.
        """
        foreign = FileExistsError(
            f"{self.path} is in the place of a lock and is not one of this package; move it"
        )
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR):
                raise foreign from None
            raise
        status = os.fstat(descriptor)
        is_lock = (
            stat.S_ISREG(status.st_mode)
            and status.st_nlink <= 1  # 0: its holder has just deleted it
            and status.st_size < _MAX_BYTES
            and _CONTENT.fullmatch(os.pread(descriptor, _MAX_BYTES, 0))
        )
        if not is_lock:
            os.close(descriptor)
            raise foreign
        return descriptor

    def _create_folder(self) -> None:
        missing = [self.folder, *self.folder.parents]
        missing = [folder for folder in missing if not folder.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._created += [folder for folder in reversed(missing) if folder not in self._created]

    def _is_current(self, descriptor: int) -> bool:
        """Return whether the locked file is still at the path, and was not just deleted."""
        try:
            return os.path.samestat(os.fstat(descriptor), self.path.lstat())
        except FileNotFoundError:
            return False

    def __del__(self) -> None:
        if self._descriptor is not None and self._process == os.getpid():  # not in a fork
            self.release()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of ``folder``, which is created and deleted again if it stays empty.

    Raises:
        FolderInUseError, OSError: As :meth:`FolderLock.acquire`.
    """
    lock = FolderLock(folder)
    lock.acquire()
    try:
        yield
    finally:
        lock.release(undo=True)
