"""kill -9 at any point of a save: the same command resumes and ends with the same run, bit by bit."""

import json
import shutil
from pathlib import Path

import pytest
from helpers import build_recipe
from killed import dropout_recipe, finish_run, read_metrics, same_weights

from hf_clm.errors import RecipeError
from hf_clm.training.checkpoints import fault_of, find_checkpoints
from hf_clm.training.run import train

# In the order of a save; the last two are in the save of the final model.
POINTS = [
    *("after:model", "after:optimizer", "after:random state", "after:files"),
    *("before:seal", "within:seal", "after:seal", "within:rotation"),
    *("after:final", "moved:model.safetensors"),
]
# Every code path of a save once; the others are files written by the Trainer, in the same path.
MORE = ("after:optimizer", "after:random state", "before:seal")
CASES = [pytest.param(point, marks=pytest.mark.large) if point in MORE else point for point in POINTS]
LIMIT = {"train": {"save_total_limit": 2}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    dropout_recipe(folder)
    assert finish_run(folder, **LIMIT) == 0, (folder / "out.txt").read_text()
    return folder


@pytest.fixture(scope="module")
def dead(whole, tmp_path_factory) -> Path:
    """A folder with a run that died after its last checkpoint, and a copy of that run."""
    folder = tmp_path_factory.mktemp("dead")
    shutil.copytree(whole / "model", folder / "model")
    assert finish_run(folder, fault="after:final", **LIMIT) == -9
    shutil.rmtree(folder / "run" / ".final")  # as if it had died before sealing it
    shutil.copytree(folder / "run", folder / "copy")
    return folder


@pytest.fixture
def unfinished(dead) -> Path:
    """That folder, with the run restored from the copy."""
    shutil.rmtree(dead / "run")
    shutil.copytree(dead / "copy", dead / "run")
    (dead / "out.txt").unlink(missing_ok=True)
    return dead


@pytest.fixture
def place(whole, tmp_path) -> Path:
    """A folder with the same model and data, but without a run."""
    shutil.copytree(whole / "model", tmp_path / "model")
    return tmp_path


def check_equal(place: Path, whole: Path) -> None:
    run, expected = place / "run", whole / "run"
    assert json.loads((run / "run.json").read_text())["status"] == "done"
    assert same_weights(run, expected)
    assert read_metrics(run) == read_metrics(expected)
    left = {path.name: fault_of(path) for path in find_checkpoints(run)}
    assert left == {"checkpoint-8": "", "checkpoint-9": ""}


@pytest.mark.parametrize("point", CASES)
def test_a_run_killed_during_a_save_resumes_and_equals_an_uninterrupted_run(whole, place, point):
    assert finish_run(place, fault=point, **LIMIT) == -9
    assert not (place / "run" / "model.safetensors").exists() or point.startswith("moved")

    assert finish_run(place, **LIMIT) == 0, (place / "out.txt").read_text()

    check_equal(place, whole)


def test_the_log_events_of_the_uninterrupted_run(whole):
    steps = [entry["step"] for entry in read_metrics(whole / "run") if "loss" in entry]

    assert steps == [1, 2, 3, 4, 5, 6, 7, 8, 9]


def test_a_run_that_died_after_its_last_checkpoint_is_completed_without_a_step(whole, unfinished):
    assert finish_run(unfinished, **LIMIT) == 0

    assert "resumes   from" in (unfinished / "out.txt").read_text()
    check_equal(unfinished, whole)
    facts = json.loads((unfinished / "run" / "run.json").read_text())
    last = json.loads((unfinished / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert facts["tokens_per_second"] > 0  # of the process that trained
    assert facts["mfu"] > 0
    assert facts["seconds"] >= last["seconds"] > 0


@pytest.mark.parametrize(
    "files", [pytest.param(n, marks=() if n in (1, 5, 10) else pytest.mark.large) for n in range(1, 11)]
)
def test_an_incomplete_save_is_ignored_whichever_file_is_missing(whole, unfinished, files):
    """Keeps the first of the ten files, in the order in which they are written."""
    last = unfinished / "run" / "checkpoint-9"
    written = sorted(
        (p for p in last.iterdir() if p.name != "SEALED.json"), key=lambda p: p.stat().st_mtime_ns
    )
    assert len(written) == 10
    (last / "SEALED.json").unlink()
    for path in written[files:]:
        path.unlink()

    assert finish_run(unfinished, **LIMIT) == 0, (unfinished / "out.txt").read_text()

    assert (
        "checkpoint checkpoint-9: not sealed: its save was interrupted"
        in (unfinished / "out.txt").read_text()
    )
    check_equal(unfinished, whole)


def test_the_last_checkpoint_is_kept_in_addition_to_the_best(place):
    """The Trainer alone would delete all but the best at the end."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    settings = {"save_total_limit": 1, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 8, **best}

    assert finish_run(place, train=settings, data={"eval_fraction": 0.3}) == 0, (
        place / "out.txt"
    ).read_text()

    state = json.loads((place / "run" / "checkpoint-8" / "trainer_state.json").read_text())
    assert state["best_global_step"] == 2
    assert {path.name for path in find_checkpoints(place / "run")} == {
        "checkpoint-2",
        "checkpoint-6",
        "checkpoint-8",
    }


def test_a_final_model_is_not_overwritten_if_resuming_with_other_data_is_rejected(tmp_path):
    """The tokenizer is trained again to find out, and must not overwrite that of the model."""
    sizes = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 64}
    model = {"init": "scratch", "config": sizes, "name_or_path": None}
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    changes = {"model": model, "tokenizer": {"train": {"vocab_size": 270}}}
    records = [{"instruct": f"say {n}\n", "input": "", "label": "xyz" * n} for n in range(1, 9)]
    train(build_recipe(tmp_path, records, train=settings, **changes))
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    recipe = build_recipe(tmp_path, records[:6], train=settings | {"max_steps": 4}, **changes)

    with pytest.raises(RecipeError, match="the recipe differs from that of the run: data"):
        train(recipe.model_copy(update={"resume_override": ["max_steps"]}))

    after = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    assert after == before


def test_early_stopping_continues_its_count_after_resuming(tmp_path):
    """The loss only grows: the run stops after 3 evaluations without improvement."""
    watched = {"metric_for_best_model": "loss", "greater_is_better": True, "load_best_model_at_end": True}
    settings = {"max_steps": 40, "eval_strategy": "steps", "eval_steps": 2, "save_total_limit": 9, **watched}
    changes = {"train": settings, "early_stopping": {"patience": 3}, "data": {"eval_fraction": 0.3}}

    assert finish_run(tmp_path, fault="after:seal", **changes) == -9
    assert finish_run(tmp_path, **changes) == 0, (tmp_path / "out.txt").read_text()

    assert json.loads((tmp_path / "run" / "run.json").read_text())["steps_done"] == 8
