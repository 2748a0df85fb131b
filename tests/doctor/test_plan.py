"""What fits on many GPUs: the bytes of each way compared with a calculation by hand, and the command."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import build_recipe

from hf_clm.cli import main
from hf_clm.doctor.memory import ModelSizes, read_sizes
from hf_clm.doctor.plan import (
    FAMILY,
    GPU_STEP,
    WAYS,
    Cluster,
    TrainingPlan,
    family_config,
    make_plan,
    make_plans,
    parse_cluster,
    plan_family,
    plan_recipe,
    read_model,
    select_plan,
)
from hf_clm.errors import RecipeError

MANY, BOX, ONE = (Cluster(gpus, memory=80e9) for gpus in (64, 8, 1))
CHECKPOINTING = replace(GPU_STEP, checkpointing=True)
# Published: https://huggingface.co/Qwen, model.safetensors.index.json of each.
PARAMETERS = {
    "0.5B": 494_032_768,
    "1.5B": 1_543_714_304,
    "3B": 3_085_938_688,
    "7B": 7_615_616_512,
    "14B": 14_770_033_664,
    "32B": 32_763_876_352,
    "72B": 72_706_203_648,
}
SEVEN = 7_615_616_512
HEAD = 152_064 * 3_584
LAYER = (SEVEN - 2 * HEAD) // 28


@pytest.fixture(scope="module")
def models() -> dict[str, ModelSizes]:
    return {name: read_sizes(family_config(name)) for name in FAMILY}


def test_the_family_has_the_published_sizes(models):
    assert {name: sizes.parameters for name, sizes in models.items()} == PARAMETERS


@pytest.mark.parametrize(
    ("way", "cluster", "expected"),
    [
        # 16 bytes per weight, gradient buckets, and bfloat16 copies of all weights but the embedding
        ("ddp", MANY, 16 * SEVEN + 4 * SEVEN + 2 * (SEVEN - HEAD)),
        ("ddp", ONE, 16 * SEVEN + 2 * (SEVEN - HEAD)),
        # the share; all weights in bfloat16; the gradient of a layer in bfloat16 and float32
        ("fsdp2-grad", MANY, 16 * SEVEN / 64 + 2 * SEVEN + 6 * LAYER),
        # the share; embedding, head and two layers in bfloat16; the gradient of a layer
        ("fsdp2", MANY, 16 * SEVEN / 64 + 2 * (2 * HEAD + 2 * LAYER) + 6 * LAYER),
        ("fsdp2-offload", MANY, 2 * (2 * HEAD + 2 * LAYER) + 6 * LAYER),
        ("zero3", MANY, 18 * SEVEN / 64 + 2 * (2 * HEAD + 2 * LAYER) + 6 * LAYER),
    ],
)
def test_the_memory_of_a_gpu_at_rest(models, way, cluster, expected):
    assert make_plan(way, models["7B"], GPU_STEP, cluster).rest == pytest.approx(expected, rel=1e-8)


def test_offloaded_memory_is_on_the_host(models):
    assert make_plan("fsdp2-offload", models["7B"], CHECKPOINTING, MANY).host == 16 * SEVEN / 64


def made(way: str, **changes: Any) -> TrainingPlan:
    values = {"checkpointing": False, "rest": 1.0, "host": 0.0, "first": 2.0, "rows": 2}
    return TrainingPlan(way=way, **{**values, **changes})


def test_offloading_is_the_last_resort_after_checkpointing():
    offload, recomputed = made("fsdp2-offload", host=1.0), made("ddp", checkpointing=True)

    assert select_plan([made("ddp"), made("fsdp2-grad"), made("fsdp2")]) == made("ddp")
    assert select_plan([recomputed, made("fsdp2"), offload]) == made("fsdp2")
    assert select_plan([recomputed, offload]) == recomputed
    assert select_plan([made("ddp", rows=0), offload]) == offload
    assert select_plan([made("ddp", rows=0)]) is None


@pytest.mark.parametrize("way", WAYS)
def test_more_gpus_memory_and_shorter_rows_never_fit_less(models, way):
    for sizes in models.values():
        on = [make_plan(way, sizes, CHECKPOINTING, Cluster(gpus, 80e9)).first for gpus in (8, 16, 64, 512)]
        rows = [make_plan(way, sizes, CHECKPOINTING, Cluster(64, size)).rows for size in (24e9, 40e9, 80e9)]
        short, long = (
            make_plan(way, sizes, CHECKPOINTING, Cluster(64, 80e9, length)) for length in (1024, 8192)
        )

        assert on == sorted(on, reverse=True)
        assert rows == sorted(rows)
        assert short.rows >= long.rows


def test_activation_checkpointing_is_only_used_if_no_row_fits_without(models):
    roomy, crowded = (
        {plan.way: plan for plan in make_plans(models["7B"], GPU_STEP, Cluster(8, memory))}["fsdp2"]
        for memory in (80e9, 60e9)
    )

    assert (roomy.checkpointing, roomy.rows) == (False, 1)
    assert crowded.checkpointing and crowded.rows >= 1


def test_larger_models_need_more_sharding(models):
    chosen = {name: select_plan(make_plans(sizes, GPU_STEP, BOX)) for name, sizes in models.items()}

    assert [plan.way for plan in chosen.values()] == [
        *("ddp", "ddp", "fsdp2-grad", "fsdp2-grad", "fsdp2", "fsdp2-offload", "fsdp2-offload")
    ]
    assert all(plan.first <= 72e9 for plan in chosen.values())  # a tenth stays free


# --- the command


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("gpus=64,memory=80GB", Cluster(64, 80e9, 4096)),
        ("gpus=8, memory=40.5gib, length=2048", Cluster(8, 40.5 * 2**30, 2048)),
    ],
)
def test_a_cluster_is_parsed_with_its_unit(text, expected):
    assert parse_cluster(text) == expected


@pytest.mark.parametrize(
    "text", ["64", "gpus=64", "gpus=0,memory=80GB", "gpus=8,memory=80", "gpus=8,memory=0GB", "gpus=8,mem=1GB"]
)
def test_an_invalid_cluster_is_rejected(text):
    with pytest.raises(RecipeError) as raised:
        parse_cluster(text)

    assert str(raised.value) == (
        f"--plan: expected the number of GPUs and the memory of each; got {text!r}; "
        "fix: use gpus=64,memory=80GB, and without a recipe optionally length=4096"
    )


def test_the_length_of_a_row_is_set_by_the_recipe():
    expected = "--plan: the recipe sets the length; got length=8192; fix: set --data.max_length 8192"

    assert parse_cluster("gpus=8,memory=80GB", length=64).length == 64
    with pytest.raises(RecipeError, match=re.escape(expected)):
        parse_cluster("gpus=8,memory=80GB,length=8192", length=64)


def test_the_readme_has_the_table_that_the_command_prints(capsys):
    readme = (Path(__file__).resolve().parents[2] / "hf_clm" / "doctor" / "README.md").read_text(
        encoding="utf-8"
    )

    assert main(["doctor", "--plan", "gpus=64,memory=80GB"]) == 0

    lines = capsys.readouterr().out.splitlines()
    rows = [re.split(r" {2,}", line) for line in lines[:8]]
    assert [row[0] for row in rows[1:]] == list(FAMILY)
    assert [line for line in readme.splitlines() if line.endswith(".yaml |")] == [
        f"| {' | '.join(row)} |" for row in rows[1:]
    ]
    assert f"| {' | '.join(rows[0])} |" in readme
    note = "64 GPUs of 80.0 GB, 10% left free; c: activation checkpointing. Estimated, not measured."
    assert lines[8:] == ["", note]


def test_a_size_that_does_not_fit_is_listed_with_its_minimum():
    lines, result = plan_family(Cluster(1, 16e9))

    assert (result["0.5B"]["way"], result["72B"]) == ("ddp", None)
    assert lines[7].split() == ["72B", "fsdp2-offload", "13.8", "40.2", "does", "not", "fit"]


def test_a_recipe_is_planned_with_its_model_and_rows(tmp_path):
    lines, result = plan_recipe(build_recipe(tmp_path, []), replace(ONE, length=64))

    assert lines[0] == f"model     {tmp_path / 'model'}, 35,360 parameters"
    assert (result["parameters"], result["take"]) == (35_360, "ddp")
    assert lines[-4:] == [
        "take      recipes/accelerate/ddp.yaml",
        "          per_device_train_batch_size up to 1024 (65,536 tokens per step)",
        "",
        "1 GPU of 80.0 GB, 10% left free; c: activation checkpointing. Estimated, not measured.",
    ]
    assert json.loads(json.dumps(result))["plans"][0]["way"] == "ddp"


def test_a_recipe_determines_optimizer_and_precision(tmp_path):
    _, step = read_model(build_recipe(tmp_path, [], train={"optim": "sgd"}))

    assert (step.optimizer_states, step.autocast) == (0.0, None)  # the recipe has bf16: false


def test_adapters_are_not_supported(tmp_path):
    pytest.importorskip("peft")
    with pytest.raises(RecipeError, match="lora: --plan only supports training of all weights"):
        plan_recipe(build_recipe(tmp_path, [], lora={"r": 4}), BOX)


def test_the_command_requires_a_recipe_or_a_plan(capsys):
    assert main(["doctor"]) == 2

    expected = "error: hf-clm doctor: needs a recipe; fix: hf-clm doctor RECIPE [--key value ...]\n"
    assert capsys.readouterr().err == expected
