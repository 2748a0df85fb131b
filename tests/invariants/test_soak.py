"""Repeated kill -9 at random times: only steps after the last save are lost, and nothing else happens.

HF_CLM_SOAK_KILLS sets the number of kills; `make soak` uses 200.
"""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from killed import dropout_recipe, finish_run, read_metrics, same_weights, start_run
from transformers import AutoModelForCausalLM

from hf_clm.training.checkpoints import fault_of, find_checkpoints, read_seal, step_of

START_SECONDS = 5.0  # of a run on two cores
KILLS = int(os.environ.get("HF_CLM_SOAK_KILLS", "20"))
CHANGES: dict[str, Any] = {
    "train": {"max_steps": 120, "learning_rate": 1e-3, "save_steps": 4, "save_total_limit": 2}
}


def newest(run: Path) -> int:
    """Returns the step of the newest complete checkpoint; 0 if there is none."""
    sound = [path for path in find_checkpoints(run) if read_seal(path) and not fault_of(path)]
    if sound:
        AutoModelForCausalLM.from_pretrained(sound[-1])
    return step_of(sound[-1]) if sound else 0


def started_at(printed: str) -> int:
    """Returns the step that a process resumed from, by its output; the last step if the run was done."""
    if "this run is already done" in printed:
        return CHANGES["train"]["max_steps"]
    lines = [line for line in printed.splitlines() if line.startswith("resumes   from")]
    return step_of(Path(lines[0].split()[2].rstrip(","))) if lines else 0


def wait_for_a_kill(process: Any, run: Path, *, rng: random.Random, pace: float) -> None:
    """Returns at a random moment: once in four times during the start, otherwise around a save.

    ``pace``: seconds between two saves.
    """
    if rng.random() < 0.25:
        process.join(rng.uniform(0.2, START_SECONDS))
        return
    last = find_checkpoints(run)[-1:]
    wanted = (step_of(last[0]) if last else 0) + rng.randrange(1, 9) * CHANGES["train"]["save_steps"]
    while process.is_alive() and not (run / f"checkpoint-{wanted}").exists():
        time.sleep(0.002)
    process.join(rng.uniform(0, 2 * pace))


@pytest.mark.large
@pytest.mark.timeout(3600)
def test_random_kills_lose_only_steps_after_the_last_save(tmp_path, capsys):
    rng = random.Random(0)
    whole = tmp_path / "whole"
    whole.mkdir()
    dropout_recipe(whole, **CHANGES)
    assert finish_run(whole, **CHANGES) == 0, (whole / "out.txt").read_text()
    facts = json.loads((whole / "run" / "run.json").read_text())
    pace = facts["seconds"] * CHANGES["train"]["save_steps"] / CHANGES["train"]["max_steps"]
    kills = finished = steps = 0
    while kills < KILLS or finished == 0:
        folder = tmp_path / f"run-{finished}"
        if not folder.exists():
            shutil.copytree(whole / "model", folder / "model")
        saved, out = newest(folder / "run"), folder / "out.txt"
        earlier = len(out.read_text()) if out.exists() else 0
        process = start_run(folder, **CHANGES)
        if kills < KILLS:
            wait_for_a_kill(process, folder / "run", rng=rng, pace=pace)
        else:
            process.join()
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
            assert newest(folder / "run") >= saved
            steps += newest(folder / "run") - saved
            continue
        assert process.exitcode == 0, out.read_text()
        assert started_at(out.read_text()[earlier:]) == saved
        assert same_weights(folder / "run", whole / "run")
        assert read_metrics(folder / "run") == read_metrics(whole / "run")
        finished += 1
    with capsys.disabled():
        print(f"\n{kills} kills, {finished} runs finished, {steps} steps saved between two kills")
