"""Where the replay of a record begins."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers import build_recipe, write_jsonl
from safetensors.torch import load_file

from hf_clm.replay.replays import first_use, replaying, rows_of
from hf_clm.training.arguments import training_arguments
from hf_clm.training.assemble import Inputs, prepare_inputs
from hf_clm.training.run import train

RECORDS = [{"instruct": f"say {n}\n", "input": "", "label": "xy" * n} for n in range(1, 8)]


def inputs_of(folder: Path, **changes: Any) -> Inputs:
    """Returns the inputs of a run on seven records, with 2 x 2 rows per step."""
    settings = {"gradient_accumulation_steps": 2} | changes.pop("train", {})
    recipe = build_recipe(folder, RECORDS, train=settings, **changes)
    return prepare_inputs(recipe, training_arguments(recipe), kept={})


def test_rows_in_order_are_used_one_step_after_another(tmp_path):
    inputs = inputs_of(tmp_path, train={"train_sampling_strategy": "sequential"})

    assert [first_use(inputs, record) for record in range(7)] == [1, 1, 1, 1, 2, 2, 2]


def test_rows_in_random_order_are_used_where_the_loader_has_them(tmp_path):
    """The order of an epoch is a permutation by NumPy, from the seed and the number of the epoch."""
    inputs = inputs_of(tmp_path)
    order = np.random.default_rng([inputs.arguments.seed, 0]).permutation(7).tolist()

    assert [first_use(inputs, record) for record in order] == [1, 1, 1, 1, 2, 2, 2]


def test_the_packed_row_of_a_record_is_found(tmp_path):
    """Rows of 9, 11, 13, 15, 17, 19 and 21 tokens, in packed rows of at most 32."""
    inputs = inputs_of(tmp_path, data={"packing": "best_fit", "max_length": 32})
    train = inputs.prepared.splits["train"]

    places = {number: row for row, pieces in enumerate(train.dataset.pieces) for number, *_ in pieces}

    assert len(train.dataset) < 7
    assert [rows_of(train, record).tolist() for record in range(7)] == [[places[n]] for n in range(7)]


def test_a_record_that_is_never_drawn_is_not_skipped(tmp_path):
    """Half an epoch of the seven records draws some of them. A later epoch has the same ones."""
    sources = [{"path": write_jsonl(tmp_path / "rows.jsonl", RECORDS), "epochs": 0.5}]
    inputs = inputs_of(tmp_path, data={"train": sources})
    split = inputs.prepared.splits["train"]
    assert split.mix is not None

    assert first_use(inputs, split.mix.times.tolist().index(0)) == 1


def test_without_evaluations_a_schedule_that_depends_on_them_still_has_them(tmp_path):
    """No evaluation is good enough, so each one divides the learning rate by 10."""
    settings: dict[str, Any] = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 1}
    settings |= {"lr_scheduler_type": "reduce_lr_on_plateau", "metric_for_best_model": "loss"}
    settings["lr_scheduler_kwargs"] = {"patience": 0, "threshold": 1.0, "factor": 0.1}
    recipe = build_recipe(tmp_path, RECORDS, data={"eval_fraction": 0.3}, train=settings)
    train(recipe)

    with replaying(str(tmp_path / "run"), recipe) as replays:
        trainer = replays.replay(replays.states[0], 4, end=replays.last)

    weights = dict(trainer.model.named_parameters())
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    saved = load_file(tmp_path / "run" / "model.safetensors")
    assert rates[-1] < rates[0] / 5
    assert all(torch.equal(weights[name], weight) for name, weight in saved.items())
