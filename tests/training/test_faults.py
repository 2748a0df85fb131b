"""Faults of the machine are one-line errors, and partial checkpoints are removed."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from hf_clm.errors import DataError, DivergedError, EnvironmentFault, ExitCode
from hf_clm.training.faults import among_others, checkpoint_bytes, own_errors, require_alive, writing

OF_RUST = "Error while serializing: I/O error: No space left on device (os error 28)"
OF_TORCH = "[enforce fail at inline_container.cc:672] . unexpected pos 226368 vs 226260"
OF_GLOO = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:9: Connection reset by"
)


def fail(folder: Path, error: Exception, part: str = "checkpoint-3", *, needed: int = 0) -> EnvironmentFault:
    """Returns the error that results from an error during a save."""
    with pytest.raises(EnvironmentFault) as found, writing(folder, part, needed=needed):
        if part:
            (folder / part).mkdir()
            (folder / part / "model.safetensors").touch()
        raise error
    assert found.value.exit_code == ExitCode.ENVIRONMENT
    assert found.value.__cause__ is error
    return found.value


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "Disk quota exceeded"),
        (SafetensorError(OF_RUST), "No space left on device"),
        (RuntimeError(OF_TORCH), "a file was truncated"),
    ],
)
def test_a_full_disk_is_reported_in_one_line_and_the_partial_checkpoint_is_removed(
    tmp_path, monkeypatch, error, reason
):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 3 * 2**20}))
    (tmp_path / "checkpoint-2").mkdir()

    found = fail(tmp_path, error, needed=5 * 2**30)

    got = (
        f"{tmp_path / 'checkpoint-3'}: cannot be written; got {reason} (5.0 GiB needed, 3.0 MiB free); fix: "
    )
    assert str(found).startswith(got)
    assert str(found).endswith("; earlier checkpoints are intact")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_the_file_that_cannot_be_written_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"

    found = fail(tmp_path, PermissionError(errno.EACCES, "Permission denied", str(path)), part="")

    assert found.where == str(path)


def test_a_complete_checkpoint_is_not_removed(tmp_path):
    with pytest.raises(EnvironmentFault), writing(tmp_path, "checkpoint-3"):
        (tmp_path / "checkpoint-3").mkdir()
        (tmp_path / "checkpoint-3" / "SEALED.json").touch()
        raise OSError(errno.EIO, "Input/output error")  # of the deletion of an older one

    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA out of memory"), FileNotFoundError(2, "no", "train.bin")]
)
def test_other_errors_pass_through(tmp_path, error):
    with pytest.raises(type(error)) as found, writing(tmp_path):
        raise error

    assert found.value is error


def test_a_folder_that_was_moved_is_not_created_again(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(EnvironmentFault, match="moved or deleted"), writing(tmp_path / "run"):
        (tmp_path / "run").rename(tmp_path / "moved")
        (tmp_path / "run" / "metrics.jsonl").open("a")

    with pytest.raises(EnvironmentFault, match="moved or deleted"), writing(tmp_path / "run", "checkpoint-1"):
        os.makedirs(tmp_path / "run" / "checkpoint-1")

    assert [path.name for path in tmp_path.iterdir()] == ["moved"]


def test_a_checkpoint_takes_weights_and_two_averages_of_each():
    model = torch.nn.Linear(10, 10, bias=False)  # 100 numbers of 4 bytes
    optimizer = torch.optim.AdamW(model.parameters())

    assert checkpoint_bytes(model, optimizer) == 400

    model(torch.ones(10)).sum().backward()
    optimizer.step()

    assert checkpoint_bytes(model, optimizer) == 1204  # and a count of the steps


def test_a_lost_process_is_reported_in_one_line(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(EnvironmentFault) as error, among_others():
        raise RuntimeError(OF_GLOO)

    assert str(error.value) == (
        "another process of this run has ended or does not respond; got Connection reset; "
        "fix: see the error of that process; the same command resumes from the last checkpoint"
    )


def test_a_single_process_reports_no_lost_process():
    with pytest.raises(RuntimeError) as error, among_others():
        raise RuntimeError(OF_GLOO)

    assert str(error.value) == OF_GLOO


@pytest.mark.parametrize(
    ("error", "is_own"), [(DataError("row 7 cannot be read"), True), (DivergedError("NaN"), None)]
)
def test_an_error_in_training_is_reported_by_its_process_and_a_diverged_loss_by_one(error, is_own):
    with pytest.raises(type(error)), own_errors():
        raise error

    assert error.is_own is is_own


def test_waiting_for_a_process_ends_when_that_process_has_ended():
    waiting = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    require_alive(waiting.pid)

    waiting.kill()
    waiting.wait()

    with pytest.raises(EnvironmentFault, match="another process of this run has ended"):
        require_alive(waiting.pid)
