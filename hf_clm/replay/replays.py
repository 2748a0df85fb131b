"""Replays parts of a run: the same steps from a sealed checkpoint, or from the start, in a temporary folder.

the start ---- checkpoint-100 ---- checkpoint-200 ---- the final model         states of the run
          span                span                span

The start is a state too, since the seed gives its weights. On the same kind of machine a replay is equal to
the run to the bit. With records left out, it shows what they did.
"""

import math
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from pydantic import ValidationError
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_clm.data.batch.sampling import EpochSampler
from hf_clm.data.label.datasets import TokenizedDataset
from hf_clm.data.proof.ledger import Seats
from hf_clm.data.split import Split
from hf_clm.errors import RecipeError
from hf_clm.hashing import fingerprint
from hf_clm.machine import describe_machine
from hf_clm.recipe.recipe import Recipe
from hf_clm.recipe.sections import TRAIN, Doctor
from hf_clm.run_folder import RunFolder, find_checkpoints, load_folder, step_of
from hf_clm.training.arguments import check_launch, rows_per_step, training_arguments
from hf_clm.training.assemble import Inputs, assemble, prepare_inputs, settle_machine
from hf_clm.training.callbacks import write_line
from hf_clm.training.changes import Change, compare, compare_versions, recipe_keys
from hf_clm.training.checkpoints import SEAL, read_seal
from hf_clm.training.faults import among_others
from hf_clm.training.lock import locked
from hf_clm.training.summary import versions
from hf_clm.training.trainer import CLMTrainer

# Fields of train that save, report or upload, and do not affect the training.
QUIET = {
    "save_strategy": "no",
    "report_to": "none",
    "push_to_hub": False,
    "load_best_model_at_end": False,
    "resume_from_checkpoint": None,
    "disable_tqdm": True,
}
PLACES = ("model.name_or_path", "tokenizer.name_or_path")
START = "start"  # the folder in scratch with the weights that the seed gives
DEPENDS_ON_EVALUATION = "reduce_lr_on_plateau"  # the schedule that does


@dataclass(frozen=True)
class State:
    """A state of a run from which, or up to which, steps can be replayed.

    folder  None for the start
    seal    the content of SEALED.json; {} for the start
    """

    step: int
    folder: Path | None = None
    seal: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def is_resumable(self) -> bool:
        """Whether it has the state of the optimizer, or needs none because it is the start."""
        return self.folder is None or bool(self.seal.get("is_resumable"))

    @property
    def is_final(self) -> bool:
        """Whether it is the final model, in the folder of the run."""
        return self.folder is not None and step_of(self.folder) < 0

    @property
    def weights(self) -> list[str]:
        """The names of the files with its weights."""
        return [name for name in self.seal.get("files", {}) if name.endswith(".safetensors")]

    @property
    def name(self) -> str:
        if self.folder is None:
            return "the start"
        return "the final model" if self.is_final else self.folder.name


@dataclass(frozen=True)
class Span:
    """The steps between two states."""

    begin: State
    end: State

    @property
    def steps(self) -> int:
        return self.end.step - self.begin.step

    def __str__(self) -> str:
        return f"{self.begin.name} to {self.end.name}"


def find_states(run: RunFolder) -> list[State]:
    """Returns the start, the sealed checkpoints and the final model of a run, by their steps."""
    states = [State(0)]
    for path in find_checkpoints(run.path):
        if seal := read_seal(path):
            states.append(State(step_of(path), path, seal))
    final = read_seal(run.path)
    if final and run.record.status == "done":
        states.append(State(int(final["step"]), run.path, final))
    return states


def find_spans(states: Sequence[State]) -> list[Span]:
    """Returns the span that ends at each state. It begins at the last state before that can be resumed.

    No span ends at a final model that is also a checkpoint, of the last step or of the best one.
    """
    spans = []
    for number, end in enumerate(states):
        earlier = states[:number]
        begin = next((state for state in reversed(earlier) if state.is_resumable), None)
        if begin and end.step not in [state.step for state in earlier]:
            spans.append(Span(begin, end))
    return spans


class FollowRunCallback(TrainerCallback):
    """Logs and evaluates at the steps at which the run did, and ends the training after a step.

    The log of the run decides, as a save, the end of an epoch and a signal also cause log events, and the
    loss of an event is the mean since the previous one.

    Args:
        step: the last step.
        logged: the steps with a log event. The last one always has one.
        evaluated: the steps with an evaluation.
        saves: whether to save a checkpoint at the last step.
    """

    def __init__(self, step: int, *, logged: Collection[int], evaluated: Collection[int], saves: bool):
        self.step, self.logged, self.evaluated, self.saves = step, logged, evaluated, saves

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        is_last = state.global_step >= self.step
        control.should_log = is_last or state.global_step in self.logged
        control.should_evaluate = state.global_step in self.evaluated
        control.should_save = is_last and self.saves
        control.should_training_stop |= is_last

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        control.should_log = control.should_evaluate = control.should_save = False  # done at the step's end


class Replays:
    """Replays parts of one run.

    Args:
        recipe: that of the run. Its paths may differ: data and model can be elsewhere.
        arguments: of the recipe.
        scratch: a folder for the files of the replays.
        evaluates: whether to evaluate as the run did. The weights do not depend on it.
    """

    def __init__(
        self,
        run: RunFolder,
        recipe: Recipe,
        *,
        arguments: TrainingArguments,
        scratch: Path,
        evaluates: bool,
    ):
        self.run, self.recipe, self.arguments, self.scratch = run, recipe, arguments, scratch
        self.evaluates = evaluates
        self.states = find_states(run)
        self._inputs: dict[str, Inputs] = {}
        self._facts: dict[int, dict[str, Any]] = {}  # by the id of the inputs, which are kept

    def say(self, line: str) -> None:
        """Prints a line, on the first process only."""
        if self.arguments.process_index == 0:
            write_line(line)

    @property
    def last(self) -> State:
        """The last state of the run."""
        return self.states[-1]

    @property
    def seconds_per_step(self) -> float:
        """How long a step took in the run, from its log."""
        timed = [entry for entry in self.run.metrics if entry["step"] and "seconds" in entry]
        return timed[-1]["seconds"] / timed[-1]["step"] if timed else 0.0

    def state_at(self, step: int, *, where: str) -> State:
        """Returns the furthest state with another step, up to which the run can be replayed.

        Raises RecipeError, naming the option ``where``, for a step that the run does not have.
        """
        furthest = max(
            self.states, key=lambda state: state.step
        )  # the final model may be that of a step before
        if not 0 < step <= furthest.step:
            got = f"{step} of {furthest.step:,} steps"
            raise RecipeError("the run has no such step", where=where, got=got)
        return replace(furthest, step=step)

    def last_before(self, step: int) -> State:
        """Returns the last state from which a step can be replayed."""
        return next(state for state in reversed(self.states) if state.is_resumable and state.step < step)

    def model_at(self, step: int) -> CLMTrainer:
        """Returns the Trainer with the model as it was after a step; 0 is before the first one."""
        begin = self.last_before(step + 1)
        if begin.step < step:
            return self.replay(begin, step, end=self.last)
        trainer, _ = assemble(self.inputs_of(self.last), checkpoint=begin.folder)
        if begin.folder:
            trainer._load_from_checkpoint(str(begin.folder))
        return trainer

    def differences_from(self, state: State) -> list[Change]:
        """Returns what differs here from the machine that saved a state: versions, and what computes.

        If nothing does, a replay up to this state must be equal to the bit.
        """
        self._use_threads_of(state)
        before, now = state.seal.get("machine", {}), describe_machine(self.arguments.device)
        changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        changes = compare_versions(state.seal.get("versions", {}), versions())
        if self.arguments.device.type != "cpu" and not self.arguments.full_determinism:
            changes.append(Change("full_determinism", False, False, "version"))  # atomics add in any order
        return changes + [Change(key, before.get(key), now.get(key), "version") for key in changed]

    @property
    def unsealed(self) -> list[Path]:
        """The checkpoints that are not sealed."""
        return [path for path in find_checkpoints(self.run.path) if not read_seal(path)]

    def facts_of(self, state: State) -> dict[str, Any]:
        """Returns what a state of the same recipe would be sealed with here."""
        inputs = self.inputs_of(state)
        if id(inputs) not in self._facts:
            self._facts[id(inputs)] = assemble(inputs, checkpoint=None)[0].seal_facts
        return self._facts[id(inputs)]

    def changes_of(self, state: State) -> list[Change]:
        """Returns what the recipe of the run's folder has other values for than the one sealed in a state.

        Data, model and tokenizer may be elsewhere. Their contents are compared, not their paths.
        """
        changes = compare(recipe_keys(dict(state.seal["recipe"])), recipe_keys(self.recipe))
        return [change for change in changes if change.key not in PLACES]

    def inputs_of(self, state: State) -> Inputs:
        """Returns the data and settings that led to a state, prepared once for all states that share them."""
        changes = self.changes_of(state)
        recipe = _sealed_recipe(state, here=self.recipe) if changes else self.recipe
        key = fingerprint([recipe.model_dump()])
        if key not in self._inputs:
            self._inputs[key] = self._prepare(recipe)
        return self._inputs[key]

    def replay(
        self,
        begin: State,
        step: int,
        *,
        end: State,
        left_out: Sequence[int] = (),
        saves: bool = False,
    ) -> CLMTrainer:
        """Trains again from a state up to a step, and returns the Trainer with its model.

        Args:
            end: the state whose recipe is used.
            left_out: the numbers of the records to leave out.
            saves: whether to save a checkpoint at the last step, in ``scratch``.
        """
        assert begin.step < step, "a replay makes at least one step"
        inputs = without(self.inputs_of(end), left_out)
        inputs = replace(inputs, arguments=copy(inputs.arguments))  # the Trainer may change them
        if begin.folder:
            inputs.arguments.eval_on_start = False  # it was evaluated at step 0
        trainer, _ = assemble(inputs, checkpoint=begin.folder)
        if begin.folder:
            before, now = (recipe_keys(dict(state.seal["recipe"])) for state in (begin, end))
            changed = [change.key for change in compare(before, now) if change.fate != "free"]
            trainer.overridden = frozenset(changed)
        logged, evaluated = self._steps_with("loss"), self._steps_with("eval_loss")
        if not self._evaluates(inputs.recipe):
            evaluated = frozenset()
        trainer.add_callback(FollowRunCallback(step, logged=logged, evaluated=evaluated, saves=saves))
        self._use_threads_of(end)
        with closing(trainer):
            if saves and begin.folder is None:
                trainer.save_model(str(self.scratch / START), _internal_call=True)
            trainer.train(resume_from_checkpoint=str(begin.folder) if begin.folder else None)
        return trainer

    def _prepare(self, recipe: Recipe) -> Inputs:
        train = {**recipe.train, **QUIET, "output_dir": str(self.scratch)}
        if not self._evaluates(recipe):
            train |= {"eval_strategy": "no", "eval_on_start": False}
        doctor = Doctor(round_trip="off", self_test=False)
        update = {"train": train, "doctor": doctor, "samples": None, "early_stopping": None}
        quiet = recipe.model_copy(update=update)
        date = self.run.record.proof.prepared.date
        return prepare_inputs(quiet, training_arguments(quiet), kept=recipe.train, date=date)

    def _evaluates(self, recipe: Recipe) -> bool:
        return self.evaluates or recipe.train.get("lr_scheduler_type") == DEPENDS_ON_EVALUATION

    def _steps_with(self, key: str) -> frozenset[int]:
        """Returns the steps at which the run logged a key."""
        return frozenset(entry["step"] for entry in self.run.metrics if key in entry)

    def _use_threads_of(self, state: State) -> None:
        """Computes with as many threads as the run did, as the order of sums depends on them."""
        threads = state.seal.get("machine", {}).get("threads")
        if threads and self.arguments.device.type == "cpu":
            torch.set_num_threads(threads)


@contextmanager
def replaying(folder: str, recipe: Recipe, *, evaluates: bool = False) -> Iterator[Replays]:
    """Opens the folder of a run for replays on this machine, and locks it during the block if it can.

    Raises RecipeError for a folder without a run or without sealed states, for a streaming run, and if the
    run had another number of processes.
    """
    run = load_folder(folder)
    check_launch(recipe)
    arguments = training_arguments(recipe)
    is_main = arguments.process_index == 0
    # A folder that cannot be written to, such as an auditor's copy, is not in use by a run either.
    locks = is_main and os.access(run.path, os.W_OK)
    with among_others(), locked(run.path, is_main=locks):
        settle_machine(arguments)
        (scratch,) = broadcast_object_list([tempfile.mkdtemp(prefix="hf_clm-replay-") if is_main else ""])
        try:
            replays = Replays(run, recipe, arguments=arguments, scratch=Path(scratch), evaluates=evaluates)
            _require_replayable(replays)
            yield replays
        finally:
            if is_main:  # which may still compare when the other processes are done
                shutil.rmtree(scratch, ignore_errors=True)


def first_use(inputs: Inputs, record: int) -> int:
    """Returns the first step that trains on a record; 1 if it is not known in advance, or not in epoch 1."""
    order = epoch_order(inputs, 0)
    if order is None:
        return 1
    used = np.flatnonzero(np.isin(order, rows_of(inputs.prepared.splits[TRAIN], record)))
    return int(used[0]) // rows_per_step(inputs.arguments) + 1 if len(used) else 1


def step_rows(inputs: Inputs, step: int) -> np.ndarray:
    """Returns the numbers of the rows that all processes train on in a step, counted from 1.

    Raises RecipeError if the order of the rows is not known in advance.
    """
    arguments, per_step = inputs.arguments, rows_per_step(inputs.arguments)
    in_epoch = math.ceil(count_rows(inputs) / per_step)
    epoch, number = divmod(step - 1, in_epoch)
    order = epoch_order(inputs, epoch)
    if order is None:
        got = str(arguments.train_sampling_strategy)
        what = "the rows of a step are only known for random and sequential"
        raise RecipeError(what, where="train.train_sampling_strategy", got=got)
    return order[number * per_step : (number + 1) * per_step]


def epoch_order(inputs: Inputs, epoch: int) -> np.ndarray | None:
    """Returns the order of the rows in an epoch, or None if it depends on more than seed and epoch."""
    arguments, rows = inputs.arguments, len(inputs.prepared.splits[TRAIN].dataset)
    if arguments.train_sampling_strategy == "sequential":
        order = np.arange(rows)
    elif arguments.train_sampling_strategy == "random":
        seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
        sampler = EpochSampler(rows, total=rows, seed=seed)
        sampler.epoch = epoch
        order = np.fromiter(sampler, np.int64, rows)
    else:
        return None
    return order[: count_rows(inputs)]


def count_rows(inputs: Inputs) -> int:
    """Returns the number of rows in an epoch, without those that ``dataloader_drop_last`` drops."""
    rows, arguments = len(inputs.prepared.splits[TRAIN].dataset), inputs.arguments
    batch = arguments.train_batch_size * arguments.world_size
    return rows - rows % batch if arguments.dataloader_drop_last else rows


def rows_of(split: Split, record: int) -> np.ndarray:
    """Returns the numbers of the training rows that contain tokens of a record."""
    packed = None if isinstance(split.dataset, TokenizedDataset) else split.dataset
    firsts = np.concatenate([[0], np.cumsum(split.ledger.numbers("rows"))])
    seats = Seats(packed, rows=int(firsts[-1]))
    return np.unique(seats.of_rows(firsts[record : record + 2])[1])


def without(inputs: Inputs, left_out: Sequence[int]) -> Inputs:
    """Returns the inputs with more records left out."""
    splits = inputs.prepared.splits
    train = replace(splits[TRAIN], left_out=(*splits[TRAIN].left_out, *left_out))
    return replace(inputs, prepared=replace(inputs.prepared, splits={**splits, TRAIN: train}))


def _sealed_recipe(state: State, *, here: Recipe) -> Recipe:
    """Returns the recipe that a state was sealed with, but with the paths of another recipe."""
    try:
        recipe = Recipe.model_validate(state.seal["recipe"])
    except ValidationError as error:
        first = error.errors()[0]
        what = f"the sealed recipe is not valid here: {'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise RecipeError(what, where=str(state.folder)) from error
    model = recipe.model.model_copy(update={"name_or_path": here.model.name_or_path})
    tokenizer = recipe.tokenizer.model_copy(update={"name_or_path": here.tokenizer.name_or_path})
    data = {"eval": here.data.eval, "cache_dir": here.data.cache_dir}
    if len(recipe.data.train) == len(here.data.train):
        pairs = zip(recipe.data.train, here.data.train, strict=True)
        data["train"] = [ours.model_copy(update={"path": its.path}) for ours, its in pairs]
    data = recipe.data.model_copy(update=data)
    return recipe.model_copy(update={"model": model, "tokenizer": tokenizer, "data": data})


def _resumed_elsewhere(state: State) -> str:
    """Returns the checkpoint outside of its folder from which the run was resumed, or an empty string."""
    train = state.seal["recipe"]["train"]
    checkpoint = Path(str(train.get("resume_from_checkpoint") or ""))
    is_outside = checkpoint.resolve().parent != Path(train["output_dir"]).resolve()
    return str(checkpoint) if step_of(checkpoint) >= 0 and is_outside else ""


def _require_replayable(replays: Replays) -> None:
    run, recipe = replays.run, replays.recipe
    if recipe.data.streaming:
        what = "a run that streams its data cannot be replayed"
        raise RecipeError(what, where=str(run.path), fix="train with data.streaming: false")
    if not replays.last.seal and run.record.status == "done":
        what = "the final model has no seal, or a damaged one, and there are no checkpoints"
        raise RecipeError(what, where=str(run.path / SEAL), fix="train again with this version of hf_clm")
    if not replays.last.seal:
        what = "the run has no sealed state"
        fix = "let it finish, or save checkpoints (--save_strategy steps --save_steps N)"
        raise RecipeError(what, where=str(run.path), got=f"status {run.record.status}", fix=fix)
    if own := replays.last.seal.get("additions"):
        what = "a run with objects of its own in Python cannot be replayed"
        raise RecipeError(what, where=str(run.path), got=", ".join(own))
    if sharded := next((state for state in replays.states[1:] if not state.weights), None):
        what = "a run with sharded checkpoints cannot be replayed"
        raise RecipeError(what, where=str(sharded.folder))
    if origin := next(filter(None, map(_resumed_elsewhere, replays.states[1:])), None):
        what = "a run that was resumed from another folder cannot be replayed"
        raise RecipeError(what, where=str(run.path), got=origin, fix="name the folder of that run")
    processes = replays.last.seal["facts"]["processes"]
    if processes != replays.arguments.world_size:
        launcher = f"torchrun --nproc_per_node {processes} -m hf_clm"
        got = f"{replays.arguments.world_size} instead of {processes}"
        fix = f"start it with {launcher if processes > 1 else 'hf-clm'}"
        raise RecipeError("needs as many processes as the run", where=str(run.path), got=got, fix=fix)
