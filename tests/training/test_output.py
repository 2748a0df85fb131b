"""The output folder is never mixed with an older run, and a fault of the disk is one line."""

import json

import pytest
from transformers import TrainingArguments

from hf_clm.errors import DivergedError, EnvironmentFault, ExitCode, RecipeError
from hf_clm.training.output import (
    move_aside,
    prepare_output_dir,
    recording_failure,
    resume_from,
    write_json,
)


def arguments(folder, **settings) -> TrainingArguments:
    return TrainingArguments(str(folder), use_cpu=True, **settings)


def checkpoints(folder, *steps) -> None:
    for step in steps:
        (folder / f"checkpoint-{step}").mkdir()
        (folder / f"checkpoint-{step}" / "trainer_state.json").touch()


def test_a_new_folder_is_made_with_its_parents_and_left_empty(tmp_path):
    folder = prepare_output_dir(arguments(tmp_path / "a" / "b"), overwrite=False)

    assert folder == tmp_path / "a" / "b"
    assert list(folder.iterdir()) == []


def test_an_empty_folder_is_used(tmp_path):
    assert prepare_output_dir(arguments(tmp_path), overwrite=False) == tmp_path


def test_a_folder_in_use_is_refused_and_the_ways_out_are_named(tmp_path):
    (tmp_path / "model.safetensors").touch()

    with pytest.raises(RecipeError) as error:
        prepare_output_dir(arguments(tmp_path), overwrite=False)

    assert error.value.exit_code == ExitCode.RECIPE
    for word in ("--output_dir", "--overwrite", "--resume_from_checkpoint true"):
        assert word in str(error.value)


def test_a_folder_in_use_is_kept_to_resume_in(tmp_path):
    checkpoints(tmp_path, 9, 10)

    prepare_output_dir(arguments(tmp_path, resume_from_checkpoint="true"), overwrite=False)

    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-9"]


def test_true_goes_on_from_the_last_checkpoint_and_a_path_from_that_one(tmp_path):
    checkpoints(tmp_path, 9, 10)
    nine = str(tmp_path / "checkpoint-9")

    assert resume_from(arguments(tmp_path, resume_from_checkpoint="true")) == str(tmp_path / "checkpoint-10")
    assert resume_from(arguments(tmp_path / "other", resume_from_checkpoint=nine)) == nine
    assert resume_from(arguments(tmp_path)) is None


@pytest.mark.parametrize("value", ["true", "checkpoint-77", "."])
def test_a_checkpoint_that_is_not_there_is_an_error_before_the_folder_is_made(tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)

    with pytest.raises(RecipeError) as error:
        prepare_output_dir(arguments("run", resume_from_checkpoint=value), overwrite=False)

    assert str(error.value) == (
        f"{'run' if value == 'true' else value}: no checkpoint to go on from; "
        "fix: leave out --resume_from_checkpoint, or name a checkpoint-N folder"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", ["false", "False"])
def test_resume_false_is_no_resume(tmp_path, value):
    (tmp_path / "checkpoint-1").mkdir()

    with pytest.raises(RecipeError):
        prepare_output_dir(arguments(tmp_path, resume_from_checkpoint=value), overwrite=False)


def test_older_runs_are_numbered(tmp_path):
    for content in ("first", "second"):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / content).touch()
        prepare_output_dir(arguments(tmp_path / "run"), overwrite=True)
        (tmp_path / "run").rmdir()

    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*/*")) == [
        "run.old-1/first",
        "run.old-2/second",
    ]


def test_move_aside_says_where_to(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run.old-1").mkdir()

    assert move_aside(tmp_path / "run") == tmp_path / "run.old-2"


def test_a_folder_under_a_file_is_a_fault_of_the_environment(tmp_path):
    (tmp_path / "file").touch()

    with pytest.raises(EnvironmentFault) as error:
        prepare_output_dir(arguments(tmp_path / "file" / "run"), overwrite=False)

    assert error.value.exit_code == ExitCode.ENVIRONMENT
    assert str(error.value) == (
        f"{tmp_path / 'file' / 'run'}: cannot write to the output folder; got Not a directory"
    )


def test_json_is_replaced_whole(tmp_path):
    path = tmp_path / "run.json"

    write_json(path, {"status": "running"})
    write_json(path, {"status": "done", "text": "诗"})

    assert json.loads(path.read_text(encoding="utf-8")) == {"status": "done", "text": "诗"}
    assert [found.name for found in tmp_path.iterdir()] == ["run.json"]


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path):
    path = tmp_path / "run.json"
    write_json(path, {"status": "running"})

    with pytest.raises(TypeError):
        write_json(path, {"status": object()})

    assert json.loads(path.read_text()) == {"status": "running"}


@pytest.mark.parametrize(
    ("error", "status"),
    [(DivergedError("NaN"), "diverged"), (KeyboardInterrupt(), "interrupted"), (OSError("disk"), "failed")],
)
def test_how_a_run_ended_stands_in_run_json(error, status, tmp_path):
    path = tmp_path / "run.json"
    write_json(path, {"status": "running", "steps": 7})

    with pytest.raises(type(error)), recording_failure(path, is_main=True):
        raise error

    facts = json.loads(path.read_text())
    assert (facts["status"], facts["steps"]) == (status, 7)


def test_what_a_refused_start_leaves_behind_does_not_block_the_next(tmp_path):
    """A run that trains its tokenizer writes it before the data are proved."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).touch()

    assert prepare_output_dir(arguments(tmp_path), overwrite=False) == tmp_path

    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(RecipeError, match="holds files of an earlier run"):
        prepare_output_dir(arguments(tmp_path), overwrite=False)
