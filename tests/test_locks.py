"""A folder's lock: one holder, released by any end of it, and no file left behind."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys

import pytest

from tokenflex import locks
from tokenflex.locks import NAME, FolderInUseError, FolderLock, locked

HOLDER = """
import sys, time
from pathlib import Path
from tokenflex.locks import FolderLock
FolderLock(Path(sys.argv[1])).acquire()
lock = FolderLock(Path(sys.argv[1] + "/inner")); lock.acquire()
print("locked", flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _little_patience(monkeypatch):
    monkeypatch.setattr(locks, "PATIENCE", 0.1)


def test_a_second_holder_is_refused_and_told_of_the_first(tmp_path):
    with locked(tmp_path / "a"):
        with pytest.raises(FolderInUseError, match=rf"{tmp_path / 'a'} .*process {os.getpid()} on"):
            FolderLock(tmp_path / "a").acquire()
        with locked(tmp_path / "b"):
            pass
    with locked(tmp_path / "a"):
        pass


def test_a_folder_that_stays_empty_is_deleted_again_with_its_parents(tmp_path):
    with locked(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert [*tmp_path.iterdir()] == []


def test_what_is_written_meanwhile_stays_without_the_lock(tmp_path):
    with locked(tmp_path / "a"):
        (tmp_path / "a" / "file").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["file"]
    (tmp_path / "empty").mkdir()
    with locked(tmp_path / "empty"):
        pass
    assert (tmp_path / "empty").is_dir()


def test_a_killed_holder_holds_nothing(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "locked\n"
    with pytest.raises(FolderInUseError, match=f"process {holder.pid} on"):
        FolderLock(tmp_path / "inner").acquire()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "inner" / NAME).exists()
    with locked(tmp_path / "inner"):
        pass
    assert not (tmp_path / "inner" / NAME).exists()


def test_a_lock_file_that_is_deleted_while_it_is_waited_for_is_made_anew(tmp_path, monkeypatch):
    """The holder ends between our opening of its file and our locking of it."""
    first, second = FolderLock(tmp_path), FolderLock(tmp_path)
    first.acquire()
    original = fcntl.flock

    def ends_before(descriptor, operation):
        monkeypatch.setattr(fcntl, "flock", original)
        first.release()
        return original(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", ends_before)
    second.acquire()
    with pytest.raises(FolderInUseError):
        FolderLock(tmp_path).acquire()
    second.release()


def test_a_fork_that_forgets_a_lock_does_not_release_it(tmp_path):
    lock = FolderLock(tmp_path)
    lock.acquire()
    child = os.fork()
    if not child:
        lock.__del__()
        os._exit(0)
    os.waitpid(child, 0)
    with pytest.raises(FolderInUseError):
        FolderLock(tmp_path).acquire()
    lock.release()


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.warns(UserWarning, match="has no locks"), locked(tmp_path / "a"):
        pass


def test_another_error_is_not_a_lock_that_is_held(tmp_path, monkeypatch):
    def failing(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", failing)
    with pytest.raises(OSError, match="Input/output"):
        FolderLock(tmp_path).acquire()
