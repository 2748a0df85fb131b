"""Describes the machine, its memory and speed, and the launcher that started this process.

Functions import torch when they need it, as the checks of a recipe must run within milliseconds.
"""

import ctypes
import importlib.util
import os
import platform
import re
import resource
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_clm.errors import EnvironmentFault, RecipeError

if TYPE_CHECKING:
    import torch

# Parameters of mallopt(3), from glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
TRIM_BYTES = 2**30  # glibc keeps this much free memory at the end of the heap

# Dense bfloat16 FLOP/s (without sparsity) by GPU model, from NVIDIA's data sheets.
NOMINAL_PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "RTX 4090": 165e12,
    "RTX 3090 Ti": 80e12,
    "RTX 3090": 71e12,
}
BRAND = r"(NVIDIA |GeForce )*"
FORM = r"([- ](SXM\d?|PCIE?|\d+GB|HBM\d\w?))*"  # memory and connector, which do not affect the peak


def bf16_instructions() -> str:
    """Returns the bfloat16 instructions of this CPU: ``amx_bf16``, ``avx512_bf16``, ``bf16`` (ARM), or "".

    Without them, bfloat16 is emulated and slower than float32.
    """
    import torch

    if torch.cpu._is_amx_tile_supported():
        return "amx_bf16"
    if torch.cpu._is_avx512_bf16_supported():
        return "avx512_bf16"
    is_arm = platform.machine() == "aarch64"
    return "bf16" if is_arm and "bf16" in _read("/proc/cpuinfo").split() else ""


def has_bf16(device: "torch.device") -> bool:
    """Returns whether a device computes in bfloat16 at full speed: decides the default precision of a run.

    False for MPS, as Metal emulates it on an M1 or M2.
    """
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(bf16_instructions())


def widest_float(device: "torch.device") -> "torch.dtype":
    """Returns the dtype for sums over many tokens on a device: float64, which MPS does not have."""
    import torch

    return torch.float32 if device.type == "mps" else torch.float64


def describe_machine(device: "torch.device") -> dict[str, str | int]:
    """Returns what decides the bits of a result, besides versions: the device and, on a CPU, its threads.

    Two machines for which this is equal, and the versions of the packages, compute the same floats.
    """
    import torch

    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device)}
    model = re.search(r"model name\s*: (.*)", _read("/proc/cpuinfo"))
    name = model[1] if model else platform.processor() or platform.machine()
    instructions = torch.backends.cpu.get_cpu_capability()
    return {"device": f"{device.type}, {name}, {instructions}", "threads": torch.get_num_threads()}


def nominal_peak(device: "torch.device") -> float | None:
    """Returns the vendor's figure for dense bfloat16 FLOP/s, or None if it is not known."""
    import torch

    return named_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def named_peak(name: str) -> float | None:
    """Returns the peak of a GPU by its name, or None for other names and variants such as ``L40-8Q``.

    ``NVIDIA A100-SXM4-80GB`` is an A100. A slice (MIG), a virtual or a laptop GPU of that name is slower.
    """
    models = (
        model for model in NOMINAL_PEAKS if re.fullmatch(BRAND + re.escape(model) + FORM, name, re.IGNORECASE)
    )
    longest = max(models, key=len, default="")
    return NOMINAL_PEAKS.get(longest)


def measure_peak(device: "torch.device", dtype: "torch.dtype", *, seconds: float = 0.2) -> float:
    """Measures the FLOP/s of a large matrix product, which is what a program can currently reach."""
    import torch

    size = 8192 if device.type == "cuda" else 1024
    # Matrices of ones would draw less power, so the device would be faster than in training.
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    product = left @ right
    _synchronize(device)
    started, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < seconds or count == 0:
        torch.mm(left, right, out=product)
        _synchronize(device)
        count += 1
    return count * 2 * size**3 / max(elapsed, 1e-9)


def gpu_figures(device: "torch.device") -> dict[str, float]:
    """Returns a GPU's share of memory in use, and its utilization, from 0 to 1; {} for other devices.

    The utilization needs NVIDIA's management library (the package nvidia-ml-py). It is omitted without it,
    and on a MIG slice.
    """
    import torch

    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    figures = {"gpu_memory": 1 - free / total}
    with suppress(Exception):  # the type of NVIDIA's errors is defined in the optional package
        figures["gpu_utilization"] = torch.cuda.utilization(device) / 100
    return figures


def peak_memory(device: "torch.device") -> int:
    """Returns the peak memory of this process in bytes: allocated on the device, or resident on a CPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kib = 1 if sys.platform == "darwin" else 1024  # getrusage(2)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kib


def settle_cpu(local_processes: int) -> None:
    """Sets up this process for training on a CPU: the number of threads, and the memory allocator.

    OMP_NUM_THREADS determines the number of threads. Without it, the processes on this machine share the
    usable cores.
    """
    import torch

    keep_memory()
    if "OMP_NUM_THREADS" not in os.environ:
        cores = min(usable_cores(), torch.get_num_threads())
        torch.set_num_threads(max(1, cores // max(1, local_processes)))


def keep_memory() -> bool:
    """Makes glibc keep freed memory for the next step. Returns False with another C library.

    By default, glibc returns large blocks to the system, so every step maps the same pages again. The peak
    memory does not change.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS and Windows have no mallopt
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, TRIM_BYTES))


def version_of(package: str) -> str | None:
    """Returns the version of an installed package, or None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def follow_umask(folder: Path) -> None:
    """Gives a folder and its files the modes that the umask asks for.

    safetensors and tempfile restrict what they write to the owner, so a model on a shared disk could not be
    opened by the group. Files that are more open than the umask, and links, are left alone.
    """
    umask = os.umask(0o077)
    os.umask(umask)
    for path in [folder, *folder.rglob("*")]:
        if not path.is_symlink():
            wanted = (0o777 if path.is_dir() else 0o666) & ~umask
            mode = path.stat().st_mode & 0o777
            if mode | wanted != mode:
                path.chmod(mode | wanted)


def has_gpu() -> bool:
    """Whether this machine seems to have a GPU for training, told without importing torch."""
    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    devices = ("/dev/nvidia0", "/dev/kfd")  # of CUDA and of ROCm
    return not is_hidden and any(map(os.path.exists, devices))


def usable_cores() -> int:
    """Returns the number of physical cores within this process's affinity and its container's quota."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    siblings = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    cores = {_read(siblings.format(number)) or str(number) for number in allowed}
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    share = int(quota) / int(period) if quota.isdigit() and period.isdigit() else len(cores)
    return max(1, min(len(cores), round(share)))


def total_memory() -> int:
    """Returns the memory of this machine in bytes, or 0 if it is not known."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):  # Windows has no sysconf
        return 0


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _synchronize(device: "torch.device") -> None:
    import torch

    if device.type != "cpu":
        torch.accelerator.synchronize(device)


# The key of train, and the variable that accelerate launch sets, for each way to shard a model.
SPREADERS = {"FSDP": ("fsdp", "ACCELERATE_USE_FSDP"), "DeepSpeed": ("deepspeed", "ACCELERATE_USE_DEEPSPEED")}
# Ways to split rows or layers, by their size in a launcher's file, and why they are not supported.
ROWS = "splits rows between processes, but packed documents and the loss at the targets need complete rows"
LAYERS = "splits layers between processes, for which the model is not loaded"
SPLITTERS = {
    "cp_size": f"context parallelism {ROWS}",
    "sp_size": f"sequence parallelism {ROWS}",
    "tp_size": f"tensor parallelism {LAYERS}",
}
LAUNCH = "accelerate launch --config_file recipes/accelerate/{}.yaml -m hf_clm train RECIPE"


def is_one_of_many(environment: Mapping[str, str] = os.environ) -> bool:
    """Returns whether a launcher started this process as one of several."""
    return int(environment.get("WORLD_SIZE", "1")) > 1


def is_first_here(environment: Mapping[str, str] = os.environ) -> bool:
    """Returns whether this process is the first, or the only one, of its run on this machine."""
    return environment.get("LOCAL_RANK", environment.get("RANK", "0")) == "0"


def spreads_with(values: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> str:
    """Returns ``FSDP`` or ``DeepSpeed`` if the launcher or the recipe enables it, else an empty string.

    values: the recipe's section ``train``.
    """
    enabled = (
        name
        for name, (key, variable) in SPREADERS.items()
        if values.get(key) or environment.get(variable, "").lower() in ("1", "true")
    )
    return next(enabled, "")


def check_spreading(
    values: Mapping[str, Any],
    environment: Mapping[str, str] = os.environ,
    *,
    on_cpu: bool,
    generates: bool = False,
) -> None:
    """Raises an error if a model cannot be sharded as requested.

    On a CPU, accelerate would silently use DDP instead of FSDP, and instead of DeepSpeed unless
    DS_ACCELERATOR=cpu is set.

    Args:
        generates: whether the recipe generates samples or answers, which a sharded model does not support.

    Raises RecipeError for these cases, for FSDP without a launcher, for FSDP version 1 and for a launcher
    that splits rows or layers; EnvironmentFault if DeepSpeed is not installed.
    """
    _check_splitting(environment)
    name = spreads_with(values, environment)
    if not name:
        return
    where = f"train.{SPREADERS[name][0]}" if values.get(SPREADERS[name][0]) else "accelerate launch"
    if on_cpu and not (name == "DeepSpeed" and environment.get("DS_ACCELERATOR") == "cpu"):
        what = f"{name} needs GPUs: on a CPU each process would keep the complete model"
        raise RecipeError(what, where=where, fix=f"use {LAUNCH.format('cpu')}")
    if name == "DeepSpeed" and importlib.util.find_spec("deepspeed") is None:
        fix = "pip install 'hf_clm[deepspeed]'"
        raise EnvironmentFault("needs the package deepspeed", where=where, fix=fix)
    if generates:
        what = f"generation is not supported with {name}, which shards the model"
        fix = "set samples to null and evaluation.generate to 0, and use hf-clm generate after training"
        raise RecipeError(what, where="samples", fix=fix)
    if name == "FSDP":
        _check_fsdp(values, environment, where=where)


def _check_splitting(environment: Mapping[str, str]) -> None:
    if environment.get("ACCELERATE_USE_PARALLELISM_CONFIG", "").lower() != "true":
        return
    for name, what in SPLITTERS.items():
        key = f"parallelism_config_{name}"
        if (size := environment.get(key.upper(), "1")) != "1":
            fix = f"set it to 1, and shard the model instead: {LAUNCH.format('fsdp2')}"
            raise RecipeError(what, where=f"accelerate launch: {key}", got=size, fix=fix)


def _check_fsdp(values: Mapping[str, Any], environment: Mapping[str, str], *, where: str) -> None:
    config = values.get("fsdp_config")
    version = environment.get("FSDP_VERSION", "1")
    if values.get("fsdp"):
        if "LOCAL_RANK" not in environment:
            raise RecipeError("needs a launcher", where=where, fix=f"use {LAUNCH.format('fsdp2')}")
        options = config if isinstance(config, Mapping) else {}
        version = str(options.get("version", options.get("fsdp_version", 2)))
    if version != "2":
        fix = "set fsdp_version to 2, as in recipes/accelerate"
        raise RecipeError("FSDP version 1 is not supported", where=where, got=version, fix=fix)
