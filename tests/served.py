"""``hf-clm serve`` in a child process, for tests and measurements."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Server:
    """A server that is ready for requests."""

    url: str
    process: subprocess.Popen[str]

    def stop(self, with_signal: int = signal.SIGTERM) -> tuple[int, str]:
        """Returns its exit code, and its output since it was ready."""
        self.process.send_signal(with_signal)
        printed, _ = self.process.communicate(timeout=60)
        return self.process.returncode, printed


@contextmanager
def served(run: str, *options: str, **environment: str) -> Iterator[Server]:
    """Serves the run on a free port of this machine."""
    words = [sys.executable, "-m", "hf_clm", "serve", run, "--port", "0", "--device", "cpu", *options]
    plain = {name: value for name, value in os.environ.items() if name != "HF_CLM_API_KEY"}
    process = subprocess.Popen(
        words,
        cwd=ROOT,
        env={**plain, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.match(r"serving at (http\S+) ", line)
        assert found, line + process.communicate(timeout=60)[0]
        yield Server(found[1], process)
    finally:
        process.kill()
        process.communicate()
