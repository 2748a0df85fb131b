"""How the Trainer saves and resumes: sealed checkpoints, the state of a run, and uploads to the Hub."""

import re
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

# Settings of an optimizer's parameter groups that come from the recipe and are also stored in checkpoints.
SETTINGS = ("initial_lr", "weight_decay", "betas", "eps", "momentum", "nesterov", "ns_steps")
# Keys whose values decide which weights have which state. Another value starts with a new state.
OF_STATES = re.compile(r"train\.optim|optimizer\.(name|freeze|layer_decay|groups$|groups\.\d+\.match).*")


class SavingTrainer(Trainer):
    """A ``transformers.Trainer`` that only counts checkpoints that are complete.

    A checkpoint is sealed once all processes have written their part (``checkpoints.seal``). Only sealed
    checkpoints are rotated, in order of their step (the Trainer sorts by modification time), and the best
    one and at least two are kept. ``training_args.bin`` is not saved, and ``use_cache`` is on in the saved
    config.

    Args:
        seal_facts: additional content of SEALED.json.
        overridden: keys of the recipe whose values replace those of the resumed checkpoint.
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
        self.add_callback(ResumeCallback())

    @property
    def model_step(self) -> int:
        """The step whose weights the final model has: the best one with ``load_best_model_at_end``."""
        best = self.state.best_global_step if self.args.load_best_model_at_end else None
        return best or self.state.global_step

    def restore(self, checkpoint: Path) -> None:
        """Loads a checkpoint at which training had ended, and ends the training without another step."""
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
        with self._deleting_none():  # the Trainer would delete all but the best, which a resume may need
            return super()._finalize_training(*args, **kwargs)

    @contextmanager
    def _deleting_none(self) -> Iterator[None]:
        """Keeps the Trainer from deleting checkpoints inside the block."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            yield
        finally:
            self.args.save_total_limit = limit

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves like the Trainer, but the complete model even if checkpoints are sharded."""
        with saving_whole(self.accelerator, output_dir or str(self.args.output_dir)):
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:  # only the first process has gathered the weights
            return
        model: Any = self.accelerator.unwrap_model(self.model)
        folder = output_dir or str(self.args.output_dir)
        if is_adapted(model):
            # "auto" would save all embeddings if a pad token was added
            model.save_pretrained(folder, state_dict=state_dict, save_embedding_layers=False)
            (Path(folder) / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
            model.generation_config.save_pretrained(folder)
            if isinstance(self.processing_class, PreTrainedTokenizerFast):
                self.processing_class.save_pretrained(folder)
        else:
            model.config.use_cache = True  # off in training only: a saved False would make generation slow
            super()._save(output_dir, without_copies(model, state_dict))
            model.config.use_cache = self.args.use_cache
            (Path(folder) / "training_args.bin").unlink(missing_ok=True)  # contains hub_token in plain text

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._loading = Path(resume_from_checkpoint)
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        except RuntimeError as error:  # raised by torch for tensors of another shape
            what = "the weights do not match the model of this recipe"
            got = str(error).splitlines()[-1].strip()
            raise ModelError(what, where=resume_from_checkpoint, got=got) from error

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Raises ModelError for weights that are missing in the checkpoint, which the Trainer only warns of.

        The files of a mixture of experts contain each expert separately, while the model has all of them in
        one weight. ``from_pretrained`` merges them and the Trainer does not, so this does it.
        """
        model: Any = self.accelerator.unwrap_model(self.model)
        tied = {*(getattr(model, "all_tied_weights_keys", None) or {})}
        missing = set(load_result.missing_keys) - tied
        if missing and not is_adapted(model):
            loaded, info = type(model).from_pretrained(
                self._loading,
                config=model.config,
                dtype=model.dtype,
                local_files_only=True,
                output_loading_info=True,
            )
            missing = set(info["missing_keys"]) - tied
            if missing:
                got = ", ".join(sorted(missing)[:3])
                raise ModelError("the checkpoint lacks weights of this model", got=got)
            model.load_state_dict(loaded.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Loads like the Trainer, then replaces settings of the checkpoint with overridden ones.

        The state of another optimizer starts empty. Raises RecipeError for a schedule whose learning rate is
        not a function of the step.
        """
        if checkpoint is None or not self.overridden:
            return super()._load_optimizer_and_scheduler(checkpoint)
        optimizer: Any = self.optimizer
        scheduler: Any = self.lr_scheduler
        fresh = [{key: group[key] for key in SETTINGS if key in group} for group in optimizer.param_groups]
        if any(map(OF_STATES.fullmatch, self.overridden)):
            scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))
        else:
            super()._load_optimizer_and_scheduler(checkpoint)
        if not isinstance(scheduler, LambdaLR):
            what = f"nothing can be overridden with the schedule {self.args.lr_scheduler_type}"
            fix = "start a new run from the weights of the checkpoint"
            raise RecipeError(what, where="resume_override", fix=fix)
        _apply(fresh, optimizer.param_groups, scheduler=scheduler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Loads like the Trainer; with another number of processes, reseeds from the seed and the step."""
        size, rank = self.args.world_size, self.args.process_index
        if checkpoint and read_seal(Path(checkpoint)).get("processes", size) != size:
            set_seed((self.args.seed + self.state.global_step * size + rank) % 2**32)
            return
        super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))
        if fault := fault_of(best):
            fix = "resume with --load_best_model_at_end false to use the last model"
            raise EnvironmentFault(f"the best checkpoint is damaged: {fault}", where=str(best), fix=fix)
        self._loading = best
        super()._load_best_model()

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Creates the repository like the Trainer. Raises EnvironmentFault if that fails."""
        with talking_to_the_hub():
            super().init_hf_repo(token, private)

    def push_to_hub(self, commit_message: str | None = "End of training", **kwargs: Any) -> None:
        """Uploads the output folder without training texts. Raises EnvironmentFault if that fails."""
        self.save_model(_internal_call=True)
        self.push_run(with_data=False, message=commit_message or "")

    def push_run(self, *, with_data: bool, message: str = "End of training") -> None:
        """Uploads the output folder. ``with_data``: includes the pages that show training texts."""
        if self.is_world_process_zero():
            self._finish_current_push()
            options: dict[str, Any] = {"repo_id": self.hub_model_id, "arguments": self.args}
            push_folder(Path(str(self.args.output_dir)), with_data=with_data, message=message, **options)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Uploads in the background. The Trainer would also push training_args.bin, with the token."""
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
        many: Any = jobs  # the annotation allows only one job
        self.push_in_progress = PushInProgress(many) if jobs else None


class ResumeCallback(TrainerCallback):
    """Updates the trainer state that was loaded from a checkpoint.

    The best checkpoint is located by its step, as the run may have been moved to another folder, and the
    intervals of logging, evaluation and saving come from the arguments.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        state.compute_steps(args, state.max_steps)
        best = Path(str(args.output_dir)) / f"checkpoint-{state.best_global_step}"
        if best.is_dir():
            state.best_model_checkpoint = str(best)


def _apply(fresh: list[dict[str, Any]], groups: list[dict[str, Any]], *, scheduler: LambdaLR) -> None:
    """Applies settings to the optimizer's groups, and sets the learning rate that the schedule has now."""
    for settings, group in zip(fresh, groups, strict=True):
        group.update(settings)
    scheduler.base_lrs = [group["initial_lr"] for group in groups]
    for group, base, factor in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
        group["lr"] = base * factor(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in groups]


def spreading_plugin(accelerator: Accelerator) -> Any:
    """Returns Accelerate's FSDP plugin, or None if FSDP is not used."""
    return getattr(accelerator.state, "fsdp_plugin", None)


def settle_precision(accelerator: Accelerator) -> None:
    """Makes FSDP2 sum gradients of 16-bit models in float32, like DDP.

    Accelerate's default sums them in 16 bits and also rounds the loss to about 3 digits.
    """
    plugin = spreading_plugin(accelerator)
    policy = getattr(plugin, "mixed_precision_policy", None)
    if policy is not None:
        plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32, output_dtype=None)


@contextmanager
def saving_whole(accelerator: Accelerator, folder: str) -> Iterator[None]:
    """Gathers the complete model for a save inside the block, unless ``folder`` is a checkpoint.

    With SHARDED_STATE_DICT the Trainer would not save the final model at all.
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
    """Drops the second name of tied weights, which are separate tensors after gathering."""
    if state_dict is None:
        return None
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {name: part for name, part in state_dict.items() if tied.get(name) not in state_dict}
