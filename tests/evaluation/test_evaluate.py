"""``hf-clm evaluate`` reads and labels data as in the run, so it reproduces the run's eval loss."""

import json
from argparse import Namespace

import pytest
from helpers import byte_tokenizer, save_folder, tiny_model, write_jsonl

from hf_clm.cli import main
from hf_clm.evaluation.evaluate import evaluate_run
from hf_clm.recipe.recipe import load_recipe
from hf_clm.text.tokenizer import use_chat_template
from hf_clm.training.run import train

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}] * 2
HELD_OUT = [
    {"talk": [*CHAT, {"role": "user", "content": "So?"}, {"role": "assistant", "content": "x" * n}]}
    for n in (1, 5)
]
RECIPE = """\
stage: sft
model: {name_or_path: model}
data:
  train: [{path: train.jsonl, format: messages, fields: {messages: talk}}]
  eval: [{path: eval.jsonl, format: messages, fields: {messages: talk}}]
  max_length: 400
  train_on: last_turn
  special_tokens_in_text: allow
doctor: {round_trip: "off", self_test: false}
train: {output_dir: run, max_steps: 1, use_cpu: true, bf16: false, save_strategy: "no"}
"""


@pytest.mark.parametrize("drop_last", ["false", "true"])
def test_evaluating_the_eval_set_of_a_run_reproduces_its_eval_loss(drop_last, tmp_path, monkeypatch):
    """Uses the columns, turns and policy of the recipe; 2 rows do not fill an eval batch of 8."""
    monkeypatch.chdir(tmp_path)
    tokenizer = byte_tokenizer()
    use_chat_template(tokenizer, "chatml")
    save_folder(tmp_path / "model", tiny_model(max_position_embeddings=512), tokenizer)
    write_jsonl(tmp_path / "train.jsonl", [{"talk": CHAT}] * 20)
    write_jsonl(tmp_path / "eval.jsonl", HELD_OUT)
    (tmp_path / "recipe.yaml").write_text(RECIPE)

    result = train(
        load_recipe("recipe.yaml", ["--dataloader_drop_last", drop_last, "--per_device_train_batch_size=2"])
    )
    options = {
        "run": "run",
        "data": ["eval.jsonl"],
        "choices": None,
        "format": None,
        "stage": None,
        "max_length": None,
    }
    options |= {
        "batch_size": 2,
        "max_new_tokens": 4,
        "generate": False,
        "no_generate": False,
        "before": None,
        "device": "cpu",
        "dtype": None,
    }
    metrics = evaluate_run(Namespace(**options)).to_json()

    assert metrics["target_tokens"] == 1 + 5 + 2  # two last turns, each with its stop token
    assert metrics["loss"] == pytest.approx(result["loss_after"], rel=1e-5)
    assert metrics["asked"] == 2


def test_skipped_lines_are_counted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tokenizer = byte_tokenizer()
    use_chat_template(tokenizer, "chatml")
    save_folder(tmp_path / "run", tiny_model(max_position_embeddings=512), tokenizer)
    (tmp_path / "recipe.yaml").write_text(
        RECIPE.replace("  max_length", "  on_bad_record: drop\n  max_length")
    )
    (tmp_path / "recipe.yaml").rename(tmp_path / "run" / "recipe.yaml")
    write_jsonl(tmp_path / "eval.jsonl", [*HELD_OUT, {"talk": []}])

    assert main(["evaluate", "run", "eval.jsonl", "--no_generate", "--device", "cpu", "--json"]) == 0

    metrics = json.loads(capsys.readouterr().out)
    assert (metrics["examples"], metrics["skipped"]) == (2, 1)


def test_a_missing_run_is_reported_before_the_data_are_read(capsys):
    assert main(["evaluate", "./no-run", "no-data.jsonl"]) == 4
    assert capsys.readouterr().err.startswith("error: run or model: no such folder; got './no-run'; fix:")
