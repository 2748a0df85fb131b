"""Faults of the machine while a run goes on, one line each: its disk, its folder, its other processes."""

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
    errno.EFBIG: "raise the limit of this shell on the size of a file (ulimit -f)",
}
CUT_OFF = "a file was cut off"
MIB = 2**20


@contextmanager
def writing(folder: Path, part: str = "", *, needed: int = 0) -> Iterator[None]:
    """What cannot be written inside becomes an EnvironmentFault, and no half of a checkpoint stays.

    Args:
        folder: the output folder. That it was moved meanwhile is an EnvironmentFault too.
        part: the checkpoint in it that is written.
        needed: bytes that it takes.
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
            got=f"{os.strerror(number) if number else CUT_OFF} ({space})",
            fix=f"{FIXES.get(number, 'look at the disk')}; what was saved before is as it was",
        ) from error


@contextmanager
def among_others() -> Iterator[None]:
    """Turns what a lost process does to the others into an EnvironmentFault.

    A process that dies or raises leaves the others waiting inside of a library, for at most
    train.ddp_timeout, or in a loop that calls ``require_alive``.
    """
    try:
        yield
    except RuntimeError as error:
        if not _is_of_another(error):
            raise
        words = re.search("Connection reset|Connection closed|Broken pipe|Timed out", str(error))
        raise _lost(words[0] if words else type(error).__name__) from error


@contextmanager
def own_errors() -> Iterator[None]:
    """Lets this process report the errors inside, though it is not the first: others may not meet them.

    A loss that is not finite is met by all of them.
    """
    try:
        yield
    except DivergedError:
        raise
    except UserError as error:
        error.is_own = True if error.is_own is None else error.is_own
        raise


def require_alive(process: int) -> None:
    """Raises EnvironmentFault if a process of this machine has ended; to be called while waiting for it."""
    try:
        is_alive = psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        is_alive = False
    if not is_alive:
        raise _lost()


def keep_timeout(arguments: TrainingArguments) -> None:
    """Lets train.ddp_timeout hold on a CPU too, where transformers 5.23 leaves it at 30 minutes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.distributed_c10d._set_pg_timeout(arguments.ddp_timeout_delta)


def fault_number(error: Exception) -> int | None:
    """The errno of a fault of the disk, also where another library says it in words; 0 where it says none."""
    if isinstance(error, OSError):
        return error.errno if error.errno in FAULTS else None
    if found := re.search(r"\(os error (\d+)\)", str(error)):
        return int(found[1])
    is_of_torch = isinstance(error, RuntimeError) and re.search("inline_container|StreamWriter", str(error))
    return 0 if is_of_torch else None


def checkpoint_bytes(model: torch.nn.Module, optimizer: Any) -> int:
    """What a checkpoint of this process takes, without its small files."""
    states = optimizer.state.values() if optimizer is not None else ()
    tensors = [*model.parameters(), *(part for state in states for part in state.values())]
    return sum(part.nbytes for part in tensors if isinstance(part, torch.Tensor))


def _is_of_another(error: RuntimeError) -> bool:
    is_one_of_many = torch.distributed.is_available() and torch.distributed.is_initialized()
    return is_one_of_many and (isinstance(error, torch.distributed.DistError) or "gloo" in str(error))


def _lost(got: str = "") -> EnvironmentFault:
    fix = "look for its own error; the same command resumes from the last checkpoint"
    return EnvironmentFault("another process of this run has ended, or does not answer", got=got, fix=fix)


def _require_folder(folder: Path) -> None:
    if not folder.is_dir():
        what = (
            "the output folder was moved or deleted while the run wrote to it; nothing is written elsewhere"
        )
        fix = "--output_dir names the folder that was moved: the run goes on there"
        raise EnvironmentFault(what, where=str(folder), fix=fix)


def _size(count: int) -> str:
    return f"{count / MIB:,.1f} MiB" if count < 1024 * MIB else f"{count / (1024 * MIB):,.1f} GiB"
