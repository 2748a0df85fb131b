"""resume_override takes effect on the optimizer, the schedule and the data."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import write_jsonl
from killed import RECORDS, dropout_recipe
from safetensors.torch import load_file, save_file

from hf_clm.errors import ModelError, RecipeError
from hf_clm.training.run import train

LINEAR = {"save_steps": 4, "lr_scheduler_type": "linear", "warmup_steps": 0}
MORE = LINEAR | {"max_steps": 8}


@pytest.fixture(scope="module")
def half(tmp_path_factory) -> Path:
    """A run of 4 steps, over which the learning rate falls from 0.01 to 0."""
    folder = tmp_path_factory.mktemp("half")
    train(dropout_recipe(folder, train=LINEAR | {"max_steps": 4}))
    return folder


@pytest.fixture
def place(half, tmp_path, monkeypatch) -> Path:
    """A copy of it in another folder, with file times in the future."""
    shutil.copytree(half / "run", tmp_path / "run")
    later = time.time() + 1e6
    for path in (tmp_path / "run").rglob("*"):
        os.utime(path, (later, later))
    (tmp_path / "model").symlink_to(half / "model")
    return tmp_path


def go_on(place: Path, *keys: str, **changes: Any) -> list[dict[str, Any]]:
    """Resumes the run; returns the log events of the new steps."""
    recipe = dropout_recipe(place, resume_override=[*keys, "model.name_or_path"], **changes)
    train(recipe)
    lines = (place / "run" / "metrics.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if "loss" in entry and entry["step"] > 4]


def groups(run: Path, step: int) -> list[dict[str, Any]]:
    return torch.load(run / f"checkpoint-{step}" / "optimizer.pt")["param_groups"]


def test_more_steps_stretch_the_schedule(place):
    events = go_on(place, "max_steps", train=MORE)

    # linear from 0.01 to 0 over 8 steps; the event of step n shows the rate of that step
    assert [entry["learning_rate"] for entry in events] == pytest.approx([0.005, 0.00375, 0.0025, 0.00125])


def test_another_learning_rate_and_weight_decay_reach_the_optimizer(place):
    settings = MORE | {"learning_rate": 1e-3, "weight_decay": 0.25}

    events = go_on(place, "max_steps", "learning_rate", "weight_decay", train=settings)

    assert [entry["learning_rate"] for entry in events] == pytest.approx(
        [0.0005, 0.000375, 0.00025, 0.000125]
    )
    assert sorted({group["weight_decay"] for group in groups(place / "run", 8)}) == [0.0, 0.25]
    assert {group["initial_lr"] for group in groups(place / "run", 8)} == {1e-3}


def test_another_schedule_is_used(place):
    settings = MORE | {"lr_scheduler_type": "constant"}

    events = go_on(place, "max_steps", "lr_scheduler_type", train=settings)

    assert [entry["learning_rate"] for entry in events] == pytest.approx([0.01] * 4)


def test_another_optimizer_starts_with_a_new_state(place, half):
    settings = MORE | {"optim": "sgd"}

    go_on(place, "max_steps", "optim", train=settings)

    assert "betas" in groups(half / "run", 4)[0]
    assert "momentum" in groups(place / "run", 8)[0]


def test_other_settings_of_muon_keep_its_state(tmp_path):
    groups_of = {"name": "muon", "groups": [{"match": "mlp", "learning_rate": 4e-3}]}
    train(dropout_recipe(tmp_path, train=LINEAR | {"max_steps": 4}, optimizer=groups_of))
    changed = {**groups_of, "momentum": 0.5, "groups": [{"match": "mlp", "learning_rate": 8e-3}]}
    keys = ("max_steps", "optimizer.momentum", "optimizer.groups.0.learning_rate")

    go_on(tmp_path, *keys, train=MORE, optimizer=changed)

    saved = torch.load(tmp_path / "run" / "checkpoint-8" / "optimizer.pt")
    assert {group["momentum"] for group in saved["param_groups"] if "momentum" in group} == {0.5}
    assert {group["initial_lr"] for group in saved["param_groups"]} == {1e-2, 8e-3}
    assert {int(state["step"]) for state in saved["state"].values() if "step" in state} == {8}


def test_other_groups_of_weights_start_with_a_new_state(place):
    go_on(place, "max_steps", "optimizer", train=MORE, optimizer={"name": "muon", "layer_decay": 0.5})

    saved = torch.load(place / "run" / "checkpoint-8" / "optimizer.pt")
    rates = sorted({group["initial_lr"] for group in saved["param_groups"]})
    assert rates == [0.00125, 0.0025, 0.005, 0.01]  # embeddings, first layer, last layer, final norm
    assert {int(state["step"]) for state in saved["state"].values() if "step" in state} == {4}


def test_a_schedule_that_depends_on_the_loss_cannot_be_added(place):
    settings = MORE | {"lr_scheduler_type": "reduce_lr_on_plateau"}
    settings |= {"eval_strategy": "steps", "eval_steps": 4, "metric_for_best_model": "loss"}

    with pytest.raises(RecipeError, match="nothing can be overridden with the schedule"):
        go_on(place, "max_steps", "lr_scheduler_type", "data", train=settings, data={"eval_fraction": 0.2})


def test_other_data_are_rejected_with_both_hashes_and_used_on_request(place):
    more = [*RECORDS, {"instruct": "say 14\n", "input": "", "label": "x"}]
    settings = MORE
    recipe = dropout_recipe(place, resume_override=["max_steps", "model.name_or_path"], train=settings)
    (place / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in more))

    with pytest.raises(RecipeError) as error:
        train(recipe)
    train(recipe.model_copy(update={"resume_override": ["max_steps", "model.name_or_path", "data"]}))

    assert "data ('13 rows, sha256 " in str(error.value)
    assert "now '14 rows, sha256 " in str(error.value)
    assert "--resume_override model.name_or_path,max_steps,data resumes" in str(error.value)
    assert json.loads((place / "run" / "run.json").read_text())["train"]["rows"] == 14


def test_other_save_and_logging_intervals_are_used(place):
    recipe = dropout_recipe(
        place,
        resume_override=["max_steps", "model.name_or_path"],
        train=MORE | {"save_steps": 1, "logging_steps": 2, "save_total_limit": 9},
    )
    train(recipe)

    saved = {path.name for path in (place / "run").glob("checkpoint-*")}
    assert saved == {f"checkpoint-{step}" for step in (4, 5, 6, 7, 8)}


def test_weights_of_another_shape_are_a_one_line_error(place):
    from helpers import byte_tokenizer, save_folder, tiny_model

    (place / "model").unlink()
    save_folder(place / "model", tiny_model("gpt2", n_embd=16), byte_tokenizer())

    with pytest.raises(
        ModelError, match="the weights do not match the model of this recipe; got size mismatch"
    ):
        go_on(place, "max_steps", "architecture", train=MORE)


def test_another_architecture_of_the_same_shape_is_rejected(half, place):
    (place / "model").unlink()
    shutil.copytree(half / "model", place / "model")
    config = json.loads((place / "model" / "config.json").read_text())
    (place / "model" / "config.json").write_text(json.dumps({**config, "layer_norm_epsilon": 0.01}))

    with pytest.raises(RecipeError, match=r"architecture\.layer_norm_epsilon \(1e-05, now 0\.01\)"):
        go_on(place, "max_steps", train=MORE)
    events = go_on(place, "max_steps", "architecture", train=MORE)

    assert [entry["step"] for entry in events] == [5, 6, 7, 8]


def test_adapters_are_not_applied_to_another_model(tmp_path):
    """The weights of the base model are in no checkpoint."""
    changes: dict[str, Any] = {"lora": {"r": 2, "alpha": 4}}
    train(dropout_recipe(tmp_path, train=LINEAR | {"max_steps": 4}, **changes))
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    save_file({name: weight * 1.01 for name, weight in weights.items()}, path, metadata={"format": "pt"})

    with pytest.raises(RecipeError, match="the recipe differs from that of the run: base_weights "):
        go_on(tmp_path, "max_steps", train=MORE, **changes)


def test_early_stopping_can_be_added(place):
    settings = MORE | {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    settings |= {"metric_for_best_model": "loss", "load_best_model_at_end": True}

    data = {"eval": [write_jsonl(place / "eval.jsonl", RECORDS[:3])], "max_leakage": 1.0}

    events = go_on(place, "max_steps", train=settings, data=data, early_stopping={"patience": 3})

    state = json.loads(
        (place / "run" / f"checkpoint-{events[-1]['step']}" / "trainer_state.json").read_text()
    )
    assert "PatienceCallback" in state["stateful_callbacks"]
