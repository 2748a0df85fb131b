"""The Trainer's saving and going on: sealed checkpoints, the state of a run, and what goes to the Hub."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.fsdp import StateDictType
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, TrainOutput
from transformers.utils.hub import PushInProgress

from hf_clm.errors import EnvironmentFault, ModelError, RecipeError
from hf_clm.model.load import is_adapted
from hf_clm.training.checkpoints import clear_place, fault_of, read_seal, rotate, seal
from hf_clm.training.publish import push_checkpoint, push_folder, talking_to_the_hub

# Of an optimizer's groups: what a recipe decides, and a checkpoint brings along.
SETTINGS = ("initial_lr", "weight_decay", "betas", "eps", "momentum")


class SavingTrainer(Trainer):
    """A ``transformers.Trainer`` whose checkpoints count when they are whole.

    A checkpoint is sealed once all processes have written their part (``checkpoints.seal``); old ones are
    deleted by their step, sealed ones only, at least two and the best kept. The Trainer goes by their time.
    Saves no training_args.bin, and a model that uses its KV cache.

    Args:
        seal_facts: what SEALED.json says beside step, processes and files.
        overridden: the keys of the recipe whose values replace those of the checkpoint that is resumed.
    """

    def __init__(
        self,
        *args: Any,
        seal_facts: Mapping[str, Any] | None = None,
        overridden: Collection[str] = (),
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.seal_facts = dict(seal_facts or {})
        self.overridden = frozenset(overridden)
        self._loading = Path()  # the checkpoint whose weights are being loaded
        self.add_callback(GoingOnCallback())

    def restore(self, checkpoint: Path) -> None:
        """Takes up the end of training that a checkpoint holds, without a step."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        self.state.is_world_process_zero = self.is_world_process_zero()
        self.callback_handler.on_train_begin(self.args, self.state, self.control)
        self.log({"total_flos": self.state.total_flos, "train_loss": 0.0})
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint:
            self._load_best_model()
        self.callback_handler.on_train_end(self.args, self.state, self.control)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        run = Path(str(self.args.output_dir))
        folder = run / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            clear_place(folder)
        self.accelerator.wait_for_everyone()
        limit = self.args.save_total_limit
        with self._deleting_none():
            super()._save_checkpoint(*args, **kwargs)
        self.accelerator.wait_for_everyone()  # every process has written its part
        if self.args.should_save:
            step = {"step": self.state.global_step, "processes": self.args.world_size}
            seal(folder, {**step, "is_resumable": not self.args.save_only_model, **self.seal_facts})
            rotate(run, limit=limit, best=self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        with self._deleting_none():  # all but the best, where one is kept: also those that a start needs
            return super()._finalize_training(*args, **kwargs)

    @contextmanager
    def _deleting_none(self) -> Iterator[None]:
        """Inside, the Trainer deletes no checkpoints."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            yield
        finally:
            self.args.save_total_limit = limit

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's; whole, also where checkpoints are in parts."""
        with saving_whole(self.accelerator, output_dir or str(self.args.output_dir)):
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:  # the other processes have nothing to add, and gathered nothing
            return
        model: Any = self.accelerator.unwrap_model(self.model)
        folder = output_dir or str(self.args.output_dir)
        if is_adapted(model):
            # "auto" would save all embeddings where one pad token was added
            model.save_pretrained(folder, state_dict=state_dict, save_embedding_layers=False)
            (Path(folder) / "README.md").unlink(missing_ok=True)  # a form that nobody filled in
            model.generation_config.save_pretrained(folder)
            if isinstance(self.processing_class, PreTrainedTokenizerFast):
                self.processing_class.save_pretrained(folder)
        else:
            model.config.use_cache = True  # off in training only; a saved False would make generation slow
            super()._save(output_dir, without_copies(model, state_dict))
            model.config.use_cache = self.args.use_cache
            (Path(folder) / "training_args.bin").unlink(missing_ok=True)  # a pickle, with hub_token in clear

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._loading = Path(resume_from_checkpoint)
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        except RuntimeError as error:  # of torch, for another shape
            what, got = "its weights do not fit the model of this recipe", str(error).splitlines()[-1].strip()
            raise ModelError(what, where=resume_from_checkpoint, got=got) from error

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Raises ModelError for weights that a checkpoint lacks: they would stay what they were.

        Of a mixture the files hold each expert apart, as it is published, and the model all of them in one
        weight: from_pretrained puts them together, the Trainer does not.
        """
        model: Any = self.accelerator.unwrap_model(self.model)
        tied = {*(getattr(model, "all_tied_weights_keys", None) or {})}
        lacking = set(load_result.missing_keys) - tied
        if lacking and not is_adapted(model):
            known: dict[str, Any] = {"config": model.config, "dtype": model.dtype, "local_files_only": True}
            opened, found = type(model).from_pretrained(self._loading, output_loading_info=True, **known)
            lacking = set(found["missing_keys"]) - tied
            if lacking:
                got = ", ".join(sorted(lacking)[:3])
                raise ModelError("the checkpoint lacks weights of this model", got=got)
            model.load_state_dict(opened.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As the Trainer's; then what is overridden replaces what the checkpoint brought along.

        Of another optimizer the state begins anew. Raises RecipeError for a schedule whose learning rate
        does not follow from the step.
        """
        if checkpoint is None or not self.overridden:
            return super()._load_optimizer_and_scheduler(checkpoint)
        optimizer: Any = self.optimizer
        scheduler: Any = self.lr_scheduler
        fresh = [{key: group[key] for key in SETTINGS if key in group} for group in optimizer.param_groups]
        if "train.optim" in self.overridden:
            scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))
        else:
            super()._load_optimizer_and_scheduler(checkpoint)
        if not isinstance(scheduler, LambdaLR):
            what = f"nothing can be overridden with the schedule {self.args.lr_scheduler_type}"
            raise RecipeError(what, where="resume_override", fix="begin a run from the checkpoint's weights")
        _apply(fresh, optimizer.param_groups, scheduler=scheduler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """As the Trainer's; on another number of processes the states begin anew, from seed and step."""
        size, rank = self.args.world_size, self.args.process_index
        if checkpoint and read_seal(Path(checkpoint)).get("processes", size) != size:
            set_seed((self.args.seed + self.state.global_step * size + rank) % 2**32)
            return
        super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))
        if fault := fault_of(best):
            fix = "resume with --load_best_model_at_end false to take the last one"
            raise EnvironmentFault(f"the best checkpoint is damaged: {fault}", where=str(best), fix=fix)
        self._loading = best
        super()._load_best_model()

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As the Trainer's. Raises EnvironmentFault where the repository cannot be made."""
        with talking_to_the_hub():
            super().init_hf_repo(token, private)

    def push_to_hub(self, commit_message: str | None = "End of training", **kwargs: Any) -> None:
        """Uploads the output folder without training texts. Raises EnvironmentFault where that fails."""
        self.save_model(_internal_call=True)
        self.push_run(with_data=False, message=commit_message or "")

    def push_run(self, *, with_data: bool, message: str = "End of training") -> None:
        """Uploads the output folder as it is; ``with_data``: with the pages that show training texts."""
        if self.is_world_process_zero():
            self._finish_current_push()
            options: dict[str, Any] = {"repo_id": self.hub_model_id, "arguments": self.args}
            push_folder(Path(str(self.args.output_dir)), with_data=with_data, message=message, **options)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Uploads in the background. The Trainer's own would push its arguments, token included."""
        is_busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if not self.is_world_process_zero() or (is_busy and not self.args.hub_always_push):
            return
        folder = Path(checkpoint_folder)
        places = {"every_save": [None], "checkpoint": [None, "last-checkpoint"]}
        places["all_checkpoints"] = [None, folder.name]
        options: dict[str, Any] = {"repo_id": self.hub_model_id, "arguments": self.args}
        jobs = [
            push_checkpoint(folder, path_in_repo=place, **options)
            for place in places.get(HubStrategy(self.args.hub_strategy).value, [])
        ]
        many: Any = jobs  # typed as one
        self.push_in_progress = PushInProgress(many) if jobs else None


class GoingOnCallback(TrainerCallback):
    """Settles where training goes on what the Trainer takes from the checkpoint as it was then.

    The best checkpoint is found by its step, as the run's folder may have been moved; the steps between log
    events, evaluations and saves are those of the arguments.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        state.compute_steps(args, state.max_steps)
        best = Path(str(args.output_dir)) / f"checkpoint-{state.best_global_step}"
        if best.is_dir():
            state.best_model_checkpoint = str(best)


def _apply(fresh: list[dict[str, Any]], groups: list[dict[str, Any]], *, scheduler: LambdaLR) -> None:
    """Sets the settings of an optimizer's groups, and the learning rate of its schedule at this step."""
    for settings, group in zip(fresh, groups, strict=True):
        group.update(settings)
    scheduler.base_lrs = [group["initial_lr"] for group in groups]
    for group, base, factor in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
        group["lr"] = base * factor(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in groups]


def spreading_plugin(accelerator: Accelerator) -> Any:
    """Accelerate's settings for FSDP; None where the model is not spread by it."""
    return getattr(accelerator.state, "fsdp_plugin", None)


def settle_precision(accelerator: Accelerator) -> None:
    """Changes how FSDP2 computes in 16 bits: gradients of the processes are summed in float32, as by DDP.

    Accelerate would sum them in 16 bits, and round the loss to 3 digits.
    """
    plugin = spreading_plugin(accelerator)
    policy = getattr(plugin, "mixed_precision_policy", None)
    if policy is not None:
        plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32, output_dtype=None)


@contextmanager
def saving_whole(accelerator: Accelerator, folder: str) -> Iterator[None]:
    """Inside, a model is gathered to be saved, also where checkpoints are written in parts.

    In parts (SHARDED_STATE_DICT) the Trainer would save no model at all. A checkpoint stays in parts.
    """
    plugin = spreading_plugin(accelerator)
    if plugin is None or Path(folder).name.startswith(PREFIX_CHECKPOINT_DIR):
        yield
        return
    kind = plugin.state_dict_type
    plugin.state_dict_type = StateDictType.FULL_STATE_DICT
    try:
        yield
    finally:
        plugin.state_dict_type = kind


def without_copies(model: Any, state_dict: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Drops the second name of weights that are tied: gathered, they are no longer one tensor."""
    if state_dict is None:
        return None
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {name: part for name, part in state_dict.items() if tied.get(name) not in state_dict}
