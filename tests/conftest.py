"""Settings for all tests: a temporary cache, the same cases in each run, and an end on SIGTERM.

HYPOTHESIS_PROFILE=default makes Hypothesis search randomly.
"""

import gc
import os
import shutil
import signal
import sys
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import hypothesis
import psutil
import pytest

hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))
IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
# What a run in this process prints to stderr if it receives a SIGTERM that was meant for the tests.
TAKEN_BY_A_RUN = "SIGTERM: saving and stopping"


@pytest.fixture(autouse=True, scope="session")
def _cache_of_its_own(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_CLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def _once_in_all_runs(tmp_path_factory):
    """Measures the speed of this machine and draws the plots of the loss only once.

    They take most of the time of a run of two steps. Both have separate tests.
    """
    run, trainer = (sys.modules.get(f"hf_clm.training.{name}") for name in ("run", "trainer"))
    if run is None or trainer is None:  # no test needs them
        yield
        return
    draw, drawn = run.write_loss_plots, tmp_path_factory.mktemp("plots")

    def copy_plots(metrics: list[dict[str, Any]], folder: Path) -> None:
        if not (drawn / "loss.pdf").exists():
            draw(metrics, drawn)
        if any("loss" in entry for entry in metrics):
            shutil.copytree(drawn, folder, dirs_exist_ok=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "write_loss_plots", copy_plots)
        patch.setattr(trainer, "measure_peak", cache(trainer.measure_peak))
        yield


def pytest_collection_finish():
    """Makes the garbage collector, which the Trainer calls at the end, skip all imported objects."""
    gc.collect()
    gc.freeze()


def pytest_configure():
    signal.signal(signal.SIGTERM, _end)


def pytest_exception_interact(report):
    """Ends the tests if one failed because a run in this process received their SIGTERM."""
    if TAKEN_BY_A_RUN in getattr(report, "capstderr", ""):
        _end()


def _end(number: int = signal.SIGTERM, frame: FrameType | None = None) -> None:
    """Kills every process below the one that started the tests, and ends that one too.

    At once, as a test may wait inside a library for as long as its own time limit.
    """
    this = psutil.Process()
    for process in this.children(recursive=True):
        process.kill()
    if IS_WORKER:
        os.kill(os.getppid(), signal.SIGTERM)  # which kills the other workers
    os.write(2, b"\nSIGTERM: the tests end here\n")
    os._exit(128 + number)
