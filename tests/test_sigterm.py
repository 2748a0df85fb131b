"""On SIGTERM, the tests end together with all processes that they have started."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from watched import is_alive, wait_for

CONFTEST = Path(__file__).with_name("conftest.py")
# Each test starts a process in a new session, like torchrun and Ray, and waits for it.
TESTS = """\
import os, subprocess
from pathlib import Path
import pytest

@pytest.mark.parametrize("name", "ab")
def test_waits(name):
    process = subprocess.Popen(["sh", "-c", "sleep 1000 & wait"], start_new_session=True)
    Path(__file__).with_name(f"{os.getpid()}.started").write_text("")
    process.wait()
"""
# A test whose run handles the signal, and that expects another exit code.
TRAINS = """\
import os, time
from pathlib import Path
from hf_clm.training.signals import Stop, listening

def test_trains():
    with listening(Stop()) as stop:
        Path(__file__).with_name(f"{os.getpid()}.started").write_text("")
        while not stop.reason:
            time.sleep(0.01)
    assert stop.reason == 0

def test_never_ends():
    time.sleep(1000)
"""


def start(folder: Path, tests: str, *words: str) -> subprocess.Popen:
    """Starts pytest on these tests, like make."""
    shutil.copy(CONFTEST, folder / "conftest.py")
    (folder / "test_it.py").write_text(tests)
    path = os.pathsep.join(map(str, (CONFTEST.parents[1], CONFTEST.parent)))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(folder),
        *words,
    ]
    return subprocess.Popen(command, cwd=folder, env=environment | {"PYTHONPATH": path})


def end(process: subprocess.Popen, folder: Path, *, count: int, to_a_worker: bool = False) -> int:
    """Sends SIGTERM once ``count`` processes run a test, and checks that no process is left."""
    wait_for(lambda: len(list(folder.glob("*.started"))) == count)
    tree = psutil.Process(process.pid).children(recursive=True)
    began = time.monotonic()
    worker = int(next(folder.glob("*.started")).stem)
    os.kill(worker if to_a_worker else process.pid, signal.SIGTERM)
    code = process.wait(20)

    assert time.monotonic() - began < 10
    wait_for(lambda: not any(is_alive(one.pid) for one in tree))
    return code


@pytest.mark.parametrize("to_a_worker", [False, True])
def test_the_workers_and_what_they_started_end_with_the_tests(tmp_path, to_a_worker):
    process = start(tmp_path, TESTS, "-n", "2", "--max-worker-restart", "0")

    assert end(process, tmp_path, count=2, to_a_worker=to_a_worker) == 143


def test_what_a_test_started_ends_where_there_are_no_workers(tmp_path):
    assert end(start(tmp_path, TESTS), tmp_path, count=1) == 143


def test_a_run_that_takes_the_signal_does_not_keep_it(tmp_path):
    assert end(start(tmp_path, TRAINS), tmp_path, count=1) == 143
