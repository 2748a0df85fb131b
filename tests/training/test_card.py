"""The model card of a run."""

from pathlib import Path

import pytest
from ruamel.yaml import YAML

from hf_clm.recipe.sections import Card
from hf_clm.run_folder import RunFolder, RunRecord
from hf_clm.training.card import base_model, write_card

HASH = "ab" * 32
RUN = {
    "stage": "sft",
    "model": "Qwen/Qwen2.5-0.5B",
    "from_scratch": False,
    "format": "instruct",
    "parameters": 1000,
    "trained_parameters": 1000,
    "train": {
        "files": ["/home/ann/secret/poems.jsonl"],
        "input_rows": 48,
        "tokens": 2911,
        "target_tokens": 1099,
        "fates": {"used": 47, "dropped: too | long": 1},
    },
    "evaluation": None,
    "steps_done": 18,
    "tokens_seen": 8733,
    "tokens_per_second": 4297.4,
    "seconds": 5400.0,
    "processes": 1,
    "device": "cpu",
    "precision": "float32",
    "evaluated": {"eval_loss": [6.958, 5.8523], "eval_token_accuracy": [0.002, 0.076]},
    "proof": {"train": {"certificate": {"content_hash": HASH}}},
    "versions": {"python": "3.11", "torch": "2.13"},
}


def card_of(folder: Path, content: dict, *, examples: tuple[str, ...] = (), **about) -> tuple[dict, str]:
    """Returns the front matter, and the text after it."""
    (folder / "recipe.yaml").write_text("stage: sft\n", encoding="utf-8")
    run = RunFolder(folder, RunRecord.model_validate(content), [], [], [], [], 0)
    write_card(run, Card(**about), examples=examples)
    _, front, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return YAML(typ="safe").load(front), text


def test_the_front_matter_has_the_metadata_for_the_hub(tmp_path):
    front, _ = card_of(tmp_path, RUN, license="apache-2.0", language=["zh"])

    assert front == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["hf_clm", "sft"],
        "base_model": "Qwen/Qwen2.5-0.5B",
        "base_model_relation": "finetune",
        "license": "apache-2.0",
        "language": ["zh"],
    }


def test_adapters_name_their_base_model_and_load_with_peft(tmp_path):
    front, text = card_of(tmp_path, {**RUN, "trained_parameters": 10})

    assert (front["library_name"], front["base_model_relation"]) == ("peft", "adapter")
    assert front["tags"] == ["hf_clm", "sft", "lora"]
    assert "AutoPeftModelForCausalLM.from_pretrained" in text


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({}, "Qwen/Qwen2.5-0.5B"),
        ({"from_scratch": True}, None),
        ({"model": "/home/ann/qwen"}, None),
        ({"model": "./qwen"}, None),
        ({"model": "tests"}, None),
    ],
)
def test_a_local_folder_is_not_named_as_the_base_model(change, name, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])

    assert base_model(RunRecord.model_validate({**RUN, **change})) == name


def test_the_text_has_the_figures_and_the_hash_and_names_files_without_their_folders(tmp_path):
    _, text = card_of(tmp_path, RUN)

    for line in (
        "48 records with 2,911 tokens, 1,099 of them targets, 18 steps",
        "Evaluated on training data. Losses are in nats per target token.",
        "| Evaluation loss | 6.9580 -> 5.8523 |",
        "| Evaluation accuracy | 0.2% -> 7.6% |",
        "| Time | 1h30m |",
        "| Device | 1 x cpu, float32 |",
        f"| train | poems.jsonl | 1 dropped: too \\| long, 47 used | `{HASH}` |",
        "![loss](loss.png)",
        "python 3.11, torch 2.13",
    ):
        assert line in text
    assert "/home/ann" not in text and "Examples" not in text


def test_the_figures_of_sets_with_names_of_their_own_and_of_answers_are_in_the_table(tmp_path):
    named = {"eval_general_loss": [3.274, 3.304], "eval_chrf": [8.5, 61.25]}

    _, text = card_of(tmp_path, {**RUN, "evaluated": {**RUN["evaluated"], **named}})

    assert "| Evaluation: general loss | 3.274 -> 3.304 |\n| Evaluation: chrf | 8.5 -> 61.25 |\n" in text


def test_examples_cannot_end_their_code_fence(tmp_path):
    _, text = card_of(tmp_path, RUN, examples=["a ```` fence\n# no heading"])

    assert "## Examples of the data\n\n`````\na ```` fence\n# no heading\n`````" in text


def test_with_streaming_the_card_counts_what_was_read_not_what_was_checked(tmp_path):
    _, text = card_of(tmp_path, {**RUN, "stream": {"documents": 3}})

    assert "1,000 of them trained, on 8,733 tokens of a stream, 18 steps." in text
    assert "48 records" not in text
    assert "The labels of the first rows of the stream were verified" in text
