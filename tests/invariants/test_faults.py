"""Failures of real runs: each ends with one line and its exit code, or continues."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from forked import LIMIT_SECONDS, finish
from launched import prepare, torchrun
from watched import (
    ALONE,
    RECIPE,
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

SAVING = ("--save_strategy", "steps", "--save_steps", "20", "--logging_steps", "20")
# Run in one of two processes: its data cannot be read at the third step.
BROKEN_DATA = """
import os
from hf_clm.cli import main
from hf_clm.errors import DataError
from hf_clm.training.trainer import CLMTrainer

class Broken(CLMTrainer):
    def get_batch_samples(self, *args, **kwargs):
        if self.state.global_step == 2 and os.environ["RANK"] == "1":
            raise DataError("row 7 cannot be read", where="train.jsonl:7")
        return super().get_batch_samples(*args, **kwargs)

import hf_clm.training.assemble as assemble
assemble.CLMTrainer = Broken
raise SystemExit(main(["train", "recipe.yaml"]))
"""

# The output goes to a pipe without a reader, so writing fails.
UNREAD = """
import os
from hf_clm.cli import main

reader, writer = os.pipe()
os.dup2(writer, 1)
os.close(reader)
raise SystemExit(main(["train", "recipe.yaml", "--max_steps", "3"]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return prepare(tmp_path_factory.mktemp("faults") / "work", RECIPE)


def errors(folder: Path) -> list[str]:
    lines = (folder / "err.txt").read_text().splitlines()
    return [line for line in lines if line.startswith("error")]


def checkpoints(folder: Path) -> list[Path]:
    """Returns the complete checkpoints in order."""
    result = (folder / "run").glob("checkpoint-*/SEALED.json")
    return sorted((path.parent for path in result), key=lambda path: int(path.name[11:]))


def test_a_file_size_limit_ends_a_run_with_one_line_and_keeps_the_last_checkpoint(folder):
    process = fork(folder, *SAVING)
    wait_for(lambda: checkpoints(folder) or process.poll() is not None)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100_000, 100_000))  # the model takes 144,152

    assert process.wait() == 6
    (error,) = errors(folder)
    assert f": cannot be written; got {os.strerror(errno.EFBIG)} (0.4 MiB needed, " in error
    assert "fix: raise this shell's limit on file sizes (ulimit -f)" in error
    assert "Traceback" not in (folder / "err.txt").read_text()
    assert checkpoints(folder) == sorted((folder / "run").glob("checkpoint-*"))
    assert facts(folder)["status"] == "failed"
    assert f"error: {facts(folder)['error'][0]}" == error


# A separate file system, visible only to this process, which fills up after a checkpoint.
ON_A_SMALL_DISK = """
mkdir run && mount -t tmpfs -o size=20m tmpfs run || exit 99
(until [ -e run/checkpoint-40/SEALED.json ]; do sleep 0.02; done; cat /dev/zero > run/other 2>/dev/null) &
"$@"
code=$?
"$1" -m hf_clm checkpoints run > listed.txt
cp run/run.json .
exit $code
"""
CAN_MOUNT = ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]


@pytest.mark.skipif(
    not shutil.which("unshare") or subprocess.run(CAN_MOUNT, capture_output=True).returncode != 0,
    reason="needs the right to mount a file system",
)
def test_a_full_disk_ends_a_run_with_one_line_and_all_checkpoints_are_complete(folder):
    small = ["unshare", "-m", "sh", "-c", ON_A_SMALL_DISK, "sh", *ALONE]

    process = start(folder, small, *SAVING)

    assert process.wait(LIMIT_SECONDS) == 6
    (error,) = errors(folder)
    assert ": cannot be written; got No space left on device (0.4 MiB needed, 0.0 MiB free)" in error
    assert "fix: free some space, or lower train.save_total_limit" in error
    assert "Traceback" not in (folder / "err.txt").read_text()
    listed = (folder / "listed.txt").read_text().splitlines()
    assert len(listed) >= 2
    assert all(line.endswith("sealed, verified") for line in listed)
    assert json.loads((folder / "run.json").read_text())["status"] in ("running", "failed")  # a complete file


def test_moving_the_folder_ends_a_run_and_the_folder_is_not_recreated(folder):
    process = fork(folder, *SAVING)
    wait_for(lambda: checkpoints(folder) or process.poll() is not None)
    (folder / "run").rename(folder / "moved")

    assert process.wait() == 6
    assert errors(folder) == [
        "error: run: the output folder was moved or deleted during the run, which stopped; "
        "fix: set --output_dir to the new place of the folder to resume"
    ]
    assert not (folder / "run").exists()
    assert list((folder / "moved").glob("checkpoint-*/optimizer.pt"))


def test_training_continues_if_its_output_is_not_read(folder):
    (folder / "unread.py").write_text(UNREAD)

    process = fork(folder, program=("unread.py",))

    assert process.wait() == 0
    assert process.read().err == ""
    assert (folder / "run" / "model.safetensors").is_file()


def test_an_unwritable_folder_is_rejected_before_the_model_is_loaded(folder):
    """Not even root can create a folder in /sys."""
    process = fork(folder, "--output_dir", "/sys/run", "--model.name_or_path", "./missing")

    assert process.wait() == 6
    assert errors(folder)[0].startswith("error: /sys/run: cannot write to the output folder; got ")


@pytest.mark.slow
def test_an_unreachable_hub_is_a_one_line_error(folder):
    """Port 9 is closed, and the cache is empty. huggingface_hub reads the address when it is imported."""
    hub = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "0"}
    process = start(folder, ALONE, "--model.name_or_path", "nobody/nothing", **hub)

    assert process.wait(LIMIT_SECONDS) == 6
    (error,) = errors(folder)
    assert "'nobody/nothing' is neither a local folder nor in the cache" in error
    assert "the Hub cannot be reached" in error
    assert "hf download nobody/nothing" in error


LOST = "another process of this run has ended or does not respond"


@pytest.mark.parametrize("killed", [0, 1])
def test_killing_one_process_ends_the_other(folder, killed):
    ranks = fork_two(folder)
    reach_step(folder, ranks[0])
    ranks[killed].send_signal(signal.SIGKILL)

    ended = finish(ranks)

    other = ended[1 - killed]
    assert (ended[killed].code, other.code) == (-9, 6)
    assert [line for line in other.err.splitlines() if LOST in line] == other.err.splitlines()[-1:]
    assert "Traceback" not in other.err


@pytest.mark.large
def test_torchrun_ends_when_a_process_is_killed(folder):
    launcher = start(folder, torchrun())
    reach_step(folder, launcher)
    of_ranks = children(launcher.pid)
    os.kill(of_ranks["1"], signal.SIGKILL)

    assert launcher.wait(LIMIT_SECONDS) == 1
    assert not any(is_alive(child) for child in of_ranks.values())
    text = (folder / "err.txt").read_text()
    assert "exitcode  : -9" in text
    assert "[rank" not in text  # no traceback of the other process
    assert len([line for line in errors(folder) if LOST in line]) <= 1


def test_a_process_that_hangs_ends_the_other_after_the_timeout(folder):
    ranks = fork_two(folder, "--ddp_timeout", "2")
    reach_step(folder, ranks[0])
    ranks[1].send_signal(signal.SIGSTOP)

    code = ranks[0].wait()
    ranks[1].kill()

    assert code == 6
    assert errors(folder) == [
        f"error: {LOST}; got Timed out; "
        "fix: see the error of that process; the same command resumes from the last checkpoint"
    ]


def test_a_data_error_in_one_process_is_reported_once_and_ends_both(folder):
    (folder / "broken.py").write_text(BROKEN_DATA)

    first, second = finish(fork_two(folder, program=("broken.py",)))

    assert (first.code, second.code) == (6, 3)
    assert steps(folder) == [1, 2]
    assert second.err.splitlines() == ["error on rank 1: train.jsonl:7: row 7 cannot be read"]
    assert first.err.startswith(f"error: {LOST}")
    assert "[rank" not in first.err
