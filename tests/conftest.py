"""What holds for all tests: a cache of their own, the same cases each time they run, and an end by SIGTERM.

HYPOTHESIS_PROFILE=default lets Hypothesis search at random.
"""

import os
import signal
from types import FrameType

import hypothesis
import psutil
import pytest

hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))
IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
# What a run in this process prints to stderr where it takes a SIGTERM that was meant for the tests.
TAKEN_BY_A_RUN = "SIGTERM: the run saves and stops"


@pytest.fixture(autouse=True, scope="session")
def _cache_of_its_own(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_CLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def pytest_configure():
    signal.signal(signal.SIGTERM, _end)


def pytest_exception_interact(report):
    """Ends the tests where one failed because a run in this process took their SIGTERM."""
    if TAKEN_BY_A_RUN in getattr(report, "capstderr", ""):
        _end()


def _end(number: int = signal.SIGTERM, frame: FrameType | None = None) -> None:
    """Kills every process below the one that began the tests, and ends that one too.

    At once, as a test may wait inside a library for as long as its own time limit.
    """
    this = psutil.Process()
    for process in this.children(recursive=True):
        process.kill()
    if IS_WORKER:
        os.kill(os.getppid(), signal.SIGTERM)  # which kills the other workers
    os.write(2, b"\nSIGTERM: the tests end here\n")
    os._exit(128 + number)
