"""Processes that are asked to stop: all stop at the same step, with one checkpoint and one line."""

import os
import signal
from pathlib import Path

import pytest
from forked import LIMIT_SECONDS, Forked, finish
from launched import ACCELERATE, prepare, torchrun
from watched import (
    RECIPE,
    accelerate,
    children,
    facts,
    fork,
    fork_two,
    is_alive,
    reach_step,
    start,
    steps,
    wait_for,
)

# Releases Python's lock and never returns, like a library that waits for another process.
STUCK = """
import ctypes
from hf_clm.training.signals import Stop, listening
with listening(Stop()):
    print("listens", flush=True)
    while True:
        ctypes.CDLL(None).sleep(1000)
"""
FIRST = "SIGTERM: saving and stopping after this step; send it again to stop now"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return prepare(tmp_path_factory.mktemp("signals") / "work", RECIPE)


def check_stopped(folder: Path, reason: str) -> None:
    """Checks for one checkpoint at the last step, one line about it, no final model and no lock."""
    last = steps(folder)[-1]
    result = facts(folder)
    assert (result["status"], result["stopped_by"], result["stopped_at_step"]) == ("preempted", reason, last)
    names = {path.name for path in (folder / "run").iterdir()}
    assert {name for name in names if "checkpoint" in name} == {f"checkpoint-{last}"}
    assert (folder / "run" / f"checkpoint-{last}" / "optimizer.pt").is_file()
    assert names & {"model.safetensors", "config.json", ".lock"} == set()
    lines = (folder / "out.txt").read_text().splitlines()
    assert [line for line in lines if line.startswith("stopped")] == [
        f"stopped by {reason} at step {last:,} of 100,000; saved in run/checkpoint-{last}; "
        "the same command resumes from there"
    ]


def test_sigterm_saves_and_ends_with_75_and_a_second_run_is_rejected_meanwhile(folder):
    process = fork(folder)
    reach_step(folder, process)
    second = Forked(folder, ["-m", "hf_clm", "train", "recipe.yaml", "--overwrite"], name="second-")
    second.wait()
    process.send_signal(signal.SIGTERM)

    assert process.wait() == 75
    check_stopped(folder, "SIGTERM")
    code, out, err = second.read()
    assert (code, out) == (6, "")
    assert err.startswith(f"error: run: in use by pid {process.pid} on ")
    assert len(err.splitlines()) == 1
    assert [path.name for path in folder.glob("run*")] == ["run"]
    assert process.read().err.splitlines()[-1:] == [FIRST]


def test_a_second_sigterm_ends_a_process_that_hangs_in_a_library(tmp_path):
    (tmp_path / "stuck.py").write_text(STUCK)
    process = Forked(tmp_path, ["stuck.py"])
    wait_for(lambda: process.read().out == "listens\n")

    process.send_signal(signal.SIGTERM)
    wait_for(lambda: process.read().err == f"{FIRST}\n")
    process.send_signal(signal.SIGTERM)

    assert process.wait() == 143
    assert process.read().err.splitlines()[1:] == [
        "SIGTERM again: stopping now, without saving; earlier checkpoints are intact"
    ]


def test_ctrl_c_ends_with_130(folder):
    process = fork(folder)
    reach_step(folder, process)
    process.send_signal(signal.SIGINT)

    assert process.wait() == 130
    check_stopped(folder, "SIGINT")


def test_a_signal_to_all_processes_does_not_end_data_workers_before_the_step(folder):
    """Slurm sends it to all processes."""
    process = fork(folder, "--dataloader_num_workers", "2", "--dataloader_persistent_workers", "true")
    reach_step(folder, process)
    os.killpg(process.pid, signal.SIGTERM)

    assert process.wait() == 75
    check_stopped(folder, "SIGTERM")


def test_a_signal_to_one_of_two_processes_stops_both_at_the_same_step(folder):
    ranks = fork_two(folder)
    reach_step(folder, ranks[0])
    ranks[1].send_signal(signal.SIGUSR1)

    assert [rank.code for rank in finish(ranks)] == [75, 75]
    check_stopped(folder, "SIGUSR1")


def test_signals_at_different_times_stop_both_processes_at_the_same_step(folder):
    """Each receives it twice, as if a launcher forwarded a signal that its processes already received."""
    ranks = fork_two(folder, TORCHELASTIC_RUN_ID="none")
    reach_step(folder, ranks[0])
    for rank in (1, 0, 1, 0):
        ranks[rank].send_signal(signal.SIGTERM)

    assert [rank.code for rank in finish(ranks)] == [75, 75]
    check_stopped(folder, "SIGTERM")


# --- with the launchers of users


@pytest.mark.slow
def test_a_signal_to_the_launcher_of_two_processes_stops_both(folder):
    launcher = start(folder, torchrun())
    reach_step(folder, launcher)
    of_ranks = children(launcher.pid)
    assert sorted(of_ranks) == ["0", "1"]
    launcher.terminate()

    assert launcher.wait(LIMIT_SECONDS) == 1  # torchrun always exits with 1
    check_stopped(folder, "SIGTERM")
    assert not any(is_alive(child) for child in of_ranks.values())


@pytest.mark.slow
def test_a_run_does_not_outlive_its_launcher(folder):
    """``accelerate launch`` with one process does not forward signals."""
    launcher = start(folder, accelerate())
    reach_step(folder, launcher)
    (child,) = children(launcher.pid).values()
    launcher.terminate()
    launcher.wait(LIMIT_SECONDS)

    wait_for(lambda: not is_alive(child))
    check_stopped(folder, "the end of its launcher")


@pytest.mark.large
def test_sigterm_to_launcher_and_processes_at_once_stops_both_after_one_checkpoint(folder):
    """As with Slurm, and the launcher and setting of the README: the processes receive it twice."""
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
