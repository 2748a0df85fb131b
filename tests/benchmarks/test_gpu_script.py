"""The script that checks and measures a GPU runs in miniature without one, where its times mean nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks.gpu import STAGES, call, judge, write

SCRIPT = Path(__file__).with_name("gpu.py")
OURS = {"tokens_per_second": 510_000, "peak_memory_bytes": 61e9, "flops_per_second": 4e14, "recompiles": 0}
OURS |= {"waits": ["trainer.py:1"], "attention_kernels": ["flash_fwd"], "losses": [[1, 10.0], [10, 9.0]]}
STOCK = OURS | {"tokens_per_second": 250_000, "losses": [[1, 10.1], [20, 1.0]]}


def run(out: Path, *options: str) -> dict:
    """Returns what the script writes."""
    subprocess.run([sys.executable, SCRIPT, "--out", out, *options], capture_output=True, check=True)
    return json.loads(out.read_text())


@pytest.mark.large
def test_all_stages_run_in_miniature(tmp_path):
    result = run(tmp_path / "gpu.json", "--miniature")

    stages = result["stages"]
    assert list(stages) == STAGES
    errors = {stage["error"] for stage in stages.values() if "error" in stage}
    assert errors <= {"bitsandbytes is not installed"}
    gates = {name: stage["gates"] for name, stage in stages.items() if "gates" in stage}
    assert {name for name, found in gates.items() if False in found.values()} == set()
    for model in result["models"].values():
        assert list(model["tokens_per_second"]) == ["ours-compile", "stock", "ours", "stock-compile"]
        assert model["goals"] is None
        assert model["gates"]["every_arm_ran"] and model["gates"]["losses_agree"]
        assert model["gates"]["no_recompile"]
    micro_batches = stages["sweep"]["micro_batches"]
    assert [part["micro_batch"] for part in micro_batches] == [[1, 4], [2, 2]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_gate_holds_on_a_gpu(tmp_path):
    result = run(tmp_path / "gpu.json")

    gates = [part.get("gates", {}) for part in (*result["stages"].values(), *result["models"].values())]
    assert [found for found in gates if False in found.values()] == []


@pytest.mark.slow
def test_a_stage_that_fails_or_takes_too_long_is_reported(tmp_path):
    failed = call("none ours", is_miniature=True, seconds=60)["error"]

    assert failed.startswith("exit code 1: ")
    assert "KeyError: 'none'" in failed
    assert call("versions", is_miniature=True, seconds=0.01) == {"error": "not done after 0 s"}
    assert call("versions", is_miniature=True, seconds=-1) == {"error": "no time left"}


def test_goals_and_gates_follow_from_the_arms():
    versions = {"peak_flops_per_second": 8e14, "nominal_flops_per_second": 989e12}
    arms = {"gpt2-124m ours-compile": OURS, "gpt2-124m stock": STOCK, "gpt2-124m ours": {"error": "x"}}

    found = judge({"versions": versions, **arms})

    assert found["gpt2-124m"] == {
        "tokens_per_second": {"ours-compile": 510_000, "stock": 250_000},
        "mfu": {"peak": 0.5, "nominal": pytest.approx(0.404, abs=1e-3)},
        "goals": {"tokens_per_second": True, "peak_memory": False},
        "gates": {
            "every_arm_ran": False,
            "losses_agree": True,  # 1 % apart at step 1, the only one that both log
            "no_recompile": True,
            "no_wait": False,
            "fused_kernel": True,
        },
    }
    assert found["qwen2.5-0.5b-sft"]["goals"] is None
    assert found["qwen2.5-0.5b-sft"]["gates"]["losses_agree"] is None


def test_the_result_is_replaced_as_a_whole(tmp_path):
    out = tmp_path / "gpu.json"
    write(out, {"stages": {}})
    write(out, {"stages": {"versions": {}}})

    assert json.loads(out.read_text()) == {"stages": {"versions": {}}}
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]
