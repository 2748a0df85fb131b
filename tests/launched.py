"""A run of a tiny model that a launcher starts on two processes, as a user would type it."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from helpers import byte_tokenizer, save_folder, tiny_model, write_jsonl

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
ACCELERATE = ROOT / "recipes" / "accelerate"
# 14 rows to learn, of unequal length, and 5 to evaluate: neither divides by 2 processes x 2 rows.
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


def prepare(folder: Path, recipe: str = RECIPE, **model: Any) -> Path:
    """A new folder with recipe, data and model; ``model`` changes its configuration."""
    folder.mkdir()
    save_folder(folder / "model", tiny_model(**model), byte_tokenizer())
    write_jsonl(folder / "train.jsonl", RECORDS)
    write_jsonl(folder / "eval.jsonl", HELD_OUT)
    (folder / "recipe.yaml").write_text(recipe)
    return folder


def launch(
    command: list[str], folder: Path, *words: str, program: Sequence[str] = ("-m", "hf_clm")
) -> subprocess.CompletedProcess:
    """``train`` with 2 rows on each process; ``words`` come behind."""
    settings = {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", ""))),
        "HF_HUB_OFFLINE": "1",
    }
    settings["CUDA_VISIBLE_DEVICES"] = ""
    return subprocess.run(
        [*command, *program, "train", "recipe.yaml", *BATCH, "2", *EVAL_BATCH, "2", *words],
        cwd=folder,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def accelerate(name: str) -> list[str]:
    """With a shipped file; each starts 2 processes and takes a free port."""
    return [str(BIN / "accelerate"), "launch", "--config_file", str(ACCELERATE / f"{name}.yaml")]


def torchrun() -> list[str]:
    """The other launcher."""
    return [str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port", free_port()]


def free_port() -> str:
    """A port that nobody listens to."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def by_hand(folders: Sequence[Path], *words: str) -> list[tuple[int, str]]:
    """``train`` on two ranks without a launcher, as srun starts them; exit code and stderr of each.

    Two folders are two machines, without a disk that they share.
    """
    is_one = folders[0] == folders[1]
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    settings |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
    settings |= {"LOCAL_WORLD_SIZE": "2" if is_one else "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "hf_clm", "train", "recipe.yaml", *words]
    pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    started = []
    for rank, folder in enumerate(folders):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank if is_one else 0)}
        started.append(subprocess.Popen(command, cwd=folder, env=os.environ | settings | own, **pipes))
    try:
        texts = [process.communicate(timeout=120)[1] for process in started]
        return [(process.returncode, text) for process, text in zip(started, texts, strict=True)]
    finally:
        for process in started:
            process.kill()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def run_ranks(program: str, folder: Path) -> None:
    """Runs a file of tests as a program, ``FILE RANK FOLDER``, for each of two processes that meet."""
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    commands = [[sys.executable, program, str(rank), str(folder)] for rank in range(2)]
    started = [
        subprocess.Popen(command, env=os.environ | settings, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    try:
        for process in started:
            assert process.wait(timeout=120) == 0, process.stderr.read()
    finally:
        for process in started:
            process.kill()
            process.communicate()
