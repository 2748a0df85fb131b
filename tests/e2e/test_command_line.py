"""From a data file to an answer, on the command line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from forked import Forked
from helpers import write_jsonl

WORDS = ("red", "green", "blue", "white", "black", "grey", "gold", "pink")
DOCUMENTS = [{"text": f"The {word} door opens. Behind the {word} door is a {word} room.\n"} for word in WORDS]
ANSWERS = {"red": "A cherry.", "green": "The forest.", "blue": "Sky and sea.", "white": "Snow."}
QUESTIONS = [{"instruct": word, "input": "", "label": answer} for word, answer in ANSWERS.items()]
PRETRAIN = """\
stage: pretrain
model:
  init: scratch
  config: {model_type: gpt2, n_layer: 2, n_embd: 64, n_head: 4, n_positions: 96,
           resid_pdrop: 0.0, embd_pdrop: 0.0, attn_pdrop: 0.0}
tokenizer:
  train: {vocab_size: 320}
data:
  train: documents.jsonl
  max_length: 64
samples: {prompts: [The red], every_steps: 10, max_new_tokens: 8}
train:
  output_dir: runs/base
  max_steps: 20
  per_device_train_batch_size: 4
  learning_rate: 1e-2
  use_cpu: true
"""
SFT = """\
stage: sft
model:
  name_or_path: runs/base
data:
  train: [{path: questions.jsonl, format: instruct}]
  max_length: 64
train:
  output_dir: runs/answers
  max_steps: 120
  per_device_train_batch_size: 4
  learning_rate: 1e-2
  use_cpu: true
"""
PLAIN = """\
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
inputs = tokenizer(sys.argv[2], return_tensors="pt", return_token_type_ids=False)
output = model.generate(**inputs, max_new_tokens=30, do_sample=False)[0]
assert model.config.use_cache and model.generation_config.use_cache
assert "hf_clm" not in sys.modules
print(tokenizer.decode(output[inputs["input_ids"].shape[1]:], skip_special_tokens=True))
"""


def run(folder: Path, *words: str) -> str:
    """Returns the output of a command, and requires that it does not warn."""
    process = Forked(folder, ["-m", "hf_clm", *words])
    assert process.wait() == 0, process.read().err
    assert "Warning" not in process.read().err and "[transformers]" not in process.read().err
    return process.read().out


@pytest.mark.slow
def test_pretrain_then_fine_tune_then_answer(tmp_path):
    write_jsonl(tmp_path / "documents.jsonl", DOCUMENTS)
    write_jsonl(tmp_path / "questions.jsonl", QUESTIONS)
    (tmp_path / "pretrain.yaml").write_text(PRETRAIN)
    (tmp_path / "sft.yaml").write_text(SFT)

    base = run(tmp_path, "train", "pretrain.yaml")
    tuned = run(tmp_path, "train", "sft.yaml")
    answers = run(tmp_path, "generate", "runs/answers", "--file", "questions.jsonl", "--json")
    figures = json.loads(run(tmp_path, "evaluate", "runs/answers", "questions.jsonl", "--json"))
    fresh = [sys.executable, "-c", PLAIN, "runs/answers", "blue"]
    plain = subprocess.run(fresh, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    facts = json.loads((tmp_path / "runs" / "base" / "run.json").read_text())
    assert "random weights" in base and "sample at step 10" in base
    assert facts["loss_after"] < facts["unigram_entropy"] < facts["loss_before"]
    assert "runs/base" in tuned
    proof = json.loads((tmp_path / "runs" / "answers" / "run.json").read_text())["proof"]
    assert (proof["train"]["certificate"]["valid"], proof["self_test"]["documents"]) == (True, 4)
    assert proof["round_trip"]["logit_difference"] < 1e-5
    assert [json.loads(line)["text"] for line in answers.splitlines()] == [*ANSWERS.values()]
    assert (figures["exact_match"], figures["stopped"], figures["token_accuracy"]) == (1.0, 1.0, 1.0)
    assert plain == "Sky and sea.\n"
