"""Evaluating a model during training changes neither its weights nor the random numbers of training."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import build_recipe, byte_tokenizer, save_folder, tiny_model, write_jsonl
from safetensors.torch import load_file

from hf_clm.training.evaluating import undisturbed
from hf_clm.training.run import train

RECORDS = [{"prompt": f"say {n}\n", "completion": "x" * n} for n in range(1, 9)]
PERSISTENT = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
LOOKING = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True}


def run(folder: Path, *, looks: bool, name: str = "run", **settings: Any) -> dict[str, torch.Tensor]:
    """Returns the weights after 9 steps of 2 rows (an epoch is 4 steps) of a model with dropout.

    looks: whether to evaluate on held-out and training rows, generate samples, and run the self-test.
    """
    if not (folder / "model").exists():
        model = tiny_model("gpt2", resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2)
        save_folder(folder / "model", model, byte_tokenizer())
    rows = {
        side: write_jsonl(folder / f"{side}.jsonl", RECORDS[start:])
        for side, start in (("all", 0), ("some", 5))
    }
    data = {
        "train": [rows["all"]],
        "max_length": 32,
        "packing": "none",
        "cache_dir": None,
        "max_leakage": 1.0,
    }
    changes: dict[str, Any] = {"doctor": {"round_trip": "off", "self_test": looks}}
    if looks:
        data |= {"eval": [rows["some"]], "eval_train_rows": 3}
        changes["samples"] = {
            "prompts": ["say 3\n"],
            "every_steps": 3,
            "max_new_tokens": 4,
            "temperature": 1.0,
        }
    settings = {"output_dir": str(folder / name), "max_steps": 9, **(LOOKING if looks else {}), **settings}
    model = {"name_or_path": str(folder / "model")}
    train(build_recipe(folder, RECORDS, model=model, data=data, train=settings, **changes))
    return load_file(folder / name / "model.safetensors")


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Returns the names of the weights that differ in value or dtype."""
    return [name for name in one if one[name].dtype != other[name].dtype or not one[name].equal(other[name])]


@pytest.mark.parametrize("workers", [{}, PERSISTENT], ids=["loads itself", "persistent workers"])
def test_evaluations_samples_and_the_self_test_do_not_change_training(tmp_path, workers):
    alone = run(tmp_path, looks=False, name="alone", eval_on_start=False)

    assert differing(alone, run(tmp_path, looks=True, name="looks", **workers)) == []


@pytest.mark.parametrize(
    ("first", "workers"),
    [(4, {}), (6, PERSISTENT)],
    ids=["at the end of an epoch", "within one, with workers"],
)
def test_a_resumed_run_has_the_same_dropout(tmp_path, first, workers):
    saving = {"save_strategy": "steps", "save_steps": first, "save_total_limit": 9, **workers}
    whole = run(tmp_path, looks=True, name="whole", **saving)
    checkpoint = str(tmp_path / "whole" / f"checkpoint-{first}")

    again = run(tmp_path, looks=True, name="again", resume_from_checkpoint=checkpoint, **saving)

    assert differing(whole, again) == []


@pytest.mark.parametrize("asked", ["bf16_full_eval", "fp16_full_eval"])
def test_an_evaluation_in_16_bits_leaves_the_weights_in_32(tmp_path, asked):
    saving = {"save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True}
    final = run(tmp_path, looks=True, **saving, **{asked: True})
    checkpoints = [load_file(path) for path in (tmp_path / "run").glob("checkpoint-*/model.safetensors")]

    assert {weight.dtype for weight in final.values()} == {torch.float32}
    assert any(differing(final, saved) == [] for saved in checkpoints)


def test_an_evaluation_in_16_bits_has_16_bits(tmp_path):
    def before(name: str, **settings: Any) -> float:
        run(tmp_path, looks=True, name=name, max_steps=1, **settings)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return float(lines[0].split('"eval_loss": ')[1].split(",")[0])

    exact, rounded = before("exact"), before("rounded", bf16_full_eval=True)

    assert exact != rounded and rounded == pytest.approx(exact, rel=1e-2)


def test_persistent_workers_read_each_evaluation_set(tmp_path):
    run(tmp_path, looks=True, max_steps=1, **PERSISTENT)
    text = (tmp_path / "run" / "metrics.jsonl").read_text()

    result = [text.split(f'"{name}_target_tokens": ')[1].split(",")[0] for name in ("eval", "eval_train")]

    assert result == ["24", "9"]  # completions of 6, 7, 8 and of 1, 2, 3 letters, with end tokens


def test_random_states_are_restored_after_an_error():
    def draw() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    def seed() -> None:
        random.seed(5), np.random.seed(5), torch.manual_seed(5)

    seed()
    expected = draw()
    seed()
    with pytest.raises(RuntimeError), undisturbed(torch.device("cpu")):
        draw()
        raise RuntimeError

    assert draw() == expected
