"""What runs on macOS, by taking away what only Linux has (on_macos.py)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import byte_tokenizer, write_jsonl

TESTS = Path(__file__).resolve().parent


def run_on_macos(*words: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent)}
    command = [sys.executable, str(TESTS / "on_macos.py"), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def train_on_macos(folder: Path, *words: str) -> list[float]:
    """Returns the losses of four steps of a run that also saves checkpoints."""
    steps = ("--save_strategy", "steps", "--save_steps", "2", "--logging_steps", "1", "--samples", "null")
    lean = ("--eval_strategy", "no", "--eval_on_start", "false", "--doctor.round_trip", "off")
    words = (
        *words,
        *steps,
        *lean,
        "--output_dir",
        str(folder),
        "--data.cache_dir",
        "null",
        "--bf16",
        "false",
    )
    run_on_macos("train", "pretrain/char-gpt", "--max_steps", "4", *words)
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in entries if "loss" in entry]


@pytest.mark.slow
def test_a_run_with_a_spawned_worker_equals_one_without(tmp_path):
    alone = train_on_macos(tmp_path / "alone")

    with_worker = train_on_macos(tmp_path / "worker", "--dataloader_num_workers", "1")

    assert len(alone) == 4
    assert with_worker == alone


@pytest.mark.large
def test_a_stream_is_read_by_a_spawned_worker(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": f"{word} is a word"} for word in dir(str)])
    byte_tokenizer().save_pretrained(tmp_path / "bytes")
    data = {"train": path, "streaming": True, "eval_fraction": 0, "eval_train_rows": 0, "packing": "best_fit"}
    words = [word for key, value in data.items() for word in (f"--data.{key}", str(value).lower())]
    words += ["--tokenizer.train", "null", "--tokenizer.name_or_path", str(tmp_path / "bytes")]

    losses = train_on_macos(tmp_path / "run", *words, "--dataloader_num_workers", "1")

    assert len(losses) == 4
