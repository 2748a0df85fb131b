"""Where a run starts: at step 0, at an intact checkpoint, or not at all."""

import json
from pathlib import Path
from typing import Any

import helpers
import pytest

from hf_clm.errors import RecipeError
from hf_clm.recipe.recipe import recipe_to_yaml
from hf_clm.training.arguments import resolve, training_arguments
from hf_clm.training.changes import Change
from hf_clm.training.checkpoints import read_seal, seal
from hf_clm.training.start import Start, prepare_start


def build(folder: Path, **changes: Any):
    recipe = helpers.build_recipe(folder, [], model={"name_or_path": "any"}, **changes)
    return recipe, training_arguments(recipe)


def sealed(run: Path, step: int) -> None:
    folder = run / f"checkpoint-{step}"
    folder.mkdir()
    for name, text in {"trainer_state.json": "{}", "optimizer.pt": "optimizer"}.items():
        (folder / name).write_text(text)
    recipe = resolve(*build(run.parent)).model_dump()
    known = {"recipe": recipe, "facts": FACTS, "versions": VERSIONS}
    seal(folder, {"step": step, "is_resumable": True, **known})


def begun(folder: Path, *steps: int, status: str = "running") -> Path:
    """A run of the recipe of ``build`` with sealed checkpoints at these steps."""
    run = folder / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(recipe_to_yaml(resolve(*build(folder))))
    (run / "run.json").write_text(json.dumps({"status": status}))
    for step in steps:
        sealed(run, step)
    return run


def start(folder: Path, **train: Any) -> Start:
    return prepare_start(*build(folder, train=train))


def test_a_new_folder_starts_a_run(tmp_path):
    assert start(tmp_path) == Start(tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


def test_the_same_command_resumes_from_the_highest_step(tmp_path):
    run = begun(tmp_path, 9, 10)

    found = start(tmp_path, logging_steps=3)

    assert (found.folder, found.checkpoint, found.result) == (run, run / "checkpoint-10", None)


def test_a_damaged_checkpoint_is_named_and_moved_aside_and_the_previous_one_is_used(tmp_path, capsys):
    run = begun(tmp_path, 9, 10)
    (run / "checkpoint-10" / "optimizer.pt").write_bytes(b"optimizeR")

    assert start(tmp_path).checkpoint == run / "checkpoint-9"
    assert capsys.readouterr().out == (
        "checkpoint checkpoint-10: optimizer.pt has changed since it was saved (sha256); "
        "moved to checkpoint-10.broken\n"
    )
    assert (run / "checkpoint-10.broken" / "optimizer.pt").is_file()


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("optimizer.pt", b"optimizeR", "optimizer.pt has changed since it was saved (sha256)"),
        ("SEALED.json", b"{", "SEALED.json is damaged"),
    ],
)
def test_must_refuses_a_damaged_checkpoint_and_moves_nothing(tmp_path, name, content, fault):
    run = begun(tmp_path, 9, 10)
    (run / "checkpoint-10" / name).write_bytes(content)

    with pytest.raises(RecipeError) as error:
        start(tmp_path, resume_from_checkpoint="must")

    assert str(error.value) == (
        f"{run / 'checkpoint-10'}: cannot resume from this checkpoint: {fault}; "
        "fix: choose another; hf-clm checkpoints RUN lists those that are intact"
    )
    assert (run / "checkpoint-10").is_dir()


def test_a_run_without_a_checkpoint_starts_again(tmp_path):
    run = begun(tmp_path)

    found = start(tmp_path)

    assert found == Start(run, begins_again=True)
    assert list(found.require_same({"recipe": {"train": {"save_strategy": "no"}}})) == [
        f"start     at step 0: no checkpoint in {run} (train.save_strategy: no)"
    ]


def test_a_finished_run_is_not_changed(tmp_path):
    begun(tmp_path, 10, status="done")

    assert start(tmp_path).result == {"status": "done"}


@pytest.mark.parametrize("word", ["must", "true"])
def test_must_does_not_change_a_finished_run_either(tmp_path, word):
    begun(tmp_path, 10, status="done")

    assert start(tmp_path, resume_from_checkpoint=word).result == {"status": "done"}


def test_a_finished_run_can_be_trained_for_more_steps(tmp_path):
    run = begun(tmp_path, 10, status="done")

    found = prepare_start(*build(tmp_path, train={"max_steps": 20}, resume_override=["max_steps"]))

    assert (found.checkpoint, found.result) == (run / "checkpoint-10", None)
    assert found.changes == [Change("train.max_steps", None, 20, "overridden")]


def test_another_recipe_is_refused_with_both_values(tmp_path):
    run = begun(tmp_path, 10)

    with pytest.raises(RecipeError) as error:
        prepare_start(*build(tmp_path, train={"learning_rate": 0.5}, data={"max_length": 32}))

    assert str(error.value) == (
        f"{run / 'checkpoint-10'}: the recipe differs from that of the run: data.max_length (64, now 32), "
        "train.learning_rate (0.001, now 0.5); fix: --resume_override data.max_length,learning_rate "
        "resumes with the new values; --overwrite starts again"
    )


def test_another_recipe_is_refused_even_if_nothing_was_saved_yet(tmp_path):
    run = begun(tmp_path)

    with pytest.raises(RecipeError) as error:
        start(tmp_path, learning_rate=0.5)

    assert str(error.value) == (
        f"{run}: the recipe differs from that of the run: train.learning_rate (0.001, now 0.5); without a "
        "checkpoint, the new values cannot be applied (train.save_strategy); "
        "fix: set --overwrite to start again, or choose another --output_dir"
    )


def test_a_refused_run_is_not_changed(tmp_path):
    run = begun(tmp_path, 9, 10)
    (run / "checkpoint-10" / "optimizer.pt").write_bytes(b"optimizeR")

    with pytest.raises(RecipeError):
        start(tmp_path, learning_rate=0.5)

    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-9"]


@pytest.mark.parametrize("word", ["auto", "never", "false", "False"])
def test_a_folder_with_other_files_is_refused(tmp_path, word):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").touch()

    with pytest.raises(
        RecipeError, match=r"run: the output folder contains files.*--overwrite to move the files aside"
    ):
        start(tmp_path, resume_from_checkpoint=word)


def test_never_refuses_a_run_that_could_be_resumed(tmp_path):
    begun(tmp_path, 10)

    with pytest.raises(RecipeError, match="contains files of an earlier run; fix"):
        start(tmp_path, resume_from_checkpoint="never")


def test_overwrite_moves_the_run_aside_and_starts(tmp_path):
    begun(tmp_path, 10)

    assert prepare_start(*build(tmp_path, overwrite=True)) == Start(tmp_path / "run")
    assert (tmp_path / "run.old-1" / "checkpoint-10").is_dir()


def test_overwrite_done_resumes_an_interrupted_run(tmp_path):
    run = begun(tmp_path, 10)

    assert prepare_start(*build(tmp_path, overwrite="done")) == Start(run, run / "checkpoint-10")
    assert not (tmp_path / "run.old-1").exists()


def test_overwrite_done_starts_again_if_the_run_is_done(tmp_path):
    run = begun(tmp_path, 10)
    (run / "run.json").write_text('{"status": "done"}')

    assert prepare_start(*build(tmp_path, overwrite="done")) == Start(run)
    assert (tmp_path / "run.old-1" / "checkpoint-10").is_dir()


def test_a_named_checkpoint_is_used_and_later_ones_are_moved_aside(tmp_path):
    run = begun(tmp_path, 9, 10)
    nine = run / "checkpoint-9"

    assert start(tmp_path, resume_from_checkpoint=str(nine)) == Start(run, nine)
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-10.later", "checkpoint-9"]


def test_a_checkpoint_of_another_run_can_be_resumed_only_in_a_new_folder(tmp_path):
    nine = begun(tmp_path, 9) / "checkpoint-9"
    other = tmp_path / "other"
    settings = {"resume_from_checkpoint": str(nine), "output_dir": str(other)}

    assert start(tmp_path, **settings) == Start(other, nine)
    (other / "metrics.jsonl").touch()
    with pytest.raises(RecipeError, match=r"other: the output folder contains files of an earlier run"):
        start(tmp_path, **settings)


@pytest.mark.parametrize("value", ["must", "checkpoint-77", "."])
def test_a_missing_checkpoint_is_an_error_before_the_folder_is_created(tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)

    with pytest.raises(RecipeError) as error:
        start(tmp_path, resume_from_checkpoint=value)

    assert str(error.value) == (
        f"{tmp_path / 'run' if value == 'must' else value}: no checkpoint to resume from; "
        "fix: remove --resume_from_checkpoint, or set it to a checkpoint-N folder"
    )
    assert not (tmp_path / "run").exists()


FACTS = {"data": "13 rows", "tokenizer": "t", "template": "c", "global_batch": 4, "processes": 2}
VERSIONS = {"torch": "2.13.0", "transformers": "5.17.0"}


def facts(**changes: Any) -> dict[str, Any]:
    known = {"facts": {**FACTS, **changes}, "versions": VERSIONS | {"torch": "2.12.0"}}
    return {**known, "recipe": {"train": {"max_steps": 20}}}


@pytest.mark.parametrize("name", ["data", "tokenizer", "template", "global_batch"])
def test_a_fact_that_differs_is_refused_with_both_values(tmp_path, name):
    run = begun(tmp_path, 9)

    with pytest.raises(RecipeError) as error:
        start(tmp_path).require_same(facts(**{name: 7}))

    before = FACTS[name] if name == "global_batch" else repr(FACTS[name])
    assert str(error.value) == (
        f"{run / 'checkpoint-9'}: the recipe differs from that of the run: {name} ({before}, now 7); "
        f"fix: --resume_override {name} resumes with the new values; --overwrite starts again"
    )


@pytest.mark.parametrize(
    "name", ["architecture", "architecture.attn_pdrop", "model", "model.config", "model.config.attn_pdrop"]
)
def test_overriding_the_config_also_overrides_the_architecture(tmp_path, name):
    run = begun(tmp_path, 9)
    content = read_seal(run / "checkpoint-9")
    known = {key: content[key] for key in content.keys() - {"files"}}
    seal(run / "checkpoint-9", {**known, "architecture": {"architecture.attn_pdrop": 0.1}})
    now = {**facts(), "architecture": {"architecture.attn_pdrop": 0.2, "architecture.new": 1}}

    with pytest.raises(RecipeError, match=r"run: architecture.attn_pdrop \(0.1, now 0.2\); fix"):
        start(tmp_path).require_same(now)
    found = prepare_start(*build(tmp_path, resume_override=[name]))

    shown = [line.split() for line in found.require_same(now)]
    assert ["architecture.attn_pdrop", "0.1", "0.2", "applied"] in shown


def test_differences_are_shown_in_a_table(tmp_path):
    run = begun(tmp_path, 9)
    changes = {
        "train": {"learning_rate": 0.5, "logging_steps": 3},
        "resume_override": ["learning_rate", "data"],
    }

    found = prepare_start(*build(tmp_path, **changes))

    assert list(found.require_same(facts(data="14 rows", processes=1))) == [
        f"resumes   from {run / 'checkpoint-9'}, with changes:",
        "                               in the checkpoint  now",
        "          train.logging_steps  1                  3          applied",
        "          train.learning_rate  0.001              0.5        applied",
        "          data                 '13 rows'          '14 rows'  applied",
        "          processes            2                  1          applied",
        "          version of torch     '2.13.0'           '2.12.0'   warning",
    ]


def test_another_global_batch_needs_max_steps(tmp_path):
    """Otherwise, its end is given in epochs, which have another number of steps now."""
    run = begun(tmp_path, 9)
    found = prepare_start(*build(tmp_path, resume_override=["global_batch"]))

    with pytest.raises(RecipeError) as error:
        found.require_same({**facts(global_batch=8), "recipe": {"train": {"max_steps": -1}}})

    assert str(error.value) == (
        f"{run / 'checkpoint-9'}: the number of steps in an epoch depends on global_batch, which "
        "changed; "
        "fix: set --max_steps and add max_steps to --resume_override"
    )


def test_without_differences_there_is_no_table(tmp_path):
    run = begun(tmp_path, 9)

    lines = start(tmp_path).require_same({"facts": FACTS, "versions": VERSIONS})

    assert lines == [f"resumes   from {run / 'checkpoint-9'}"]


def test_a_key_that_a_later_version_added_does_not_count_as_changed(tmp_path):
    run = begun(tmp_path)
    sealed(run, 9)
    seal_file = run / "checkpoint-9" / "SEALED.json"
    content = json.loads(seal_file.read_text())
    del content["recipe"]["data"]["shuffle_buffer"], content["recipe"]["card"]
    seal(run / "checkpoint-9", {key: content[key] for key in content.keys() - {"files", "sha256"}})

    assert start(tmp_path) == Start(run, run / "checkpoint-9")


def test_the_data_files_may_be_moved(tmp_path):
    """Data are compared by content."""
    run = begun(tmp_path, 9)

    found = prepare_start(*build(tmp_path, data={"train": [{"path": "moved.jsonl", "format": "instruct"}]}))

    assert found == Start(run, run / "checkpoint-9")
