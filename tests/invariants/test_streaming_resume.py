"""An interrupted and resumed run over a stream ends with the same weights, bit by bit."""

import json
import re
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from helpers import byte_tokenizer, save_folder, tiny_model
from safetensors.torch import load_file

from hf_clm.errors import DataError
from hf_clm.recipe.recipe import Recipe
from hf_clm.training.run import train

# 28 documents, 3 or 4 per chunk, 4 rows per step: 10 steps reach the second pass of three shards.
RECORDS = [{"text": f"{n} " + "xyz"[: n % 3 + 1] * n, "note": "." * 2090} for n in range(1, 29)]


def build_recipe(folder: Path, *, data: dict[str, Any] | None = None, **settings: Any) -> Recipe:
    """Builds a recipe with dropout, 2 x 2 rows per step and blocks of a chunk; it stops within a block."""
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


@pytest.mark.parametrize("workers", [0, 2])
def test_three_steps_and_seven_more_equal_ten(tmp_path, workers):
    train(build_recipe(tmp_path, dataloader_num_workers=workers))
    checkpoint = tmp_path / "run" / "checkpoint-3"
    torch.manual_seed(987)  # a new process has another random state

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


def test_the_position_is_that_of_the_last_row_trained_on(tmp_path):
    """Workers have read ahead. One document per row; 3 steps of 4 rows end with the third chunk."""
    whole = {"packing": "none", "max_length": 128}
    train(build_recipe(tmp_path, data=whole, dataloader_num_workers=1, max_steps=3))

    state = json.loads((tmp_path / "run" / "checkpoint-3" / "stream_state_0.json").read_text())

    (position,) = state["positions"]
    (place,) = position["places"]
    assert (place["epoch"], place["mark"], place["row"]) == (0, [0, 0, 3], 0)
    assert place["counts"] == {"used": 12}


def test_with_another_number_of_workers_each_document_is_read_once(tmp_path):
    """One document per row: 3 steps on two shards and 4 more on one make one pass over all 28."""
    whole = {"packing": "none", "max_length": 128}
    train(build_recipe(tmp_path, data=whole, max_steps=3, dataloader_num_workers=2))
    again = build_recipe(
        tmp_path,
        data=whole,
        output_dir=str(tmp_path / "second"),
        resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"),
        max_steps=7,
        dataloader_num_workers=1,
    )

    train(again.model_copy(update={"resume_override": ["max_steps"]}))

    logs = read_logs(tmp_path / "run") | read_logs(tmp_path / "second")
    assert sorted(logs) == [1, 2, 3, 4, 5, 6, 7]
    assert logs[7]["target_tokens_seen"] == sum(len(record["text"]) for record in RECORDS)
    said = json.loads((tmp_path / "second" / "run.json").read_text())["stream"]
    assert said["fates"] == {"used": 28}
    assert said["shards"] == 1


def test_too_many_dropped_records_in_a_worker_are_a_one_line_error(tmp_path):
    path = tmp_path / "late.jsonl"
    path.write_text('{"text": "abc"}\n' * 1100 + "no json\n" * 1000)

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

    said = (
        r"data\.train: \d+ of 1,\d+ documents of the stream cannot be trained on; got \d+ unreadable; fix: .*"
    )
    assert re.fullmatch(said, str(error.value))
