"""Two processes are one run: the same figures, one set of files, each line printed once."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import byte_tokenizer, save_folder, tiny_model, write_jsonl
from safetensors.torch import load_file

from hf_clm.cli import main

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
# 14 rows to learn, of unequal length, and 5 to evaluate: neither divides by 2 processes x 2 rows.
RECORDS = [{"instruct": f"say {n}", "input": "", "label": "xyz"[: n % 3 + 1] * n} for n in range(1, 15)]
HELD_OUT = [{"instruct": f"tell {n}", "input": "", "label": "ab" * n} for n in range(1, 6)]
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
FILES = {
    *(
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ),
    *(
        "recipe.yaml",
        "run.json",
        "metrics.jsonl",
        "samples.jsonl",
        "ledger.parquet",
        "loss.png",
        "loss.pdf",
        "README.md",
        "label_rows.jsonl",
        "report.html",
        "checkpoint-4",
        "checkpoint-8",
    ),
}


def prepare(folder: Path, recipe: str = RECIPE, **settings: Any) -> Path:
    """``settings``: of a GPT-2."""
    folder.mkdir()
    model = tiny_model("gpt2", **settings) if settings else tiny_model()
    save_folder(folder / "model", model, byte_tokenizer())
    write_jsonl(folder / "train.jsonl", RECORDS)
    write_jsonl(folder / "eval.jsonl", HELD_OUT)
    (folder / "recipe.yaml").write_text(recipe)
    return folder


def launch(command: list[str], folder: Path) -> subprocess.CompletedProcess:
    """Two processes with 2 rows each."""
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [*command, "-m", "hf_clm", "train", "recipe.yaml", *BATCH, "2", *EVAL_BATCH, "2"],
        cwd=folder,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def accelerate() -> list[str]:
    where = ["--num_processes", "2", "--num_machines", "1", "--main_process_port", free_port()]
    return [
        str(BIN / "accelerate"),
        "launch",
        "--multi_gpu",
        *where,
        *("--mixed_precision", "no"),
        "--dynamo_backend=no",
    ]


def torchrun() -> list[str]:
    return [str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port", free_port()]


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """One process with the global batch of the two."""
    folder = prepare(tmp_path_factory.mktemp("processes") / "alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", "recipe.yaml", *BATCH, "4", *EVAL_BATCH, "4"]) == 0
    return folder


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """Two processes to the end."""
    folder = prepare(tmp_path_factory.mktemp("processes") / "two")
    done = launch(accelerate(), folder)
    assert done.returncode == 0, done.stderr
    return folder, done


@pytest.mark.slow
def test_two_processes_train_as_one(together, alone):
    folder, done = together
    one, two = read_metrics(alone), read_metrics(folder)
    assert [entry["step"] for entry in two] == [entry["step"] for entry in one]
    for key in ("loss", "grad_norm", "eval_loss"):
        assert [e[key] for e in two if key in e] == pytest.approx(
            [e[key] for e in one if key in e], rel=1e-5
        ), key
    for key in (
        "tokens_seen",
        "target_tokens_seen",
        "learning_rate",
        "token_accuracy",
        "eval_token_accuracy",
    ):
        assert [e[key] for e in two if key in e] == [e[key] for e in one if key in e], key
    assert {e["eval_target_tokens"] for e in two if "eval_loss" in e} == {35}  # 2 + 4 + ... + 10, 5 ends
    assert {path.name for path in (folder / "run").iterdir()} == FILES
    assert [path.name for path in (folder / "run").rglob("*.bin")] == []
    facts = json.loads((folder / "run" / "run.json").read_text())
    assert (facts["processes"], facts["rows_per_step"], facts["steps"], facts["steps_done"]) == (2, 4, 8, 8)
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    shown = [
        line for line in lines if line.startswith(("recipe", "step", "sample", "done", "written", "next"))
    ]
    # 3 of the start, 8 steps, 3 evaluations, 2 samples, 3 of the end
    assert len(shown) == len(set(shown)) == 19
    assert "Traceback" not in done.stderr


def cut_off(source: Path, folder: Path) -> Path:
    """The run as it was between its two saves."""
    shutil.copytree(source, folder)
    run = folder / "run"
    for name in ("run.json", "model.safetensors"):
        (run / name).unlink()
    shutil.rmtree(run / "checkpoint-8")
    return folder


def check_same_losses(folder: Path, expected: Path) -> None:
    for key in ("loss", "grad_norm", "eval_loss"):
        found, wanted = ([e[key] for e in read_metrics(place) if key in e] for place in (folder, expected))
        assert found == pytest.approx(wanted, rel=1e-5), key
    for key in ("step", "tokens_seen", "learning_rate"):
        found, wanted = ([e.get(key) for e in read_metrics(place)] for place in (folder, expected))
        assert found == wanted, key


@pytest.mark.slow
def test_two_processes_go_on_with_the_rows_of_one(tmp_path, alone):
    folder = cut_off(alone, tmp_path / "two")

    done = launch(torchrun(), folder)

    assert done.returncode == 0, done.stderr
    assert re.search(r"processes +1 +2 +applied", done.stdout), done.stdout
    check_same_losses(folder, alone)


@pytest.mark.slow
def test_one_process_goes_on_with_the_rows_of_two(tmp_path, together, alone, monkeypatch):
    folder = cut_off(together[0], tmp_path / "one")
    monkeypatch.chdir(folder)

    assert main(["train", "recipe.yaml", *BATCH, "4", *EVAL_BATCH, "4"]) == 0

    check_same_losses(folder, alone)


@pytest.mark.slow
def test_another_global_batch_is_refused(tmp_path, alone, monkeypatch, capsys):
    folder = cut_off(alone, tmp_path / "one")
    monkeypatch.chdir(folder)

    assert main(["train", "recipe.yaml", *BATCH, "2", *EVAL_BATCH, "4"]) == 2

    assert "run/checkpoint-4: not the run of this recipe: global_batch (4, now 2)" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_that_are_killed_go_on_exactly(tmp_path):
    """With dropout, accumulation and a worker each; kill -9 to the launcher and all its processes at once."""
    recipe = RECIPE.replace(
        "save_steps: 4", "save_steps: 2\n  gradient_accumulation_steps: 2\n  dataloader_num_workers: 1"
    )
    recipe = recipe.replace("num_train_epochs: 2", "num_train_epochs: 4").replace(
        "eval_steps: 4", "eval_steps: 2"
    )
    whole, cut = (prepare(tmp_path / name, recipe, resid_pdrop=0.1) for name in ("whole", "cut"))
    done = launch(torchrun(), whole)
    assert done.returncode == 0, done.stderr

    command = [*torchrun(), "-m", "hf_clm", "train", "recipe.yaml", *BATCH, "2", *EVAL_BATCH, "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    silent: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, cwd=cut, env=environment, start_new_session=True, **silent) as process:
        path = cut / "run" / "metrics.jsonl"
        while process.poll() is None and not (path.exists() and '"step": 5' in path.read_text()):
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
    assert not (cut / "run" / "model.safetensors").exists()
    done = launch(torchrun(), cut)

    assert done.returncode == 0, done.stderr
    assert re.search(r"goes on   from run/checkpoint-[246]", done.stdout), done.stdout
    same = [load_file(place / "run" / "model.safetensors") for place in (whole, cut)]
    assert all(torch.equal(weight, same[1][name]) for name, weight in same[0].items())
    left_out = ("seconds", "per_second", "mfu", "peak_memory_bytes", "runtime")
    found, wanted = (
        [{k: v for k, v in e.items() if not k.endswith(left_out)} for e in read_metrics(place)]
        for place in (cut, whole)
    )
    assert found == wanted


@pytest.mark.slow
def test_torchrun_trains_the_tokenizer_once_and_both_processes_load_it(tmp_path):
    sizes = "{model_type: gpt2, n_layer: 1, n_embd: 16, n_head: 2, n_positions: 64}"
    scratch = f"model: {{init: scratch, config: {sizes}}}"
    recipe = RECIPE.replace(
        "model: {name_or_path: model}", f"{scratch}\ntokenizer: {{train: {{vocab_size: 270}}}}"
    )
    folder = prepare(tmp_path / "two", recipe)

    done = launch(torchrun(), folder)

    assert done.returncode == 0, done.stderr
    assert [entry["step"] for entry in read_metrics(folder) if "loss" in entry] == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.slow
def test_an_error_is_printed_once_and_no_process_waits_for_the_others(tmp_path):
    folder = prepare(tmp_path / "two")
    (folder / "run").mkdir()
    (folder / "run" / "mine.txt").touch()

    done = launch(torchrun(), folder)

    lines = [
        line
        for line in done.stderr.splitlines()
        if "run: the output folder holds files of an earlier run" in line
    ]
    assert done.returncode != 0
    assert [line.startswith("error: ") for line in lines] == [True]


@pytest.mark.slow
def test_two_processes_train_adapters_as_one(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    recipe = RECIPE + "lora: {r: 4}\n"
    alone, two = prepare(tmp_path / "alone", recipe), prepare(tmp_path / "two", recipe)

    done = launch(torchrun(), two)
    monkeypatch.chdir(alone)
    assert main(["train", "recipe.yaml", *BATCH, "4", *EVAL_BATCH, "4"]) == 0

    assert done.returncode == 0, done.stderr
    losses = [[entry["loss"] for entry in read_metrics(folder) if "loss" in entry] for folder in (alone, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    one, other = (load_file(folder / "run" / "adapter_model.safetensors") for folder in (alone, two))
    assert sorted(one) == sorted(other)
    for name, weight in one.items():
        torch.testing.assert_close(other[name], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_two_processes_draw_the_same_rows_of_mixed_sources(tmp_path, monkeypatch):
    """14 and 5 rows, weighed 1 to 1 until each was read once: 28 rows an epoch, packed."""
    sources = "[{path: train.jsonl, weight: 1}, {path: eval.jsonl, weight: 1}]"
    recipe = RECIPE.replace("[{path: train.jsonl, format: instruct}]", sources)
    recipe = recipe.replace(
        "eval: [{path: eval.jsonl, format: instruct}]", "mixing: {stopping_strategy: all_exhausted}"
    )
    recipe = recipe.replace("packing: none", "packing: best_fit")
    recipe = recipe.replace("eval_strategy: steps\n  eval_steps: 4\n", 'eval_strategy: "no"\n')
    alone, two = prepare(tmp_path / "alone", recipe), prepare(tmp_path / "two", recipe)

    done = launch(torchrun(), two)
    monkeypatch.chdir(alone)
    assert main(["train", "recipe.yaml", *BATCH, "4", *EVAL_BATCH, "4"]) == 0

    assert done.returncode == 0, done.stderr
    mixed = [json.loads((folder / "run" / "run.json").read_text())["mixing"] for folder in (alone, two)]
    assert mixed[0] == mixed[1]
    assert [share["rows"] for share in mixed[0]["sources"]] == [14, 14]
    assert [share["rows_left_out"] for share in mixed[0]["sources"]] == [0, 0]
    one, other = ([e for e in read_metrics(folder) if "loss" in e] for folder in (alone, two))
    for key in ("step", "tokens_seen", "target_tokens_seen"):
        assert [entry[key] for entry in other] == [entry[key] for entry in one], key
    assert [e["loss"] for e in other] == pytest.approx([e["loss"] for e in one], rel=1e-5)
