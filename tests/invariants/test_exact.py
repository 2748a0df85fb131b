"""A run killed between two saves resumes exactly: weights, data order, dropout, log events."""

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from killed import dropout_recipe, finish_run, read_metrics, same_weights, start_run

KILLED_AT = 5
CASES: dict[str, dict[str, Any]] = {
    # 13 rows, 2 per batch: 7 batches per epoch
    "in the first epoch": {"train": {"save_steps": 3}},
    "accumulation across epochs": {"train": {"save_steps": 3, "gradient_accumulation_steps": 2}},
    "at the end of an epoch": {"train": {"save_steps": 4, "gradient_accumulation_steps": 2}},
    "workers": {"train": {"save_steps": 3, "dataloader_num_workers": 2, "gradient_accumulation_steps": 2}},
    "packed": {"data": {"packing": "best_fit"}, "train": {"save_steps": 3}},
    "a stream": {
        "stage": "pretrain",
        "data": {"packing": "stream", "max_length": 16},
        "train": {"save_steps": 3},
    },
    "saves between log events": {"train": {"save_steps": 3, "logging_steps": 2}},
    "evaluation and the best": {
        "data": {"eval_fraction": 0.3},
        "train": {"save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True},
    },
}


def kill_after(folder: Path, step: int, **changes: Any) -> int:
    """Kills a run once metrics.jsonl has a log event of ``step``; returns the step of the last event."""
    process = start_run(folder, **changes)
    path = folder / "run" / "metrics.jsonl"
    while process.is_alive():
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        steps = [json.loads(line)["step"] for line in lines if line.endswith("\n")]
        if max(steps, default=0) >= step:
            os.kill(process.pid, signal.SIGKILL)
            break
        time.sleep(0.001)
    process.join()
    assert process.exitcode == -signal.SIGKILL, (folder / "out.txt").read_text()
    return max(steps)


MORE = ("in the first epoch", "accumulation across epochs", "saves between log events")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.large) if case in MORE else case for case in CASES]
)
def test_a_run_killed_between_saves_resumes_exactly(tmp_path, case):
    changes = CASES[case]
    changes = {**changes, "train": {"max_steps": 12, "learning_rate": 1e-3, **changes["train"]}}
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    dropout_recipe(tmp_path / "whole", **changes)
    shutil.copytree(tmp_path / "whole" / "model", tmp_path / "cut" / "model")

    assert finish_run(tmp_path / "whole", **changes) == 0, (tmp_path / "whole" / "out.txt").read_text()
    kill_after(tmp_path / "cut", KILLED_AT, **changes)
    assert finish_run(tmp_path / "cut", **changes) == 0, (tmp_path / "cut" / "out.txt").read_text()

    assert "resumes   from" in (tmp_path / "cut" / "out.txt").read_text()
    assert same_weights(tmp_path / "cut" / "run", tmp_path / "whole" / "run")
    assert read_metrics(tmp_path / "cut" / "run") == read_metrics(tmp_path / "whole" / "run")


# 9 training rows, 5 steps per epoch: the first checkpoint is that of step 5.
AT_EPOCHS: dict[str, dict[str, Any]] = {
    "evaluation": {"eval_strategy": "epoch", "save_strategy": "steps", "save_steps": 5},
    "saves between log events": {"save_strategy": "epoch", "logging_steps": 7},
    "the best": {
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "greater_is_better": True,  # that of step 5, as the loss decreases
    },
}


@pytest.mark.parametrize("case", AT_EPOCHS)
def test_the_end_of_an_epoch_is_handled_before_its_step_is_saved(tmp_path, case):
    changes: dict[str, Any] = {
        "train": {"max_steps": 10, "learning_rate": 1e-3, **AT_EPOCHS[case]},
        "data": {"eval_fraction": 0.3},
        "samples": {"prompts": ["say 3"], "every_epoch": True, "max_new_tokens": 2},
    }
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    dropout_recipe(tmp_path / "whole", **changes)
    shutil.copytree(tmp_path / "whole" / "model", tmp_path / "cut" / "model")

    assert finish_run(tmp_path / "whole", **changes) == 0, (tmp_path / "whole" / "out.txt").read_text()
    assert finish_run(tmp_path / "cut", fault="after:seal", **changes) == -signal.SIGKILL
    assert finish_run(tmp_path / "cut", **changes) == 0, (tmp_path / "cut" / "out.txt").read_text()

    whole, cut = (tmp_path / name / "run" for name in ("whole", "cut"))
    assert "resumes   from" in (tmp_path / "cut" / "out.txt").read_text()
    assert read_metrics(cut) == read_metrics(whole)
    assert same_weights(cut, whole)
    assert (cut / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    evaluated = [(e["step"], e["eval_loss"]) for e in read_metrics(whole) if "eval_loss" in e]
    at_end = [10, 10] if case == "the best" else [10]  # the best is evaluated again
    between = [] if case == "saves between log events" else [5]
    assert [step for step, _ in evaluated] == [0, *between, *at_end]
    sampled = [json.loads(line)["step"] for line in (whole / "samples.jsonl").read_text().splitlines()]
    assert sampled == [0, 5, 10]
    if case == "the best":
        state = json.loads((cut / "checkpoint-10" / "trainer_state.json").read_text())
        assert state["best_global_step"] == 5
        assert evaluated[-1][1] == evaluated[1][1]
