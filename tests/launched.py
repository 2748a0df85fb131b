"""Runs of a tiny model on two processes: forked, or started with a launcher."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from forked import Ended, free_port, run_ranks
from helpers import byte_tokenizer, save_folder, tiny_model, write_jsonl

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
ACCELERATE = ROOT / "recipes" / "accelerate"
# 14 training rows of different lengths and 5 evaluation rows: no multiples of 2 processes x 2 rows.
RECORDS = [{"instruct": f"say {n}\n", "input": "", "label": "xyz"[: n % 3 + 1] * n} for n in range(1, 15)]
HELD_OUT = [{"instruct": f"tell {n}\n", "input": "", "label": "ab" * n} for n in range(1, 6)]
RECIPE = """\
stage: sft
model: {name_or_path: model}
data:
  train: [{path: train.jsonl, format: instruct}]
  eval: [{path: eval.jsonl, format: instruct}]
  max_length: 64
  packing: none
doctor: {round_trip: "off"}
samples: {prompts: [say 2], max_new_tokens: 3}
train:
  output_dir: run
  num_train_epochs: 2
  learning_rate: 1e-2
  logging_steps: 1
  eval_strategy: steps
  eval_steps: 4
  save_strategy: steps
  save_steps: 4
  use_cpu: true
  bf16: false
"""
BATCH, EVAL_BATCH = ["--per_device_train_batch_size"], ["--per_device_eval_batch_size"]
TWO_ROWS = [*BATCH, "2", *EVAL_BATCH, "2"]


def prepare(folder: Path, recipe: str = RECIPE, **model: Any) -> Path:
    """Creates a folder with recipe, data and model; ``model`` changes its configuration."""
    folder.mkdir()
    save_folder(folder / "model", tiny_model(**model), byte_tokenizer())
    write_jsonl(folder / "train.jsonl", RECORDS)
    write_jsonl(folder / "eval.jsonl", HELD_OUT)
    (folder / "recipe.yaml").write_text(recipe)
    return folder


def train_on_two(folder: Path, *words: str, program: Sequence[str] = ("-m", "hf_clm")) -> Ended:
    """Runs ``train`` with 2 rows on each of two forked processes, which must succeed."""
    return run_ranks(folder, "train", "recipe.yaml", *TWO_ROWS, *words, program=program)


def launch(
    command: list[str], folder: Path, *words: str, program: Sequence[str] = ("-m", "hf_clm")
) -> subprocess.CompletedProcess:
    """Does the same with a launcher and new interpreters, which may fail."""
    return subprocess.run(
        [*command, *program, "train", "recipe.yaml", *TWO_ROWS, *words],
        cwd=folder,
        env=os.environ | environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def environment() -> dict[str, str]:
    """Returns the environment in which an interpreter finds this checkout and its tests, but no GPU."""
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")))
    ours = {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    return ours


def accelerate(name: str) -> list[str]:
    """Returns the command of accelerate with a shipped file, for 2 processes and any free port."""
    return [str(BIN / "accelerate"), "launch", "--config_file", str(ACCELERATE / f"{name}.yaml")]


def torchrun() -> list[str]:
    """Returns the command of torchrun."""
    return [str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port", free_port()]


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
