"""The output folder: never mixed with an older run, and written whole."""

import json
import os
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from hf_clm.errors import EnvironmentFault, RecipeError


def prepare_output_dir(arguments: TrainingArguments, *, overwrite: bool) -> Path:
    """Makes the output folder; rank 0 moves an older run aside with ``overwrite``, and else refuses to mix with it.

    Raises RecipeError for a folder in use, EnvironmentFault for one that cannot be written.
    """
    folder = Path(str(arguments.output_dir))
    with arguments.main_process_first(desc="preparing the output folder"):
        if arguments.process_index == 0:
            if _is_in_use(folder) and not arguments.resume_from_checkpoint:
                if not overwrite:
                    fix = "name another --output_dir, or --overwrite moves it aside, or --resume_from_checkpoint true goes on"
                    raise RecipeError("the output folder holds files of an earlier run", where=str(folder), fix=fix)
                move_aside(folder)
            _make_writable(folder)
    return folder


def move_aside(folder: Path) -> Path:
    """Renames a folder to ``NAME.old-1``, or the next number that is free."""
    number = next(n for n in range(1, 1_000_000) if not Path(f"{folder}.old-{n}").exists())
    return folder.rename(f"{folder}.old-{number}")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes JSON so that a reader sees the old file or the new one, never half of it."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def _is_in_use(folder: Path) -> bool:
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


def _make_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise EnvironmentFault("cannot write to the output folder", where=str(folder), got=str(error.strerror)) from error
