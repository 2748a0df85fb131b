"""Replays parts of a run: the same steps from a sealed checkpoint, or from the start, in a temporary folder.

the start ---- checkpoint-100 ---- checkpoint-200 ---- the final model         states of the run
          span                span                span

The start is a state too, since the seed gives its weights. On the same kind of machine a replay is equal to
the run to the bit. With records left out, it shows what they did.
"""

import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_clm.data.batch.sampling import EpochSampler
from hf_clm.data.label.datasets import TokenizedDataset
from hf_clm.data.proof.ledger import Seats
from hf_clm.data.split import Split
from hf_clm.errors import RecipeError
from hf_clm.hashing import fingerprint
from hf_clm.machine import describe_machine, spreads_with
from hf_clm.recipe.recipe import Recipe, training_values
from hf_clm.recipe.sections import TRAIN, Doctor
from hf_clm.run_folder import RunFolder, find_checkpoints, load_folder, step_of
from hf_clm.training.arguments import check_launch, rows_per_step, training_arguments
from hf_clm.training.assemble import Inputs, assemble, prepare_inputs, settle_machine
from hf_clm.training.callbacks import LastEvaluationCallback
from hf_clm.training.changes import Change, compare, compare_versions, recipe_keys
from hf_clm.training.checkpoints import read_seal
from hf_clm.training.faults import among_others
from hf_clm.training.lock import locked
from hf_clm.training.summary import RunFacts, versions
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
    def name(self) -> str:
        if self.folder is None:
            return "the start"
        return self.folder.name if step_of(self.folder) >= 0 else "the final model"


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
    """Returns the span that ends at each state. It begins at the last state before that can be resumed."""
    spans = []
    for number, end in enumerate(states):
        begin = next((state for state in reversed(states[:number]) if state.is_resumable), None)
        if begin and begin.step < end.step:
            spans.append(Span(begin, end))
    return spans


class StopAtCallback(TrainerCallback):
    """Ends the training after a step, with a log event and, if asked, a checkpoint."""

    def __init__(self, step: int, *, saves: bool):
        self.step, self.saves = step, saves

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step >= self.step:
            control.should_log = control.should_training_stop = True
            control.should_save |= self.saves


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

    @property
    def last(self) -> State:
        """The last state of the run."""
        return self.states[-1]

    @property
    def seconds_per_step(self) -> float:
        """How long a step took in the run, from its log."""
        timed = [entry for entry in self.run.metrics if entry["step"] and "seconds" in entry]
        return timed[-1]["seconds"] / timed[-1]["step"] if timed else 0.0

    def last_before(self, step: int) -> State:
        """Returns the last state from which a step can be replayed."""
        return next(state for state in reversed(self.states) if state.is_resumable and state.step < step)

    def model_at(self, step: int) -> CLMTrainer:
        """Returns the Trainer with the model as it was after a step; 0 is before the first one."""
        begin = self.last_before(step + 1)
        if begin.step < step:
            return self.replay(begin, step, end=self.last)[0]
        trainer, _ = assemble(self.inputs_of(self.last), checkpoint=begin.folder)
        if begin.folder:
            trainer._load_from_checkpoint(str(begin.folder))
        return trainer

    @cached_property
    def differences(self) -> list[Change]:
        """What differs on this machine from the one that trained: versions, and what computes.

        If there is none, a replay must be equal to the bit.
        """
        before, now = self.last.seal, describe_machine(self.arguments.device)
        machine = before.get("machine", {})
        changed = [key for key in {**machine, **now} if machine.get(key) != now.get(key)]
        changes = [Change(key, machine.get(key), now.get(key), "version") for key in changed]
        return compare_versions(before.get("versions", {}), versions()) + changes

    @property
    def unsealed(self) -> list[Path]:
        """The checkpoints that are not sealed."""
        return [path for path in find_checkpoints(self.run.path) if not read_seal(path)]

    def facts_of(self, state: State) -> dict[str, Any]:
        """Returns what a state of the same recipe would be sealed with here."""
        return assemble(self.inputs_of(state), checkpoint=None)[0].seal_facts

    def changes_of(self, state: State) -> list[Change]:
        """Returns what the recipe of the run's folder has other values for than the one sealed in a state."""
        return compare(recipe_keys(dict(state.seal["recipe"])), recipe_keys(self.recipe))

    def inputs_of(self, state: State) -> Inputs:
        """Returns the data and settings that led to a state, prepared once for all states that share them."""
        changes = self.changes_of(state)
        recipe = Recipe.model_validate(state.seal["recipe"]) if changes else self.recipe
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
    ) -> tuple[CLMTrainer, RunFacts]:
        """Trains again from a state up to a step, and returns the Trainer with its model.

        Args:
            end: the state whose recipe is used.
            left_out: the numbers of the records to leave out.
            saves: whether to save a checkpoint at the last step, in ``scratch``.
        """
        inputs = without(self.inputs_of(end), left_out)
        inputs = replace(inputs, arguments=copy(inputs.arguments))  # the Trainer may change them
        if begin.folder:
            inputs.arguments.eval_on_start = False  # it was evaluated at step 0
        trainer, facts = assemble(inputs, checkpoint=begin.folder)
        if begin.folder:
            before, now = (recipe_keys(dict(state.seal["recipe"])) for state in (begin, end))
            changed = [change.key for change in compare(before, now) if change.fate != "free"]
            trainer.overridden = frozenset(changed)
        trainer.add_callback(StopAtCallback(step, saves=saves))
        if self.evaluates and end.folder == self.run.path:
            trainer.add_callback(LastEvaluationCallback())
        with closing(trainer):
            if saves and begin.folder is None:
                trainer.save_model(str(self.scratch / START), _internal_call=True)
            trainer.train(resume_from_checkpoint=str(begin.folder) if begin.folder else None)
        return trainer, facts

    def _prepare(self, recipe: Recipe) -> Inputs:
        train = {**recipe.train, **QUIET, "output_dir": str(self.scratch)}
        if not self.evaluates and train.get("lr_scheduler_type") != DEPENDS_ON_EVALUATION:
            train |= {"eval_strategy": "no", "eval_on_start": False}
        doctor = Doctor(round_trip="off", self_test=False)
        update = {"train": train, "doctor": doctor, "samples": None, "early_stopping": None}
        quiet = recipe.model_copy(update=update)
        date = self.run.record.proof.prepared.date
        return prepare_inputs(quiet, training_arguments(quiet), kept=recipe.train, date=date)


@contextmanager
def replaying(folder: str, recipe: Recipe, *, evaluates: bool = False) -> Iterator[Replays]:
    """Opens the folder of a run for replays on this machine, and locks it during the block.

    Raises RecipeError for a folder without a run or without sealed states, for a streaming run, and if the
    run had another number of processes.
    """
    run = load_folder(folder)
    check_launch(recipe)
    arguments = training_arguments(recipe)
    with among_others(), locked(run.path, is_main=arguments.process_index == 0):
        settle_machine(arguments)
        is_main = arguments.process_index == 0
        (scratch,) = broadcast_object_list([tempfile.mkdtemp(prefix="hf_clm-replay-") if is_main else ""])
        try:
            replays = Replays(run, recipe, arguments=arguments, scratch=Path(scratch), evaluates=evaluates)
            _require_replayable(replays)
            threads = replays.last.seal.get("machine", {}).get("threads")
            if threads and arguments.device.type == "cpu":  # sums of floats depend on it
                torch.set_num_threads(threads)
            yield replays
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def first_use(inputs: Inputs, record: int) -> int:
    """Returns the first step that trains on a record; 1 if the order of the rows is not known in advance."""
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


def _require_replayable(replays: Replays) -> None:
    run, recipe = replays.run, replays.recipe
    if recipe.data.streaming:
        what = "a run that streams its data cannot be replayed"
        raise RecipeError(what, where=str(run.path), fix="train with data.streaming: false")
    if spread := spreads_with(training_values(recipe)):
        what = f"replays are not supported with {spread}, which shards the model"
        raise RecipeError(what, where=str(run.path))
    if not replays.last.seal:
        what = "the run has no sealed state"
        fix = "let it finish, or save checkpoints (--save_strategy steps --save_steps N)"
        raise RecipeError(what, where=str(run.path), got=f"status {run.record.status}", fix=fix)
    processes = replays.last.seal["facts"]["processes"]
    if processes != replays.arguments.world_size:
        launcher = f"accelerate launch --multi_gpu --num_processes {processes} -m hf_clm"
        launcher = "hf-clm" if processes == 1 else launcher
        got = f"{replays.arguments.world_size} instead of {processes}"
        fix = f"start it with {launcher}"
        raise RecipeError("needs as many processes as the run", where=str(run.path), got=got, fix=fix)
