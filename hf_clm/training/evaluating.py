"""Evaluation in the Trainer: sums over tokens, several sets, and answers, without an effect on training."""

import math
import random
import time
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter
from transformers.trainer_utils import EvalLoopOutput, speed_metrics

from hf_clm.data.batch.sampling import EvenRows
from hf_clm.data.batch.transfer import BufferingCollator
from hf_clm.data.prepared.stream import StreamedRows
from hf_clm.machine import widest_float
from hf_clm.model.attention import use_for_training
from hf_clm.model.loss import TokenFigures
from hf_clm.training.saving import SavingTrainer
from hf_clm.training.signals import let_workers_last

if TYPE_CHECKING:  # it generates, which a trainer without questions does not
    from hf_clm.training.answering import Answering

WATCHED = "eval_train"
# What of a batch only the loss needs.
OF_LOSS = ("labels", "shift_labels", "logits_to_keep", "loss_weights", "padding_tokens")


class EvaluatingTrainer(SavingTrainer):
    """A ``transformers.Trainer`` whose evaluation does not depend on the batch size or affect training.

    Weights, their dtype and all random states are restored: a run is the same with and without evaluations.

    Args:
        watched_rows: rows of the training data to evaluate as well (eval_train_loss).
        answering: measures answers, at every nth evaluation (``answers_every``).

    ``compute_metrics`` receives the logits (rows, T, V) and labels (rows, T) of the collated rows, as in the
    Trainer. This takes much memory without ``preprocess_logits_for_metrics``. Without ``compute_metrics``,
    logits are not kept.
    """

    def __init__(
        self,
        *args: Any,
        watched_rows: Any = None,
        answering: "Answering | None" = None,
        answers_every: int = 1,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        if (self.args.bf16_full_eval or self.args.fp16_full_eval) and not self.place_model_on_device:
            self.place_model_on_device = not (self.is_deepspeed_enabled or self.is_fsdp_enabled)
            if self.place_model_on_device:  # the Trainer would move the model only after rounding it
                self._move_model_to_device(cast(Any, self.model), self.args.device)
        # Whoever asked the model since may have left it with the attention of generation.
        self._attention = str(self.accelerator.unwrap_model(self.model).config._attn_implementation)
        self.watched_rows = watched_rows
        self.answering, self.answers_every = answering, answers_every
        self._all_loaders: list[DataLoader] = []
        self._loaders: dict[int, DataLoader] = {}  # of evaluation sets, by the id of the set, which they keep
        self._counted_since = time.monotonic()

    @abstractmethod
    def require_finite(self) -> None:
        """Raises DivergedError if the latest step of the training is not finite."""

    @abstractmethod
    def measure(self, model: torch.nn.Module, inputs: dict[str, Any]) -> TokenFigures:
        """Returns the figures of each target of a batch."""

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Keeps evaluation, sampling or saving in the block from affecting training.

        The time does not count for tokens_per_second, and the random states are restored.
        """
        start = time.monotonic()
        with undisturbed(self.args.device):
            yield
        self._counted_since += time.monotonic() - start

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Returns the loader of a set, built once. With persistent workers, the Trainer reuses the first."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if id(dataset) not in self._loaders:
            size, sampler = self.args.eval_batch_size, cast(Any, self._get_eval_sampler)
            self._loaders[id(dataset)] = self._isolate(
                self._get_dataloader(
                    self._even(dataset, size),
                    description="Evaluation",
                    batch_size=size,
                    sampler_fn=sampler,
                )
            )
        return self._loaders[id(dataset)]

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """Returns a loader whose batches reach the device as one buffer."""
        collate = self.data_collator
        self.data_collator = BufferingCollator(collate)
        try:
            return super()._get_dataloader(*args, **kwargs)
        finally:
            self.data_collator = collate

    def _isolate(self, loader: DataLoader) -> DataLoader:
        """Lets the loader's workers ignore SIGTERM, and gives it a random generator of its own."""
        self._all_loaders.append(getattr(loader, "base_dataloader", loader))  # inside accelerate's loader
        return draw_apart(let_workers_last(loader), seed=self.args.seed)

    def close(self) -> None:
        """Ends persistent workers. On garbage collection, torch would wait 10 s for each of them."""
        for loader in self._all_loaders:
            if isinstance(loader._iterator, _MultiProcessingDataLoaderIter):
                loader._iterator._shutdown_workers()
                loader._iterator = None

    def _even(self, dataset: Any, batch_size: int) -> Any:
        """Pads a dataset so that accelerate can give each process the same number of full batches."""
        is_uneven = self.args.world_size > 1 or self.args.dataloader_drop_last
        if isinstance(dataset, StreamedRows) or not is_uneven:
            return dataset
        return EvenRows(dataset, self.args.world_size * batch_size)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Evaluates each set and logs the metrics as one event; several sets by name, and all together.

        Without ``eval_dataset``, also evaluates the watched training rows and measures answers.
        """
        self.require_finite()
        self._memory_tracker.start()
        started, is_default = time.time(), eval_dataset is None
        use_for_training(cast(Any, self.accelerator.unwrap_model(self.model)), self._attention)
        datasets = self.eval_dataset if is_default else eval_dataset
        sets: dict[str, Any] = datasets if isinstance(datasets, dict) else {"": datasets}
        metrics: dict[str, float] = {}
        samples = 0
        sums = torch.zeros(3, dtype=widest_float(self.args.device), device=self.args.device)
        for name, rows in sets.items():
            prefix = f"{metric_key_prefix}_{name}" if name else metric_key_prefix
            output = self._evaluate_rows(rows, prefix, ignore_keys)
            metrics |= output.metrics or {}
            samples += output.num_samples or 0
            sums += self._eval_sums
        if "" not in sets:
            metrics |= to_metrics(sums, metric_key_prefix)
        steps = math.ceil(samples / (self.args.eval_batch_size * self.args.world_size))
        metrics |= speed_metrics(metric_key_prefix, started, num_samples=samples, num_steps=steps)
        if is_default and self.watched_rows is not None:
            metrics |= self._evaluate_rows(self.watched_rows, WATCHED, ignore_keys).metrics or {}
        if is_default and self._answers_are_due():
            model: Any = self.accelerator.unwrap_model(self.model)
            assert self.answering is not None
            with self.aside():
                metrics |= self.answering.measure(model, step=self.state.global_step)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._memory_tracker.stop_and_update_metrics(metrics)
        return metrics

    def _evaluate_rows(self, rows: Any, prefix: str, ignore_keys: list[str] | None) -> EvalLoopOutput:
        loader = self.get_eval_dataloader(rows)
        keeps_logits = self.compute_metrics is not None
        options: dict[str, Any] = {"prediction_loss_only": not keeps_logits, "ignore_keys": ignore_keys}
        return self.evaluation_loop(loader, "Evaluation", metric_key_prefix=prefix, **options)

    def _answers_are_due(self) -> bool:
        """Returns whether this evaluation is the first, the last, or an nth in between."""
        if self.answering is None:
            return False
        count = sum("eval_loss" in entry for entry in self.state.log_history)
        is_last = self.state.global_step >= self.state.max_steps or not self.is_in_train
        return is_last or count % self.answers_every == 0

    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, torch.Tensor | None, torch.Tensor | None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            figures = self.measure(model, inputs)
            kind = self._eval_sums.dtype
            self._eval_sums += torch.stack(
                [part.sum(dtype=kind) for part in (figures.nll, figures.is_target, figures.correct)]
            )
            if prediction_loss_only:
                return None, None, None
            # The loss at the targets computes no logits to keep: compute_metrics pays for a second forward.
            row = {key: value for key, value in inputs.items() if key not in OF_LOSS}
            return None, model(**row, use_cache=False).logits, inputs["labels"]

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Evaluates like the Trainer, but averages loss and token_accuracy over all targets of a set."""
        self._eval_sums = torch.zeros(3, dtype=widest_float(self.args.device), device=self.args.device)
        with self.aside(), self._in_half_precision():
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        sums: Any = self.accelerator.reduce(self._eval_sums, reduction="sum")
        self._eval_sums = sums
        assert output.metrics is not None
        output.metrics.update(to_metrics(sums, metric_key_prefix))
        return output

    @contextmanager
    def _in_half_precision(self) -> Iterator[None]:
        """Applies bf16_full_eval and fp16_full_eval by autocast.

        The Trainer would round the weights of the model, and save them rounded.
        """
        args = self.args
        settings = args.bf16_full_eval, args.fp16_full_eval
        if not any(settings):
            yield
            return
        args.bf16_full_eval = args.fp16_full_eval = False
        kind = torch.bfloat16 if settings[0] else torch.float16
        try:
            with torch.autocast(args.device.type, dtype=kind):
                yield
        finally:
            args.bf16_full_eval, args.fp16_full_eval = settings


def to_metrics(sums: torch.Tensor, prefix: str) -> dict[str, float]:
    """Returns ``eval_loss`` and so on. ``sums`` (3,): total nll in nats, targets, correct targets."""
    nll, targets, correct = sums.tolist()
    metrics = {"loss": nll / targets, "token_accuracy": correct / targets, "target_tokens": int(targets)}
    return {f"{prefix}_{key}": value for key, value in metrics.items()}


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Restores the random states of Python, NumPy and torch, on the CPU and this device, after the block.

    Without this, training would continue with different dropout after an evaluation, a sample or a test.
    """
    accessors: list[tuple[Any, Any]] = [
        (random.getstate, random.setstate),
        (np.random.get_state, np.random.set_state),
        (torch.get_rng_state, torch.set_rng_state),
    ]
    if device.type != "cpu":
        backend = getattr(torch, device.type)  # torch.cuda, torch.mps, torch.xpu
        accessors.append((backend.get_rng_state, backend.set_rng_state))
    states = [get() for get, _ in accessors]
    try:
        yield
    finally:
        for (_, put), state in zip(accessors, states, strict=True):
            put(state)


def draw_apart(loader: DataLoader, *, seed: int) -> DataLoader:
    """Lets a loader draw the seed of its workers from a separate generator, not from that of dropout.

    Persistent workers are seeded once and others in every epoch, so a resumed run would otherwise differ.
    """
    base: Any = getattr(loader, "base_dataloader", loader)  # inside accelerate's loader
    base.generator = torch.Generator().manual_seed(seed)
    return loader
