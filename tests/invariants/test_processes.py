"""Two processes make up one run: the same metrics, one set of files, each line printed once."""

import json
import shutil
import socket
from collections import Counter
from pathlib import Path

import pytest
import torch
from forked import Ended, finish, start_ranks
from helpers import write_jsonl
from launched import (
    BATCH,
    EVAL_BATCH,
    HELD_OUT,
    RECIPE,
    ROOT,
    accelerate,
    launch,
    prepare,
    read_metrics,
    train_on_two,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_clm.cli import main

FILES = {
    *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"),
    *("tokenizer_config.json", "recipe.yaml", "run.json", "metrics.jsonl", "samples.jsonl"),
    *("ledger.parquet", "loss.png", "loss.pdf", "README.md", "label_rows.jsonl", "report.html"),
    *("SEALED.json", "checkpoint-4", "checkpoint-8"),
}


@pytest.fixture(scope="module", params=["sft", "pretrain"])
def runs(request, tmp_path_factory) -> tuple[str, Path, Path, str]:
    """Returns the stage, a run of one process with the global batch of two, a run of two, and its output.

    The two processes of SFT are started by ``accelerate launch``.
    """
    stage, folder = request.param, tmp_path_factory.mktemp("processes")
    recipe = RECIPE.replace("stage: sft", f"stage: {stage}")
    routed = {"kind": "mixtral", "output_router_logits": True, "router_aux_loss_coef": 1.0}
    model = routed if stage == "pretrain" else {}  # with two losses, each must be the same
    alone, two = (prepare(folder / name, recipe, **model) for name in ("alone", "two"))
    if stage == "sft":
        done = launch(accelerate("cpu"), two)
        assert done.returncode == 0, done.stderr
        printed = done.stdout + done.stderr
    else:
        ended = train_on_two(two)
        printed = ended.out + ended.err
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(alone)
        assert main(["train", "recipe.yaml", *BATCH, "4", *EVAL_BATCH, "4"]) == 0
    return stage, alone, two, printed


@pytest.mark.slow
def test_two_processes_train_like_one(runs):
    stage, alone, folder, printed = runs
    one, two = read_metrics(alone), read_metrics(folder)
    assert [entry["step"] for entry in two] == [entry["step"] for entry in one]
    for key in ("loss", "grad_norm", "eval_loss"):
        assert [e[key] for e in two if key in e] == pytest.approx(
            [e[key] for e in one if key in e], rel=1e-5
        ), key
    counts = ("tokens_seen", "target_tokens_seen", "token_accuracy", "eval_token_accuracy")
    for key in ("learning_rate", *counts):
        assert [e[key] for e in two if key in e] == [e[key] for e in one if key in e], key
    # sft: 2 + 4 + ... + 10, 5 end tokens; pretrain: also 7 letters per instruction, minus each first one
    targets = {"sft": 35, "pretrain": 65}[stage]
    assert {e["eval_target_tokens"] for e in two if "eval_loss" in e} == {targets}
    template = {"chat_template.jinja"} if stage == "sft" else set()
    assert {path.name for path in (folder / "run").iterdir()} == FILES | template
    assert [path.name for path in (folder / "run").rglob("*.bin")] == []
    facts = json.loads((folder / "run" / "run.json").read_text())
    assert (facts["processes"], facts["rows_per_step"], facts["steps"], facts["steps_done"]) == (2, 4, 8, 8)
    starts = ("recipe", "step", "sample", "done", "written", "next")
    shown = [line.strip() for line in printed.splitlines() if line.strip().startswith(starts)]
    # 3 at the start, 8 steps, 3 evaluations, 2 samples, 3 at the end
    assert len(shown) == len(set(shown)) == 19
    assert "Traceback" not in printed


@pytest.mark.slow
def test_the_evaluation_of_two_processes_equals_that_of_the_plain_model(runs):
    """5 rows on 2 processes with batches of 2: each row is counted exactly once."""
    stage, _, two, _ = runs
    model = AutoModelForCausalLM.from_pretrained(two / "model")
    total, count = 0.0, 0
    for n in range(1, 6):
        prompt, answer = f"tell {n}\n".encode(), ("ab" * n).encode()
        ids = torch.tensor([[*prompt, *answer, 256]])
        with torch.no_grad():
            nll = -model(ids).logits.double().log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        learned = nll[len(prompt) - 1 :] if stage == "sft" else nll
        total, count = total + float(learned.sum()), count + len(learned)

    first = next(entry for entry in read_metrics(two) if "eval_loss" in entry)
    assert (first["step"], first["eval_target_tokens"]) == (0, count)
    assert first["eval_loss"] == pytest.approx(total / count, rel=1e-6)


@pytest.mark.slow
def test_two_processes_update_with_muon_like_one(tmp_path):
    """Muon iterates in bfloat16, so sums of gradients in another order are rounded to other updates."""
    section = "optimizer: {name: muon, layer_decay: 0.8, freeze: [embed]}\ntrain:"
    recipe = RECIPE.replace("samples: {prompts: [say 2], max_new_tokens: 3}\ntrain:", section)
    alone, two = (prepare(tmp_path / name, recipe) for name in ("alone", "two"))

    train_on_two(two)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(alone)
        assert main(["train", "recipe.yaml", *BATCH, "4", *EVAL_BATCH, "4"]) == 0

    one, other = read_metrics(alone), read_metrics(two)
    for key in ("loss", "grad_norm", "eval_loss"):
        values = [entry[key] for entry in one if key in entry]
        assert [entry[key] for entry in other if key in entry] == pytest.approx(values, rel=1e-3), key


@pytest.mark.slow
def test_metrics_are_communicated_once_per_log_event_and_a_single_row_is_evaluated(tmp_path):
    folder = prepare(tmp_path / "two")
    write_jsonl(folder / "eval.jsonl", [HELD_OUT[2]])  # 1 row, 6 letters and the end token
    program = [str(ROOT / "tests" / "counted_run.py")]
    words = ["--logging_steps", "3", "--samples", "null", "--save_strategy", "no"]

    train_on_two(folder, *words, "--data.eval_train_rows", "3", program=program)

    metrics = read_metrics(folder)
    assert {entry["eval_target_tokens"] for entry in metrics if "eval_loss" in entry} == {7}
    watched = {entry["eval_train_target_tokens"] for entry in metrics if "eval_train_loss" in entry}
    assert watched == {14}  # xy, xyzxyz, xxx and 3 end tokens
    # log events: every third step, at evaluations, first and last step; evaluations: at 0, 4 and 8
    assert [entry["step"] for entry in metrics if "loss" in entry] == [1, 3, 4, 6, 8]
    for rank in range(2):
        calls = json.loads((folder / f"collectives-{rank}.json").read_text())
        counts = Counter((name, *shape, dtype.removeprefix("torch.")) for name, shape, dtype in calls)
        assert counts["all_reduce", 5, "int64"] == 5  # tokens, targets, correct ones: per log event
        assert counts["all_reduce", 3, "float64"] == 6  # per evaluation, of held-out or watched rows
        assert counts["all_gather", 1, "float32"] == 5  # the Trainer's loss: per log event
        assert counts["all_gather", 1, "int64"] == 8  # the Trainer's number of targets: per step


@pytest.mark.slow
def test_two_processes_save_the_same_weights_and_samples_as_one(runs):
    _, alone, two, _ = runs
    one, other = (load_file(folder / "run" / "model.safetensors") for folder in (alone, two))
    assert sorted(one) == sorted(other)
    for name, weight in one.items():
        torch.testing.assert_close(other[name], weight, rtol=1e-4, atol=1e-5)
    texts = [(folder / "run" / "samples.jsonl").read_text().splitlines() for folder in (alone, two)]
    assert [json.loads(line)["step"] for line in texts[1]] == [0, 8]
    assert texts[0] == texts[1]


def cut_off(two: Path, folder: Path) -> Path:
    """Restores the run to its state between its two saves."""
    shutil.copytree(two, folder)
    shutil.rmtree(folder / "run" / "checkpoint-8")
    (folder / "run" / "model.safetensors").unlink()
    return folder


def check_resumed(folder: Path, whole: Path) -> None:
    steps = [entry["step"] for entry in read_metrics(folder) if "loss" in entry]
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8]
    expected, result = (load_file(place / "run" / "model.safetensors") for place in (whole, folder))
    assert [name for name, weight in expected.items() if not torch.equal(result[name], weight)] == []


@pytest.mark.slow
def test_two_processes_resume_from_a_checkpoint_to_the_same_weights(runs, tmp_path):
    _, _, two, _ = runs
    again = cut_off(two, tmp_path / "again")

    train_on_two(again, "--resume_from_checkpoint", "run/checkpoint-4")

    check_resumed(again, two)


@pytest.mark.large
def test_the_launcher_file_of_ddp_makes_one_run_without_a_gpu(runs, tmp_path):
    """Without use_cpu, accelerate would let each process train by itself."""
    _, _, two, _ = runs
    again = cut_off(two, tmp_path / "again")

    done = launch(
        accelerate("ddp"), again, "--resume_from_checkpoint", "run/checkpoint-4", "--use_cpu", "false"
    )

    assert done.returncode == 0, done.stderr
    check_resumed(again, two)


def test_the_tokenizer_is_trained_once_and_loaded_by_both_processes(tmp_path):
    sizes = "{model_type: gpt2, n_layer: 1, n_embd: 16, n_head: 2, n_positions: 64}"
    scratch = f"model: {{init: scratch, config: {sizes}}}"
    recipe = RECIPE.replace(
        "model: {name_or_path: model}", f"{scratch}\ntokenizer: {{train: {{vocab_size: 270}}}}"
    )
    folder = prepare(tmp_path / "two", recipe)

    train_on_two(folder, "--max_steps", "2", "--samples", "null")

    assert [entry["step"] for entry in read_metrics(folder) if "loss" in entry] == [1, 2]


def test_an_error_is_printed_once_and_no_process_hangs(tmp_path):
    folder = prepare(tmp_path / "two")
    (folder / "run").mkdir()
    (folder / "run" / "mine.txt").touch()

    ended = finish(start_ranks([folder, folder]))

    said = "error: run: the output folder contains files, but no recipe.yaml of a run"
    assert ended[0].err.startswith(said)
    assert said not in ended[1].err
    assert 0 not in [one.code for one in ended]


LOST = "error on rank 1: another process of this run has ended or does not respond"


def check_said_by_the_first(ended: list[Ended], code: int, *, says: str) -> None:
    """Checks the error line and exit code of the first process, and that the other reports losing it."""
    first, other = ended
    assert (first.code, other.code) == (code, 6)
    assert first.err.startswith(f"error: {says}")
    assert other.err.startswith(LOST)
    assert [one.err.count("\n") for one in ended] == [1, 1]


def test_an_error_on_the_first_rank_alone_ends_the_other_with_one_line(tmp_path):
    folder = prepare(tmp_path / "two")

    ended = finish(start_ranks([folder, folder], "--resume_from_checkpoint", "nothing"))

    check_said_by_the_first(ended, 2, says="nothing: no checkpoint to resume from; fix: ")


def test_a_rank_that_waits_for_prepared_data_ends_if_preparation_fails(tmp_path):
    folder = prepare(tmp_path / "two")

    ended = finish(start_ranks([folder, folder], "--data.max_length", "2"))

    check_said_by_the_first(ended, 3, says="train.jsonl: ")


def test_a_data_error_on_every_rank_is_reported_once_and_no_rank_hangs(tmp_path):
    folder = prepare(tmp_path / "two")
    write_jsonl(folder / "train.jsonl", [{"instruct": 5, "input": "", "label": "x"}])

    ended = finish(start_ranks([folder, folder]))

    assert [(one.code, one.err) for one in ended] == [
        (3, "error: train.jsonl:1: key 'instruct': expected str; got int\n"),
        (3, ""),
    ]


def test_machines_that_do_not_share_the_output_folder_are_rejected_first(tmp_path):
    one, other = prepare(tmp_path / "one"), prepare(tmp_path / "other")
    (other / "run").mkdir()
    (other / "run" / "mine.txt").touch()  # by itself, it would be rejected: it is not a run

    ended = finish(start_ranks([one, other]))

    said = (
        "run: the processes do not see the same output folder (it differs on "
        f"{socket.gethostname()}); fix: set --output_dir to a folder on a disk that all machines share\n"
    )
    assert [(one.code, one.err) for one in ended] == [(6, f"error: {said}"), (6, f"error on rank 1: {said}")]
    assert not (one / "run").exists()
    assert [path.name for path in (other / "run").iterdir()] == ["mine.txt"]


@pytest.mark.slow
def test_two_processes_train_adapters_like_one(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    recipe = RECIPE + "lora: {r: 4}\n"
    alone, two = prepare(tmp_path / "alone", recipe), prepare(tmp_path / "two", recipe)

    train_on_two(two)
    monkeypatch.chdir(alone)
    assert main(["train", "recipe.yaml", *BATCH, "4", *EVAL_BATCH, "4"]) == 0

    losses = [[entry["loss"] for entry in read_metrics(folder) if "loss" in entry] for folder in (alone, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    one, other = (load_file(folder / "run" / "adapter_model.safetensors") for folder in (alone, two))
    assert sorted(one) == sorted(other)
    for name, weight in one.items():
        torch.testing.assert_close(other[name], weight, rtol=1e-3, atol=1e-4)
