"""An output folder belongs to one run at a time: ``.lock`` in it says to which, and since when."""

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
BEAT_SECONDS = 20.0  # the holder touches the file so often
GONE_SECONDS = 120  # without a touch a holder counts as gone, where the system cannot tell
LOOK_SECONDS = 1.0  # between two looks at a file whose holder may be gone
# Of file systems that know no locks.
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}


class Lock:
    """Holds a ``.lock`` file from its making until ``release``.

    The system tells whether a holder on this machine lives (flock). Of one elsewhere, on a shared file
    system, a touch of the file tells: it is waited for. Raises EnvironmentFault where another run holds it.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file = _take(path)
        self._is_released = threading.Event()
        self._beat = threading.Thread(target=self._touch, name="lock", daemon=True)
        self._beat.start()
        os.register_at_fork(after_in_child=self._close)  # else a worker would hold it after our death

    def release(self) -> None:
        """Deletes the file, unless it is another's by now."""
        self._is_released.set()
        self._beat.join()
        if _is_open_here(self._file, self.path):
            self.path.unlink()
        self._close()

    def _touch(self) -> None:
        while not self._is_released.wait(BEAT_SECONDS):
            with suppress(OSError):  # a file system may be away for a moment
                os.utime(self._file if os.utime in os.supports_fd else self.path)

    def _close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


@contextmanager
def locked(folder: Path, *, is_main: bool) -> Iterator[None]:
    """Holds the output folder, which it makes, for what happens inside. Only the main process does.

    Raises EnvironmentFault where another run holds the folder, and where it cannot be written.
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
            folder.rmdir()  # a run that was refused leaves nothing behind


def keep_lock(moved: Path, folder: Path) -> None:
    """Makes a new folder in the place of one that was moved, and brings the lock back: this run holds it."""
    if (moved / LOCK).exists():
        folder.mkdir()
        (moved / LOCK).rename(folder / LOCK)


def _take(path: Path) -> int:
    """The open and locked file, which names this process now."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        holder = _read(file)
        if not _is_free(path, holder, is_ours=_flock(file)):
            os.close(file)
            fix = "another --output_dir; or end that run first: SIGTERM lets it save and stop"
            what = f"locked by {_name(holder)}, which is still running"
            raise EnvironmentFault(what, where=str(path.parent), fix=fix)
        if _is_open_here(file, path):
            break
        os.close(file)  # its holder has deleted it meanwhile
    if holder:
        write_line(f"lock      taken over from {_name(holder)}, which is gone")
    own = {"host": socket.gethostname(), "pid": os.getpid(), "since": _now(), "command": shlex.join(sys.argv)}
    os.ftruncate(file, 0)
    os.pwrite(file, (json.dumps(own) + "\n").encode(), 0)
    return file


def _flock(file: int) -> bool | None:
    """Whether the lock is ours now; None where the system has no locks for this file."""
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
    """Whether nobody holds the folder any more. ``is_ours`` as of ``_flock``.

    Of a holder that the system cannot see, it waits for a sign of life.
    """
    is_here = holder.get("host") == socket.gethostname()
    if is_ours is False or not holder or (is_ours and is_here):
        return is_ours is not False
    touched, left = path.stat().st_mtime, GONE_SECONDS - max(0.0, _age(path))
    end = time.monotonic() + left
    if left > 0:
        write_line(f"lock      of {_name(holder)}: waiting up to {left:.0f} s for a sign of its life")
    while time.monotonic() < end:
        time.sleep(LOOK_SECONDS)
        try:
            if path.stat().st_mtime != touched:
                return False
        except FileNotFoundError:  # it has just ended
            return True
    return True


def _read(file: int) -> dict[str, Any]:
    """What the file says of its holder; {} of a new file, or one that was cut off."""
    try:
        content = json.loads(os.pread(file, 1 << 16, 0))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _name(holder: dict[str, Any]) -> str:
    """``pid 123 on host since 2026-11-21 10:00:00 UTC``."""
    if not holder:
        return "a run that has just begun"
    return f"pid {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}"


def _age(path: Path) -> float:
    """Seconds since the file was touched, by the clock of its file system: a host's own may differ."""
    with tempfile.TemporaryFile(dir=path.parent) as now:
        return os.fstat(now.fileno()).st_mtime - path.stat().st_mtime


def _is_open_here(file: int, path: Path) -> bool:
    """Whether the path still leads to the open file."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
