"""Runs in child processes that are observed through their files, for tests of signals and faults."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from forked import LIMIT_SECONDS, PROGRAM, Forked, start_ranks
from launched import BIN, environment

ALONE = [sys.executable]
# Runs until it is stopped, and does not save by itself.
RECIPE = """\
stage: sft
model: {name_or_path: model}
data:
  train: [{path: train.jsonl, format: instruct}]
  max_length: 64
  packing: none
doctor: {self_test: false, round_trip: "off"}
train:
  output_dir: run
  max_steps: 100000
  per_device_train_batch_size: 2
  logging_steps: 1
  save_strategy: "no"
  use_cpu: true
  bf16: false
"""


def accelerate(*words: str) -> list[str]:
    """Returns the command of accelerate, for one process unless the words change it."""
    plain = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    return [str(BIN / "accelerate"), "launch", *(words or ("--cpu", "--num_processes", "1")), *plain]


def start(folder: Path, launcher: list[str], *words: str, **settings: str) -> subprocess.Popen:
    """Starts a run in an empty ``run`` folder, with its output in out.txt and err.txt."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    command = [*launcher, "-m", "hf_clm", "train", "recipe.yaml", *words]
    with (folder / "out.txt").open("w") as out, (folder / "err.txt").open("w") as err:
        given = os.environ | environment() | settings
        return subprocess.Popen(command, cwd=folder, env=given, stdout=out, stderr=err)


def fork(folder: Path, *words: str, program: Sequence[str] = PROGRAM) -> Forked:
    """Starts it in one process, without a launcher."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    return Forked(folder, [*program, *words])


def fork_two(folder: Path, *words: str, **options: Any) -> list[Forked]:
    """Starts it in two processes, without a launcher; for ``options`` see ``start_ranks``."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    return start_ranks([folder] * 2, *words, **options)


def reach_step(folder: Path, process: subprocess.Popen | Forked) -> None:
    """Waits for the first step of a run."""
    try:
        wait_for(lambda: steps(folder) or process.poll() is not None)
        assert steps(folder), (folder / "err.txt").read_text()
    except AssertionError:
        process.kill()
        raise


def wait_for(condition: Callable[[], object]) -> None:
    """Polls a condition until it is true; raises AssertionError after a timeout."""
    end = time.monotonic() + LIMIT_SECONDS
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


def steps(folder: Path) -> list[int]:
    """Returns the steps that a run has logged."""
    path = folder / "run" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    entries = [json.loads(line) for line in lines if line.endswith("\n")]
    return [entry["step"] for entry in entries if "loss" in entry]


def facts(folder: Path) -> dict[str, Any]:
    """Returns the content of run.json."""
    return json.loads((folder / "run" / "run.json").read_text())


def is_alive(number: int) -> bool:
    """Returns whether a process is running and not a zombie."""
    path = Path("/proc") / str(number) / "stat"
    return path.exists() and path.read_text().rsplit(") ", 1)[1][0] not in "ZX"


def children(parent: int) -> dict[str, int]:
    """Returns the processes that a launcher has started, by their rank ("" without one)."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        if int(path.read_text().rsplit(") ", 1)[1].split()[1]) == parent:
            pairs = [pair.split("=", 1) for pair in (path.parent / "environ").read_text().split("\0") if pair]
            found[dict(pairs).get("RANK", "")] = int(path.parent.name)
    return found
