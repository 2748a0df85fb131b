"""The output folder: never mixed with an older run, and written whole."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from hf_clm.errors import DivergedError, EnvironmentFault, Preempted, RecipeError
from hf_clm.training.lock import LOCK, keep_lock

# What is written before everything is proved: the tokenizer that a run trains, and its type.
BEFORE_A_RUN = {"config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", LOCK}
FAILURES: dict[type[BaseException], str] = {
    DivergedError: "diverged",
    KeyboardInterrupt: "interrupted",
    Preempted: "preempted",
}


def prepare_output_dir(arguments: TrainingArguments, *, overwrite: bool) -> Path:
    """Makes the output folder; rank 0 refuses to mix with an older run, or moves it aside with ``overwrite``.

    Raises RecipeError for a folder in use, EnvironmentFault for one that cannot be written.
    """
    folder, goes_on = Path(str(arguments.output_dir)), resume_from(arguments) is not None
    with arguments.main_process_first(local=False, desc="preparing the output folder"):
        if arguments.process_index == 0:
            if _is_in_use(folder) and not goes_on:
                if not overwrite:
                    fix = "another --output_dir; --overwrite moves it; --resume_from_checkpoint true goes on"
                    raise RecipeError(
                        "the output folder holds files of an earlier run", where=str(folder), fix=fix
                    )
                move_aside(folder)
            _make_writable(folder)
    return folder


def resume_from(arguments: TrainingArguments) -> str | None:
    """The checkpoint to go on from, or None. Raises RecipeError where there is no such checkpoint."""
    value = str(arguments.resume_from_checkpoint or "false")
    if value.lower() == "false":
        return None
    folder = str(arguments.output_dir)
    if value.lower() == "true":
        value = (get_last_checkpoint(folder) if Path(folder).is_dir() else None) or folder
    if not Path(value, "trainer_state.json").is_file():
        fix = "leave out --resume_from_checkpoint, or name a checkpoint-N folder"
        raise RecipeError("no checkpoint to go on from", where=value, fix=fix)
    return value


def move_aside(folder: Path) -> Path:
    """Renames a folder to ``NAME.old-1``, or the next number that is free."""
    number = next(n for n in range(1, 1_000_000) if not Path(f"{folder}.old-{n}").exists())
    moved = folder.rename(f"{folder}.old-{number}")
    keep_lock(moved, folder)
    return moved


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes JSON so that a reader sees the old file or the new one, never half of it."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


@contextmanager
def recording_failure(path: Path, *, is_main: bool) -> Iterator[None]:
    """Writes into run.json how a run ended that was not done: diverged, interrupted, preempted or failed."""
    try:
        yield
    except BaseException as error:
        if is_main and path.is_file():
            status = FAILURES.get(type(error), "failed")
            facts = json.loads(path.read_text(encoding="utf-8"))
            ending = error.to_json() if isinstance(error, Preempted) else {}
            error_line = str(error).splitlines()[:1]
            with suppress(OSError):  # the disk may be what failed
                write_json(path, {**facts, "status": status, "error": error_line, **ending})
        raise


def _is_in_use(folder: Path) -> bool:
    """Whether more lies there than a run leaves behind that was refused before its first step."""
    if folder.is_dir():
        return any(entry.name not in BEFORE_A_RUN for entry in folder.iterdir())
    return folder.exists()


def _make_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise EnvironmentFault(
            "cannot write to the output folder", where=str(folder), got=str(error.strerror)
        ) from error
