"""The output folder: never mixed with an older run, and written whole."""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hf_clm.errors import DivergedError, EnvironmentFault, Preempted
from hf_clm.model.build import TRAINED_TOKENIZER
from hf_clm.run_folder import read_record, sync, write_record
from hf_clm.training.checkpoints import read_seal
from hf_clm.training.lock import keep_lock

PREPARED = ".prepared"  # the prepared set, where it is not kept for other runs
FINAL = ".final"  # the model of a run that is done, until all of it lies there
LOOK_SECONDS = 0.2  # between two looks at a file that is to come
FAILURES: dict[type[BaseException], str] = {
    DivergedError: "diverged",
    KeyboardInterrupt: "interrupted",
    Preempted: "preempted",
}


def move_aside(folder: Path) -> Path:
    """Renames a folder to ``NAME.old-1``, or the next number that is free."""
    number = next(n for n in range(1, 1_000_000) if not Path(f"{folder}.old-{n}").exists())
    moved = folder.rename(f"{folder}.old-{number}")
    keep_lock(moved, folder)
    return moved


@contextmanager
def recording_failure(path: Path, *, is_main: bool) -> Iterator[None]:
    """Writes into run.json how a run ended that was not done: diverged, interrupted, preempted or failed."""
    try:
        yield
    except BaseException as error:
        if is_main and (record := read_record(path.parent)):
            status = FAILURES.get(type(error), "failed")
            ending = error.to_json() if isinstance(error, Preempted) else {}
            with suppress(OSError):  # the disk may be what failed
                write_record(
                    path.parent, record.updated(status=status, error=str(error).splitlines()[:1], **ending)
                )
        raise


def publish(folder: Path) -> None:
    """Moves a whole final model from its own folder into that of the run; run.json, which says done, is last.

    Where only some files were moved when the process died, the next call moves the rest. A folder that was
    not sealed is deleted.
    """
    final = folder / FINAL
    names = sorted(read_seal(final).get("files", {}), key=lambda name: name == "run.json")
    for name in names:
        if (final / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (final / name).replace(folder / name)
    if names:
        sync(folder)
        for name in (TRAINED_TOKENIZER, PREPARED):  # the tokenizer is the model's now
            shutil.rmtree(folder / name, ignore_errors=True)
    shutil.rmtree(final, ignore_errors=True)


def is_in_use(folder: Path) -> bool:
    """Whether more lies there than a run leaves behind that was refused before its first step."""
    if folder.is_dir():
        return any(not entry.name.startswith(".") for entry in folder.iterdir())
    return folder.exists()


def is_seen(file: Path, *, seconds: float) -> bool:
    """Whether a file is there, or comes in so many seconds.

    A network file system may know of a new file, or of its new folder, only where what it is in is listed.
    """
    end = time.monotonic() + seconds
    while not os.path.exists(file):
        if time.monotonic() > end:
            return False
        time.sleep(LOOK_SECONDS)
        for folder in (file.parent.parent, file.parent):
            with suppress(OSError):
                os.listdir(folder)
    return True


def make_writable(folder: Path) -> None:
    """Makes the folder. Raises EnvironmentFault where nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise EnvironmentFault(
            "cannot write to the output folder", where=str(folder), got=str(error.strerror)
        ) from error
