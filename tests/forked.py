"""Processes that are forked from one with all imports, so that they start quickly.

A new interpreter takes 6 CPU seconds to import torch and transformers. Launchers are tested separately
(launched.py); most tests of ranks do not need one.
"""

import atexit
import gc
import multiprocessing
import os
import runpy
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

PROGRAM = ("-m", "hf_clm", "train", "recipe.yaml")
LIMIT_SECONDS = 120
NONE: Mapping[str, str] = MappingProxyType({})
SERVER = multiprocessing.get_context("forkserver")  # has no threads yet
SERVER.set_forkserver_preload(["hf_clm.cli", "hf_clm.training.run"])


class Ended(NamedTuple):
    """How a process ended: its exit code (-9 for kill -9), and what it printed."""

    code: int
    out: str
    err: str


class Forked:
    """A process in a new session, with the interface of ``subprocess.Popen``.

    Args:
        words: the arguments of ``python``: ``-m hf_clm`` or a file, and its arguments.
        settings: additional environment variables.
        name: prefix of the files for its output in ``folder``, ``NAMEout.txt`` and ``NAMEerr.txt``.
    """

    def __init__(
        self, folder: Path, words: Sequence[str], settings: Mapping[str, str] = NONE, name: str = ""
    ):
        self.files = [folder / f"{name}{stream}.txt" for stream in ("out", "err")]
        for file in self.files:
            file.write_text("")
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", **settings}
        self._process = SERVER.Process(target=_run, args=(folder, list(words), environment, self.files))
        self._process.start()
        atexit.register(self.kill)  # of a test that failed; else Python would wait for it at its end
        self.pid: int = self._process.pid or 0

    def poll(self) -> int | None:
        """Returns the exit code, or None while it runs."""
        return self._process.exitcode

    def wait(self, seconds: float = LIMIT_SECONDS) -> int:
        """Waits for the end and returns the exit code. Kills a process that does not end."""
        self._process.join(seconds)
        code = self.poll()
        if code is None:
            self.kill()
            raise AssertionError(f"it did not end in {seconds} s: {self.read().err}")
        return code

    def send_signal(self, number: int) -> None:
        """Sends a signal to this process only."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Kills it with kill -9 if it still runs."""
        self._process.kill()
        self._process.join()

    def read(self) -> Ended:
        """Returns its output up to now; the code is 0 while it runs."""
        return Ended(self.poll() or 0, *(file.read_text() for file in self.files))


def _run(folder: Path, words: list[str], environment: dict[str, str], files: list[Path]) -> None:
    """Runs in the new process, like Python with these arguments."""
    gc.freeze()  # else the collector, which the Trainer calls, looks at all that was imported
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.set_start_method("fork", force=True)  # as in a run: its workers see that it has died
    torch.set_num_threads(1)
    if words[:2] == ["-m", "hf_clm"]:
        from hf_clm.cli import main

        sys.exit(main(words[2:]))
    sys.argv = words
    sys.path.insert(0, str(Path(words[0]).parent))
    runpy.run_path(words[0], run_name="__main__")


def free_port() -> str:
    """Returns a free port."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def start_ranks(
    folders: Sequence[Path], *words: str, program: Sequence[str] = PROGRAM, **settings: str
) -> list[Forked]:
    """Starts a rank in each folder, like srun. The same folder for all means one machine, else each is one.

    The output of rank 0 is in ``out.txt`` and ``err.txt``, that of rank 1 in ``1-out.txt`` and ``1-err.txt``.
    """
    is_one = len(set(folders)) == 1
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "CUDA_VISIBLE_DEVICES": ""}
    shared |= {"WORLD_SIZE": str(len(folders)), "LOCAL_WORLD_SIZE": str(len(folders) if is_one else 1)}
    started = []
    for rank, folder in enumerate(folders):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank if is_one else 0)}
        name = f"{rank}-" if rank else ""
        started.append(Forked(folder, [*program, *words], {**shared, **own, **settings}, name))
    return started


def finish(processes: Sequence[Forked]) -> list[Ended]:
    """Waits for all processes."""
    try:
        for process in processes:
            process.wait()
        return [process.read() for process in processes]
    finally:
        for process in processes:
            process.kill()


def run_ranks(folder: Path, *words: str, count: int = 2, **options: Any) -> Ended:
    """Runs ranks on one machine that must succeed, and returns their combined output. See ``start_ranks``."""
    return _join(finish(start_ranks([folder] * count, *words, **options)))


def run_program(file: str, folder: Path) -> None:
    """Runs a file of tests as a program, ``FILE RANK FOLDER``, in each of two processes that meet."""
    _join(finish([Forked(folder, [file, str(rank), str(folder)], name=f"{rank}-") for rank in range(2)]))


def _join(ended: Sequence[Ended]) -> Ended:
    out, err = "".join(one.out for one in ended), "".join(one.err for one in ended)
    assert [one.code for one in ended] == [0] * len(ended), err
    return Ended(0, out, err)
