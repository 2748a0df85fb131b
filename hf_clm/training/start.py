"""Where a run starts: at its beginning, at a checkpoint, or nowhere, as it is done; on all processes alike.

resume_from_checkpoint   nothing in the folder   a run of this recipe    something else
auto (or nothing)        begins                  goes on, or is done     refused, with what differs
never (or false)         begins                  refused                 refused
must (or true)           refused                 goes on, or is done     refused, with what differs
a checkpoint's path      goes on from that       goes on from that       refused, with what differs

What ``resume_override`` names may differ.
"""

import json
import shutil
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from accelerate.utils import broadcast_object_list, gather_object
from transformers import TrainingArguments

from hf_clm.errors import EnvironmentFault, RecipeError, UserError
from hf_clm.recipe.recipe import Recipe, load_recipe
from hf_clm.run_folder import find_checkpoints, read_record, step_of
from hf_clm.training.arguments import resolve
from hf_clm.training.callbacks import spent_patience, write_line
from hf_clm.training.changes import (
    Change,
    compare,
    compare_versions,
    recipe_keys,
    refusal,
    shared,
    to_architecture,
    to_override,
    to_table,
)
from hf_clm.training.checkpoints import (
    SEAL,
    drop_broken,
    drop_later,
    newest_sealed,
    read_seal,
    require_sound,
)
from hf_clm.training.output import FINAL, is_in_use, is_seen, make_writable, move_aside, publish

WORDS = {"": "auto", "auto": "auto", "false": "never", "never": "never", "true": "must", "must": "must"}
SEEN_SECONDS = 10.0  # that a network file system may take to show a new file to others


@dataclass(frozen=True)
class Start:
    """``result`` is that of a run that is done; else training begins, or goes on from ``checkpoint``."""

    folder: Path
    checkpoint: Path | None = None
    result: dict[str, Any] | None = None
    changes: list[Change] = field(default_factory=list)  # of the recipe
    overridden: tuple[str, ...] = ()
    begins_again: bool = False  # the folder holds a run of this recipe, of which nothing was saved

    @property
    def override_keys(self) -> frozenset[str]:
        """The keys of the recipe that resume_override lets differ, and that do."""
        return frozenset(change.key for change in self.changes if change.fate == "overridden")

    @property
    def step(self) -> int:
        """The step that training starts behind."""
        return step_of(self.checkpoint) if self.checkpoint else 0

    def require_same(self, facts: dict[str, Any]) -> list[str]:
        """Compares data, tokenizer, template, batch and versions with those of the checkpoint.

        Returns the lines that say where training resumes and what differs. Raises RecipeError for what
        may not differ and is not overridden.
        """
        if self.checkpoint is None:
            why = f"(train.save_strategy: {facts['recipe']['train'].get('save_strategy')})"
            line = f"start     no checkpoint in {self.folder} {why}: from the beginning"
            return [line] if self.begins_again else []
        before = read_seal(self.checkpoint)
        changes = compare(before.get("facts", {}), facts["facts"], overridden=self.overridden)
        configs = shared(before.get("architecture", {}), facts.get("architecture", {}))
        changes += compare(*configs, overridden=[*self.overridden, *to_architecture(self.overridden)])
        moved = [change.key for change in changes if change.key in ("data", "global_batch")]
        changes = [*self.changes, *changes]
        _require_allowed(changes, self.checkpoint)
        if moved and facts["recipe"]["train"].get("max_steps", -1) <= 0:
            what = f"with other {' and '.join(moved)} an epoch has other steps: when it ends must be said"
            raise RecipeError(what, where=str(self.checkpoint), fix="give --max_steps, and override it too")
        changes += compare_versions(before.get("versions", {}), facts["versions"])
        return [f"resumes   from {self.checkpoint}{', with changes:' if changes else ''}", *to_table(changes)]


def prepare_start(recipe: Recipe, arguments: TrainingArguments) -> Start:
    """Makes the output folder and finds where to start; rank 0 moves aside what does not count.

    Raises RecipeError for a folder in use, a checkpoint that is not there, and a recipe that differs;
    EnvironmentFault for a folder that cannot be written, or that not all processes see.
    """
    _require_one_folder(arguments)
    with arguments.main_process_first(local=False, desc="preparing the output folder"):
        if arguments.process_index == 0:
            _tidy(recipe, arguments)
        start = _find_start(recipe, arguments)
        if arguments.process_index == 0:
            make_writable(start.folder)
    _require_agreement(start, arguments)
    return start


def _require_one_folder(arguments: TrainingArguments) -> None:
    """Raises EnvironmentFault, on all processes, where one does not see the output folder of rank 0."""
    if arguments.world_size == 1:
        return
    folder, is_main = Path(str(arguments.output_dir)), arguments.process_index == 0
    file = folder / f".seen-{uuid4().hex}"
    if is_main:
        for left in folder.glob(".seen-*"):  # by a run that was killed here
            left.unlink()
        file.touch()
    try:
        (name,) = broadcast_object_list([file.name])
        seconds = min(SEEN_SECONDS, arguments.ddp_timeout / 2)
        found = gather_object(["" if is_seen(folder / name, seconds=seconds) else socket.gethostname()])
    finally:
        if is_main:
            file.unlink(missing_ok=True)
    if hosts := sorted(set(found) - {""}):
        what, got = "the processes do not see the same output folder", f"another one on {', '.join(hosts)}"
        fix = "an --output_dir on a disk that all machines share"
        raise EnvironmentFault(what, where=str(folder), got=got, fix=fix)


def has_ended(checkpoint: Path, steps: int, *, patience: int | None) -> bool:
    """Whether no step of training is left behind a checkpoint. ``patience``: of early stopping."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    is_stopped = patience is not None and spent_patience(state["stateful_callbacks"]) >= patience
    return is_stopped or state["global_step"] >= steps


def _word(arguments: TrainingArguments) -> str:
    """``auto``, ``never``, ``must``, or a path."""
    value = str(arguments.resume_from_checkpoint or "")
    return WORDS.get(value.lower(), value)


def _tidy(recipe: Recipe, arguments: TrainingArguments) -> None:
    """Moves aside an older run (``overwrite``) or broken checkpoints, and ends an interrupted final save.

    What is refused stays as it is.
    """
    folder, word = Path(str(arguments.output_dir)), _word(arguments)
    is_path = word not in WORDS.values()
    is_own = is_path and Path(word).resolve().parent == folder.resolve()
    if is_path:
        require_sound(Path(word))
    if not is_in_use(folder):
        return
    if _begins_again(recipe, folder) and word != "must" and not is_own:
        move_aside(folder)
        return
    if word == "never" or (is_path and not is_own):
        return
    checkpoint = Path(word) if is_own else newest_sealed(folder)
    _require_allowed(_changes(recipe, arguments, checkpoint=checkpoint), checkpoint or folder)
    if is_own:
        for line in drop_later(folder, step_of(Path(word))):
            write_line(line)
        shutil.rmtree(folder / FINAL, ignore_errors=True)
        return
    newest = find_checkpoints(folder)[-1:]
    if word == "must" and newest and (newest[0] / SEAL).exists():
        require_sound(newest[0])
    publish(folder)
    for line in drop_broken(folder):
        write_line(line)


def _begins_again(recipe: Recipe, folder: Path) -> bool:
    if recipe.overwrite != "done":
        return bool(recipe.overwrite)
    record = read_record(folder)
    return record is not None and record.status == "done"


def _require_agreement(start: Start, arguments: TrainingArguments) -> None:
    """Raises EnvironmentFault where the processes of several machines see other folders."""
    if arguments.world_size == 1:
        return
    steps = gather_object([step_of(start.checkpoint) if start.checkpoint else 0])
    if len(set(steps)) > 1:
        what = "the processes do not see the same checkpoints"
        got, fix = f"steps {', '.join(map(str, steps))}", "an --output_dir on a disk that all machines share"
        raise EnvironmentFault(what, where=str(start.folder), got=got, fix=fix)


def _find_start(recipe: Recipe, arguments: TrainingArguments) -> Start:
    folder, word = Path(str(arguments.output_dir)), _word(arguments)
    checkpoint = newest_sealed(folder) if word in WORDS.values() else Path(word)
    is_used = is_in_use(folder)
    if word == "must" and (checkpoint is None or not is_used):
        fix = "leave out --resume_from_checkpoint, or name a checkpoint-N folder"
        raise RecipeError("no checkpoint to go on from", where=str(folder), fix=fix)
    if not is_used and word in ("auto", "never"):
        return Start(folder)
    is_elsewhere = checkpoint is not None and checkpoint.resolve().parent != folder.resolve()
    if is_used and (word == "never" or is_elsewhere):
        fix = "another --output_dir; --overwrite moves it; --resume_from_checkpoint auto goes on with it"
        raise RecipeError("the output folder holds files of an earlier run", where=str(folder), fix=fix)
    changes = _changes(recipe, arguments, checkpoint=checkpoint)
    _require_allowed(changes, checkpoint or folder)
    overridden = tuple(recipe.resume_override)
    record = read_record(folder) if word in WORDS.values() else None
    trains_on = any(change.fate == "overridden" for change in changes)
    result = record.to_json() if record and record.status == "done" and not trains_on else None
    begins_again = is_used and checkpoint is None
    return Start(folder, checkpoint, result, changes, overridden, begins_again)


def _changes(recipe: Recipe, arguments: TrainingArguments, *, checkpoint: Path | None) -> list[Change]:
    """What of the recipe differs from that of the checkpoint, or of the folder that holds none yet.

    Raises RecipeError for a folder that holds no run.
    """
    folder = Path(str(arguments.output_dir))
    now = recipe_keys(resolve(recipe, arguments))
    sealed = read_seal(checkpoint).get("recipe") if checkpoint else None
    before = recipe_keys(sealed) if sealed else None
    if checkpoint is None:
        try:
            before = recipe_keys(load_recipe(folder / "recipe.yaml"))
        except UserError as error:
            what = "the output folder holds files of an earlier run, and no recipe of one that could go on"
            raise RecipeError(
                what, where=str(folder), fix="another --output_dir; --overwrite moves it"
            ) from error
    overridden = recipe.resume_override if checkpoint else ()
    return compare(before or {}, now, overridden=overridden) if before else []


def _require_allowed(changes: list[Change], where: Path) -> None:
    if not (text := refusal(changes)):
        return
    fix = f"{to_override(changes)} applies what is given now; --overwrite begins again"
    if step_of(where) < 0:
        text += "; it holds no checkpoint that a change could be applied to (train.save_strategy)"
        fix = "--overwrite begins again; or another --output_dir"
    raise RecipeError(f"not the run of this recipe: {text}", where=str(where), fix=fix)
