"""Two runs never write to one output folder, and a run that died does not block the next."""

import errno
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from hf_clm.errors import EnvironmentFault, ExitCode, RecipeError
from hf_clm.training.lock import locked
from hf_clm.training.output import is_in_use, move_aside

ROOT = Path(__file__).resolve().parents[2]
# Locks the folder, prints a line, and waits for the end of its input.
HOLDER = """
import os, sys
from pathlib import Path
from hf_clm.training.lock import locked
with locked(Path(sys.argv[1]), is_main=True):
    if "fork" in sys.argv and os.fork() == 0:
        sys.stdin.read()  # a worker that outlives its parent
        os._exit(0)
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(folder: Path, *words: str) -> subprocess.Popen:
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder), *words], cwd=ROOT, **pipes)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def refusal(folder: Path) -> EnvironmentFault:
    with pytest.raises(EnvironmentFault) as error, locked(folder, is_main=True):
        pass
    assert error.value.exit_code == ExitCode.ENVIRONMENT
    return error.value


def leave_lock(folder: Path, *, seconds_ago: float, **holder: Any) -> Path:
    """Writes a lock file that another run has left, or holds on another host."""
    path = folder / ".lock"
    path.write_text(json.dumps({"pid": 7, "since": "2026-01-02 03:04:05 UTC", "command": "x", **holder}))
    then = path.stat().st_mtime - seconds_ago
    os.utime(path, (then, then))
    return path


def test_the_lock_names_its_holder_and_is_removed_afterwards(tmp_path):
    with locked(tmp_path / "a" / "run", is_main=True):
        holder = json.loads((tmp_path / "a" / "run" / ".lock").read_text())
        (tmp_path / "a" / "run" / "run.json").touch()

    assert (holder["pid"], holder["host"]) == (os.getpid(), socket.gethostname())
    assert sorted(holder) == ["command", "host", "pid", "since"]
    assert holder["since"].endswith(" UTC")
    assert [path.name for path in (tmp_path / "a" / "run").iterdir()] == ["run.json"]


def test_a_second_run_is_refused_and_changes_nothing(tmp_path):
    holder = hold(tmp_path)
    before = (tmp_path / ".lock").read_text()

    error = refusal(tmp_path)

    since = json.loads(before)["since"]
    assert str(error) == (
        f"{tmp_path}: in use by pid {holder.pid} on {socket.gethostname()} since {since}, which is still "
        "running; fix: choose another --output_dir, or stop that run first (on SIGTERM it saves and stops)"
    )
    assert (tmp_path / ".lock").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    holder.communicate("")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [(), ("fork",)], ids=["alone", "a worker lives on"])
def test_the_lock_of_a_run_that_was_killed_is_taken_over(tmp_path, capsys, words):
    holder = hold(tmp_path, *words)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    since = json.loads((tmp_path / ".lock").read_text())["since"]

    with locked(tmp_path, is_main=True):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()

    name = f"pid {holder.pid} on {socket.gethostname()} since {since}"
    assert capsys.readouterr().out == f"lock      taken over from {name}, which is no longer running\n"
    holder.communicate("")


def test_a_process_cannot_lock_a_folder_twice(tmp_path):
    with locked(tmp_path, is_main=True):
        assert "which is still running" in str(refusal(tmp_path))
        assert (tmp_path / ".lock").exists()


NAME = "pid 7 on elsewhere since 2026-01-02 03:04:05 UTC"


@pytest.fixture
def is_fast(monkeypatch):
    """A holder on another host touches its file every 20 ms and counts as gone after 30 seconds."""
    for name, seconds in {"HEARTBEAT_SECONDS": 0.02, "POLL_SECONDS": 0.01, "EXPIRY_SECONDS": 30}.items():
        monkeypatch.setattr(f"hf_clm.training.lock.{name}", seconds)


def test_a_holder_on_another_host_that_touches_its_file_is_alive(tmp_path, is_fast, capsys):
    path = leave_lock(tmp_path, seconds_ago=0, host="elsewhere")
    beat = threading.Timer(0.2, path.touch)
    beat.start()

    assert f"{tmp_path}: in use by {NAME}, which is still running" in str(refusal(tmp_path))

    beat.join()
    assert json.loads(path.read_text())["host"] == "elsewhere"
    line = rf"lock      held by {NAME}: waiting up to \d+ s for its heartbeat\n"
    assert re.fullmatch(line, capsys.readouterr().out)


def test_a_holder_on_another_host_without_a_heartbeat_is_gone(tmp_path, is_fast, capsys):
    leave_lock(tmp_path, seconds_ago=29.5, host="elsewhere")
    began = time.monotonic()

    with locked(tmp_path, is_main=True):
        assert 0.3 < time.monotonic() - began < 20

    assert (
        capsys.readouterr().out.splitlines()[-1]
        == f"lock      taken over from {NAME}, which is no longer running"
    )


def test_a_holder_on_another_host_that_was_silent_for_two_minutes_is_not_waited_for(tmp_path, capsys):
    leave_lock(tmp_path, seconds_ago=121, host="elsewhere")

    with locked(tmp_path, is_main=True):
        pass

    assert capsys.readouterr().out == f"lock      taken over from {NAME}, which is no longer running\n"


def test_a_holder_on_another_host_with_a_clock_that_is_fast_is_not_waited_for_longer(
    tmp_path, is_fast, monkeypatch
):
    monkeypatch.setattr("hf_clm.training.lock.EXPIRY_SECONDS", 1)
    leave_lock(tmp_path, seconds_ago=-3600, host="elsewhere")

    with locked(tmp_path, is_main=True):
        pass


def test_a_holder_on_another_host_that_ends_meanwhile_leaves_the_folder(tmp_path, is_fast, capsys):
    path = leave_lock(tmp_path, seconds_ago=0, host="elsewhere")
    end = threading.Timer(0.1, path.unlink)
    end.start()

    with locked(tmp_path, is_main=True):
        assert json.loads(path.read_text())["pid"] == os.getpid()

    assert "taken over" not in capsys.readouterr().out


def test_on_a_file_system_without_locks_the_heartbeat_decides(tmp_path, is_fast, monkeypatch):
    def no_locks(file, operation):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    leave_lock(tmp_path, seconds_ago=29.9, host=socket.gethostname())

    with locked(tmp_path, is_main=True):
        assert "which is still running" in str(refusal(tmp_path))


def test_the_holder_touches_the_file_regularly(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_clm.training.lock.HEARTBEAT_SECONDS", 0.01)
    with locked(tmp_path, is_main=True):
        path = tmp_path / ".lock"
        os.utime(path, (0, 0))
        while path.stat().st_mtime == 0:
            pass


def test_an_incomplete_lock_file_does_not_count(tmp_path, capsys):
    (tmp_path / ".lock").write_text('{"host": "vm", "pi')

    with locked(tmp_path, is_main=True):
        pass

    assert capsys.readouterr().out == ""


def test_a_lock_that_another_run_has_taken_over_is_not_removed(tmp_path):
    """The folder was moved, and another run started in its place."""
    with locked(tmp_path / "run", is_main=True):
        (tmp_path / "run").rename(tmp_path / "moved")
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / ".lock").write_text("another's")

    assert (tmp_path / "run" / ".lock").read_text() == "another's"


def test_a_folder_with_only_a_lock_is_not_in_use(tmp_path):
    with locked(tmp_path, is_main=True):
        assert not is_in_use(tmp_path)
        (tmp_path / "run.json").touch()
        assert is_in_use(tmp_path)


def test_overwrite_moves_the_files_and_keeps_the_lock(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model.safetensors").touch()

    with locked(tmp_path / "run", is_main=True):
        move_aside(tmp_path / "run")
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
        assert [path.name for path in (tmp_path / "run.old-1").iterdir()] == ["model.safetensors"]
        assert "which is still running" in str(refusal(tmp_path / "run"))


def test_only_the_main_process_locks_and_a_refused_run_leaves_no_folder(tmp_path):
    with locked(tmp_path / "other", is_main=False):
        assert not (tmp_path / "other").exists()

    with pytest.raises(RecipeError), locked(tmp_path / "new", is_main=True):
        raise RecipeError("refused")

    assert list(tmp_path.iterdir()) == []


def test_a_folder_under_a_file_is_a_fault_of_the_environment(tmp_path):
    (tmp_path / "file").touch()

    error = refusal(tmp_path / "file" / "run")

    where = tmp_path / "file" / "run"
    assert str(error) == f"{where}: cannot write to the output folder; got Not a directory"
