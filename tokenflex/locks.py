"""One process at a time in a folder, by a lock that the end of the process releases."""

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
PATIENCE = 1.0  # seconds; the loader workers of a killed process hold its lock until they end
_RETRY_AFTER = 0.05  # seconds
_LONGEST = 400  # bytes of a lock file
_CONTENT = re.compile(rb"(process \d+ on [^\n]*)?")
_HELD = (errno.EWOULDBLOCK, errno.EACCES)
_UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class FolderInUseError(ReportedError):
    """Another process writes into the folder."""


class FolderLock:
    """An exclusive lock on a folder, which is created if it does not exist.

    The lock is ``flock`` on a file in the folder. The kernel releases it when the process ends,
    however it ends. On NFS it also holds between machines where the server's lock service runs. On
    a file system without locks a warning says that nothing is guarded. A link, or a file with other
    content than a lock's, is neither written nor deleted.

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
            FileExistsError: What lies in the lock's place is not a lock.
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
        os.pwrite(self._descriptor, content[: _LONGEST - 1], 0)

    def release(self, *, undo: bool = False) -> None:
        """Unlock the folder.

        Args:
            undo: Also delete the folders that :meth:`acquire` created, as far as they are empty.
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
        """Open the lock file, which is created if there is none.

        Raises:
            FileExistsError: It is a link, a folder, or a file that no lock has written.
        """
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR):
                raise FileExistsError(self._is_no_lock()) from None
            raise
        status = os.fstat(descriptor)
        is_lock = (
            stat.S_ISREG(status.st_mode)
            and status.st_nlink <= 1  # 0: its holder has just deleted it
            and status.st_size < _LONGEST
            and _CONTENT.fullmatch(os.pread(descriptor, _LONGEST, 0))
        )
        if not is_lock:
            os.close(descriptor)
            raise FileExistsError(self._is_no_lock())
        return descriptor

    def _is_no_lock(self) -> str:
        return f"{self.path} is in the place of a lock and is not one of this package; move it"

    def _create_folder(self) -> None:
        missing = [self.folder, *self.folder.parents]
        missing = [folder for folder in missing if not folder.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._created += [folder for folder in reversed(missing) if folder not in self._created]

    def _is_current(self, descriptor: int) -> bool:
        """Return whether the locked file still is the one at the path, not one just deleted."""
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
