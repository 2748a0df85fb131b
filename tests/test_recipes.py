"""Every shipped recipe loads, and trains with a tiny model in place of its model."""

from pathlib import Path
from typing import Any

import pytest
from helpers import byte_tokenizer, save_folder, tiny_model, write_jsonl
from transformers import AutoModelForCausalLM

from hf_clm.recipe.recipe import load_recipe
from hf_clm.training.run import train

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "recipes").glob("[ps]*/*.yaml"))
KINDS = {
    "qwen2.5-0.5b.yaml": "qwen2",
    "lora-qwen2.5-0.5b.yaml": "qwen2",
    "gpt2-alpaca.yaml": "gpt2",
    "mrpc.yaml": "gpt2",
    "docstrings.yaml": "gpt2",
    "five-poems.yaml": "qwen2",
    "smollm2.yaml": "llama",
}
ROWS = {
    "text": {"text": "The with statement wraps a block. " * 4},
    "instruct": {"instruct": "Go on.\n", "input": "The lamp turns,", "label": "and boats come home."},
    "alpaca": {"instruction": "Name three colours.", "input": "", "output": "Red, blue and green."},
    "template": {
        "sentence1": "The lamp turns.",
        "sentence2": "A lamp is turning.",
        "title": "Lamp",
        "content": "On.",
    },
    "messages": {
        "messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "The keeper."}]
    },
    "prompt_completion": {"prompt": "def area(circle):\n", "completion": "The area of a circle."},
}
SHORT = ["--max_steps", "2", "--save_strategy", "no", "--eval_strategy", "no", "--use_cpu", "--bf16", "false"]
SHORT += ["--doctor.round_trip", "off"]


def test_all_recipes_are_found():
    assert {f"{path.parent.name}/{path.name}" for path in RECIPES} == {
        "pretrain/book.yaml",
        "pretrain/char-gpt.yaml",
        "pretrain/essays-zh.yaml",
        "pretrain/mixed.yaml",
        "pretrain/python-docs.yaml",
        "pretrain/qwen2.5-0.5b.yaml",
        "sft/docstrings.yaml",
        "sft/five-poems.yaml",
        "sft/gpt2-alpaca.yaml",
        "sft/lora-qwen2.5-0.5b.yaml",
        "sft/mrpc.yaml",
        "sft/poems.yaml",
        "sft/qwen2.5-0.5b.yaml",
        "sft/smollm2.yaml",
    }


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_recipe_loads_and_its_stage_is_its_folder(path):
    assert load_recipe(path).stage == path.parent.name


def save_tokenizer(folder: Path) -> str:
    byte_tokenizer(pad=None).save_pretrained(folder)
    return str(folder)


def numbered(value: Any, number: int) -> Any:
    """A text, or the content of each message, with a number that makes the record its own."""
    if isinstance(value, list):
        return [{**turn, "content": f"{turn['content']} {number}"} for turn in value]
    return f"{value} {number}"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_recipe_trains_two_steps(path, tmp_path):
    recipe = load_recipe(path)
    first = recipe.data.train[0]
    texts = ROWS["template" if first.template else str(first.format)]
    label = {"label": "1"} if first.template else {}
    rows = [{key: numbered(text, n) for key, text in texts.items()} | label for n in range(100)]
    words = [
        "--data.train",
        write_jsonl(tmp_path / "rows.jsonl", rows),
        "--output_dir",
        str(tmp_path / "run"),
    ]
    words += ["--data.eval", "[]"] if recipe.data.eval else []
    words += [*SHORT, "--load_best_model_at_end", "false", "--early_stopping", "null"]
    if recipe.model.init == "pretrained":
        model = tiny_model(KINDS[path.name], vocab_size=300)
        words += ["--model.name_or_path", save_folder(tmp_path / "model", model, byte_tokenizer(pad=None))]
        words += ["--data.max_length", "256"]
    elif recipe.model.config["model_type"] == "gpt2":
        words += ["--model.config.n_layer", "1", "--model.config.n_embd", "16", "--model.config.n_head", "2"]
    if first.format == "messages":
        words += ["--tokenizer.chat_template", "chatml"]
    if recipe.tokenizer.name_or_path:
        words += ["--tokenizer.name_or_path", save_tokenizer(tmp_path / "tokenizer")]

    result = train(load_recipe(path, words))

    assert result["status"] == "done"
    assert result["steps_done"] == 2
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run").config.use_cache is True
