"""An interrupted and resumed run ends with the same weights, bit by bit."""

import json
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from helpers import byte_tokenizer, save_folder, tiny_model
from safetensors.torch import load_file

from hf_clm.recipe.recipe import Recipe
from hf_clm.training.run import train

RECORDS = [{"instruct": f"say {n}\n", "input": "", "label": "xyz"[: n % 3 + 1] * n} for n in range(1, 14)]


SECTIONS = {
    "muon": {
        "name": "muon",
        "groups": [{"match": "mlp", "learning_rate": 3e-3, "weight_decay": 0.1}],
        "freeze": ["wpe"],
        "layer_decay": 0.8,
    },
    "adamw": {"groups": [{"match": r"\.h\.0\.", "learning_rate": 1e-3}]},
}


def build_recipe(
    folder: Path, *, dropout: float = 0.1, optimizer: dict[str, Any] | None = None, **settings: Any
) -> Recipe:
    """Builds a recipe with 13 rows and 2 x 2 per step: 10 steps reach the third epoch; dropout everywhere."""
    model = tiny_model("gpt2", resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout)
    name = save_folder(folder / "model", model, byte_tokenizer())
    defaults = {"max_steps": 10, "learning_rate": 1e-2, "gradient_accumulation_steps": 2}
    defaults |= {"save_strategy": "steps", "save_steps": 5, "dataloader_num_workers": 0}
    sections: dict[str, Any] = {"model": {"name_or_path": name}, "optimizer": optimizer}
    return helpers.build_recipe(folder, RECORDS, **sections, train=defaults | settings)


def read_logs(folder: Path) -> dict[int, dict[str, Any]]:
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {entry["step"]: entry for entry in entries if "loss" in entry}


@pytest.mark.parametrize("name", ["adamw_torch_fused", "adafactor", *SECTIONS])
def test_five_steps_and_five_more_equal_ten(tmp_path, name):
    optimizer: dict[str, Any] = {"optimizer": SECTIONS[name]} if name in SECTIONS else {"optim": name}
    train(build_recipe(tmp_path, **optimizer))
    checkpoint = str(tmp_path / "run" / "checkpoint-5")
    torch.manual_seed(987)  # a new process has another random state

    train(
        build_recipe(
            tmp_path, output_dir=str(tmp_path / "second"), resume_from_checkpoint=checkpoint, **optimizer
        )
    )

    whole = load_file(tmp_path / "run" / "model.safetensors")
    resumed = load_file(tmp_path / "second" / "model.safetensors")
    started = load_file(tmp_path / "run" / "checkpoint-5" / "model.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not all(torch.equal(whole[name], started[name]) for name in whole)
    logs, again = read_logs(tmp_path / "run"), read_logs(tmp_path / "second")
    assert sorted(again) == [6, 7, 8, 9, 10]
    for step, entry in again.items():
        for key in ("loss", "grad_norm", "learning_rate", "tokens_seen", "target_tokens_seen"):
            assert entry[key] == logs[step][key], (step, key)


def test_dropout_is_active_in_these_tests(tmp_path):
    """Otherwise, the test above would not cover the random state."""
    train(build_recipe(tmp_path, max_steps=1, save_strategy="no"))
    train(
        build_recipe(tmp_path, dropout=0.0, max_steps=1, save_strategy="no", output_dir=str(tmp_path / "b"))
    )

    assert read_logs(tmp_path / "run")[1]["loss"] != read_logs(tmp_path / "b")[1]["loss"]
