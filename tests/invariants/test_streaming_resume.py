"""A run over a stream that was cut in two ends in the same weights, bit by bit."""

import json
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from helpers import byte_tokenizer, save_folder, tiny_model
from safetensors.torch import load_file

from hf_clm.config import Recipe
from hf_clm.errors import DataError, RecipeError
from hf_clm.training.run import train

# 29 documents, 4 rows a step: 10 steps reach into the second pass.
RECORDS = [{"text": f"{n} " + "xyz"[: n % 3 + 1] * n} for n in range(1, 30)]


def build_recipe(folder: Path, *, data: dict[str, Any] | None = None, **settings: Any) -> Recipe:
    """Dropout everywhere, 2 x 2 rows a step, blocks of 4 documents; stopped in the middle of a block."""
    model = tiny_model("gpt2", resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)
    name = save_folder(folder / "model", model, byte_tokenizer())
    content = {"packing": "stream", "streaming": True, "shuffle_buffer": 4, "max_length": 32, **(data or {})}
    defaults = {"max_steps": 10, "learning_rate": 1e-2, "gradient_accumulation_steps": 2}
    defaults |= {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 4}
    changes: dict[str, Any] = {"model": {"name_or_path": name}, "data": content, "train": defaults | settings}
    return helpers.build_recipe(folder, RECORDS, stage="pretrain", **changes)


def read_logs(folder: Path) -> dict[int, dict[str, Any]]:
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {entry["step"]: entry for entry in entries if "loss" in entry}


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_three_steps_and_seven_more_are_ten(tmp_path, workers):
    train(build_recipe(tmp_path, dataloader_num_workers=workers))
    checkpoint = tmp_path / "run" / "checkpoint-3"
    torch.manual_seed(987)  # what a new process would not have in common with the old one

    again: dict[str, Any] = {
        "output_dir": str(tmp_path / "second"),
        "resume_from_checkpoint": str(checkpoint),
    }
    train(build_recipe(tmp_path, dataloader_num_workers=workers, **again))

    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "second"))
    started = load_file(checkpoint / "model.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not all(torch.equal(whole[name], started[name]) for name in whole)
    logs, later = read_logs(tmp_path / "run"), read_logs(tmp_path / "second")
    assert sorted(later) == [4, 5, 6, 7, 8, 9, 10]
    for step, entry in later.items():
        for key in ("loss", "grad_norm", "learning_rate", "epoch", "tokens_seen", "target_tokens_seen"):
            assert entry[key] == logs[step][key], (step, key)
    facts, said = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("run", "second"))
    assert facts["stream"] == said["stream"]


def test_the_position_is_that_of_the_last_row_trained_on_not_of_what_workers_read_ahead(tmp_path):
    """One document a row; 3 steps of 4 rows are 12, the last of the third block."""
    whole = {"packing": "none", "max_length": 128}
    train(build_recipe(tmp_path, data=whole, dataloader_num_workers=1, max_steps=3))

    state = json.loads((tmp_path / "run" / "checkpoint-3" / "stream_state_0.json").read_text())

    (position,) = state["positions"]
    assert (position["epoch"], position["block"], position["row"]) == (0, 3, 0)
    assert position["counts"] == {"used": 12}


def test_another_number_of_workers_is_refused_before_the_model_is_loaded(tmp_path):
    train(build_recipe(tmp_path, max_steps=3, dataloader_num_workers=2))
    again = build_recipe(
        tmp_path,
        output_dir=str(tmp_path / "second"),
        max_steps=3,
        dataloader_num_workers=3,
        resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"),
    )
    (tmp_path / "model" / "model.safetensors").unlink()

    with pytest.raises(RecipeError, match="the stream cannot go on: shards was 2; got 3"):
        train(again)


def test_an_error_in_a_worker_is_one_line_with_its_place(tmp_path):
    path = tmp_path / "late.jsonl"
    path.write_text('{"text": "abc"}\n' * 1100 + "no json\n")

    with pytest.raises(DataError) as error:
        train(
            build_recipe(
                tmp_path,
                data={"train": [str(path)], "packing": "none", "shuffle_buffer": 100},
                dataloader_num_workers=1,
                per_device_train_batch_size=100,
                max_steps=20,
            )
        )

    assert str(error.value).startswith(f"{path}:1101: not valid JSON: ")
    assert "Traceback" not in str(error.value)
