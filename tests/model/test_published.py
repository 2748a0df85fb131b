"""Recipes of published systems, with random weights and the shipped texts; in their true shapes if large.

Otherwise, they have the true vocabulary and positions, but a single narrow layer.
"""

import json
from pathlib import Path

import pytest
import torch
from helpers import byte_tokenizer
from tokenizers import models
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hf_clm.recipe.recipe import load_recipe
from hf_clm.training.run import train

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes"
SHORT = ["--use_cpu", "--doctor.round_trip", "off", "--doctor.self_test", "false"]
UNSAVED = ["--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false"]
QWEN = {  # Qwen2.5-0.5B
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}
NARROW = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
NARROW_GPT2 = ["--model.config.n_layer", "1", "--model.config.n_embd", "16", "--model.config.n_head", "2"]


def both(narrow: object, true: object) -> pytest.MarkDecorator:
    """Parametrizes a test with the narrow shape and, marked large, the true shape."""
    large = pytest.param(true, marks=[pytest.mark.large, pytest.mark.timeout(1200)], id="true shape")
    return pytest.mark.parametrize("shape", [pytest.param(narrow, id="narrow"), large])


def qwen_folder(folder: Path, sizes: dict[str, int | bool]) -> str:
    """Writes a configuration without weights, and a byte tokenizer with as many ids as that of Qwen2.5."""
    AutoConfig.for_model("qwen2", **sizes).save_pretrained(folder)
    tokenizer = byte_tokenizer(pad=None)
    vocab = tokenizer.get_vocab()
    vocab |= {f"unused {number}": number for number in range(len(vocab), 151665)}
    tokenizer.backend_tokenizer.model = models.BPE(vocab=vocab, merges=[])
    tokenizer.save_pretrained(folder)
    return str(folder)


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]


@both((QWEN | NARROW, 2432864), (QWEN, 494032768))
def test_qwen_learns_five_poems_with_a_pad_token_in_an_unused_row(tmp_path, monkeypatch, shape):
    sizes, parameters = shape
    monkeypatch.chdir(ROOT)
    words = ["--model.name_or_path", qwen_folder(tmp_path / "qwen", sizes), "--model.init", "scratch", *SHORT]
    words += [
        "--output_dir",
        str(tmp_path / "run"),
        "--max_steps",
        "2",
        "--samples",
        "null",
        "--bf16",
        "true",
    ]

    result = train(load_recipe(RECIPES / "sft/five-poems.yaml", words))

    assert (result["parameters"], result["train"]["input_rows"], result["steps_done"]) == (parameters, 5, 2)
    assert AutoTokenizer.from_pretrained(tmp_path / "run").pad_token_id == 151665
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run", dtype=torch.bfloat16)
    assert model.get_input_embeddings().weight.shape == (151936, sizes["hidden_size"])
    assert 10 < result["loss_before"] < 13  # ln 151,936 is 11.9


@both((NARROW_GPT2, 1615680), ([], 12 * 7087872 + (2 * 50258 + 257) * 768 + 2 * 768))
def test_the_book_trains_gpt2_and_logs_both_losses(tmp_path, monkeypatch, shape):
    narrow, parameters = shape
    monkeypatch.chdir(ROOT)
    byte_tokenizer(pad=None).save_pretrained(tmp_path / "tokenizer")
    words = ["--tokenizer.name_or_path", str(tmp_path / "tokenizer"), "--max_steps", "5", *SHORT, *narrow]
    words += ["--output_dir", str(tmp_path / "run"), "--model.config.vocab_size", "50258", "--bf16", "true"]

    result = train(load_recipe(RECIPES / "pretrain/book.yaml", [*words, "--samples.max_new_tokens", "2"]))

    assert result["parameters"] == parameters
    assert result["train"]["rows"] == 15  # 3,700 letters in rows of 256
    entries = metrics(tmp_path / "run")
    assert [entry["step"] for entry in entries if "eval_loss" in entry] == [0, 5]
    watched = [entry for entry in entries if "eval_train_loss" in entry]
    assert [(entry["step"], entry["eval_train_target_tokens"]) for entry in watched] == [(0, 2560), (5, 2560)]
    assert (tmp_path / "run" / "loss.pdf").is_file()


@both((NARROW_GPT2, 1, 16), ([], 12, 768))
def test_the_essays_are_trained_in_windows_after_their_titles(tmp_path, monkeypatch, shape):
    narrow, layers, width = shape
    monkeypatch.chdir(ROOT)
    words = ["--output_dir", str(tmp_path / "run"), "--max_steps", "2", *SHORT, *UNSAVED, *narrow]

    result = train(load_recipe(RECIPES / "pretrain/essays-zh.yaml", [*words, "--bf16", "true"]))

    assert (result["train"]["input_rows"], result["evaluation"]["input_rows"]) == (18, 2)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<eod>", "<pad>")
    assert len(tokenizer("<sep>")["input_ids"]) == 1
    config = AutoConfig.from_pretrained(tmp_path / "run")
    assert (config.n_layer, config.n_embd, config.n_positions) == (layers, width, 1024)


def test_there_are_twenty_essays_with_titles():
    files = sorted((ROOT / "data/pretrain/essays-zh").glob("*.txt"))
    texts = [file.read_text(encoding="utf-8") for file in files]

    assert len(texts) == len({text.split("\n")[0] for text in texts}) == 20
    assert all(2 <= len(text.split("\n")[0]) <= 8 and 150 <= len(text) <= 400 for text in texts)
    assert all(text.endswith("\n") and "\n\n" not in text for text in texts)
