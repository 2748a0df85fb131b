"""Turns faults of the machine during a run into one-line errors: the disk, the folder, other processes."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError
from transformers import TrainingArguments

from hf_clm.errors import DivergedError, EnvironmentFault, UserError
from hf_clm.training.checkpoints import SEAL

FULL = {errno.ENOSPC, errno.EDQUOT}
FAULTS = FULL | {errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE}
FIXES = {
    **dict.fromkeys(FULL, "free some space, or lower train.save_total_limit"),
    errno.EFBIG: "raise this shell's limit on file sizes (ulimit -f)",
}
TRUNCATED = "a file was truncated"
MIB = 2**20


@contextmanager
def writing(folder: Path, part: str = "", *, needed: int = 0) -> Iterator[None]:
    """Converts write errors to EnvironmentFault, and deletes the unfinished checkpoint.

    Args:
        folder: the output folder. Also raises EnvironmentFault if it has been moved.
        part: the name of the checkpoint that is being written.
        needed: its size in bytes.
    """
    _require_folder(folder)
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        _require_folder(folder)
        number = fault_number(error)
        if number is None:
            raise
        path = folder / part
        if part and path.is_dir() and not (path / SEAL).exists():
            shutil.rmtree(path, ignore_errors=True)
        free = f"{_size(shutil.disk_usage(folder).free)} free"
        space = f"{_size(needed)} needed, {free}" if needed else free
        raise EnvironmentFault(
            "cannot be written",
            where=str(error.filename if isinstance(error, OSError) and error.filename else path),
            got=f"{os.strerror(number) if number else TRUNCATED} ({space})",
            fix=f"{FIXES.get(number, 'check the disk')}; earlier checkpoints are intact",
        ) from error


@contextmanager
def among_others() -> Iterator[None]:
    """Converts the errors that follow the loss of another process to an EnvironmentFault.

    The remaining processes wait inside a collective operation, for at most train.ddp_timeout, or in a loop
    that calls ``require_alive``.
    """
    try:
        yield
    except RuntimeError as error:
        if not _is_from_another_process(error):
            raise
        reason = re.search("Connection reset|Connection closed|Broken pipe|Timed out", str(error))
        raise _lost(reason[0] if reason else type(error).__name__) from error


@contextmanager
def own_errors() -> Iterator[None]:
    """Lets this process report its errors even if it is not the first, as the others may not have them.

    A loss that is not finite occurs on all processes, and only the first reports it.
    """
    try:
        yield
    except DivergedError:
        raise
    except UserError as error:
        error.is_own = True if error.is_own is None else error.is_own
        raise


def require_alive(process: int) -> None:
    """Raises EnvironmentFault if a process of this machine has ended. Call it in loops that wait for one."""
    try:
        is_alive = psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        is_alive = False
    if not is_alive:
        raise _lost()


def keep_timeout(arguments: TrainingArguments) -> None:
    """Applies train.ddp_timeout on CPUs too, where transformers 5.23 leaves it at 30 minutes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.distributed_c10d._set_pg_timeout(arguments.ddp_timeout_delta)


def fault_number(error: Exception) -> int | None:
    """Returns the errno of a disk error, 0 if its library does not give one, None for other errors."""
    if isinstance(error, OSError):
        return error.errno if error.errno in FAULTS else None
    if number := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors
        return int(number[1])
    is_from_torch = isinstance(error, RuntimeError) and re.search("inline_container|StreamWriter", str(error))
    return 0 if is_from_torch else None


def checkpoint_bytes(model: torch.nn.Module, optimizer: Any) -> int:
    """Returns the size of a checkpoint of this process, without its small files."""
    states = optimizer.state.values() if optimizer is not None else ()
    tensors = [*model.parameters(), *(part for state in states for part in state.values())]
    return sum(part.nbytes for part in tensors if isinstance(part, torch.Tensor))


def _is_from_another_process(error: RuntimeError) -> bool:
    is_one_of_many = torch.distributed.is_available() and torch.distributed.is_initialized()
    return is_one_of_many and (isinstance(error, torch.distributed.DistError) or "gloo" in str(error))


def _lost(got: str = "") -> EnvironmentFault:
    fix = "see the error of that process; the same command resumes from the last checkpoint"
    return EnvironmentFault("another process of this run has ended or does not respond", got=got, fix=fix)


def _require_folder(folder: Path) -> None:
    if not folder.is_dir():
        what = "the output folder was moved or deleted during the run, which stopped"
        fix = "set --output_dir to the new place of the folder to resume"
        raise EnvironmentFault(what, where=str(folder), fix=fix)


def _size(count: int) -> str:
    return f"{count / MIB:,.1f} MiB" if count < 1024 * MIB else f"{count / (1024 * MIB):,.1f} GiB"
