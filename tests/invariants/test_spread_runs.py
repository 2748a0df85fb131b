"""A complete run with accelerate's FSDP2, on two CPU processes, equals the run of one process.

See ``spread_on_cpu.py``. Not tested without a GPU: NCCL, mixed precision of CUDA kernels, offloading.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from forked import run_ranks
from launched import ACCELERATE, BATCH, BIN, EVAL_BATCH, RECIPE, ROOT, TWO_ROWS, launch, prepare, read_metrics
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_clm.cli import main

UNSAMPLED = RECIPE.replace("samples: {prompts: [say 2], max_new_tokens: 3}\n", "")
PROGRAM = [str(ROOT / "tests" / "spread_on_cpu.py")]
CHECKPOINTING = {"activation_checkpointing: false": "activation_checkpointing: true"}
HYBRID = "parallelism_config: {parallelism_config_dp_replicate_size: 2, parallelism_config_dp_shard_size: 2}"
TIED = {"tie_word_embeddings": True}
# The model; additional options of the sharded run; changes to fsdp2.yaml.
CASES = {
    "untied": ({}, [], {}),
    "tied": (TIED, [], CHECKPOINTING),
    "in parts": (TIED, [], {"type: FULL_STATE_DICT": "type: SHARDED_STATE_DICT"}),
    "lora": ({}, ["--lora", "{r: 4}"], {}),
    "muon": ({}, ["--optimizer", "{name: muon, freeze: [embed], layer_decay: 0.9}"], {}),
    "hybrid": ({}, [*BATCH, "1", *EVAL_BATCH, "1"], {"num_processes: 2": f"num_processes: 4\n{HYBRID}"}),
}
# Muon iterates in bfloat16, so sums of gradients in another order are rounded to other updates.
TOLERANCES = {"muon": (1e-3, 8e-3)}
SAME_ALONE = {"in parts": "tied", "hybrid": "untied"}


def spread(folder: Path, *words: str, changes: dict[str, str] | None = None) -> Path:
    """Runs with fsdp2.yaml, with changes to its text, on two processes."""
    text = (ACCELERATE / "fsdp2.yaml").read_text()
    for old, new in (changes or {}).items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (folder / "fsdp2.yaml").write_text(text)
    count, settings = read_launcher_file(folder / "fsdp2.yaml")
    program = [*PROGRAM, "train", "recipe.yaml", *TWO_ROWS]
    run_ranks(folder, *words, program=program, count=count, **settings)
    return folder


def read_launcher_file(file: Path) -> tuple[int, dict[str, str]]:
    """Returns the number of processes that ``accelerate launch`` starts, and their environment variables."""
    words = launch_command_parser().parse_args(["--config_file", str(file), *PROGRAM])
    words, *_ = _validate_launch_command(words)
    result = prepare_multi_gpu_env(words)
    return words.num_processes, {
        name: value for name, value in result.items() if os.environ.get(name) != value
    }


def train_alone(folder: Path, *words: str) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", "recipe.yaml", *BATCH, "4", *EVAL_BATCH, "4", *words]) == 0
    return folder


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = (folder / "run").glob("*model.safetensors")
    return load_file(path)


@pytest.fixture(scope="module")
def run_once(tmp_path_factory) -> Callable[..., Path]:
    """Performs each run when a test first needs it: ``(alone or spread, case)`` -> its folder."""
    folder, result = tmp_path_factory.mktemp("runs"), {}

    def run(how: str, case: str) -> Path:
        if how == "alone":
            case = SAME_ALONE.get(case, case)
        model, words, changes = CASES[case]
        if (how, case) not in result:
            place = prepare(folder / f"{how} {case}", UNSAMPLED, **model)
            made = train_alone(place, *words) if how == "alone" else spread(place, *words, changes=changes)
            result[how, case] = made
        return result[how, case]

    return run


@pytest.mark.parametrize("case", CASES)
def test_a_sharded_run_equals_the_run_of_one_process(run_once, case):
    if case == "lora":
        pytest.importorskip("peft")
    alone, two = run_once("alone", case), run_once("spread", case)
    rel, atol = TOLERANCES.get(case, (1e-5, 1e-4))

    expected, result = read_metrics(alone), read_metrics(two)
    for key in ("loss", "grad_norm", "eval_loss", "token_accuracy", "tokens_seen"):
        values = [entry[key] for entry in expected if key in entry]
        assert len(values) >= 3, key
        assert [entry[key] for entry in result if key in entry] == pytest.approx(values, rel=rel), key
    one, other = load_weights(alone), load_weights(two)
    assert sorted(one) == sorted(other)
    for name, weight in one.items():
        torch.testing.assert_close(other[name], weight, rtol=1e-3, atol=atol)
    if case != "lora":
        AutoModelForCausalLM.from_pretrained(two / "run")


@pytest.mark.parametrize("case", ["tied", "in parts", "muon"])
def test_a_sharded_run_resumes_exactly(run_once, tmp_path, case):
    whole = run_once("spread", case)
    again = shutil.copytree(whole, tmp_path / "again")
    shutil.rmtree(again / "run" / "checkpoint-8")
    (again / "run" / "model.safetensors").unlink()

    _, words, changes = CASES[case]
    spread(again, *words, "--resume_from_checkpoint", "run/checkpoint-4", changes=changes)

    expected, result = load_weights(whole), load_weights(again)
    same = {name: torch.equal(result[name], weight) for name, weight in expected.items()}
    assert same == dict.fromkeys(expected, True)


@pytest.mark.slow
def test_accelerate_launches_a_sharded_run(run_once, tmp_path):
    folder = prepare(tmp_path / "two", UNSAMPLED)
    command = [str(BIN / "accelerate"), "launch", "--config_file", str(ACCELERATE / "fsdp2.yaml")]

    done = launch(command, folder, program=PROGRAM)

    assert done.returncode == 0, done.stderr
    losses = [
        [entry["loss"] for entry in read_metrics(place) if "loss" in entry]
        for place in (folder, run_once("spread", "untied"))
    ]
    assert losses[0] == losses[1]


def test_a_sharded_run_in_bfloat16_does_not_round_its_loss(tmp_path):
    words = ["--bf16", "true", "--data.packing", "best_fit"]
    alone = train_alone(prepare(tmp_path / "alone", UNSAMPLED), *words)
    two = spread(prepare(tmp_path / "two", UNSAMPLED), *words)

    expected, result = (
        [entry["loss"] for entry in read_metrics(folder) if "loss" in entry] for folder in (alone, two)
    )
    assert result == pytest.approx(expected, rel=1e-3)
    rounded = torch.tensor(result).bfloat16().tolist()
    assert [a == b for a, b in zip(result, rounded, strict=True)] == [False] * len(result)
    assert {weight.dtype for weight in load_weights(two).values()} == {torch.float32}
