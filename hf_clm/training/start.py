"""Decides where a run starts: at step 0, at a checkpoint, or not at all because it is done.

resume_from_checkpoint   empty folder     a run of this recipe   a run of another recipe
auto (the default)       starts           resumes, or is done    refused, with the differences
never (or false)         starts           refused                refused
must (or true)           refused          resumes, or is done    refused, with the differences
a checkpoint's path      resumes there    resumes there          refused, with the differences

Keys in ``resume_override`` may differ. All processes start at the same place.
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
SHARED_DISK = "set --output_dir to a folder on a disk that all machines share"
VISIBLE_SECONDS = 10.0  # a network file system may take this long to show a new file to other hosts


@dataclass(frozen=True)
class Start:
    """The start of a run: ``result`` if it is done, else the ``checkpoint`` to resume, or None."""

    folder: Path
    checkpoint: Path | None = None
    result: dict[str, Any] | None = None
    changes: list[Change] = field(default_factory=list)  # of the recipe
    overridden: tuple[str, ...] = ()
    begins_again: bool = False  # the folder contains a run of this recipe that has not saved anything yet

    @property
    def override_keys(self) -> frozenset[str]:
        """The keys of the recipe that differ and are allowed to by resume_override."""
        return frozenset(change.key for change in self.changes if change.fate == "overridden")

    @property
    def step(self) -> int:
        """The number of steps that have been made already."""
        return step_of(self.checkpoint) if self.checkpoint else 0

    @property
    def kept(self) -> dict[str, Any]:
        """The section ``train`` of the checkpoint, with the choices of the first start; {} without one."""
        return read_seal(self.checkpoint)["recipe"]["train"] if self.checkpoint else {}

    def require_same(self, facts: dict[str, Any]) -> list[str]:
        """Compares data, tokenizer, template, batch and versions with those of the checkpoint.

        Returns lines that show where training resumes and what differs. Raises RecipeError for differences
        that are neither allowed nor overridden.
        """
        if self.checkpoint is None:
            why = f"(train.save_strategy: {facts['recipe']['train'].get('save_strategy')})"
            line = f"start     at step 0: no checkpoint in {self.folder} {why}"
            return [line] if self.begins_again else []
        before = read_seal(self.checkpoint)
        changes = compare(before.get("facts", {}), facts["facts"], overridden=self.overridden)
        configs = shared(before.get("architecture", {}), facts.get("architecture", {}))
        changes += compare(*configs, overridden=[*self.overridden, *to_architecture(self.overridden)])
        resized = [change.key for change in changes if change.key in ("data", "global_batch")]
        changes = [*self.changes, *changes]
        _require_allowed(changes, self.checkpoint)
        if resized and facts["recipe"]["train"].get("max_steps", -1) <= 0:
            what = f"the number of steps in an epoch depends on {' and '.join(resized)}, which changed"
            fix = "set --max_steps and add max_steps to --resume_override"
            raise RecipeError(what, where=str(self.checkpoint), fix=fix)
        changes += compare_versions(before.get("versions", {}), facts["versions"])
        return [f"resumes   from {self.checkpoint}{', with changes:' if changes else ''}", *to_table(changes)]


def prepare_start(recipe: Recipe, arguments: TrainingArguments) -> Start:
    """Creates the output folder and decides where to start. Rank 0 moves broken checkpoints aside.

    Raises RecipeError for a folder in use, a missing checkpoint, and a recipe that differs; EnvironmentFault
    for a folder that is not writable, or not visible to all processes.
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
    """Raises EnvironmentFault on all processes if one of them does not see the output folder of rank 0."""
    if arguments.world_size == 1:
        return
    folder, is_main = Path(str(arguments.output_dir)), arguments.process_index == 0
    file = folder / f".seen-{uuid4().hex}"
    if is_main:
        for stale in folder.glob(".seen-*"):
            stale.unlink()
        file.touch()
    try:
        (name,) = broadcast_object_list([file.name])
        seconds = min(VISIBLE_SECONDS, arguments.ddp_timeout / 2)
        hosts = gather_object(["" if is_seen(folder / name, seconds=seconds) else socket.gethostname()])
    finally:
        if is_main:
            file.unlink(missing_ok=True)
    if blind := sorted(set(hosts) - {""}):
        what = f"the processes do not see the same output folder (it differs on {', '.join(blind)})"
        raise EnvironmentFault(what, where=str(folder), fix=SHARED_DISK)


def has_ended(checkpoint: Path, steps: int, *, patience: int | None) -> bool:
    """Returns whether training had ended at a checkpoint. ``patience``: of early stopping."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    is_stopped = patience is not None and spent_patience(state["stateful_callbacks"]) >= patience
    return is_stopped or state["global_step"] >= steps


def _word(arguments: TrainingArguments) -> str:
    """Returns ``auto``, ``never``, ``must``, or the path of a checkpoint."""
    value = str(arguments.resume_from_checkpoint or "")
    return WORDS.get(value.lower(), value)


def _tidy(recipe: Recipe, arguments: TrainingArguments) -> None:
    """Moves aside an earlier run (``overwrite``) or broken checkpoints, and completes an interrupted save.

    Changes nothing if the run is refused.
    """
    folder, word = Path(str(arguments.output_dir)), _word(arguments)
    is_path = word not in WORDS.values()
    is_inside = is_path and Path(word).resolve().parent == folder.resolve()
    if is_path:
        require_sound(Path(word))
    if not is_in_use(folder):
        return
    if _begins_again(recipe, folder) and word != "must" and not is_inside:
        move_aside(folder)
        return
    if word == "never" or (is_path and not is_inside):
        return
    checkpoint = Path(word) if is_inside else newest_sealed(folder)
    _require_allowed(_changes(recipe, arguments, checkpoint=checkpoint), checkpoint or folder)
    if is_inside:
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
    """Raises EnvironmentFault if the processes do not resume from the same step."""
    if arguments.world_size == 1:
        return
    steps = gather_object([step_of(start.checkpoint) if start.checkpoint else 0])
    if len(set(steps)) > 1:
        what = "the processes do not see the same checkpoints"
        got = f"steps {', '.join(map(str, steps))}"
        raise EnvironmentFault(what, where=str(start.folder), got=got, fix=SHARED_DISK)


def _find_start(recipe: Recipe, arguments: TrainingArguments) -> Start:
    folder, word = Path(str(arguments.output_dir)), _word(arguments)
    checkpoint = newest_sealed(folder) if word in WORDS.values() else Path(word)
    is_used = is_in_use(folder)
    if word == "must" and (checkpoint is None or not is_used):
        fix = "remove --resume_from_checkpoint, or set it to a checkpoint-N folder"
        raise RecipeError("no checkpoint to resume from", where=str(folder), fix=fix)
    if not is_used and word in ("auto", "never"):
        return Start(folder)
    is_elsewhere = checkpoint is not None and checkpoint.resolve().parent != folder.resolve()
    if is_used and (word == "never" or is_elsewhere):
        fix = (
            "choose another --output_dir, set --overwrite to move the files aside,"
            " or --resume_from_checkpoint auto to resume that run"
        )
        raise RecipeError("the output folder contains files of an earlier run", where=str(folder), fix=fix)
    changes = _changes(recipe, arguments, checkpoint=checkpoint)
    _require_allowed(changes, checkpoint or folder)
    overridden = tuple(recipe.resume_override)
    record = read_record(folder) if word in WORDS.values() else None
    trains_on = any(change.fate == "overridden" for change in changes)
    result = record.to_json() if record and record.status == "done" and not trains_on else None
    begins_again = is_used and checkpoint is None
    return Start(folder, checkpoint, result, changes, overridden, begins_again)


def _changes(recipe: Recipe, arguments: TrainingArguments, *, checkpoint: Path | None) -> list[Change]:
    """Returns the differences to the recipe of the checkpoint or, without a checkpoint, of the folder.

    Raises RecipeError for a folder that does not contain a run.
    """
    folder = Path(str(arguments.output_dir))
    now = recipe_keys(resolve(recipe, arguments))
    sealed = read_seal(checkpoint).get("recipe") if checkpoint else None
    before = recipe_keys(sealed) if sealed else None
    if checkpoint is None:
        try:
            before = recipe_keys(load_recipe(folder / "recipe.yaml"))
        except UserError as error:
            what = "the output folder contains files, but no recipe.yaml of a run to resume"
            fix = "choose another --output_dir, or set --overwrite to move the files aside"
            raise RecipeError(what, where=str(folder), fix=fix) from error
    overridden = recipe.resume_override if checkpoint else ()
    return compare(before or {}, now, overridden=overridden) if before else []


def _require_allowed(changes: list[Change], where: Path) -> None:
    if not (text := refusal(changes)):
        return
    fix = f"{to_override(changes)} resumes with the new values; --overwrite starts again"
    if step_of(where) < 0:
        text += "; without a checkpoint, the new values cannot be applied (train.save_strategy)"
        fix = "set --overwrite to start again, or choose another --output_dir"
    raise RecipeError(f"the recipe differs from that of the run: {text}", where=str(where), fix=fix)
