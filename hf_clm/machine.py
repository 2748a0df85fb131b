"""What the machine offers to a training process, and what a launcher started on it.

torch is imported where a device is asked: the recipe's checks need the launcher alone, within milliseconds.
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

# mallopt(3): parameter numbers of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
TRIM_BYTES = 2**30  # free memory at the heap's end that is kept

# Dense bfloat16 FLOP/s by the model of a device, from NVIDIA's data sheets (without sparsity).
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
FORM = r"([- ](SXM\d?|PCIE?|\d+GB|HBM\d\w?))*"  # of memory and plug, which change nothing


def bf16_instructions() -> str:
    """The instructions for bfloat16 of this CPU: ``amx_bf16``, ``avx512_bf16``, ``bf16`` (ARM), or empty.

    Without them bfloat16 is emulated, and slower than float32.
    """
    import torch

    if torch.cpu._is_amx_tile_supported():
        return "amx_bf16"
    if torch.cpu._is_avx512_bf16_supported():
        return "avx512_bf16"
    is_arm = platform.machine() == "aarch64"
    return "bf16" if is_arm and "bf16" in _read("/proc/cpuinfo").split() else ""


def has_bf16(device: "torch.device") -> bool:
    """Whether a device computes in bfloat16 at full speed."""
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(bf16_instructions())


def nominal_peak(device: "torch.device") -> float | None:
    """Dense bfloat16 FLOP/s that the maker states; None where it is not known."""
    import torch

    return named_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def named_peak(name: str) -> float | None:
    """The peak of a device of this name; None for a name that says more, such as ``L40`` with ``-8Q``.

    ``NVIDIA A100-SXM4-80GB`` is an A100; a slice of one (MIG) or a laptop's GPU is slower than its namesake.
    """
    known = (
        model for model in NOMINAL_PEAKS if re.fullmatch(BRAND + re.escape(model) + FORM, name, re.IGNORECASE)
    )
    longest = max(known, key=len, default="")
    return NOMINAL_PEAKS.get(longest)


def measure_peak(device: "torch.device", dtype: "torch.dtype", *, seconds: float = 0.2) -> float:
    """FLOP/s of a large matrix product: what a program can reach on this device, now."""
    import torch

    size = 8192 if device.type == "cuda" else 1024
    # of ones a device draws less power, and so computes faster than in any training
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
    """Of a GPU: the share of its memory that is in use, and the share of the time that it computes; 0 to 1.

    The second needs NVIDIA's management library (the package nvidia-ml-py), and is left out without it, and
    where a part of a GPU does not tell it.
    """
    import torch

    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    found = {"gpu_memory": 1 - free / total}
    with suppress(Exception):  # NVIDIA's errors have a type of that package alone
        found["gpu_utilization"] = torch.cuda.utilization(device) / 100
    return found


def peak_memory(device: "torch.device") -> int:
    """Bytes that this process held at most so far: on the device, or resident on a CPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kib = 1 if sys.platform == "darwin" else 1024  # getrusage(2)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kib


def settle_cpu(local_processes: int) -> None:
    """Changes this process for training on a CPU: threads, and how memory is kept. Called by ``train``.

    OMP_NUM_THREADS, where it is set, decides the threads; else each process on this machine gets its share
    of the cores that it may use.
    """
    import torch

    keep_memory()
    if "OMP_NUM_THREADS" not in os.environ:
        cores = min(usable_cores(), torch.get_num_threads())
        torch.set_num_threads(max(1, cores // max(1, local_processes)))


def keep_memory() -> bool:
    """Lets glibc keep freed memory for the next step; False where the C library is another.

    It gives large blocks back to the system when they are freed, so that every step pays again for the same
    pages. The memory at the peak stays the same.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl has none, macOS and Windows have another allocator
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
    """Physical cores that this process may use: within its affinity and its share in a container."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    siblings = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    cores = {_read(siblings.format(number)) or str(number) for number in allowed}
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    share = int(quota) / int(period) if quota.isdigit() and period.isdigit() else len(cores)
    return max(1, min(len(cores), round(share)))


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _synchronize(device: "torch.device") -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


# What spreads a model: the key of train, and the variable by which accelerate says it to its processes.
SPREADERS = {"FSDP": ("fsdp", "ACCELERATE_USE_FSDP"), "DeepSpeed": ("deepspeed", "ACCELERATE_USE_DEEPSPEED")}
LAUNCH = "accelerate launch --config_file recipes/accelerate/{}.yaml -m hf_clm train RECIPE"


def is_one_of_many(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher started this process as one of a group."""
    return int(environment.get("WORLD_SIZE", "1")) > 1


def is_first_here(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is the only one of its run on this machine, or speaks for the others."""
    return environment.get("LOCAL_RANK", environment.get("RANK", "0")) == "0"


def spreads_with(values: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> str:
    """FSDP or DeepSpeed where the launcher or the recipe asks for it, else empty.

    values: of the recipe's section ``train``.
    """
    asked = (
        name
        for name, (key, variable) in SPREADERS.items()
        if values.get(key) or environment.get(variable, "").lower() in ("1", "true")
    )
    return next(asked, "")


def check_spreading(
    values: Mapping[str, Any],
    environment: Mapping[str, str] = os.environ,
    *,
    on_cpu: bool,
    generates: bool = False,
) -> None:
    """Raises where a model could not be spread as it was asked for; accelerate would train on all the same.

    On a CPU it silently uses DDP instead of FSDP, and instead of DeepSpeed without DS_ACCELERATOR=cpu.

    Args:
        generates: the recipe wants samples or answers, which no process can generate from its part alone.

    Raises RecipeError for these, for FSDP without a launcher and for its version 1; EnvironmentFault where
    DeepSpeed is not installed.
    """
    name = spreads_with(values, environment)
    if not name:
        return
    where = f"train.{SPREADERS[name][0]}" if values.get(SPREADERS[name][0]) else "accelerate launch"
    if on_cpu and not (name == "DeepSpeed" and environment.get("DS_ACCELERATOR") == "cpu"):
        what = f"{name} needs GPUs: on a CPU each process would keep the whole model"
        raise RecipeError(what, where=where, fix=LAUNCH.format("cpu"))
    if name == "DeepSpeed" and importlib.util.find_spec("deepspeed") is None:
        fix = "pip install 'hf_clm[deepspeed]'"
        raise EnvironmentFault("needs the package deepspeed", where=where, fix=fix)
    if generates:
        what = f"no process can generate alone from a model that {name} spreads"
        fix = "set samples to null and evaluation.generate to 0; hf-clm generate works afterwards"
        raise RecipeError(what, where="samples", fix=fix)
    if name == "FSDP":
        _check_fsdp(values, environment, where=where)


def _check_fsdp(values: Mapping[str, Any], environment: Mapping[str, str], *, where: str) -> None:
    config = values.get("fsdp_config")
    version = environment.get("FSDP_VERSION", "1")
    if values.get("fsdp"):
        if "LOCAL_RANK" not in environment:
            raise RecipeError("needs a launcher", where=where, fix=LAUNCH.format("fsdp2"))
        named = config if isinstance(config, Mapping) else {}
        version = str(named.get("version", named.get("fsdp_version", 2)))
    if version != "2":
        what = "FSDP of version 1 is not supported"
        raise RecipeError(what, where=where, got=version, fix="fsdp_version: 2, as in recipes/accelerate")
