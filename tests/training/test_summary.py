"""The counts that a run prints, for sets that are small enough to count by hand."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import byte_tokenizer, tiny_model, write_jsonl
from transformers import TrainingArguments

from hf_clm.data.prepared.cache import read_splits
from hf_clm.recipe.recipe import Recipe, load_recipe
from hf_clm.training.summary import RunFacts, add_outcome, end_lines, sample_lines, start_lines, versions

# "say N\n", N letters and the end token are 8, 9, 10 and 11 tokens; 2, 3, 4 and 5 of them are learned.
RECORDS = [{"instruct": f"say {n}\n", "input": "", "label": "x" * n} for n in range(1, 5)]


def build_facts(folder: Path, *, data: dict[str, Any] | None = None, **settings: Any) -> RunFacts:
    source = {"path": write_jsonl(folder / "say.jsonl", RECORDS), "format": "instruct"}
    data = {"train": [source], "max_length": 32, "packing": "none"} | (data or {})
    content = {"stage": "sft", "model": {"name_or_path": "some/model"}, "data": data}
    recipe = Recipe.model_validate({**content, "train": {"output_dir": str(folder / "run")}})
    splits = read_splits(recipe, byte_tokenizer(), seed=0)
    arguments = TrainingArguments(str(folder / "run"), use_cpu=True, **settings)
    return RunFacts(recipe, arguments, tiny_model(), splits, 0.5)


def with_processes(facts: RunFacts, count: int) -> RunFacts:
    arguments = SimpleNamespace(
        **{name: getattr(facts.arguments, name) for name in FIELDS} | {"world_size": count}
    )
    return RunFacts(facts.recipe, arguments, facts.model, facts.splits, 0.5)


FIELDS = (
    *("train_batch_size", "gradient_accumulation_steps", "max_steps"),
    *("dataloader_drop_last", "num_train_epochs"),
)


@pytest.mark.parametrize(
    ("processes", "settings", "rows_per_step", "steps"),
    [
        (1, {"per_device_train_batch_size": 2, "num_train_epochs": 1}, 2, 2),
        (1, {"per_device_train_batch_size": 3, "num_train_epochs": 1}, 3, 2),
        (1, {"per_device_train_batch_size": 3, "num_train_epochs": 1, "dataloader_drop_last": True}, 3, 1),
        (
            1,
            {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3, "num_train_epochs": 2},
            3,
            4,
        ),
        (1, {"per_device_train_batch_size": 8, "num_train_epochs": 2.5}, 8, 3),
        (2, {"per_device_train_batch_size": 1, "num_train_epochs": 3}, 2, 6),
        (2, {"per_device_train_batch_size": 3, "num_train_epochs": 1}, 6, 1),
        (2, {"per_device_train_batch_size": 2, "max_steps": 7}, 4, 7),
    ],
)
def test_steps_follow_from_rows_batches_and_processes(tmp_path, processes, settings, rows_per_step, steps):
    facts = with_processes(build_facts(tmp_path, **settings), processes)

    assert (facts.rows_per_step, facts.steps) == (rows_per_step, steps)


def test_tokens_per_step_are_those_of_average_rows(tmp_path):
    assert build_facts(tmp_path, per_device_train_batch_size=2).tokens_per_step == 19.0  # 38 tokens in 4 rows
    assert build_facts(tmp_path, per_device_train_batch_size=64).tokens_per_step == 38.0  # there are no more


def test_run_json_starts_with_the_inputs_of_the_run(tmp_path):
    content = (
        build_facts(tmp_path, per_device_train_batch_size=2, max_steps=3)
        .to_record("running", proof={})
        .to_json()
    )

    assert content["train"] == {
        "files": [str(tmp_path / "say.jsonl")],
        "input_rows": 4,
        "fates": {"used": 4},
        "rows": 4,
        "tokens": 38,
        "target_tokens": 14,
    }
    assert (content["evaluation"], content["unigram_entropy"]) == (None, 0.5)
    assert content["attention"] == "sdpa"
    assert (content["model"], content["parameters"]) == ("some/model", 35360)
    assert content["max_grad_norm"] == 1.0
    assert content["versions"]["python"].startswith("3.")
    assert content["started"].endswith("+00:00")


def test_run_json_records_the_origin_of_each_value_of_the_recipe(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("stage: sft\nmodel: {name_or_path: m}\ndata: {train: a.jsonl}\ntrain: {output_dir: o}\n")
    facts = replace(build_facts(tmp_path), recipe=load_recipe(path, ["--data.max_length", "64"]))

    origins = facts.to_record("running", proof={}).origins

    assert origins["stage"] == f"{path}:1"
    assert origins["data.max_length"] == "command line"
    assert origins["train.lr_scheduler_type"] == "hf_clm default"
    assert "data.overflow" not in origins


def test_rows_that_are_cut_or_dropped_are_reported_at_the_start(tmp_path):
    facts = build_facts(tmp_path, data={"max_length": 9, "overflow": "drop", "max_dropped": 0.5})

    assert facts.train.fates == {"used": 2, "dropped: longer than max_length": 2}
    text = "\n".join(start_lines(facts))
    assert "2 dropped: longer than max_length" in text
    assert "17 tokens" in text and "5 targets" in text


def test_packed_rows_are_counted(tmp_path):
    facts = build_facts(tmp_path, data={"packing": "best_fit", "max_length": 20})

    assert "2 packed rows" in "\n".join(start_lines(facts))  # 11 + 9 and 10 + 8
    assert facts.to_record("running", proof={}).train.packing_fill == 38 / 40


def test_held_out_rows_are_counted_and_named_at_the_end(tmp_path):
    facts = build_facts(tmp_path, data={"eval_fraction": 0.25})
    record = add_outcome(
        facts.to_record("done", proof={}),
        [
            {"step": 0, "eval_loss": 3.0, "eval_token_accuracy": 0.0, "eval_runtime": 1.0},
            {"step": 7, "loss": 1.5, "tokens_seen": 700},
        ],
        {"eval_loss": 1.0, "eval_token_accuracy": 0.5, "eval_runtime": 2.0, "eval_chrf": 61.25},
        seconds=2.0,
        steps=7,
        speed={"tokens_per_second": 350.0, "mfu": 0.4},
    )

    assert (record.tokens_per_second, record.mfu) == (350.0, 0.4)
    assert (record.steps_done, record.tokens_seen) == (7, 700)
    assert (record.loss_before, record.loss_after) == (3.0, 1.0)
    assert (record.token_accuracy_before, record.token_accuracy_after) == (0.0, 0.5)
    assert set(record.evaluated) == {"eval_loss", "eval_token_accuracy", "eval_chrf"}
    assert end_lines(facts, record, samples=[])[:4] == [
        "done      7 steps in 2s, 700 tokens, 350 tokens/s (40% MFU)",
        "loss      3.0000 -> 1.0000 on held-out data",
        "accuracy  0% -> 50% of the target tokens",
        "          chrf 61.25 -> 61.25",
    ]


def test_each_sample_prompt_is_told_with_its_first_and_its_last_answer():
    told = [(0, "Why?", "I do\nnot know."), (0, "When?", "Now."), (5, "Why?", "Hm."), (5, "When?", "Hm.")]
    told += [(9, "Why?", "Because."), (9, "When?", "Later.")]
    samples = [{"step": step, "prompt": prompt, "text": text} for step, prompt, text in told]

    assert sample_lines(samples) == [
        "asked     Why?",
        "before    I do not know.",
        "after     Because.",
        "asked     When?",
        "before    Now.",
        "after     Later.",
    ]
    assert sample_lines(samples[:2]) == sample_lines([]) == []


def test_a_long_answer_is_cut_in_the_last_lines_and_an_empty_one_is_named():
    samples = [
        {"step": 0, "prompt": "Why?", "text": " \n"},
        {"step": 1, "prompt": "Why?", "text": "no " * 100},
    ]

    assert sample_lines(samples)[1:] == ["before    (empty)", f"after     {'no ' * 53}n ..."]


def test_versions_include_every_package_that_computes():
    assert {"python", "hf_clm", "torch", "transformers", "tokenizers"} <= set(versions())
    assert versions()["hf_clm"] == "0.4.0"
