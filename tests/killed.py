"""Runs in child processes that are killed, and what remains of them."""

import gc
import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from forked import SERVER
from helpers import build_recipe, byte_tokenizer, save_folder, tiny_model
from safetensors.torch import load_file

RECORDS = [{"instruct": f"say {n}\n", "input": "", "label": "xyz"[: n % 3 + 1] * n} for n in range(1, 14)]
OF_THE_CLOCK = ("seconds", "per_second", "mfu", "peak_memory_bytes", "runtime")


def dropout_recipe(folder: Path, **changes: Any) -> Any:
    """Returns the recipe of 9 steps of a tiny GPT-2 with dropout on 13 rows, saved at 2, 4, 6, 8 and 9."""
    if not (folder / "model").exists():
        model = tiny_model("gpt2", resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)
        save_folder(folder / "model", model, byte_tokenizer())
    settings = {"max_steps": 9, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 2}
    train = settings | changes.pop("train", {})
    return build_recipe(
        folder, RECORDS, model={"name_or_path": str(folder / "model")}, train=train, **changes
    )


def die_at(point: str) -> None:
    """Patches this process so that it dies like with kill -9 at a given point of a save."""
    from hf_clm.training import checkpoints, output, run, saving

    def is_moved(file: Path, target: Path) -> bool:
        return point == f"moved:{target.name}" and file.parent.name == output.FINAL

    after = {
        "after:model": (saving.SavingTrainer, "_save"),
        "after:optimizer": (saving.SavingTrainer, "_save_optimizer_and_scheduler"),
        "after:random state": (saving.SavingTrainer, "_save_rng_state"),
        "within:rotation": (checkpoints, "_renamed_to_delete"),
        "moved:model.safetensors": (Path, "replace", is_moved),
    }
    before = {
        "after:files": (saving, "seal"),
        "before:seal": (Path, "write_text", lambda file, *_: file.name == "SEALED.json.partial"),
        "within:seal": (Path, "replace", lambda file, *_: file.name == "SEALED.json.partial"),
        "after:seal": (saving, "rotate"),
        "after:final": (run, "publish"),
    }
    owner, name, *condition = {**after, **before}[point]
    original = getattr(owner, name)

    def deadly(*arguments: Any, **options: Any) -> Any:
        is_here = not condition or condition[0](*arguments)
        if is_here and point in before:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*arguments, **options)
        if is_here:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, deadly)


def start_run(folder: Path, *, fault: str = "", **changes: Any) -> Any:
    """Starts a process that trains. ``fault``: where it kills itself. Its output is in out.txt."""
    process = SERVER.Process(target=_train, args=(folder, fault, changes))
    process.start()
    return process


def _train(folder: Path, fault: str, changes: dict[str, Any]) -> None:
    from hf_clm.errors import UserError
    from hf_clm.training.run import train

    gc.freeze()
    if fault:
        die_at(fault)
    multiprocessing.set_start_method("fork", force=True)  # as in a run: its workers see that it has died
    torch.set_num_threads(1)
    with (folder / "out.txt").open("a", buffering=1) as out:
        sys.stdout = sys.stderr = out
        try:
            train(dropout_recipe(folder, **changes))
        except UserError as error:
            print(f"error: {error}")
            sys.exit(int(error.exit_code))


def finish_run(folder: Path, **options: Any) -> int | None:
    """Runs to the end or the fault. Returns the exit code, -9 for kill -9."""
    process = start_run(folder, **options)
    process.join()
    return process.exitcode


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Returns all lines of metrics.jsonl, without values that depend on time."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in entry.items() if not key.endswith(OF_THE_CLOCK)}
        for entry in map(json.loads, lines)
    ]


def same_weights(one: Path, other: Path) -> bool:
    """Returns whether two folders contain bitwise equal models."""
    found = [load_file(folder / "model.safetensors") for folder in (one, other)]
    assert found[0].keys() == found[1].keys()
    return all(torch.equal(weight, found[1][name]) for name, weight in found[0].items())
