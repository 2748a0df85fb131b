"""Facts about the machine, and settings of the process."""

import mmap
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import build_recipe

from hf_clm import machine
from hf_clm.doctor.facts import read_machine
from hf_clm.training.arguments import training_arguments


def test_bfloat16_needs_matrix_instructions(monkeypatch):
    found = {"amx": False, "avx512": False}
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: found["amx"])
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: found["avx512"])

    assert machine.bf16_instructions() == ""
    found["avx512"] = True
    assert machine.bf16_instructions() == "avx512_bf16"
    found["amx"] = True
    assert machine.bf16_instructions() == "amx_bf16"


def test_mps_trains_in_float32_as_metal_emulates_bfloat16_on_some_chips():
    assert machine.has_bf16(torch.device("mps")) is False


def test_an_emulated_bfloat16_of_a_gpu_does_not_count(monkeypatch):
    """A T4 or V100 emulates it, at a fraction of the speed of float16."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)

    assert machine.has_bf16(torch.device("cuda")) is False


def test_sums_are_float64_but_on_mps_which_has_none():
    assert machine.widest_float(torch.device("mps")) == torch.float32
    assert machine.widest_float(torch.device("cpu")) == torch.float64


@pytest.mark.parametrize(
    ("siblings", "quota", "cores"),
    [
        ({"0": "0,4", "1": "1,5", "4": "0,4", "5": "1,5"}, "max 100000", 2),
        ({"0": "0", "1": "1", "4": "4", "5": "5"}, "max 100000", 4),
        ({"0": "0", "1": "1", "4": "4", "5": "5"}, "150000 100000", 2),
        ({"0": "0", "1": "1", "4": "4", "5": "5"}, "20000 100000", 1),
        ({}, "", 4),
    ],
)
def test_cores_are_physical_and_within_the_containers_share(monkeypatch, siblings, quota, cores):
    def read(path: str) -> str:
        if path.endswith("cpu.max"):
            return quota
        return siblings.get(path.split("/cpu/cpu")[1].split("/")[0], "")

    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: {0, 1, 4, 5}, raising=False)
    monkeypatch.setattr(machine, "_read", read)

    assert machine.usable_cores() == cores


def test_omp_num_threads_takes_precedence(monkeypatch):
    monkeypatch.setattr(machine, "keep_memory", lambda: True)
    monkeypatch.setattr(machine, "usable_cores", lambda: 6)
    chosen = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)

    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    machine.settle_cpu(2)
    monkeypatch.delenv("OMP_NUM_THREADS")
    machine.settle_cpu(2)

    assert chosen == [3]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is of glibc")
def test_glibc_accepts_the_settings():
    """Runs in a new process, as the settings apply to the entire process."""
    code = "import torch; from hf_clm.machine import keep_memory; print(keep_memory(), torch.ones(9).sum())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)

    assert found.stdout.split() == ["True", "tensor(9.)"]


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA GeForce RTX 3090 Ti", 80e12),
        # slower than what they are called after
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("GRID A100D-4C", None),
        ("NVIDIA RTX A1000", None),
        ("Tesla T4", None),
    ],
)
def test_a_device_has_the_peak_of_its_exact_name_only(name, peak):
    assert machine.named_peak(name) == peak


def test_training_and_the_doctor_use_the_same_functions_for_cores_and_bfloat16(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "_read", lambda path: "100000 100000" if path.endswith("cpu.max") else "")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    recipe = build_recipe(tmp_path, [{"text": "a"}], stage="pretrain")
    recipe = recipe.model_copy(update={"train": {"output_dir": str(tmp_path / "run"), "use_cpu": True}})
    arguments = training_arguments(recipe)

    found = read_machine(arguments)

    assert (machine.usable_cores(), found.cores) == (1, 1)
    assert (arguments.bf16, found.has_bf16) == (False, False)


def test_the_measured_peak_is_that_of_a_matrix_product():
    assert machine.measure_peak(torch.device("cpu"), torch.float32, seconds=0.05) > 1e8
    assert machine.nominal_peak(torch.device("cpu")) is None


@pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc")
def test_the_peak_memory_rises_with_allocations_and_stays():
    status = Path("/proc/self/status").read_text().splitlines()
    resident = next(line for line in status if line.startswith("VmRSS"))
    before = machine.peak_memory(torch.device("cpu"))

    chunks = (before - int(resident.split()[1]) * 1024) // 1_000_000 + 64
    with mmap.mmap(-1, chunks * 1_000_000) as held:  # new pages: malloc would reuse what was freed
        for _ in range(chunks):
            held.write(b"x" * 1_000_000)
        during = machine.peak_memory(torch.device("cpu"))

    assert 40_000_000 < during - before < 90_000_000
    assert machine.peak_memory(torch.device("cpu")) == during


def test_gpu_figures_are_shares_and_without_the_library_only_the_memory_is_measured(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20, 80))
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 93)
    assert machine.gpu_figures(gpu) == {"gpu_memory": 0.75, "gpu_utilization": 0.93}

    def missing(device: torch.device) -> int:
        raise ModuleNotFoundError("pynvml")

    monkeypatch.setattr(torch.cuda, "utilization", missing)
    assert machine.gpu_figures(gpu) == {"gpu_memory": 0.75}
    assert machine.gpu_figures(torch.device("cpu")) == {}
