"""Locks an output folder for one run at a time. Its ``.lock`` file names the run that uses it."""

import errno
import json
import os
import shlex
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from hf_clm.errors import EnvironmentFault
from hf_clm.training.callbacks import write_line

LOCK = ".lock"
HEARTBEAT_SECONDS = 20.0  # how often the holder touches the file
EXPIRY_SECONDS = 120  # a holder on another host that has not touched the file for this long is gone
POLL_SECONDS = 1.0  # between two checks of a file whose holder may be gone
# What flock raises on a file system without locks.
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}


class Lock:
    """Holds a ``.lock`` file from its creation until ``release``.

    On one machine, flock shows whether the holder is alive. On a file system that machines share, the
    holder touches the file regularly, and another run waits to see whether it still does.
    Raises EnvironmentFault if another run holds the lock.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file = _take(path)
        self._is_released = threading.Event()
        self._heartbeat = threading.Thread(target=self._touch, name="lock", daemon=True)
        self._heartbeat.start()
        os.register_at_fork(after_in_child=self._close)  # a worker may outlive this process

    def release(self) -> None:
        """Deletes the file, unless another run has taken it over."""
        self._is_released.set()
        self._heartbeat.join()
        if _is_open_here(self._file, self.path):
            self.path.unlink()
        self._close()

    def _touch(self) -> None:
        while not self._is_released.wait(HEARTBEAT_SECONDS):
            with suppress(OSError):  # a network file system may be unavailable for a moment
                os.utime(self._file if os.utime in os.supports_fd else self.path)

    def _close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


@contextmanager
def locked(folder: Path, *, is_main: bool) -> Iterator[None]:
    """Creates and locks the output folder for the duration of the block. Only the main process locks it.

    Raises EnvironmentFault if another run uses the folder, or if it is not writable.
    """
    if not is_main:
        yield
        return
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = Lock(folder / LOCK)
    except OSError as error:
        what = "cannot write to the output folder"
        raise EnvironmentFault(what, where=str(folder), got=str(error.strerror)) from error
    try:
        yield
    finally:
        lock.release()
        if is_new and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()  # a run that was refused leaves no folder


def keep_lock(moved: Path, folder: Path) -> None:
    """Recreates a folder that was moved aside, and moves this run's lock back into it."""
    if (moved / LOCK).exists():
        folder.mkdir()
        (moved / LOCK).rename(folder / LOCK)


def _take(path: Path) -> int:
    """Locks the file, writes this process into it, and returns its descriptor."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        holder = _read(file)
        if not _is_free(path, holder, is_ours=_flock(file)):
            os.close(file)
            fix = "choose another --output_dir, or stop that run first (on SIGTERM it saves and stops)"
            what = f"in use by {_name(holder)}, which is still running"
            raise EnvironmentFault(what, where=str(path.parent), fix=fix)
        if _is_open_here(file, path):
            break
        os.close(file)  # its holder has just deleted it
    if holder:
        write_line(f"lock      taken over from {_name(holder)}, which is no longer running")
    command = shlex.join(sys.argv)
    content = {"host": socket.gethostname(), "pid": os.getpid(), "since": _now(), "command": command}
    os.ftruncate(file, 0)
    os.pwrite(file, (json.dumps(content) + "\n").encode(), 0)
    return file


def _flock(file: int) -> bool | None:
    """Tries to lock the file. Returns whether that worked, or None if its file system has no locks."""
    try:
        import fcntl
    except ImportError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in NO_LOCKS:
            return None
        raise
    return True


def _is_free(path: Path, holder: dict[str, Any], *, is_ours: bool | None) -> bool:
    """Returns whether no other run holds the lock. ``is_ours`` is the result of ``_flock``.

    If the holder runs on another host, waits to see whether it touches the file.
    """
    is_here = holder.get("host") == socket.gethostname()
    if is_ours is False or not holder or (is_ours and is_here):
        return is_ours is not False
    touched_at, left = path.stat().st_mtime, EXPIRY_SECONDS - max(0.0, _age(path))
    end = time.monotonic() + left
    if left > 0:
        write_line(f"lock      held by {_name(holder)}: waiting up to {left:.0f} s for its heartbeat")
    while time.monotonic() < end:
        time.sleep(POLL_SECONDS)
        try:
            if path.stat().st_mtime != touched_at:
                return False
        except FileNotFoundError:  # it has just ended
            return True
    return True


def _read(file: int) -> dict[str, Any]:
    """Returns the content of the file, or {} if it is new or incomplete."""
    try:
        content = json.loads(os.pread(file, 1 << 16, 0))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _name(holder: dict[str, Any]) -> str:
    """Returns text such as ``pid 123 on host since 2026-11-21 10:00:00 UTC``."""
    if not holder:
        return "a run that has just started"
    return f"pid {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}"


def _age(path: Path) -> float:
    """Returns the seconds since the file was touched, by the clock of its file system."""
    with tempfile.TemporaryFile(dir=path.parent) as now:
        return os.fstat(now.fileno()).st_mtime - path.stat().st_mtime


def _is_open_here(file: int, path: Path) -> bool:
    """Returns whether the path still refers to the open file."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
