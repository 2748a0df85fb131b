"""The input of the checks: the largest micro-batch of a run, and the machine."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from helpers import byte_tokenizer, prompted, split_of, tiny_model
from transformers import AutoConfig, TrainingArguments

from hf_clm.data.split import Split
from hf_clm.doctor import facts
from hf_clm.doctor.checks import Problem, to_problem
from hf_clm.doctor.facts import (
    Facts,
    build_facts,
    longest_rows,
    read_machine,
    read_sharding,
    row_tokens,
    to_micro_step,
)
from hf_clm.doctor.memory import Sharding
from hf_clm.errors import DataError
from hf_clm.recipe.recipe import Recipe


def build_recipe(**sections: Any) -> tuple[Recipe, TrainingArguments]:
    train = {"output_dir": "runs/x", "use_cpu": True, "per_device_train_batch_size": 2} | sections.get(
        "train", {}
    )
    content = {
        "stage": "sft",
        "model": {"name_or_path": "some/model"} | sections.get("model", {}),
        "data": {"train": ["rows.jsonl"], "max_length": 16, "packing": "none"} | sections.get("data", {}),
        "train": train,
        "optimizer": sections.get("optimizer"),
    }
    return Recipe.model_validate(content), TrainingArguments(**train)


def build_rows(recipe: Recipe) -> Split:
    """Builds rows of 6, 13, 9 and 7 tokens."""
    rows = [prompted("say\n", "x" * count) for count in (1, 8, 4, 2)]
    with TemporaryDirectory() as folder:
        return split_of(Path(folder), rows, recipe)


def test_the_tokens_of_a_row_are_the_sum_over_its_documents():
    plain, packed = build_rows(build_recipe()[0]), build_rows(build_recipe(data={"packing": "best_fit"})[0])

    assert row_tokens(plain.dataset).tolist() == [6, 13, 9, 7]
    assert row_tokens(packed.dataset).tolist() == [13, 16, 6]


def test_the_longest_rows_come_first():
    assert longest_rows(build_rows(build_recipe()[0]).dataset, 2) == [1, 2]


@pytest.mark.parametrize(
    ("sections", "field", "value"),
    [
        ({}, "tokens", 22),  # 13 + 9, concatenated
        ({"model": {"attention": "sdpa"}}, "tokens", 26),  # padded: 2 x 13
        ({"data": {"packing": "best_fit"}}, "tokens", 29),  # 16 + 13
        ({"train": {"per_device_train_batch_size": 8}}, "tokens", 35),
        ({}, "longest", 13),
        ({}, "eval_tokens", 35),  # up to 8 rows, of which there are 4
        ({"train": {"bf16": True}}, "autocast", "bfloat16"),
        ({}, "autocast", None),
        ({"train": {"optim": "sgd"}}, "optimizer_states", 0.0),
        ({}, "optimizer_states", 2.0),
        # 18,432 of 35,360 parameters are in matrices of the layers, 16,640 in embeddings and head
        ({"optimizer": {"name": "muon"}}, "optimizer_states", (18_432 + 2 * 16_928) / 35_360),
        ({"optimizer": {"freeze": ["embed_tokens", "lm_head"]}}, "trained", 18_720 / 35_360),
        ({"train": {"gradient_accumulation_steps": 2}}, "accumulates", True),
        ({"model": {"dtype": "bfloat16"}}, "dtype", "bfloat16"),
        ({}, "device", "cpu"),
    ],
)
def test_the_largest_micro_batch_of_a_run(sections, field, value):
    recipe, arguments = build_recipe(**sections)
    parts = {"tokenizer": byte_tokenizer(), "config": tiny_model().config}

    result = build_facts(recipe, arguments, splits={"train": build_rows(recipe)}, **parts)

    assert getattr(to_micro_step(result), field) == value


def test_the_estimate_includes_the_embedding_rows_that_the_tokenizer_needs():
    """260 ids for 250 rows: 10 more rows of 32 float32 in embeddings and head."""
    recipe, arguments = build_recipe()
    parts: dict[str, Any] = {"tokenizer": byte_tokenizer(), "splits": {"train": build_rows(recipe)}}
    config = tiny_model(vocab_size=250).config

    small = build_facts(recipe, arguments, config=config, **parts).estimate
    right = build_facts(recipe, arguments, config=tiny_model().config, **parts).estimate

    assert small == right
    assert config.vocab_size == 250


def test_the_memory_of_an_unknown_model_is_not_estimated():
    recipe, arguments = build_recipe()
    config = tiny_model().config
    config.model_type = "my-own"

    result = build_facts(
        recipe, arguments, tokenizer=byte_tokenizer(), config=config, splits={"train": build_rows(recipe)}
    )

    assert result.estimate is None


def test_the_machine_is_read_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setattr(facts, "usable_cores", lambda: 2)
    monkeypatch.setattr(facts, "has_bf16", lambda device: True)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    _, arguments = build_recipe(train={"output_dir": str(tmp_path / "not" / "there")})

    machine = read_machine(arguments)

    assert (machine.cores, machine.threads, machine.processes, machine.has_bf16) == (2, 3, 2, True)
    assert machine.free_disk > 0
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert read_machine(arguments).threads is None


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Sharding("ddp", 1)),
        ({"ACCELERATE_USE_FSDP": "true"}, Sharding("fsdp2", 1)),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "true"}, Sharding("fsdp2-offload", 1)),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, Sharding("zero3", 1)),
    ],
)
def test_the_launcher_determines_the_sharding(environment, expected, monkeypatch):
    recipe, arguments = build_recipe()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    assert read_sharding(recipe, arguments) == expected


def test_an_error_becomes_a_problem_that_includes_what_it_got():
    result = to_problem(DataError("too long", where="a.jsonl:3", got="9 tokens", fix="cut it"))

    assert result == Problem("too long; got 9 tokens", "a.jsonl:3", "cut it", DataError)
    assert str(result.to_error()) == "a.jsonl:3: too long; got 9 tokens; fix: cut it"


@pytest.mark.parametrize(
    ("kind", "settings", "is_chunked"),
    [
        ("qwen2", {}, True),
        ("gemma2", {"final_logit_softcapping": 30.0}, False),
        ("granite", {"logits_scaling": 8.0}, False),
        ("granite", {"logits_scaling": 1.0}, True),
    ],
)
def test_a_model_that_transforms_its_logits_needs_memory_for_all_of_them(kind, settings, is_chunked):
    recipe, arguments = build_recipe()
    config = AutoConfig.for_model(kind, **settings)

    result = Facts(
        recipe,
        arguments,
        byte_tokenizer(),
        config,
        build_rows(recipe),
        read_machine(arguments),
    )

    assert to_micro_step(result).chunked_loss is is_chunked


def test_the_memory_of_a_model_without_attention_is_not_estimated():
    recipe, arguments = build_recipe()
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 512}
    config = AutoConfig.for_model("mamba", **sizes)

    result = build_facts(
        recipe, arguments, tokenizer=byte_tokenizer(), config=config, splits={"train": build_rows(recipe)}
    )

    assert result.estimate is None
