"""A replay of a run by hf-clm verify equals the run bit by bit, in one process and in two."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from forked import finish, run_ranks, start_ranks
from helpers import build_recipe, byte_tokenizer, save_folder, tiny_model
from launched import prepare, train_on_two
from safetensors.torch import load_file, save_file

from hf_clm.recipe.recipe import Recipe, load_recipe
from hf_clm.replay.verify import verify
from hf_clm.training.checkpoints import read_seal, seal
from hf_clm.training.run import train

RECORDS = [{"instruct": f"say {n}\n", "input": "", "label": "xyz"[: n % 3 + 1] * n} for n in range(1, 14)]
PROGRAM = ("-m", "hf_clm")


def checkpointed_recipe(folder: Path, *, dropout: float, packing: str, accumulation: int) -> Recipe:
    """Returns the recipe of 6 steps, saved after 2, 4 and 6; with accumulation they reach a second epoch."""
    model = tiny_model("gpt2", resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout)
    name = save_folder(folder / "model", model, byte_tokenizer())
    settings: dict[str, Any] = {"max_steps": 6, "learning_rate": 1e-2, "save_total_limit": 3}
    settings |= {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": accumulation}
    return build_recipe(
        folder, RECORDS, model={"name_or_path": name}, data={"packing": packing}, train=settings
    )


@pytest.mark.parametrize("packing", ["best_fit", "none"])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_every_span_is_replayed_to_the_bit(tmp_path, dropout, accumulation, packing):
    train(checkpointed_recipe(tmp_path, dropout=dropout, packing=packing, accumulation=accumulation))

    result = verify(str(tmp_path / "run"), load_recipe(tmp_path / "run" / "recipe.yaml"), spans=9)

    assert result.faults == []
    assert [one.difference for one in result.replayed] == [0.0, 0.0, 0.0]


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """A run of two processes with dropout, saved after 4 and 8 steps."""
    folder = tmp_path_factory.mktemp("two") / "run"
    prepare(folder, attention_dropout=0.1)
    train_on_two(folder)
    return folder


@pytest.mark.slow
def test_two_processes_replay_a_run_of_two_processes_to_the_bit(two, tmp_path):
    shutil.copytree(two, tmp_path / "two")

    ended = run_ranks(tmp_path / "two", "verify", "run", program=PROGRAM)

    content = json.loads((tmp_path / "two" / "run" / "verify.json").read_text())
    assert content["valid"]
    assert [(one["steps"], one["difference"]) for one in content["replayed"]] == [(4, 0.0), (4, 0.0)]
    assert ended.out.count("verified  ") == 1  # by one of them


@pytest.mark.slow
def test_two_processes_find_a_changed_weight_that_was_sealed_again(two, tmp_path):
    shutil.copytree(two, tmp_path / "two")
    folder = tmp_path / "two" / "run" / "checkpoint-4"
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] + 1e-6
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    content = read_seal(folder)
    del content["files"]
    seal(folder, content)

    first, other = finish(start_ranks([tmp_path / "two"] * 2, "verify", "run", program=PROGRAM))

    assert (first.code, other.code) == (6, 6)
    assert "differs   checkpoint-4: the weights of the replay differ by " in first.out
    assert "model.norm.weight in model.safetensors, by up to " in first.out
