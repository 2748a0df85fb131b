"""The plan of a run on many GPUs against arithmetic by hand."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import build_recipe

from hf_clm.cli import main
from hf_clm.doctor.cluster import Cluster
from hf_clm.doctor.plan import (
    WAYS,
    Plan,
    choose,
    plan,
    rest_bytes,
    ring_seconds,
    to_plan,
    to_planned_model,
    traffic_seconds,
)
from hf_clm.doctor.plan_text import FAMILY, STEP, family_config, plan_family, plan_recipe, recipe_model
from hf_clm.errors import RecipeError

BOXES = Cluster(gpus=64, memory=80e9)
BOX = Cluster(gpus=8, memory=80e9)
ONE = Cluster(gpus=1, memory=80e9, node=1)
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
def models() -> dict[str, Any]:
    return {name: to_planned_model(family_config(name), STEP) for name in FAMILY}


def test_the_family_has_the_published_sizes(models):
    assert {name: model.parameters for name, model in models.items()} == PARAMETERS


def test_a_weight_takes_16_bytes_with_adamw_in_float32(models):
    assert models["7B"].state == 16
    assert replace(models["7B"], step=replace(STEP, optimizer="sgd")).state == 8
    assert replace(models["7B"], step=replace(STEP, dtype="bfloat16", autocast=None)).state == 8


@pytest.mark.parametrize(
    ("way", "expected"),
    [
        # whole states, the gradients once more in buckets, and bfloat16 copies of all but the embedding
        ("ddp", 16 * SEVEN + 4 * SEVEN + 2 * (SEVEN - HEAD)),
        # a share of the states; all weights in bfloat16; the gradient of a layer in bfloat16 and float32
        ("fsdp2-grad", 16 * SEVEN / 64 + 2 * SEVEN + 6 * LAYER),
        # a share; embedding, head and two layers in bfloat16
        ("fsdp2", 16 * SEVEN / 64 + 2 * (2 * HEAD + 2 * LAYER) + 6 * LAYER),
        ("fsdp2-hybrid", 16 * SEVEN / 8 + 2 * (2 * HEAD + 2 * LAYER) + 6 * LAYER),
        ("fsdp2-offload", 2 * (2 * HEAD + 2 * LAYER) + 6 * LAYER),
        ("zero3", 18 * SEVEN / 64 + 2 * (2 * HEAD + 2 * LAYER) + 6 * LAYER),
    ],
)
def test_what_lies_on_a_gpu_at_rest(models, way, expected):
    assert rest_bytes(way, models["7B"], cluster=BOXES) == pytest.approx(expected, rel=1e-9)


def test_one_gpu_keeps_no_buckets(models):
    assert rest_bytes("ddp", models["7B"], cluster=ONE) == 16 * SEVEN + 2 * (SEVEN - HEAD)


def test_the_host_holds_the_states(models):
    assert to_plan("fsdp2-offload", models["7B"], cluster=BOXES, checkpointing=True).host == 16 * SEVEN / 64


def test_a_ring_hands_on_all_but_its_own_part():
    assert ring_seconds(80.0, 4, rate=10.0) == 6.0  # 3/4 of 8 seconds
    assert ring_seconds(80.0, 1, rate=10.0) == 0.0


@pytest.mark.parametrize(
    ("way", "cluster", "expected"),
    [
        # a sum to all: 4 bytes twice, 7/8 of it, over NVLink
        ("ddp", BOX, 2 * 4 * SEVEN * 7 / 8 / 450e9),
        # between boxes of 8 GPUs with a card of 50 GB/s each: 8 x 50 = 400 GB/s, less than NVLink
        ("ddp", BOXES, 2 * 4 * SEVEN * 63 / 64 / 400e9),
        # two cards a box: 2 x 50 = 100 GB/s
        ("ddp", replace(BOXES, node=2), 2 * 4 * SEVEN * 63 / 64 / 100e9),
        # cards that are faster than NVLink, 8 x 100 = 800 GB/s: the ring passes through the box too
        ("ddp", replace(BOXES, network=100e9), 2 * 4 * SEVEN * 63 / 64 / 450e9),
        # weights once in bfloat16, gradients in float32
        ("fsdp2-grad", BOXES, (2 + 4) * SEVEN * 63 / 64 / 400e9),
        # weights twice
        ("fsdp2", BOXES, (2 * 2 + 4) * SEVEN * 63 / 64 / 400e9),
        ("zero3", BOXES, 3 * 2 * SEVEN * 63 / 64 / 400e9),
        # that in the box, and between 8 boxes, over the card of each GPU, a sum of an eighth of the gradients
        ("fsdp2-hybrid", BOXES, 8 * SEVEN * 7 / 8 / 450e9 + 2 * 4 * SEVEN / 8 * 7 / 8 / 50e9),
        # the host's bus is slower here: float32 weights up twice, gradients down
        ("fsdp2-offload", BOX, 3 * 4 * SEVEN / 8 / 25e9),
    ],
)
def test_what_goes_between_gpus_in_a_step(models, way, cluster, expected):
    assert traffic_seconds(way, models["7B"], cluster=cluster) == pytest.approx(expected, rel=1e-9)


def test_the_time_of_a_step_is_its_flop_by_the_assumed_share_of_the_peak(models):
    """6 FLOP a weight of a product, 12 a feature, layer and pair of tokens."""
    found = to_plan("fsdp2", models["7B"], cluster=BOXES, checkpointing=False)

    tokens, pairs = found.rows * 4096, found.rows * 4096 * 4097 / 2
    norms_and_biases = 28 * (2 * 3584 + 3584 + 2 * 512) + 3584
    flop = 6 * (SEVEN - HEAD - norms_and_biases) * tokens + 12 * 28 * 3584 * pairs
    assert found.rows >= 1
    assert found.compute == pytest.approx(flop / (0.4 * 989e12), rel=1e-9)
    assert found.tokens_per_second == pytest.approx(tokens / max(found.compute, found.traffic))


def test_checkpointing_computes_a_third_more_and_holds_less(models):
    without, with_it = (
        to_plan("fsdp2", models["7B"], cluster=BOXES, checkpointing=value) for value in (False, True)
    )

    assert with_it.compute / with_it.rows == pytest.approx(4 / 3 * without.compute / without.rows)
    assert with_it.first < without.first
    assert with_it.rows > without.rows


def made(way: str, **changes: Any) -> Plan:
    values = {
        "rest": 1.0,
        "host": 0.0,
        "first": 2.0,
        "rows": 2,
        "length": 100,
        "compute": 2.0,
        "traffic": 1.0,
    }
    return Plan(way=way, checkpointing=False, **{**values, **changes})


def test_traffic_overlaps_the_arithmetic_and_the_work_of_the_host_does_not():
    assert (made("fsdp2").tokens_per_second, made("fsdp2").bound_by) == (100.0, "compute")
    assert (made("fsdp2", traffic=4.0).tokens_per_second, made("fsdp2", traffic=4.0).bound_by) == (
        50.0,
        "network",
    )
    offloaded = made("fsdp2-offload", update=3.0)
    assert (offloaded.tokens_per_second, offloaded.bound_by) == (40.0, "host")


def test_the_fastest_is_chosen_and_of_equals_the_simplest():
    slow, fast = made("ddp", traffic=4.0), made("fsdp2")

    assert choose([made("ddp"), made("fsdp2-grad"), fast]).way == "ddp"
    assert choose([slow, fast]).way == "fsdp2"
    assert choose([replace(slow, rows=0), replace(fast, rows=0)]) is None
    assert choose([made("zero3")]) is None  # only shown to compare


@pytest.mark.parametrize("name", FAMILY)
def test_more_gpus_never_need_more_memory_each(models, name):
    for way in WAYS:
        needs = [
            to_plan(way, models[name], cluster=replace(BOX, gpus=gpus), checkpointing=True).first
            for gpus in (8, 16, 64, 512)
        ]
        assert needs == sorted(needs, reverse=True), way


@pytest.mark.parametrize("name", FAMILY)
def test_more_memory_never_fits_fewer_rows_and_longer_rows_never_more(models, name):
    for way in WAYS:
        rows = [
            to_plan(way, models[name], cluster=replace(BOXES, memory=memory), checkpointing=True).rows
            for memory in (24e9, 40e9, 80e9, 141e9)
        ]
        assert rows == sorted(rows), way
    short = to_plan("fsdp2", models[name], cluster=replace(BOXES, length=1024), checkpointing=True)
    long = to_plan("fsdp2", models[name], cluster=replace(BOXES, length=8192), checkpointing=True)
    assert short.rows >= long.rows


def test_checkpointing_is_taken_where_it_is_faster_or_fits_alone(models):
    found = {one.way: one for one in plan(models["7B"], replace(BOX, network=1.0))}
    crowded = {one.way: one for one in plan(models["7B"], replace(BOX, memory=60e9))}

    assert (found["fsdp2"].checkpointing, found["fsdp2"].rows) == (False, 1)
    assert crowded["fsdp2"].checkpointing
    # 8 x 7.6 GB in 60 s at 8 x 0.125 GB/s: more rows a step are worth their 0.62 s instead of 0.46
    slow = {one.way: one for one in plan(models["7B"], replace(BOXES, network=0.125e9))}
    assert (slow["fsdp2"].checkpointing, slow["fsdp2"].bound_by) == (True, "network")


def test_larger_models_need_more_spreading(models):
    chosen = {name: choose(plan(model, BOX)) for name, model in models.items()}

    assert chosen["0.5B"].way == "ddp"
    assert chosen["14B"].way in ("fsdp2-grad", "fsdp2")
    assert chosen["72B"].way == "fsdp2-offload"  # 16 x 72.7 / 8 = 145 GB of states on each of 8 GPUs
    assert all(found.first <= 72e9 for found in chosen.values())  # a tenth is left free


def test_the_command_prints_a_table_of_all_sizes(capsys):
    assert main(["doctor", "--plan", "gpus=64,memory=80GB"]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["model", "way", "GB"]
    assert [line.split()[0] for line in lines[1:8]] == list(FAMILY)
    assert "64 GPUs of 80.0 GB in 8 boxes of 8" in lines[-2]
    assert lines[-1].startswith("Arithmetic, not measured; assumed: 40% of 989 TFLOP/s; 450 GB/s between")


def test_the_readme_holds_the_table_that_the_command_prints():
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    lines, _ = plan_family(BOXES)

    rows = [re.split(r" {2,}", line) for line in lines[:8]]
    table = [line.strip("| ").split(" | ") for line in readme.splitlines() if line.endswith(".yaml |")]
    assert table == rows[1:]
    assert f"| {' | '.join(rows[0])} |" in readme


def test_a_size_that_does_not_fit_is_said_to_need_so_much(capsys):
    assert main(["doctor", "--plan", "gpus=1,memory=16GB", "--json"]) == 0

    found = json.loads(capsys.readouterr().out)
    assert found["0.5B"]["way"] == "ddp"
    assert found["72B"] is None


def test_a_recipe_is_planned_with_its_own_model_and_rows(tmp_path):
    lines, found = plan_recipe(build_recipe(tmp_path, []), BOX)

    assert found["parameters"] == 35_360
    assert lines[0] == f"model     {tmp_path / 'model'}, 35,360 parameters"
    assert (found["take"], found["plans"][0]["length"]) == ("ddp", 64)
    assert "take      recipes/accelerate/ddp.yaml" in lines
    assert "          per_device_train_batch_size up to 1024 (524,288 tokens a step): " in "\n".join(lines)


def test_how_long_a_row_is_says_the_recipe(tmp_path):
    with pytest.raises(RecipeError) as raised:
        plan_recipe(build_recipe(tmp_path, []), replace(BOX, length=8192))

    expected = "--plan: length is the recipe's; got length=8192; fix: --data.max_length 8192"
    assert str(raised.value) == expected


def test_one_gpu_is_singular_and_has_no_traffic(tmp_path):
    lines, _ = plan_recipe(build_recipe(tmp_path, []), ONE)

    assert lines[-4].endswith(" tokens/s on 1 GPU")
    assert lines[-2:] == [
        "1 GPU of 80.0 GB in one box; c: activation checkpointing.",
        "Arithmetic, not measured; assumed: 40% of 989 TFLOP/s; 10% of the memory left free.",
    ]


def test_a_recipe_says_optimizer_and_precision(tmp_path):
    recipe = build_recipe(tmp_path, [], train={"optim": "sgd"})

    assert recipe_model(recipe).state == 8
    assert recipe_model(recipe).step.autocast is None  # bf16: false in it


def test_adapters_are_not_planned(tmp_path):
    pytest.importorskip("peft")
    with pytest.raises(RecipeError, match="lora: a plan is one of training all weights"):
        plan_recipe(build_recipe(tmp_path, [], lora={"r": 4}), BOX)


def test_without_recipe_and_plan_a_recipe_is_asked_for(capsys):
    assert main(["doctor"]) == 2

    expected = "error: hf-clm doctor: needs a recipe; fix: hf-clm doctor RECIPE [--key value ...]\n"
    assert capsys.readouterr().err == expected
