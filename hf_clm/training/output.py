"""The output folder: it contains files of one run only, and the final model appears in it complete."""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hf_clm.errors import DivergedError, EnvironmentFault, Preempted
from hf_clm.model.build import TRAINED_TOKENIZER
from hf_clm.run_folder import read_record, sync, write_record
from hf_clm.training.checkpoints import SEAL, VERIFIED, read_seal
from hf_clm.training.lock import keep_lock

PREPARED = ".prepared"  # the prepared set, if it is not cached
FINAL = ".final"  # the final model, until it is complete
POLL_SECONDS = 0.2
FAILURES: dict[type[BaseException], str] = {
    DivergedError: "diverged",
    KeyboardInterrupt: "interrupted",
    Preempted: "preempted",
}


def move_aside(folder: Path) -> Path:
    """Renames a folder to ``NAME.old-1``, or the next free number, and returns the new path."""
    number = next(n for n in range(1, 1_000_000) if not Path(f"{folder}.old-{n}").exists())
    moved = folder.rename(f"{folder}.old-{number}")
    keep_lock(moved, folder)
    return moved


@contextmanager
def recording_failure(path: Path, *, is_main: bool) -> Iterator[None]:
    """Records in run.json how a run ended early: diverged, interrupted, preempted or failed."""
    try:
        yield
    except BaseException as error:
        if is_main and (record := read_record(path.parent)):
            status = FAILURES.get(type(error), "failed")
            ending = error.to_json() if isinstance(error, Preempted) else {}
            with suppress(OSError):  # the disk may be the reason
                write_record(
                    path.parent, record.updated(status=status, error=str(error).splitlines()[:1], **ending)
                )
        raise


def publish(folder: Path) -> None:
    """Moves a complete final model into the folder of the run, run.json (status: done) and the seal last.

    If the process dies in between, the next call moves the remaining files. Deletes an unsealed model.
    """
    final = folder / FINAL
    names = sorted(read_seal(final).get("files", {}), key=lambda name: name == "run.json")
    for name in names:
        if (final / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (final / name).replace(folder / name)
    if names:
        for name in (TRAINED_TOKENIZER, PREPARED):  # the tokenizer has been saved with the model
            shutil.rmtree(folder / name, ignore_errors=True)
        (folder / VERIFIED).unlink(missing_ok=True)  # of an earlier end
        (final / SEAL).replace(folder / SEAL)  # last, as a repetition starts from it
        sync(folder)
    shutil.rmtree(final, ignore_errors=True)


def is_in_use(folder: Path) -> bool:
    """Returns whether the folder has files of a run that got past its checks, or is a file."""
    if folder.is_dir():
        return any(not entry.name.startswith(".") for entry in folder.iterdir())
    return folder.exists()


def is_seen(file: Path, *, seconds: float) -> bool:
    """Returns whether a file exists, or appears within ``seconds``.

    Lists the parent folders meanwhile, as a network file system may not show a new file before that.
    """
    end = time.monotonic() + seconds
    while not os.path.exists(file):
        if time.monotonic() > end:
            return False
        time.sleep(POLL_SECONDS)
        for folder in (file.parent.parent, file.parent):
            with suppress(OSError):
                os.listdir(folder)
    return True


def make_writable(folder: Path) -> None:
    """Creates the folder. Raises EnvironmentFault if it is not writable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise EnvironmentFault(
            "cannot write to the output folder", where=str(folder), got=str(error.strerror)
        ) from error
