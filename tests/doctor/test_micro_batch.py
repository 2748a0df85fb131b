"""The micro-batch of packed rows is as large as a budget or a GPU allows, in the same global batch."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import build_recipe, byte_tokenizer, tiny_model
from safetensors.torch import load_file
from transformers import PretrainedConfig

from hf_clm.data.prepared.cache import read_splits
from hf_clm.doctor import micro_batch
from hf_clm.doctor.facts import Facts, build_facts
from hf_clm.doctor.micro_batch import choose_batch, choose_compile, settle_batch
from hf_clm.training.arguments import training_arguments
from hf_clm.training.run import train

RECORDS = [{"instruct": f"say {n}\n", "input": "", "label": "xyz" * n} for n in range(1, 33)]


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the choices see a GPU; nothing is computed on it."""
    monkeypatch.setattr(micro_batch, "nominal_peak", lambda device: 989e12)
    monkeypatch.setattr(micro_batch.importlib.util, "find_spec", lambda name: name)


def build(folder: Path, *, rows: int, accumulation: int, device: str = "cpu", **data: Any) -> Facts:
    sizes = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulation}
    recipe = build_recipe(
        folder, RECORDS, data={"packing": "best_fit", "max_length": 128, **data}, train=sizes
    )
    tokenizer, arguments = byte_tokenizer(), training_arguments(recipe)
    config: PretrainedConfig = tiny_model("qwen2").config
    splits = read_splits(recipe, tokenizer, seed=0)
    facts = build_facts(recipe, arguments, tokenizer=tokenizer, config=config, splits=splits)
    vars(arguments)["_setup_devices"] = torch.device(device)
    return facts


def with_memory(facts: Facts, free_bytes: int) -> Facts:
    return replace(facts, machine=replace(facts.machine, free_memory=free_bytes))


def test_a_cpu_keeps_the_micro_batch_of_the_recipe(tmp_path):
    assert choose_batch(build(tmp_path, rows=2, accumulation=6), kept={}, most_rows=None) == ({}, "")


def test_a_budget_regroups_the_rows_of_a_step_on_any_device(tmp_path):
    facts = build(tmp_path, rows=2, accumulation=6, tokens_per_batch=600)

    fields, line = choose_batch(facts, kept={}, most_rows=None)

    # 600 tokens are 4 rows of 128, and 4 divides the 12 rows of a step
    assert fields["per_device_train_batch_size"] == 4
    assert fields["gradient_accumulation_steps"] == 3
    assert line == ("batch     micro-batches of 4 rows x 3 instead of 2 x 6: data.tokens_per_batch is 600")


def test_a_gpu_takes_all_rows_of_a_step_if_they_fit_and_fewer_if_not(tmp_path, on_gpu):
    facts = build(tmp_path, rows=2, accumulation=6, device="cuda")
    assert facts.estimate is not None
    rows = [
        choose_batch(with_memory(facts, free), kept={}, most_rows=most)[0].get(
            "per_device_train_batch_size", 2
        )
        for free, most in ((2**40, None), (2**40, 6), (2**40, 5), (1, None))
    ]

    assert rows == [12, 6, 4, 1]


def test_a_resumed_run_keeps_the_micro_batch_of_its_first_start(tmp_path, on_gpu):
    facts = with_memory(build(tmp_path, rows=2, accumulation=6, device="cuda"), 2**40)
    kept = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4}
    other = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 5}

    rows = [choose_batch(facts, kept=train, most_rows=None)[0][micro_batch.ROWS] for train in (kept, other)]

    assert rows == [3, 12]


def test_a_gpu_compiles_the_model_of_a_long_run(tmp_path, on_gpu, monkeypatch):
    facts = build(tmp_path, rows=2, accumulation=6, device="cuda")
    seconds = []
    monkeypatch.setattr(micro_batch, "estimate_seconds", lambda facts: seconds.pop())

    seconds += [3600.0, 100.0, 100.0]
    short = choose_compile(facts, kept={})
    kept = choose_compile(facts, kept={"torch_compile": True})
    fields, line = choose_compile(facts, kept={})

    assert short == ({}, "")
    assert kept[0] == {"torch_compile": True}
    assert fields == {"torch_compile": True}
    assert line == (
        "compile   takes minutes, and makes about 60 minutes of training shorter; "
        "--torch_compile false turns it off"
    )


def test_the_duration_is_the_flop_of_all_steps_at_two_fifths_of_the_peak(tmp_path, on_gpu):
    facts = build(tmp_path, rows=2, accumulation=6, device="cuda")
    sizes = micro_batch.model_sizes(facts)
    assert sizes is not None
    tokens = facts.train.tokens * facts.steps * 12 / len(facts.train.dataset)

    assert micro_batch.estimate_seconds(facts) == pytest.approx(
        6 * sizes.parameters * tokens / (0.4 * 989e12)
    )


@pytest.mark.parametrize("data", [{"packing": "none"}, {"streaming": True}], ids=str)
def test_rows_without_a_common_shape_are_not_compiled(tmp_path, on_gpu, data):
    facts = build(tmp_path, rows=1, accumulation=1)
    recipe = facts.recipe.model_copy(update={"data": facts.recipe.data.model_copy(update=data)})

    assert micro_batch.can_compile(facts.recipe)
    assert micro_batch.can_compile(recipe) == (data == {"packing": "none"})


def test_a_run_with_a_budget_equals_one_with_the_same_rows_in_a_step(tmp_path):
    """The budget of 300 tokens makes 2 rows x 3 of 6 rows x 1."""
    losses, weights = [], []
    for name, budget in (("given", {}), ("budget", {"tokens_per_batch": 300})):
        folder = tmp_path / name
        folder.mkdir()
        sizes = {"per_device_train_batch_size": 6, "max_steps": 3}
        data = {"packing": "best_fit", "max_length": 128, **budget}
        losses.append(train(build_recipe(folder, RECORDS, data=data, train=sizes))["loss_after"])
        weights.append(load_file(folder / "run" / "model.safetensors"))
    record = json.loads((tmp_path / "budget" / "run" / "run.json").read_text())

    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for name, part in weights[0].items():
        torch.testing.assert_close(part, weights[1][name], atol=1e-4, rtol=1e-3)
    assert record["status"] == "done"
    assert "per_device_train_batch_size: 2" in (tmp_path / "budget" / "run" / "recipe.yaml").read_text()


def test_settled_facts_have_the_arguments_and_the_estimate_of_the_choice(tmp_path):
    facts = build(tmp_path, rows=2, accumulation=6, tokens_per_batch=1536)

    settled, lines = settle_batch(facts, kept={})

    assert settled.arguments.train_batch_size == 12
    assert settled.rows_per_step == facts.rows_per_step == 12
    assert settled.estimate is not None and facts.estimate is not None
    assert settled.estimate.activations > facts.estimate.activations
    assert len(lines) == 1
