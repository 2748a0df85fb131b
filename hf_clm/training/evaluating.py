"""The Trainer's evaluation: sums over tokens, several sets, answers; it leaves the training as it was."""

import math
import random
import time
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter
from transformers.trainer_utils import EvalLoopOutput, speed_metrics

from hf_clm.data.batch.sampling import EvenRows
from hf_clm.data.prepared.stream import StreamedRows
from hf_clm.model.attention import use_for_training
from hf_clm.model.loss import TokenFigures
from hf_clm.training.answering import Answering
from hf_clm.training.saving import SavingTrainer
from hf_clm.training.signals import let_workers_last

WATCHED = "eval_train"
# What of a batch only the loss needs.
OF_LOSS = ("labels", "shift_labels", "logits_to_keep", "loss_weights", "padding_tokens")


class EvaluatingTrainer(SavingTrainer):
    """A ``transformers.Trainer`` whose evaluation depends on no batch size, and changes nothing.

    Weights, their type and all random states are as before: a run is the same with and without evaluations.

    Args:
        watched_rows: rows of the training data that are evaluated too (eval_train_loss).
        answering: measures answers, at every nth evaluation (``answers_every``).

    ``compute_metrics`` is given the logits (rows, T, V) and labels (rows, T) of the collated rows, as by the
    Trainer; without ``preprocess_logits_for_metrics`` that is a lot of memory. Without ``compute_metrics`` no
    logits are kept.
    """

    def __init__(
        self,
        *args: Any,
        watched_rows: Any = None,
        answering: Answering | None = None,
        answers_every: int = 1,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        if (self.args.bf16_full_eval or self.args.fp16_full_eval) and not self.place_model_on_device:
            self.place_model_on_device = not (self.is_deepspeed_enabled or self.is_fsdp_enabled)
            if self.place_model_on_device:  # the Trainer puts it off until it rounds the weights
                self._move_model_to_device(cast(Any, self.model), self.args.device)
        # Whoever asked the model since may have left it with the attention of generation.
        self._attention = str(self.accelerator.unwrap_model(self.model).config._attn_implementation)
        self.watched_rows = watched_rows
        self.answering, self.answers_every = answering, answers_every
        self._all_loaders: list[DataLoader] = []
        self._loaders: dict[int, DataLoader] = {}  # of evaluation sets, by the id of the set, which they hold
        self._counted_since = time.monotonic()

    @abstractmethod
    def measure(self, model: torch.nn.Module, inputs: dict[str, Any]) -> TokenFigures:
        """The figures of each target of a batch."""

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Keeps what happens inside (evaluation, samples, saving) apart from training.

        Its time does not count in tokens_per_second, and the random numbers of training stay the same.
        """
        start = time.monotonic()
        with undisturbed(self.args.device):
            yield
        self._counted_since += time.monotonic() - start

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """The loader of a set, built once. The Trainer's takes every set for one where workers persist."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if id(dataset) not in self._loaders:
            rows, size = self._even(dataset, self.args.eval_batch_size), self.args.eval_batch_size
            named: dict[str, Any] = {"description": "Evaluation", "sampler_fn": self._get_eval_sampler}
            self._loaders[id(dataset)] = self._apart(self._get_dataloader(rows, batch_size=size, **named))
        return self._loaders[id(dataset)]

    def _apart(self, loader: DataLoader) -> DataLoader:
        """A loader whose workers outlive a SIGTERM, and that draws nothing from the numbers of training."""
        self._all_loaders.append(getattr(loader, "base_dataloader", loader))  # of accelerate's
        return draw_apart(let_workers_last(loader), seed=self.args.seed)

    def close(self) -> None:
        """Ends workers that persist: where the Trainer is collected, torch waits 10 s for each of them."""
        for loader in self._all_loaders:
            if isinstance(loader._iterator, _MultiProcessingDataLoaderIter):
                loader._iterator._shutdown_workers()
                loader._iterator = None

    def _even(self, dataset: Any, batch_size: int) -> Any:
        """Filled up for several processes, of which accelerate wants as many full batches each."""
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
        """The figures of each set, as one log event; those of several sets by name, and of all together.

        On the Trainer's own evaluation sets it measures answers too, and the watched training rows.
        """
        self._memory_tracker.start()
        started, is_own = time.time(), eval_dataset is None
        use_for_training(cast(Any, self.accelerator.unwrap_model(self.model)), self._attention)
        given = self.eval_dataset if is_own else eval_dataset
        sets: dict[str, Any] = given if isinstance(given, dict) else {"": given}
        metrics: dict[str, float] = {}
        samples = 0
        sums = torch.zeros(3, dtype=torch.float64, device=self.args.device)
        for name, rows in sets.items():
            prefix = f"{metric_key_prefix}_{name}" if name else metric_key_prefix
            found = self._evaluate_rows(rows, prefix, ignore_keys)
            metrics |= found.metrics or {}
            samples += found.num_samples or 0
            sums += self._eval_sums
        if "" not in sets:
            metrics |= to_metrics(sums, metric_key_prefix)
        steps = math.ceil(samples / (self.args.eval_batch_size * self.args.world_size))
        metrics |= speed_metrics(metric_key_prefix, started, num_samples=samples, num_steps=steps)
        if is_own and self.watched_rows is not None:
            metrics |= self._evaluate_rows(self.watched_rows, WATCHED, ignore_keys).metrics or {}
        if is_own and self._answers_are_due():
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
        """At the first evaluation, at the last, and at every nth between them."""
        if self.answering is None:
            return False
        made = sum("eval_loss" in entry for entry in self.state.log_history)
        is_last = self.state.global_step >= self.state.max_steps or not self.is_in_train
        return is_last or made % self.answers_every == 0

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
            sums = (figures.nll.double().sum(), figures.is_target.sum(), figures.correct.sum())
            self._eval_sums += torch.stack([part.double() for part in sums])
            if prediction_loss_only:
                return None, None, None
            # The loss at the targets computes no logits to keep: compute_metrics pays for a second forward.
            row = {key: value for key, value in inputs.items() if key not in OF_LOSS}
            return None, model(**row, use_cache=False).logits, inputs["labels"]

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """As the Trainer's; loss and token_accuracy are sums over all targets, divided once."""
        self._eval_sums = torch.zeros(3, dtype=torch.float64, device=self.args.device)
        with self.aside(), self._in_half_precision():
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        sums: Any = self.accelerator.reduce(self._eval_sums, reduction="sum")
        self._eval_sums = sums
        assert output.metrics is not None
        output.metrics.update(to_metrics(sums, metric_key_prefix))
        return output

    @contextmanager
    def _in_half_precision(self) -> Iterator[None]:
        """Evaluates in 16 bits where bf16_full_eval or fp16_full_eval asks for it, by autocast.

        The Trainer rounds the model's weights for it, and would save them so.
        """
        args = self.args
        asked = args.bf16_full_eval, args.fp16_full_eval
        if not any(asked):
            yield
            return
        args.bf16_full_eval = args.fp16_full_eval = False
        kind = torch.bfloat16 if asked[0] else torch.float16
        try:
            with torch.autocast(args.device.type, dtype=kind):
                yield
        finally:
            args.bf16_full_eval, args.fp16_full_eval = asked


def to_metrics(sums: torch.Tensor, prefix: str) -> dict[str, float]:
    """``eval_loss`` and such. ``sums`` (3,) float64: the nll of the targets, their number, those guessed."""
    nll, targets, correct = sums.tolist()
    found = {"loss": nll / targets, "token_accuracy": correct / targets, "target_tokens": int(targets)}
    return {f"{prefix}_{key}": value for key, value in found.items()}


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Leaves the random states of Python, NumPy and torch, on the CPU and this device, as it found them.

    What evaluates, samples or tests a model runs inside: else training would go on with other dropout.
    """
    draws: list[tuple[Any, Any]] = [
        (random.getstate, random.setstate),
        (np.random.get_state, np.random.set_state),
        (torch.get_rng_state, torch.set_rng_state),
    ]
    if device.type != "cpu":
        own = getattr(torch, device.type)  # torch.cuda, torch.mps, torch.xpu
        draws.append((own.get_rng_state, own.set_rng_state))
    states = [get() for get, _ in draws]
    try:
        yield
    finally:
        for (_, put), state in zip(draws, states, strict=True):
            put(state)


def draw_apart(loader: DataLoader, *, seed: int) -> DataLoader:
    """Lets a loader draw the seed of its workers from a generator of its own, not from that of dropout.

    Workers that persist are seeded once, others in every epoch: a resumed run would draw differently.
    """
    own: Any = getattr(loader, "base_dataloader", loader)  # of accelerate's
    own.generator = torch.Generator().manual_seed(seed)
    return loader
