"""A Trainer with token accuracy, counts of real tokens, the loss at targets only, and a stop at NaN.

Evaluation is in evaluating.py, saving and resuming in saving.py.
"""

import math
import time
import warnings
from collections import Counter
from dataclasses import replace
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, SequentialSampler
from transformers import (
    PreTrainedTokenizerFast,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import TrainOutput

from hf_clm.data.batch.left_out import KEPT, mask_left_out
from hf_clm.data.batch.sampling import EpochSampler, EvenRows
from hf_clm.data.prepared.division import furthest
from hf_clm.data.prepared.stream import StreamedRows, plain_errors
from hf_clm.errors import DivergedError
from hf_clm.evaluation.metrics import count_tokens, logit_figures
from hf_clm.machine import gpu_figures, measure_peak, nominal_peak
from hf_clm.model.flops import count_flops
from hf_clm.model.loss import (
    LossOptions,
    TargetLoss,
    TokenFigures,
    logit_loss,
    tally,
    use_target_loss,
    why_not,
)
from hf_clm.model.router_loss import RouterLoss
from hf_clm.pages.labels import write_labels
from hf_clm.pages.rows import Vocabulary, to_rows
from hf_clm.training.callbacks import SkippedStepsCallback, ends_epoch
from hf_clm.training.evaluating import EvaluatingTrainer
from hf_clm.training.faults import checkpoint_bytes, writing
from hf_clm.training.finite import FiniteGuard, WatchedStep, skip_update
from hf_clm.training.groups import build_optimizer
from hf_clm.training.saving import settle_precision

if TYPE_CHECKING:  # the trainer needs no recipe
    from hf_clm.recipe.sections import OptimizerSection

# Indices of the counts since the last log event.
TARGETS, CORRECT, TOKENS, PAIRS, POSITIONS = range(5)
# Made by the collator for a TargetLoss. A model's own loss takes the labels of all positions.
TARGET_LOSS_INPUTS = ("logits_to_keep", "shift_labels")
WEIGHTS = "loss_weights"  # (B, T) float32: how much the loss of each label counts


class CLMTrainer(EvaluatingTrainer):
    """A ``transformers.Trainer`` for causal language models.

    Adds token_accuracy, tokens_seen, target_tokens_seen, tokens_per_second (real tokens of all processes),
    mfu and padding_share to each log event. Evaluation sums over tokens, so its loss does not depend on the
    batch size. Raises DivergedError before an optimizer step with a NaN or Inf. Computes the loss at the
    targets only (``hf_clm/model/loss.py``), unless the model needs its own (``own_loss`` has the reason).

    If rows have ``weights``, the loss of an optimizer step is the sum of weight times loss over all its
    labels, divided by the sum of the weights. Evaluation and token_accuracy count every label once.

    Args:
        loss_options: additional terms of the loss; the label smoothing comes from the arguments.
        optimizer_section: the optimizer and its groups of weights; None: as the arguments say. See
            EvaluatingTrainer, SavingTrainer and the Trainer for the other arguments.
    """

    def __init__(
        self,
        *args: Any,
        loss_options: LossOptions | None = None,
        optimizer_section: "OptimizerSection | None" = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.optimizer_section = optimizer_section
        self.label_names = [*self.label_names, "weights", KEPT]  # remove_unused_columns drops other columns
        settle_precision(self.accelerator)
        if self.accelerator.ddp_handler is not None:  # without it, DDP copies the gradients into its buckets
            self.accelerator.ddp_handler.gradient_as_bucket_view = True
        model: Any = self.accelerator.unwrap_model(self.model)
        self.own_loss = why_not(model)  # why the model's own loss is used, or empty
        self.router_loss = RouterLoss(model)
        smoothing, balance = self.args.label_smoothing_factor, self.router_loss.coefficient
        self._logit_loss = partial(logit_loss, label_smoothing=smoothing, balance=balance)
        self.target_loss: TargetLoss | None = None
        if not self.own_loss:
            self.label_smoother = None
            options = replace(loss_options or LossOptions(), label_smoothing=smoothing)
            self.target_loss = use_target_loss(model, options)
        self._sampler: EpochSampler | None = None
        if self.train_dataset is not None and not self.args.dataloader_drop_last:
            self.train_dataset = self._even(self.train_dataset, self.args.train_batch_size)
        self.add_callback(EpochCallback(self))
        if self.args.fp16:
            self.add_callback(SkippedStepsCallback(self))
        self._counts = torch.zeros(5, dtype=torch.int64, device=self.args.device)
        self._timed = (0, 0.0)  # tokens and seconds since the start, without evaluation, samples and saving
        self._computed = 0.0  # FLOP in that time
        self._flops = count_flops(model)
        self._step_loss: torch.Tensor | float = 0.0
        self._step_batches: list[dict[str, Any]] = []
        self._guard = FiniteGuard(self.args.device, defers=self.args.device.type != "cpu")

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        model = self.model if model is None else model
        if self.optimizer is None and self.optimizer_section:
            names = self.get_decay_parameter_names(model)
            section = self.optimizer_section
            self.optimizer = build_optimizer(model, section=section, arguments=self.args, decaying=names)
        return super().create_optimizer(model)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        assert self.peak_flops > 0  # measures it now rather than in the first steps
        self._counted_since = time.monotonic()
        with warnings.catch_warnings():  # torch 2.13 renames the option, which accelerate cannot pass on yet
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
            return super().train(*args, **kwargs)

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        if isinstance(self.train_dataset, StreamedRows):
            self.train_dataset.passed(inputs.pop("stream"))
        self._step_batches.append(inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._step_loss = self._step_loss + loss
        return loss

    def get_batch_samples(self, *args: Any) -> Any:
        """Returns the micro-batches of a step, and the sum of their labels' weights on all processes."""
        with plain_errors():
            batches, items = super().get_batch_samples(*args)
        if isinstance(items, torch.Tensor):
            items = self._weigh(items, batches)
        for batch in batches:  # not before: the divisor counts what is left out
            mask_left_out(batch, weights=WEIGHTS)
        return batches, items

    def _weigh(self, items: torch.Tensor, batches: list[dict[str, Any]]) -> torch.Tensor:
        """Returns ``items``, the number of labels as counted by the Trainer, times their mean weight."""
        is_shared = self.args.world_size > 1 and self.args.average_tokens_across_devices
        if not is_shared and not any(WEIGHTS in batch for batch in batches):
            return items
        sums: Any = torch.stack([tally(batch["labels"], batch.get(WEIGHTS)) for batch in batches]).sum(dim=0)
        if is_shared:  # always: a process cannot know whether another one has weights
            sums = self.accelerator.reduce(sums, reduction="sum")
        weighed = items * (sums[0] / sums[1])  # the factor is exactly 1 without weights
        return torch.where(weighed > 0, weighed, 1.0).to(items.dtype)  # avoids 0 / 0 if all weights are 0

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        loss, outputs, figures = self.measure_loss(model, inputs, items=num_items_in_batch)
        if model.training:
            self._counts[TARGETS] += figures.is_target.sum()
            self._counts[CORRECT] += figures.correct.sum()
            tokens, pairs = count_tokens(inputs)
            self._counts[TOKENS] += tokens
            self._counts[PAIRS] += pairs
            self._counts[POSITIONS] += inputs["input_ids"].numel()
        return (loss, outputs) if return_outputs else loss

    def measure(self, model: torch.nn.Module, inputs: dict[str, Any]) -> TokenFigures:
        """Returns the figures of each target of a batch."""
        return self.measure_loss(model, inputs, items=None)[2]

    def measure_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any], *, items: torch.Tensor | int | None
    ) -> tuple[torch.Tensor, Any, TokenFigures]:
        """Returns the loss, normalised like the Trainer's, the outputs and the figures of each target."""
        batch = inputs if model.training else {**inputs, WEIGHTS: None}  # evaluation is not weighted
        with self.router_loss.weighing(batch, items):
            return self._measure_tokens(model, inputs, items=items)

    def _measure_tokens(
        self, model: torch.nn.Module, inputs: dict[str, Any], *, items: torch.Tensor | int | None
    ) -> tuple[torch.Tensor, Any, TokenFigures]:
        excluded = ("padding_tokens", WEIGHTS, *(TARGET_LOSS_INPUTS if self.target_loss is None else ()))
        batch: Any = {key: value for key, value in inputs.items() if key not in excluded}
        weights = inputs.get(WEIGHTS) if model.training else None  # evaluation is not weighted
        options: Any = {"return_outputs": True, "num_items_in_batch": items}
        if self.target_loss is None:
            # The Trainer may pop the labels from the batch.
            labels, loss_function = batch["labels"], self.compute_loss_func
            if weights is not None:
                self.compute_loss_func = partial(self._logit_loss, label_weights=weights)
            try:
                loss, outputs = cast(Any, super().compute_loss(model, batch, **options))
            finally:
                self.compute_loss_func = loss_function
            return loss, outputs, logit_figures(outputs.logits, labels)
        if weights is not None and "logits_to_keep" in batch:  # a position predicts the next token
            weights = weights.roll(-1, dims=1)[:, batch["logits_to_keep"]]
        with self.target_loss.measuring(weights):
            loss, outputs = cast(Any, super().compute_loss(model, batch, **options))
        figures = self.target_loss.figures
        assert figures is not None, "the model computed no loss"
        return loss, outputs, figures

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """Watches loss and gradient. Runs after clipping and before the optimizer step."""
        norm: Any = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.require_finite()
        loss: Any = self._step_loss
        if self.args.fp16:  # overflowing gradients skip a step, so only the loss counts, on all processes
            loss = self.accelerator.reduce(torch.as_tensor(loss), reduction="sum")
        full = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        seen = loss if self.args.fp16 or norm is None else full  # DeepSpeed may not return a norm
        figures = torch.stack([torch.as_tensor(part, device=loss.device).float() for part in (loss, seen)])
        found_inf = self._guard.watch(
            self.state.global_step + 1,
            figures,
            learning_rate=self._get_learning_rate(),
            batches=self._step_batches,
        )
        self._step_loss, self._step_batches = 0.0, []
        if not self._guard.defers:
            self.require_finite()
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # inside accelerate's
        if self._guard.defers and not self.args.fp16 and isinstance(optimizer, torch.optim.Optimizer):
            skip_update(optimizer, found_inf)  # with fp16, the scaler sets the flag
        return norm

    def require_finite(self) -> None:
        """Raises DivergedError, and writes diverged.html, if the latest step is not finite."""
        if (step := self._guard.settle()) is not None:
            self._stop(step)

    def _stop(self, step: WatchedStep) -> NoReturn:
        """Writes the rows of the step to diverged.html, and raises DivergedError."""
        facts = step.to_facts()
        page = ""
        is_ours = self.is_world_process_zero() or not math.isfinite(step.loss)
        if isinstance(self.processing_class, PreTrainedTokenizerFast) and is_ours:
            path = Path(str(self.args.output_dir)) / "diverged.html"
            rows = []
            for batch in step.batches:
                rows += to_rows(batch, first_number=len(rows))
            write_labels(path, rows, vocabulary=Vocabulary(self.processing_class), facts=facts)
            page = f"; the rows of this step are in {path}"
        # DeepSpeed updates the weights in the backward pass.
        is_updated = self.is_deepspeed_enabled or self._guard.defers
        state = "the last checkpoint is intact" if is_updated else "no weight was updated"
        raise DivergedError(
            f"step {facts['step']}: the loss or its gradient is not finite; {state}{page}",
            got=", ".join(f"{name} {facts[name]}" for name in ("loss", "gradient norm", "learning rate")),
            fix="lower train.learning_rate, raise train.warmup_steps, or check the data of this step",
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self.require_finite()
        if "loss" in logs:
            logs.update(self._token_metrics())
        if "train_loss" in logs:  # the Trainer averages only over the steps since the start or resume
            logs["train_loss"] = mean_loss(self.state.log_history)
        super().log(logs, start_time)

    @property
    def tokens_per_second(self) -> float:
        """Real tokens of all processes per second of training, up to the last log event."""
        tokens, seconds = self._timed
        return tokens / seconds if seconds else self._logged("tokens_per_second")

    @cached_property
    def peak_flops(self) -> float:
        """FLOP/s of all processes: the vendor's figure, or measured with a large matrix product."""
        return (nominal_peak(self.args.device) or self._measure_peak()) * self.args.world_size

    def _measure_peak(self) -> float:
        kind = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else torch.float32
        return measure_peak(self.args.device, kind)

    def _utilisation(self, flops_per_second: float) -> float:
        """Returns the share of the peak, at most 1. Measures the peak again if it is exceeded."""
        if flops_per_second > self.peak_flops:
            again = self._measure_peak() * self.args.world_size
            self.peak_flops = max(again, flops_per_second)
        return flops_per_second / self.peak_flops

    @property
    def mfu(self) -> float:
        """Model FLOP utilisation up to the last log event: FLOP for real tokens, relative to the peak."""
        seconds = self._timed[1]
        return self._utilisation(self._computed / seconds) if seconds else self._logged("mfu")

    def _logged(self, name: str) -> float:
        """Returns the value in the last log event that has it, for a resumed run that made no step."""
        return next((entry[name] for entry in reversed(self.state.log_history) if name in entry), 0.0)

    def stream_totals(self) -> dict[str, Any] | None:
        """Returns the shards of a stream, their passes and its documents by fate; None without a stream.

        Includes blocks that are not finished. Every process must call it.
        """
        rows = self.train_dataset
        if not isinstance(rows, StreamedRows):
            return None
        shards = furthest(gather_object([position for position in rows.positions.values() if position.steps]))
        epochs, fates = [min(place.epoch for place in position.places) for position in shards], Counter()
        for place in (place for position in shards for place in position.places):
            fates.update(place.counts)
        is_complete = len(shards) == rows.plan.shards  # else a shard has not been read yet
        passes = [min(epochs) if is_complete else 0, max(epochs, default=0)]
        return {
            "shards": rows.plan.shards,
            "shuffle_buffer": rows.identity["documents"],
            "passes": passes,
            "documents": sum(fates.values()),
            "fates": dict(sorted(fates.items())),
        }

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Returns 0. FLOP are counted with the tokens; the Trainer's count lacks attention and the head."""
        return 0

    def store_flos(self) -> None:
        """Does nothing. The Trainer would gather the zeros of all processes at every log event."""

    def get_train_dataloader(self) -> DataLoader:
        return self._isolate(super().get_train_dataloader())

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the sampler, which accelerate does not reach after every resume."""
        if self._sampler is not None:
            self._sampler.epoch = epoch

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(dataset, StreamedRows):
            return SequentialSampler(dataset)
        if self.args.train_sampling_strategy != "random":
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        rows = dataset.rows if isinstance(dataset, EvenRows) else len(dataset)
        self._sampler = EpochSampler(rows, total=len(dataset), seed=seed)
        return self._sampler

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.require_finite()
        model: Any = self.model
        needed, name = checkpoint_bytes(model, self.optimizer), f"checkpoint-{self.state.global_step}"
        with self.aside(), writing(Path(str(self.args.output_dir)), name, needed=needed):
            super()._save_checkpoint(*args, **kwargs)

    def _save_rng_state(self, output_dir: str) -> None:
        if isinstance(self.train_dataset, StreamedRows):  # on every process, for its shards
            self.train_dataset.write_state(Path(output_dir), rank=self.args.process_index)
        super()._save_rng_state(output_dir)

    def _token_metrics(self) -> dict[str, float]:
        """Returns the metrics of all processes since the last log event, and resets the counts."""
        sums: Any = self.accelerator.reduce(self._counts, reduction="sum")
        counts = sums.tolist()
        now = time.monotonic()
        seconds, self._counted_since = now - self._counted_since, now
        self._counts.zero_()
        self._timed = (self._timed[0] + counts[TOKENS], self._timed[1] + seconds)
        heads = counts[TARGETS] if self.target_loss else counts[TOKENS]
        flops = self._flops.of(tokens=counts[TOKENS], targets=heads, pairs=counts[PAIRS])
        self._computed += flops
        self.state.total_flos += flops
        before = next((entry for entry in reversed(self.state.log_history) if "tokens_seen" in entry), {})
        return {
            "token_accuracy": counts[CORRECT] / max(1, counts[TARGETS]),
            "tokens_seen": before.get("tokens_seen", 0) + counts[TOKENS],
            "target_tokens_seen": before.get("target_tokens_seen", 0) + counts[TARGETS],
            "tokens_per_second": counts[TOKENS] / seconds,
            "mfu": self._utilisation(flops / seconds),
            "padding_share": 1 - counts[TOKENS] / max(1, counts[POSITIONS]),
            **gpu_figures(self.args.device),
        }


class EpochCallback(TrainerCallback):
    """Sets the sampler's epoch, and evaluates and saves at the last step of an epoch rather than after it.

    A run that resumes there begins with the next epoch, so nothing may remain to be done for the previous
    one. Also logs at the last step and at every evaluation and save.
    """

    def __init__(self, trainer: CLMTrainer):
        self.trainer = trainer
        self.evaluated_at = self.saved_at = -1

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.set_epoch(math.floor((state.epoch or 0.0) + 1e-6))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        is_last = state.global_step >= state.max_steps or control.should_training_stop
        if is_last or ends_epoch(state):
            control.should_evaluate |= args.eval_strategy == "epoch" and args.eval_delay <= (state.epoch or 0)
            control.should_save |= args.save_strategy == "epoch"
        control.should_log |= is_last or control.should_evaluate or control.should_save

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.evaluated_at = state.global_step

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.saved_at = state.global_step

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        control.should_evaluate &= self.evaluated_at != state.global_step
        control.should_save &= self.saved_at != state.global_step
        control.should_log |= control.should_evaluate or control.should_save


def mean_loss(history: list[dict[str, Any]]) -> float:
    """Returns the mean over all steps of a run, from log events with the mean since the previous event."""
    events = [{"step": 0, "loss": 0.0}, *(event for event in history if "loss" in event)]
    steps = events[-1]["step"]
    return sum((e["step"] - before["step"]) * e["loss"] for before, e in pairwise(events)) / max(steps, 1)
