"""The output folder contains one run only, and disk errors are one line."""

import json
import threading

import pytest

from hf_clm.errors import DivergedError, EnvironmentFault, ExitCode
from hf_clm.run_folder import write_json
from hf_clm.training.checkpoints import fault_of, seal
from hf_clm.training.output import (
    is_in_use,
    is_seen,
    make_writable,
    move_aside,
    publish,
    recording_failure,
)


def test_move_aside_returns_the_new_path(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run.old-1").mkdir()

    assert move_aside(tmp_path / "run") == tmp_path / "run.old-2"


def test_a_file_that_appears_late_is_seen_and_one_that_never_appears_is_not(tmp_path):
    run = tmp_path / "run"
    late = threading.Timer(0.3, lambda: (run.mkdir(), (run / "late").touch()))
    late.start()

    assert is_seen(run / "late", seconds=30)
    assert not is_seen(run / "never", seconds=0.1)
    (tmp_path / "file").touch()
    assert not is_seen(tmp_path / "file" / "never", seconds=0.1)


def test_a_folder_under_a_file_is_a_fault_of_the_environment(tmp_path):
    (tmp_path / "file").touch()

    with pytest.raises(EnvironmentFault) as error:
        make_writable(tmp_path / "file" / "run")

    assert error.value.exit_code == ExitCode.ENVIRONMENT
    assert str(error.value) == (
        f"{tmp_path / 'file' / 'run'}: cannot write to the output folder; got Not a directory"
    )


def test_a_new_folder_is_created_with_its_parents_and_left_empty(tmp_path):
    make_writable(tmp_path / "a" / "b")

    assert list((tmp_path / "a" / "b").iterdir()) == []


def final_model(run) -> None:
    (run / ".final").mkdir(parents=True)
    for name in ("model.safetensors", "config.json", "run.json"):
        (run / ".final" / name).write_text(name)


@pytest.mark.parametrize("moved", [[], ["config.json"], ["config.json", "model.safetensors", "run.json"]])
def test_a_sealed_final_model_is_moved_into_the_run_with_its_seal(tmp_path, moved):
    """``moved``: the files that were in place when the process died. An earlier seal is replaced."""
    final_model(tmp_path)
    seal(tmp_path / ".final", {"step": 3})
    (tmp_path / "SEALED.json").write_text("of an earlier end")
    (tmp_path / "verify.json").write_text("of an earlier end")
    for name in moved:
        (tmp_path / ".final" / name).replace(tmp_path / name)

    publish(tmp_path)

    files = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert json.loads(files.pop("SEALED.json"))["step"] == 3
    assert files == {name: name for name in ("config.json", "model.safetensors", "run.json")}
    assert fault_of(tmp_path) == ""


def test_publishing_twice_changes_nothing(tmp_path):
    """The process may die after the seal was moved."""
    final_model(tmp_path)
    seal(tmp_path / ".final", {"step": 3})
    publish(tmp_path)
    (tmp_path / ".final").mkdir()

    publish(tmp_path)

    assert fault_of(tmp_path) == ""
    assert not (tmp_path / ".final").exists()


def test_a_final_model_that_was_not_sealed_is_deleted(tmp_path):
    final_model(tmp_path)

    publish(tmp_path)

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "status"),
    [(DivergedError("NaN"), "diverged"), (KeyboardInterrupt(), "interrupted"), (OSError("disk"), "failed")],
)
def test_run_json_records_how_a_run_ended(error, status, tmp_path):
    path = tmp_path / "run.json"
    write_json(path, {"status": "running", "steps": 7})

    with pytest.raises(type(error)), recording_failure(path, is_main=True):
        raise error

    facts = json.loads(path.read_text())
    assert (facts["status"], facts["steps"]) == (status, 7)


def test_files_of_a_start_that_ended_before_its_first_step_do_not_block_the_next(tmp_path):
    """A trained tokenizer, the folder of the round trip, and an incomplete file."""
    for name in (".lock", ".tokenizer", ".round-trip", ".probe-7", ".recipe.yaml.partial"):
        (tmp_path / name).touch()
    before = is_in_use(tmp_path)
    (tmp_path / "recipe.yaml").touch()

    assert (before, is_in_use(tmp_path)) == (False, True)
