"""The GPU benchmark runs in miniature without a GPU, where its measurements are meaningless."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("gpu.py")


@pytest.mark.large
def test_the_gpu_benchmark_runs_in_miniature():
    options = ["--miniature", "--cases", "qwen2.5-0.5b-sft", "--arms", "ours-compile", "stock"]

    done = subprocess.run([sys.executable, SCRIPT, *options], capture_output=True, text=True, check=True)

    result = json.loads(done.stdout)
    case = result["cases"]["qwen2.5-0.5b-sft"]
    assert result["roofline"]["flops_per_second"] > 1e9
    assert case["gates"] == {
        "every_arm_ran": True,
        "losses_agree": True,
        "no_recompile": True,
        "no_sync": None,
        "fused_kernel": None,
        "documents_isolated": True,
    }
    assert set(case["arms"]) == {"ours-compile", "stock"}
    for arm in case["arms"].values():
        assert len(arm["windows_tokens_per_second"]) == 3
        assert min(arm["windows_tokens_per_second"]) <= arm["tokens_per_second"]
        assert 0 < arm["mfu"] < 1


@pytest.mark.slow
def test_an_arm_that_fails_leaves_the_others():
    code = f"""
import sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import gpu
print(gpu.call(["none", "ours"], miniature=True, seconds=60)["error"][:11])
print(gpu.call(["roofline"], miniature=True, seconds=0.01)["error"])
print(gpu.to_gates({{"stock": {{"error": "x"}}}}))
"""

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    lines = done.stdout.splitlines()
    assert lines[:2] == ["exit code 1", "not done after 0 s"]
    assert lines[2].startswith("{'every_arm_ran': False, 'losses_agree': None, 'no_recompile': None")


def test_the_models_need_the_flop_that_the_script_states():
    """By hand: a document of 2 tokens has 3 pairs; GPT-2 124M at 1024 needs 0.798 GFLOP per token."""
    code = f"""
import sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
from gpu_cases import CASES
full = {{"input_ids": [0] * 1024, "labels": [0] * 1024, "position_ids": range(1024)}}
print(round(CASES["gpt2-124m"].flops([full]) / 1024 / 1e9, 3))
two = {{"input_ids": [0, 0], "labels": [-100, 0], "position_ids": [0, 1]}}
for name in ("qwen2.5-0.5b-sft", "qwen2.5-0.5b-lora"):
    print(int(CASES[name].flops([two])))
"""

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    layers, head = 24 * (2 * 896**2 + 2 * 896 * 128 + 3 * 896 * 4864), 151_936 * 896
    pairs = 3 * 12 * 24 * 896
    assert done.stdout.split() == [
        "0.798",
        str(6 * (2 * layers + head) + pairs),
        str(4 * (2 * layers + head) + pairs),
    ]
