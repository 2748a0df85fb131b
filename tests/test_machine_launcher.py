"""Sharding that a launcher requests works, or is refused before anything is loaded; accelerate is silent."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_extend_env_parallelism_config
from forked import free_port
from helpers import build_recipe

from hf_clm.cli import main
from hf_clm.errors import EnvironmentFault, RecipeError
from hf_clm.machine import check_spreading, is_one_of_many, spreads_with
from hf_clm.recipe.recipe import recipe_to_yaml
from hf_clm.training.run import train

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "LOCAL_RANK": "0"}
KNOWN = {action.dest for action in launch_command_parser()._actions}


def test_all_launcher_files_are_found():
    names = ["cpu.yaml", "ddp.yaml", "deepspeed_zero3.yaml", "fsdp2.yaml", "fsdp2_offload.yaml"]

    assert [path.name for path in FILES] == names


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_accelerate_knows_every_key_and_the_header_has_the_command(path):
    """Accelerate's loader rejects unknown keys of a file; keys of a section become command-line options."""
    found = load_config_from_file(str(path))

    assert isinstance(found, ClusterConfig)
    sections = {**found.fsdp_config, **found.deepspeed_config, **found.dynamo_config}
    assert set(sections) <= KNOWN
    assert f"#   accelerate launch --config_file recipes/accelerate/{path.name} " in path.read_text()


@pytest.mark.parametrize(
    ("name", "kind", "on_cpu"),
    [
        ("cpu", "MULTI_GPU", True),
        ("ddp", "MULTI_GPU", False),
        ("fsdp2", "FSDP", False),
        ("fsdp2_offload", "FSDP", False),
        ("deepspeed_zero3", "DEEPSPEED", False),
    ],
)
def test_a_launcher_file_shards_as_its_name_says(name, kind, on_cpu):
    found = load_config_from_file(str(ROOT / "recipes" / "accelerate" / f"{name}.yaml"))

    assert (found.distributed_type.value, found.use_cpu, found.main_process_port) == (kind, on_cpu, 0)
    assert found.fsdp_config.get("fsdp_version") == (2 if kind == "FSDP" else None)
    assert found.fsdp_config.get("fsdp_offload_params", False) == (name == "fsdp2_offload")
    assert found.deepspeed_config.get("zero_stage") == (3 if kind == "DEEPSPEED" else None)


def test_deepspeed_on_two_machines_starts_only_local_processes(monkeypatch):
    """None means no command of DeepSpeed, which would reach the other machine with pdsh and a hostfile."""
    monkeypatch.setattr("accelerate.commands.launch.is_deepspeed_available", lambda: True)
    words = ["--config_file", str(ROOT / "recipes" / "accelerate" / "deepspeed_zero3.yaml")]
    words += ["--num_machines", "2", "--num_processes", "16", "--machine_rank", "1"]
    words += ["--main_process_ip", "10.0.0.1", "--main_process_port", (port := free_port())]
    parsed = launch_command_parser().parse_args([*words, "-m", "hf_clm", "train", "RECIPE"])
    arguments, _, _ = _validate_launch_command(parsed)
    arguments.deepspeed_fields_from_accelerate_config = ""

    command, _ = prepare_deepspeed_cmd_env(arguments)

    assert command is None
    assert (arguments.nnodes, arguments.node_rank, arguments.nproc_per_node) == ("2", 1, "8")
    assert arguments.rdzv_endpoint == f"10.0.0.1:{port}"


def test_a_process_knows_whether_it_is_one_of_many():
    assert is_one_of_many({"WORLD_SIZE": "2"})
    assert not is_one_of_many({"WORLD_SIZE": "1"})
    assert not is_one_of_many({})


@pytest.mark.parametrize(
    ("values", "environment", "expected"),
    [
        ({}, {}, ""),
        ({}, {"ACCELERATE_USE_FSDP": "false"}, ""),
        ({}, FSDP, "FSDP"),
        ({"fsdp": True}, {}, "FSDP"),
        ({}, {"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed"),
        ({"deepspeed": "zero.json"}, {}, "DeepSpeed"),
    ],
)
def test_launcher_and_recipe_determine_how_the_model_is_sharded(values, environment, expected):
    assert spreads_with(values, environment) == expected


def test_supported_sharding_is_accepted():
    check_spreading({}, {}, on_cpu=True, generates=True)
    check_spreading({}, FSDP, on_cpu=False)
    check_spreading({"fsdp": True}, {"LOCAL_RANK": "0"}, on_cpu=False)
    check_spreading({"fsdp": True, "fsdp_config": {"version": 2}}, {"LOCAL_RANK": "0"}, on_cpu=False)


@pytest.mark.parametrize(
    ("values", "environment", "options", "expected"),
    [
        (
            {},
            FSDP,
            {"on_cpu": True},
            "accelerate launch: FSDP needs GPUs: on a CPU each process would keep the complete model; "
            "fix: use accelerate launch --config_file recipes/accelerate/cpu.yaml -m hf_clm train RECIPE",
        ),
        (
            {"deepspeed": "zero.json"},
            {},
            {"on_cpu": True},
            "train.deepspeed: DeepSpeed needs GPUs: on a CPU each process would keep the complete model; "
            "fix: use accelerate launch --config_file recipes/accelerate/cpu.yaml -m hf_clm train RECIPE",
        ),
        (
            {"fsdp": True},
            {},
            {"on_cpu": False},
            "train.fsdp: needs a launcher; fix: use "
            "accelerate launch --config_file recipes/accelerate/fsdp2.yaml -m hf_clm train RECIPE",
        ),
        (
            {},
            FSDP | {"FSDP_VERSION": "1"},
            {"on_cpu": False},
            "accelerate launch: FSDP version 1 is not supported; got 1; "
            "fix: set fsdp_version to 2, as in recipes/accelerate",
        ),
        (
            {},
            FSDP,
            {"on_cpu": False, "generates": True},
            "samples: generation is not supported with FSDP, which shards the model; "
            "fix: set samples to null and evaluation.generate to 0, and use hf-clm generate after training",
        ),
    ],
)
def test_unsupported_sharding_is_refused_with_a_fix(values, environment, options, expected):
    with pytest.raises(RecipeError) as raised:
        check_spreading(values, environment, **options)

    assert str(raised.value) == expected


ROWS = "splits rows between processes, but packed documents and the loss at the targets need complete rows"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cp_size", f"context parallelism {ROWS}"),
        ("sp_size", f"sequence parallelism {ROWS}"),
        ("tp_size", "tensor parallelism splits layers between processes, for which the model is not loaded"),
    ],
)
def test_a_launcher_that_splits_rows_or_layers_is_refused_before_anything_is_loaded(
    name, expected, tmp_path, monkeypatch
):
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_DP_SHARD_SIZE", "2")
    monkeypatch.setenv(f"PARALLELISM_CONFIG_{name.upper()}", "2")
    recipe = build_recipe(tmp_path, [])  # no rows: reading them would be another error

    with pytest.raises(RecipeError) as raised:
        train(recipe)

    assert raised.value.exit_code == 2
    assert str(raised.value) == (
        f"accelerate launch: parallelism_config_{name}: {expected}; got 2; fix: set it to 1, and shard the "
        "model instead: accelerate launch --config_file recipes/accelerate/fsdp2.yaml -m hf_clm train RECIPE"
    )


def test_the_variables_of_the_check_are_those_that_accelerate_sets():
    words = launch_command_parser().parse_args(["--parallelism_config_cp_size", "2", "x.py"])
    environment: Any = prepare_extend_env_parallelism_config(words, {})

    with pytest.raises(RecipeError, match="context parallelism"):
        check_spreading({}, environment, on_cpu=False)


def test_context_parallelism_in_a_recipe_is_an_error(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_to_yaml(build_recipe(tmp_path, [])))

    code = main(["train", str(path), "--parallelism_config", "{cp_size: 2}"])

    assert code == 2
    assert "parallelism_config has no effect: the launcher sets up the processes" in capsys.readouterr().err


def test_deepspeed_without_its_package_names_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    with pytest.raises(EnvironmentFault) as raised:
        check_spreading({}, {"ACCELERATE_USE_DEEPSPEED": "true"}, on_cpu=False)

    expected = "accelerate launch: needs the package deepspeed; fix: pip install 'hf_clm[deepspeed]'"
    assert str(raised.value) == expected


def test_fsdp_on_a_cpu_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    recipe = build_recipe(tmp_path, [])  # no rows: reading them would be another error

    with pytest.raises(RecipeError, match="FSDP needs GPUs"):
        train(recipe)


def test_accelerate_itself_silently_uses_ddp_for_fsdp_on_a_cpu():
    """The reason for the check. If this fails, accelerate reports it now, or shards on a CPU."""
    code = """
import os
os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "RANK": "0", "LOCAL_RANK": "0"}
os.environ |= {"WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "OMP_NUM_THREADS": "1"}
from accelerate import Accelerator
print(Accelerator(cpu=True).distributed_type.value)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "MULTI_CPU\n"
    assert "FSDP" not in done.stderr
