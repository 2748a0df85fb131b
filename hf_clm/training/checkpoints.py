"""Checkpoints that count: sealed when all of their files are on the disk, verified before they are used.

save: files of the Trainer -> barrier -> sizes and sha256 -> fsync -> SEALED.json, by rename: the last file
start: newest sealed one -> verified -> gone on from      unsealed or damaged -> checkpoint-N.broken
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
DELETED = ".del"  # the end of a name: what is being deleted
LEAST_KEPT = 2  # where the newest is damaged there is one before it


def seal(folder: Path, facts: dict[str, Any]) -> None:
    """Writes SEALED.json, once everything else in the folder has reached the disk.

    A crash at any instant leaves a folder without it, which does not count, or a whole one.
    """
    follow_umask(folder)
    paths = list_files(folder)
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        hashes = list(pool.map(_hash_to_disk, paths))
    for part in {path.parent for path in paths} | {folder}:
        sync(part)
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": found}
        for path, found in zip(paths, hashes, strict=True)
    }
    partial = folder / f"{SEAL}.partial"
    content = json.loads(json.dumps({**facts, "files": files}))
    partial.write_text(json.dumps({**content, "sha256": fingerprint([content])}, indent=1) + "\n", "utf-8")
    sync(partial)
    partial.replace(folder / SEAL)
    sync(folder)
    sync(folder.parent)


def read_seal(folder: Path) -> dict[str, Any]:
    """The content of SEALED.json; {} where there is none, or one that is not as it was written."""
    try:
        content = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        is_whole = content.pop("sha256") == fingerprint([content])
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}
    return content if is_whole else {}


def fault_of(folder: Path) -> str:
    """Why a checkpoint does not count, or empty: every file is as it was when it was sealed."""
    if not (files := read_seal(folder).get("files")):
        return "not sealed: its save was cut off" if not (folder / SEAL).exists() else f"{SEAL} is damaged"
    for name, facts in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if (size := path.stat().st_size) != facts["size"]:
            return f"{name} has {size:,} bytes instead of {facts['size']:,}"
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        hashes = pool.map(hash_file, [folder / name for name in files])
        damaged = [name for name, found in zip(files, hashes, strict=True) if found != files[name]["sha256"]]
    return f"{damaged[0]} is not what was saved (sha256)" if damaged else ""


def newest_sealed(run: Path) -> Path | None:
    """The last checkpoint that is sealed and that training can go on from; its files are not read."""
    return next((path for path in reversed(find_checkpoints(run)) if _is_resumable(path)), None)


def drop_broken(run: Path) -> list[str]:
    """Moves aside what does not count, from the last checkpoint back to one that is as it was saved.

    Returns a line for each that was moved; the earlier ones are not read.
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
    """Raises RecipeError for a checkpoint that was named and that training cannot go on from."""
    if not (checkpoint / "trainer_state.json").is_file():
        fix = "leave out --resume_from_checkpoint, or name a checkpoint-N folder"
        raise RecipeError("no checkpoint to go on from", where=str(checkpoint), fix=fix)
    fault = fault_of(checkpoint)
    if not fault and not _is_resumable(checkpoint):
        fault = "it holds the model only (train.save_only_model)"
    if fault:
        fix = "hf-clm checkpoints RUN lists those that are whole"
        raise RecipeError(f"cannot go on from this checkpoint: {fault}", where=str(checkpoint), fix=fix)


def drop_later(run: Path, step: int) -> list[str]:
    """Moves aside the checkpoints behind a step that training goes on from: they are of another course."""
    later = [path for path in find_checkpoints(run) if step_of(path) > step]
    moved = [(path, move(path, "later")) for path in later]
    return [f"checkpoint {path.name}: later than step {step:,}; moved to {to.name}" for path, to in moved]


def rotate(run: Path, *, limit: int | None, best: str | None) -> None:
    """Deletes the oldest sealed checkpoints, by step: the last ``limit``, at least two, and the best stay.

    Each is renamed first, so that a crash leaves no half of one under its name.
    """
    if not limit or limit < 0:
        return
    sealed = [path for path in find_checkpoints(run) if read_seal(path)]
    for path in sealed[: -max(limit, LEAST_KEPT)]:
        if best and path.name == Path(best).name:
            continue
        shutil.rmtree(_renamed_to_delete(path))


def clear_place(checkpoint: Path) -> None:
    """Makes room for a save: a folder of the same step is moved aside, sealed or not."""
    if checkpoint.exists():
        move(checkpoint, "later" if read_seal(checkpoint) else "broken")


def describe_checkpoints(run: Path) -> tuple[list[str], bool]:
    """A line for each checkpoint of a run: step, files, size, and whether it is as it was saved.

    Returns the lines, and whether all are whole. Raises RecipeError where there is none.
    """
    if not (found := find_checkpoints(run)):
        raise RecipeError(
            "no checkpoint-N folders", where=str(run), fix="name a run that saves (train.save_strategy)"
        )
    width = max(len(path.name) for path in found)
    lines, faults = [], [fault_of(path) for path in found]
    for path, fault in zip(found, faults, strict=True):
        files = list_files(path)
        size = sum(file.stat().st_size for file in files)
        state = fault or f"sealed, verified{'' if _is_resumable(path) else ', the model only'}"
        lines.append(f"{path.name:<{width}}  {len(files):>3} files  {size / 1e6:>10,.1f} MB  {state}")
    return lines, not any(faults)


def move(path: Path, ending: str) -> Path:
    """Renames a folder to ``NAME.ENDING``, or to ``NAME.ENDING-2`` and so on where that is taken."""
    names = (f"{path}.{ending}{f'-{number}' if number > 1 else ''}" for number in range(1, 1_000_000))
    return path.rename(next(name for name in names if not Path(name).exists()))


def list_files(folder: Path) -> list[Path]:
    """All files below a folder but its seal, in order."""
    ours = {folder / SEAL, folder / f"{SEAL}.partial"}
    return sorted(path for path in folder.rglob("*") if path.is_file() and path not in ours)


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
