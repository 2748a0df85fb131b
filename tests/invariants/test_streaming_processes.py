"""A stream on two processes: each reads its part without waiting, and one process reads the same rows."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from forked import finish, run_ranks, start_ranks
from helpers import byte_tokenizer, save_folder, tiny_model, write_jsonl

from hf_clm.cli import main

# The second chunk has one document, so its shard starts over long before the other one.
RECORDS = [{"text": f"{n} " + "xyz"[: n % 3 + 1] * (n % 5)} for n in range(20)]
RECORDS += [{"text": "long " * 60, "note": "." * 8000}, {"text": "long " * 60}]
RECIPE = """\
stage: pretrain
model: {name_or_path: model}
data: {train: rows.jsonl, max_length: 32, streaming: true, shuffle_buffer: 4}
doctor: {round_trip: "off"}
train:
  output_dir: run
  max_steps: 6
  per_device_train_batch_size: 2
  learning_rate: 1e-2
  logging_steps: 1
  save_strategy: steps
  save_steps: 3
  use_cpu: true
  bf16: false
"""
ONE = ["--dataloader_num_workers", "2", "--gradient_accumulation_steps", "2"]
TWO = ["--dataloader_num_workers", "1"]


def write_run(folder: Path) -> Path:
    folder.mkdir()
    save_folder(folder / "model", tiny_model(), byte_tokenizer())
    write_jsonl(folder / "rows.jsonl", RECORDS)
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def losses(folder: Path) -> dict[int, float]:
    entries = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return {entry["step"]: entry["loss"] for entry in entries if "loss" in entry}


def positions(checkpoint: Path) -> dict[int, Any]:
    states = [json.loads(path.read_text()) for path in checkpoint.glob("stream_state_*.json")]
    return {entry["shard"]: entry for state in states for entry in state["positions"]}


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """A run of two processes."""
    folder = write_run(tmp_path_factory.mktemp("streams") / "two")
    run_ranks(folder, *TWO)
    return folder


def cut_off(two: Path, folder: Path) -> Path:
    """Restores the run to its state after the first save."""
    shutil.copytree(two, folder)
    (folder / "run" / "checkpoint-6" / "SEALED.json").unlink()
    (folder / "run" / "run.json").unlink()
    return folder


def test_two_processes_take_the_rows_of_one_with_two_workers_and_one_resumes_for_two(
    two, tmp_path, monkeypatch
):
    one = write_run(tmp_path / "one")
    monkeypatch.chdir(one)
    assert main(["train", "recipe.yaml", *ONE]) == 0

    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    for step in (3, 6):
        result = positions(two / "run" / f"checkpoint-{step}")
        assert result == positions(one / "run" / f"checkpoint-{step}")
        assert sorted(result) == [0, 1]
    totals = [json.loads((folder / "run" / "run.json").read_text())["stream"] for folder in (one, two)]
    assert totals[0] == totals[1]
    assert totals[0]["shards"] == 2
    assert result[1]["places"][0]["epoch"] >= 1  # the long document, repeatedly
    again = cut_off(two, tmp_path / "again")
    monkeypatch.chdir(again)
    assert main(["train", "recipe.yaml", *ONE]) == 0

    assert losses(again) == pytest.approx(losses(one), rel=1e-5)
    assert positions(again / "run" / "checkpoint-6") == positions(one / "run" / "checkpoint-6")


def test_two_processes_resume_bit_by_bit(two, tmp_path):
    again = cut_off(two, tmp_path / "again")

    run_ranks(again, *TWO)

    assert losses(again) == losses(two)


def test_one_process_resumes_a_run_of_two_and_reads_no_document_twice(tmp_path, monkeypatch):
    """One document per row, 4 rows per step: two processes, and then one, read 28 documents in total."""
    folder = write_run(tmp_path / "two")
    write_jsonl(folder / "rows.jsonl", [{"text": f"{n} " * n, "note": "." * 2090} for n in range(1, 29)])
    options = ("--data.packing", "none", "--data.max_length", "128", "--save_steps", "3")
    run_ranks(folder, "--max_steps", "3", *options)
    monkeypatch.chdir(folder)

    more = ("--max_steps", "7", "--resume_override", "max_steps", "--gradient_accumulation_steps", "2")
    assert main(["train", "recipe.yaml", *more, *options]) == 0

    entries = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    seen = {entry["step"]: entry["target_tokens_seen"] for entry in entries if "loss" in entry}
    assert seen[7] == sum(len(f"{n} " * n) for n in range(1, 29))
    said = json.loads((folder / "run" / "run.json").read_text())["stream"]
    assert (said["shards"], said["fates"]) == (1, {"used": 28})


def test_an_error_in_the_second_process_alone_is_reported_and_ends_both(tmp_path):
    """It reads the chunks with odd numbers; the bad records are in the last one."""
    folder = write_run(tmp_path / "two")
    lines = ['{"text": "abc"}'] * 3584 + ["no json        "] * 512  # 512 per chunk
    (folder / "rows.jsonl").write_text("".join(f"{line}\n" for line in lines))
    words = ("--data.packing", "none", "--data.shuffle_buffer", "500", "--data.on_bad_record", "drop")
    words += ("--per_device_train_batch_size", "32", "--max_steps", "200", "--logging_steps", "100")

    first, second = finish(start_ranks([folder, folder], *words))

    assert 0 not in (first.code, second.code)
    said = [line for line in second.err.splitlines() if "512 of 2,048 documents of the stream" in line]
    assert [line.split(":")[0] for line in said] == ["error on rank 1"]
    assert "512 of" not in first.err
