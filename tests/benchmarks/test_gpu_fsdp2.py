"""The script that runs FSDP2 end to end, on two CPU processes, and on GPUs if available."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("gpu_fsdp2.py")
GATES = ["learned", "opens_with_what_was_learned", "resume_is_the_same", "weights_are_float32"]


def run(*words: str) -> dict:
    done = subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.large
def test_the_script_runs_on_two_processes_of_a_cpu():
    found = run("--on_cpu")

    assert found["gates"] == dict.fromkeys(GATES, True)
    assert found["processes"] == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("file", ["fsdp2", "fsdp2_offload"])
def test_a_gpu_trains_saves_and_goes_on_under_fsdp2(file):
    assert run("--file", file)["gates"] == dict.fromkeys(GATES, True)
