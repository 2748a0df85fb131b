"""Seals checkpoints when all of their files are on the disk, and verifies them before they are used.

save: files of the Trainer -> barrier -> sizes and sha256 -> fsync -> SEALED.json, renamed into place last
start: newest sealed checkpoint -> verified -> resumed     unsealed or damaged -> checkpoint-N.broken
"""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hf_clm.errors import RecipeError
from hf_clm.hashing import fingerprint, hash_file
from hf_clm.machine import follow_umask
from hf_clm.run_folder import find_checkpoints, step_of, sync

SEAL = "SEALED.json"
VERIFIED = "verify.json"  # what hf-clm verify found in the states of a run
DELETED = ".del"  # suffix of a folder that is being deleted
MIN_CHECKPOINTS = 2  # so that there is another if the newest is damaged


def seal(folder: Path, facts: dict[str, Any]) -> None:
    """Writes SEALED.json after all other files in the folder have reached the disk.

    After a crash at any time, a folder either has no SEALED.json and does not count, or is complete.
    """
    follow_umask(folder)
    paths = list_files(folder)
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        hashes = list(pool.map(_hash_to_disk, paths))
    for part in {path.parent for path in paths} | {folder}:
        sync(part)
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256}
        for path, sha256 in zip(paths, hashes, strict=True)
    }
    partial = folder / f"{SEAL}.partial"
    content = json.loads(json.dumps({**facts, "files": files}))
    partial.write_text(json.dumps({**content, "sha256": fingerprint([content])}, indent=1) + "\n", "utf-8")
    sync(partial)
    partial.replace(folder / SEAL)
    sync(folder)
    sync(folder.parent)


def read_seal(folder: Path) -> dict[str, Any]:
    """Returns the content of SEALED.json, or {} if it is missing or damaged."""
    try:
        content = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        is_intact = content.pop("sha256") == fingerprint([content])
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}
    return content if is_intact else {}


def fault_of(folder: Path) -> str:
    """Returns what is wrong with a checkpoint, or an empty string if all files match its seal."""
    if not (files := read_seal(folder).get("files")):
        is_sealed = (folder / SEAL).exists()
        return f"{SEAL} is damaged" if is_sealed else "not sealed: its save was interrupted"
    for name, facts in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if (size := path.stat().st_size) != facts["size"]:
            return f"{name} has {size:,} bytes instead of {facts['size']:,}"
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        hashes = pool.map(hash_file, [folder / name for name in files])
        pairs = zip(files.items(), hashes, strict=True)
        damaged = [name for (name, facts), sha256 in pairs if sha256 != facts["sha256"]]
    return f"{damaged[0]} has changed since it was saved (sha256)" if damaged else ""


def newest_sealed(run: Path) -> Path | None:
    """Returns the last sealed checkpoint that can be resumed, without verifying its files."""
    return next((path for path in reversed(find_checkpoints(run)) if _is_resumable(path)), None)


def drop_broken(run: Path) -> list[str]:
    """Moves broken checkpoints aside, from the last one back to the first intact one.

    Returns a line for each that was moved. Earlier checkpoints are not verified.
    """
    lines = []
    for path in run.glob(f"*{DELETED}"):
        shutil.rmtree(path, ignore_errors=True)
    for path in reversed(find_checkpoints(run)):
        if not (fault := fault_of(path)):
            if _is_resumable(path):
                break
            continue
        lines.append(f"checkpoint {path.name}: {fault}; moved to {move(path, 'broken').name}")
    return lines


def require_sound(checkpoint: Path) -> None:
    """Raises RecipeError if a checkpoint cannot be resumed."""
    if not (checkpoint / "trainer_state.json").is_file():
        fix = "remove --resume_from_checkpoint, or set it to a checkpoint-N folder"
        raise RecipeError("no checkpoint to resume from", where=str(checkpoint), fix=fix)
    fault = fault_of(checkpoint)
    if not fault and not _is_resumable(checkpoint):
        fault = "it contains the model only (train.save_only_model)"
    if fault:
        fix = "choose another; hf-clm checkpoints RUN lists those that are intact"
        raise RecipeError(f"cannot resume from this checkpoint: {fault}", where=str(checkpoint), fix=fix)


def drop_later(run: Path, step: int) -> list[str]:
    """Moves checkpoints after the step that training resumes from aside, and returns a line for each."""
    later = [path for path in find_checkpoints(run) if step_of(path) > step]
    moved = [(path, move(path, "later")) for path in later]
    return [f"checkpoint {path.name}: later than step {step:,}; moved to {to.name}" for path, to in moved]


def rotate(run: Path, *, limit: int | None, best: str | None) -> None:
    """Deletes old sealed checkpoints, except for the last ``limit`` by step (at least two) and the best.

    Renames each one first, so that a crash does not leave part of one under its name.
    """
    if not limit or limit < 0:
        return
    sealed = [path for path in find_checkpoints(run) if read_seal(path)]
    for path in sealed[: -max(limit, MIN_CHECKPOINTS)]:
        if best and path.name == Path(best).name:
            continue
        shutil.rmtree(_renamed_to_delete(path))


def clear_place(checkpoint: Path) -> None:
    """Moves an existing folder of the same step aside before a save."""
    if checkpoint.exists():
        move(checkpoint, "later" if read_seal(checkpoint) else "broken")


def describe_checkpoints(run: Path) -> tuple[list[str], bool]:
    """Describes each checkpoint of a run in a line: step, number of files, size, and whether it is intact.

    Returns the lines, and whether all are intact. Raises RecipeError if there are no checkpoints.
    """
    if not (checkpoints := find_checkpoints(run)):
        fix = "name the folder of a run that saves checkpoints (train.save_strategy)"
        raise RecipeError("no checkpoint-N folders", where=str(run), fix=fix)
    width = max(len(path.name) for path in checkpoints)
    lines, faults = [], [fault_of(path) for path in checkpoints]
    for path, fault in zip(checkpoints, faults, strict=True):
        files = list_files(path)
        size = sum(file.stat().st_size for file in files)
        state = fault or f"sealed, verified{'' if _is_resumable(path) else ', model only'}"
        lines.append(f"{path.name:<{width}}  {len(files):>3} files  {size / 1e6:>10,.1f} MB  {state}")
    return lines, not any(faults)


def move(path: Path, ending: str) -> Path:
    """Renames a folder to ``NAME.ENDING``, or ``NAME.ENDING-2`` and so on if that exists."""
    names = (f"{path}.{ending}{f'-{number}' if number > 1 else ''}" for number in range(1, 1_000_000))
    return path.rename(next(name for name in names if not Path(name).exists()))


def list_files(folder: Path) -> list[Path]:
    """Returns all files below a folder except its seal, sorted."""
    seals = {folder / SEAL, folder / f"{SEAL}.partial"}
    return sorted(path for path in folder.rglob("*") if path.is_file() and path not in seals)


def _hash_to_disk(path: Path) -> str:
    sync(path)
    return hash_file(path)


def _is_resumable(checkpoint: Path) -> bool:
    return bool(read_seal(checkpoint).get("is_resumable"))


def _renamed_to_delete(path: Path) -> Path:
    aside = path.with_name(path.name + DELETED)
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    return aside
