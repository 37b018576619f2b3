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


@pytest.mark.parametrize("kind", ["link", "dangling link", "hard link", "file", "long", "folder"])
def test_what_is_not_a_lock_is_neither_written_nor_deleted(tmp_path, kind):
    folder, theirs = tmp_path / "out", tmp_path / "theirs"
    folder.mkdir()
    lock = folder / NAME
    content = f"process 1 on host{'x' * 9999 if kind == 'long' else chr(10) + 'mine'}"
    theirs.write_text(content)
    if kind == "link":
        lock.symlink_to(theirs)
    elif kind == "dangling link":
        lock.symlink_to(tmp_path / "none")
    elif kind == "hard link":
        theirs.write_text("process 1 on host")
        os.link(theirs, lock)
    elif kind == "folder":
        lock.mkdir()
    else:
        lock.write_text(content)
    before = lock.lstat(), theirs.read_text()
    with pytest.raises(FileExistsError, match=r"place of a lock and is not one"):
        FolderLock(folder).acquire()
    assert (lock.lstat().st_ino, theirs.read_text()) == (before[0].st_ino, before[1])
    assert lock.lstat().st_size == before[0].st_size
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("content", ["", "process 12 on host"])
def test_a_lock_that_a_killed_process_has_left_is_taken(tmp_path, content):
    (tmp_path / NAME).write_text(content)
    with locked(tmp_path):
        assert (tmp_path / NAME).read_text().startswith(f"process {os.getpid()} on ")
    assert not (tmp_path / NAME).exists()


def test_a_file_that_took_the_locks_place_meanwhile_is_not_deleted(tmp_path):
    with locked(tmp_path):
        (tmp_path / NAME).unlink()
        (tmp_path / NAME).write_text("mine")
    assert (tmp_path / NAME).read_text() == "mine"


def test_a_released_lock_is_free_though_a_forked_child_is_alive(tmp_path):
    """A loader worker shares the open file, and with it the lock."""
    lock = FolderLock(tmp_path)
    lock.acquire()
    path, kept = tmp_path / NAME, tmp_path / "kept"
    os.link(path, kept)  # the same file again, as the child's lock is on the file
    child = os.fork()
    if not child:
        signal.pause()
        os._exit(0)
    try:
        lock.release()
        other = os.open(kept, os.O_RDWR)
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(other)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
