"""What the machine offers to a training process, and the settings that make use of it."""

import ctypes
import os
import resource
import sys
import time
from pathlib import Path

import torch

# mallopt(3): parameter numbers of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
TRIM_BYTES = 2**30  # free memory at the heap's end that is kept

# Dense bfloat16 FLOP/s by a part of the device's name, from NVIDIA's data sheets (without sparsity).
NOMINAL_PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def bf16_instructions() -> str:
    """The matrix instructions for bfloat16 of this CPU: ``amx_bf16``, ``avx512_bf16``, or empty.

    Without them bfloat16 is emulated, and slower than float32.
    """
    if torch.cpu._is_amx_tile_supported():
        return "amx_bf16"
    return "avx512_bf16" if torch.cpu._is_avx512_bf16_supported() else ""


def nominal_peak(device: torch.device) -> float | None:
    """Dense bfloat16 FLOP/s that the maker states; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in NOMINAL_PEAKS.items() if part in name), None)


def measure_peak(device: torch.device, dtype: torch.dtype, *, seconds: float = 0.2) -> float:
    """FLOP/s of a large matrix product: what a program can reach on this device, now."""
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    product = left @ right
    _synchronize(device)
    started, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < seconds or count == 0:
        torch.mm(left, right, out=product)
        _synchronize(device)
        count += 1
    return count * 2 * size**3 / max(elapsed, 1e-9)


def peak_memory(device: torch.device) -> int:
    """Bytes that this process held at most so far: on the device, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kib = 1 if sys.platform == "darwin" else 1024  # getrusage(2)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kib


def settle_cpu(local_processes: int) -> None:
    """Changes this process for training on a CPU: threads, and how memory is kept. Called by ``train``.

    OMP_NUM_THREADS, where it is set, decides the threads; else each process on this machine gets its share
    of the cores that it may use.
    """
    keep_memory()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, usable_cores() // max(1, local_processes)))


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


def usable_cores() -> int:
    """Physical cores that this process may use: within its affinity and its share in a container."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    siblings = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    cores = {_read(siblings.format(number)) or str(number) for number in allowed}
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    share = int(quota) / int(period) if quota.isdigit() and period.isdigit() else len(cores)
    return max(1, min(len(cores), torch.get_num_threads(), round(share)))


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
