"""``diagnose`` on small runs, its table and its JSON."""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import byte_tokenizer, save_folder, tiny_model, write_jsonl

from hf_clm.doctor.checks import Ok, Problem
from hf_clm.doctor.command import Diagnosis, diagnose
from hf_clm.doctor.memory import MemoryEstimate
from hf_clm.errors import EnvironmentFault, ExitCode, ModelError, RecipeError
from hf_clm.recipe.recipe import Recipe

MIB = 2**20
# "say N\\n" is a prompt of 6 tokens; N letters and the end token are targets.
RECORDS = [{"instruct": f"say {n}", "input": "", "label": "x" * n} for n in range(1, 9)]
ESTIMATE = MemoryEstimate(MIB, MIB, 2 * MIB, 3 * MIB, 4 * MIB, micro_step=9 * MIB, evaluation=5 * MIB)


def build_recipe(folder: Path, records: list[Any] | None = None, **sections: Any) -> Recipe:
    model = {"name_or_path": save_folder(folder / "model", tiny_model(), byte_tokenizer())}
    path = write_jsonl(folder / "say.jsonl", records or RECORDS)
    data = {"train": [{"path": path, "format": "instruct"}], "max_length": 64, "packing": "none"}
    train = {"output_dir": str(folder / "run"), "use_cpu": True, "per_device_train_batch_size": 2}
    return Recipe.model_validate(
        {
            "stage": "sft",
            "model": model | sections.get("model", {}),
            "data": data | sections.get("data", {}),
            "train": train | {"save_strategy": "no"} | sections.get("train", {}),
        }
    )


def test_a_sound_run_has_no_problems_and_no_files_are_written(tmp_path):
    recipe = build_recipe(tmp_path)

    diagnosis = diagnose(recipe, measure=False)

    assert (diagnosis.problems, diagnosis.exit_code, diagnosis.measured) == ([], ExitCode.DONE, None)
    assert diagnosis.checks["steps"] == Ok("12 steps with 2 rows each")
    assert diagnosis.estimate is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "say.jsonl"]


def test_measuring_loads_the_model_and_runs_a_micro_step(tmp_path):
    measured = diagnose(build_recipe(tmp_path), measure=True).measured

    assert measured is not None and measured > 0


def test_accumulated_gradients_are_added_to_the_measurement(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_clm.doctor.command.measure_memory", lambda *args, **kwargs: 1000)
    weights = diagnose(build_recipe(tmp_path), measure=False).to_json()["memory_bytes"]["weights"]

    measured = diagnose(
        build_recipe(tmp_path, train={"gradient_accumulation_steps": 2}), measure=True
    ).measured

    assert measured == 1000 + weights


def test_a_trained_tokenizer_is_not_saved_in_the_output_folder(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = {"model_type": "qwen2", "num_key_value_heads": 2, **sizes}
    recipe = build_recipe(tmp_path).model_dump()
    recipe["model"] = {"init": "scratch", "config": config}
    recipe["tokenizer"] = {"train": {"vocab_size": 300}}

    diagnosis = diagnose(Recipe.model_validate(recipe), measure=False)

    assert diagnosis.problems == []
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "stage", "what", "code"),
    [
        ({"data": {"train": ["missing.jsonl"]}}, "data", "no such file", ExitCode.DATA),
        ({"model": {"name_or_path": "./missing"}}, "tokenizer", "no such folder", ExitCode.MODEL),
        ({"data": {"max_length": 200_000}}, "model", "exceeds the model's", ExitCode.MODEL),
        ({"data": {"max_length": 8}}, "data", "cannot be trained on", ExitCode.DATA),
    ],
)
def test_a_part_that_cannot_be_loaded_is_a_problem(tmp_path, changes, stage, what, code):
    diagnosis = diagnose(build_recipe(tmp_path, **changes), measure=False)

    assert list(diagnosis.checks) == [stage]
    assert what in diagnosis.problems[0].what
    assert diagnosis.exit_code == code


def test_arguments_that_transformers_rejects_are_a_problem(tmp_path, monkeypatch):
    def refuse(recipe: Recipe) -> None:
        raise RecipeError("no such optimizer", where="train")

    monkeypatch.setattr("hf_clm.doctor.command.training_arguments", refuse)

    assert diagnose(build_recipe(tmp_path), measure=False).checks == {
        "arguments": Problem("no such optimizer", "train")
    }


def test_the_exit_code_is_that_of_the_first_problem_without_warnings():
    warning = Problem("a", "b", "c", EnvironmentFault, is_warning=True)

    assert Diagnosis({"x": Ok("fine"), "y": warning}).exit_code == 0
    assert Diagnosis({"y": warning, "z": Problem("a", "b", "c", ModelError)}).exit_code == 4


def test_the_table_shows_grade_check_and_fix():
    result = {"steps": Ok("12 steps"), "threads": Problem("1 thread", "OMP", "OMP=2", is_warning=True)}

    lines = Diagnosis({**result, "disk": Problem("full", "/runs", "free some")}, seconds=1.25).to_lines()

    assert lines == [
        "OK       steps    12 steps",
        "WARN     threads  1 thread",
        "                  OMP; fix: OMP=2",
        "PROBLEM  disk     full",
        "                  /runs; fix: free some",
        "3 checks, 1 problems, 1 warnings, 1.2 s",
    ]


def test_the_table_shows_the_memory_estimated_and_measured():
    lines = Diagnosis({"steps": Ok("12 steps")}, ESTIMATE, 10 * MIB).to_lines()

    assert lines[1:3] == [
        "memory (MiB, estimated): weights 1, optimizer 2, gradients 1, copies 0, activations 3, logits 4,"
        " micro step 9, evaluation 5, total 12",
        "memory (MiB, measured): micro step 10; the estimate is 90% of it",
    ]


def test_the_json_has_the_same_content_and_is_serializable():
    problem = Problem("full", "/runs", "free some", EnvironmentFault)

    written = json.loads(json.dumps(Diagnosis({"a": Ok("b"), "disk": problem}, ESTIMATE, 7, 0.5).to_json()))

    assert written["checks"] == [
        {"name": "a", "grade": "ok", "what": "b"},
        {
            "name": "disk",
            "grade": "problem",
            "what": "full",
            "where": "/runs",
            "fix": "free some",
            "exit_code": 6,
        },
    ]
    assert (written["memory_bytes"]["total"], written["measured_micro_step_bytes"]) == (12 * MIB, 7)
    assert (written["exit_code"], written["seconds"]) == (6, 0.5)
