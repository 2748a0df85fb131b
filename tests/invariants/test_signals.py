"""Real processes that are asked to stop: one step for all, one checkpoint, and one line that says so."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from launched import ACCELERATE, ROOT, torchrun
from watched import (
    ALONE,
    LIMIT_SECONDS,
    accelerate,
    children,
    facts,
    is_alive,
    prepare,
    reach_step,
    start,
    steps,
    wait_for,
)

WITH_SESSION = ["setsid"]  # in place of itself: the process stays the same
LASTING = ["--dataloader_persistent_workers", "true"]
# Holds no lock of Python and never returns, as a library that waits for another process.
STUCK = """
import ctypes
from hf_clm.training.signals import Stop, listening
with listening(Stop()):
    print("listens", flush=True)
    while True:
        ctypes.CDLL(None).sleep(1000)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return prepare(tmp_path_factory.mktemp("signals") / "work")


def check_stopped(folder: Path, reason: str) -> None:
    """One checkpoint at the last step, no final model, no lock, and one line that says so."""
    last = steps(folder)[-1]
    found = facts(folder)
    assert (found["status"], found["stopped_by"], found["stopped_at_step"]) == ("preempted", reason, last)
    names = {path.name for path in (folder / "run").iterdir()}
    assert {name for name in names if "checkpoint" in name} == {f"checkpoint-{last}"}
    assert (folder / "run" / f"checkpoint-{last}" / "optimizer.pt").is_file()
    assert names & {"model.safetensors", "config.json", ".lock"} == set()
    lines = (folder / "out.txt").read_text().splitlines()
    assert [line for line in lines if line.startswith("stopped")] == [
        f"stopped by {reason} at step {last:,} of 100,000; saved in run/checkpoint-{last}; "
        "the same command resumes from there"
    ]


def test_sigterm_saves_and_ends_with_75_and_a_second_run_is_refused_meanwhile(folder):
    process = start(folder, ALONE)
    reach_step(folder, process)
    second = subprocess.run(
        [*ALONE, "-m", "hf_clm", "train", "recipe.yaml", "--overwrite"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    process.send_signal(signal.SIGTERM)

    assert process.wait(LIMIT_SECONDS) == 75
    check_stopped(folder, "SIGTERM")
    assert (second.returncode, second.stdout) == (6, "")
    assert second.stderr.startswith(f"error: run: locked by pid {process.pid} on ")
    assert len(second.stderr.splitlines()) == 1
    assert [path.name for path in folder.glob("run*")] == ["run"]
    assert (folder / "err.txt").read_text().splitlines()[-1:] == [
        "SIGTERM: the run saves and stops at the end of this step; once more ends it now"
    ]


def test_a_second_sigterm_ends_a_process_that_waits_inside_a_library():
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", STUCK], cwd=ROOT, **pipes)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "listens\n"

    process.send_signal(signal.SIGTERM)
    first = process.stderr.readline()
    process.send_signal(signal.SIGTERM)

    assert process.wait(LIMIT_SECONDS) == 143
    assert first == "SIGTERM: the run saves and stops at the end of this step; once more ends it now\n"
    assert process.stderr.read() == (
        "SIGTERM again: the run ends now; its earlier checkpoints are as they were\n"
    )


@pytest.mark.slow
def test_ctrl_c_ends_with_130(folder):
    process = start(folder, ALONE)
    reach_step(folder, process)
    process.send_signal(signal.SIGINT)

    assert process.wait(LIMIT_SECONDS) == 130
    check_stopped(folder, "SIGINT")


@pytest.mark.slow
def test_a_signal_to_all_processes_of_a_run_leaves_those_that_load_data_to_the_end_of_the_step(folder):
    """Slurm sends it to all of them."""
    process = start(folder, [*WITH_SESSION, *ALONE], "--dataloader_num_workers", "2", *LASTING)
    reach_step(folder, process)
    os.killpg(process.pid, signal.SIGTERM)

    assert process.wait(LIMIT_SECONDS) == 75
    check_stopped(folder, "SIGTERM")


@pytest.mark.slow
def test_sigterm_to_launcher_and_processes_at_once_stops_both_behind_one_checkpoint(folder):
    """As Slurm does, with the launcher and the setting of the README: the processes get it twice."""
    command = accelerate("--config_file", str(ACCELERATE / "cpu.yaml"))
    launcher = start(folder, command, TORCH_ELASTIC_SHUTDOWN_TIMEOUT="110")
    reach_step(folder, launcher)
    of_ranks = children(launcher.pid)
    assert sorted(of_ranks) == ["0", "1"]
    for number in (launcher.pid, *of_ranks.values()):
        os.kill(number, signal.SIGTERM)

    assert launcher.wait(LIMIT_SECONDS) == 1
    check_stopped(folder, "SIGTERM")
    assert not any(is_alive(child) for child in of_ranks.values())


@pytest.mark.slow
def test_a_run_does_not_outlive_its_launcher(folder):
    """``accelerate launch`` of one process passes no signal on."""
    launcher = start(folder, accelerate())
    reach_step(folder, launcher)
    (child,) = children(launcher.pid).values()
    launcher.terminate()
    launcher.wait(LIMIT_SECONDS)

    wait_for(lambda: not is_alive(child))
    check_stopped(folder, "the end of its launcher")


@pytest.mark.slow
@pytest.mark.parametrize("first", ["0", "1"])
def test_a_signal_to_one_of_two_processes_stops_both_at_one_step(folder, first):
    launcher = start(folder, torchrun())
    reach_step(folder, launcher)
    of_ranks = children(launcher.pid)
    assert sorted(of_ranks) == ["0", "1"]
    os.kill(of_ranks[first], signal.SIGUSR1)

    assert launcher.wait(LIMIT_SECONDS) == 1  # torchrun has one exit code for everything
    check_stopped(folder, "SIGUSR1")
    assert not any(is_alive(child) for child in of_ranks.values())
    assert "exitcode  : 75" in (folder / "err.txt").read_text()


@pytest.mark.slow
def test_signals_at_different_times_stop_both_processes_at_one_step(folder):
    launcher = start(folder, torchrun())
    reach_step(folder, launcher)
    of_ranks = children(launcher.pid)
    os.kill(of_ranks["1"], signal.SIGTERM)
    os.kill(of_ranks["0"], signal.SIGTERM)

    assert launcher.wait(LIMIT_SECONDS) == 1
    check_stopped(folder, "SIGTERM")


@pytest.mark.slow
def test_a_signal_to_the_launcher_of_two_processes_stops_both(folder):
    launcher = start(folder, torchrun())
    reach_step(folder, launcher)
    of_ranks = children(launcher.pid)
    launcher.terminate()

    assert launcher.wait(LIMIT_SECONDS) == 1
    check_stopped(folder, "SIGTERM")
    assert not any(is_alive(child) for child in of_ranks.values())
