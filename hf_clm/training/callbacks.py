"""Callbacks that print progress and write metrics.jsonl, samples.jsonl and report.html during training."""

import os
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from hf_clm.errors import DivergedError, UserError
from hf_clm.logs import to_json_lines, writes_json
from hf_clm.run_folder import append_json, drop_after, metric_of, to_duration

REPORT_SHARE = 0.01  # of the training time
GROWTH = 1.5  # a report takes at most this many times as long as the previous one
SKIPPED_STEPS = 20  # a GradScaler begins with a scale of 2**16
MIN_SECONDS = 1.0  # assumed for a report, as the first one with a chart imports matplotlib

# Figures only: 80 columns have no room for a bar as well.
BAR = "step {n_fmt}/{total_fmt} [{elapsed}, {remaining} left]{postfix}"


class ProgressCallback(TrainerCallback):
    """Shows a progress bar on a terminal, or else prints a line per log event. Rank 0 only."""

    def __init__(self, *, is_terminal: bool):
        self.is_terminal = is_terminal and not writes_json()
        self.bar: tqdm | None = None
        self.started = 0.0
        self.first_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.started, self.first_step = time.monotonic(), state.global_step
        if self.is_terminal and state.is_world_process_zero:
            steps: dict[str, Any] = {"total": state.max_steps, "initial": state.global_step}
            self.bar = tqdm(**steps, dynamic_ncols=True, bar_format=BAR)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == self.first_step:  # the evaluation and the samples before it are no steps
            self.started = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        logs = kwargs["logs"]
        if not state.is_world_process_zero or not (logs.keys() & {"loss", "eval_loss"}):
            return
        found = ((metric_of(key), value) for key, value in logs.items())
        shown = [f"{metric.short} {metric.form(value)}" for metric, value in found if metric and metric.short]
        if self.bar is not None and "loss" in logs:
            self.bar.set_postfix_str(", ".join(shown))
            return
        left = f"  {self._time_left(state)} left" if "loss" in logs else ""
        step = f"{state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}"
        line = f"step {step}  epoch {state.epoch or 0:.2f}  {'  '.join(shown)}{left}"
        write_line(line, {"step": state.global_step, **logs})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _time_left(self, state: TrainerState) -> str:
        done = max(1, state.global_step - self.first_step)
        seconds = (time.monotonic() - self.started) / done * (state.max_steps - state.global_step)
        return to_duration(seconds)


class WatchCallback(TrainerCallback):
    """Shows the state of the training at every step, log event and at the end. Rank 0 only."""

    def __init__(self, show: Callable[[TrainerState], None]):
        self.show = show

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self.show(state)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.on_step_end(args, state, control)


class MetricsCallback(TrainerCallback):
    """Appends one JSON object per log event to ``metrics.jsonl``. Rank 0 only.

    Adds the seconds of training, including those before a resume, and the peak memory of the process in
    bytes, as returned by ``measure_memory``.
    """

    def __init__(self, path: Path, *, measure_memory: Callable[[], int]):
        self.path, self.measure_memory = path, measure_memory
        self.started = time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            earlier = drop_after(self.path, state.global_step, history=state.log_history)
            self.started = time.monotonic() - max((entry.get("seconds", 0) for entry in earlier), default=0)

    @property
    def seconds(self) -> float:
        """The time of training, without pauses before a resume."""
        return time.monotonic() - self.started

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            added = {"seconds": round(self.seconds, 3), "peak_memory_bytes": self.measure_memory()}
            append_json(self.path, {"step": state.global_step, **kwargs["logs"], **added})


class SamplesCallback(TrainerCallback):
    """Generates from fixed prompts before, during and after training. Rank 0 only.

    ``generate`` returns one answer for each of the ``prompts``, in order.
    """

    def __init__(
        self,
        prompts: list[str],
        generate: Callable[[], list[str]],
        *,
        path: Path,
        every_steps: int | None = None,
        every_epoch: bool = False,
    ):
        self.prompts, self.generate, self.path = prompts, generate, path
        self.every_steps, self.every_epoch = every_steps, every_epoch
        self.last_step = -1

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            earlier = drop_after(self.path, state.global_step)
            self.last_step = max((entry["step"] for entry in earlier), default=-1)
        if state.global_step == 0:
            self._sample(state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        is_due = self.every_steps and state.global_step % self.every_steps == 0
        if is_due or (self.every_epoch and ends_epoch(state)):  # before the step is saved
            self._sample(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._sample(state)

    def _sample(self, state: TrainerState) -> None:
        if not state.is_world_process_zero or self.last_step == state.global_step:
            return
        self.last_step = state.global_step
        for prompt, text in zip(self.prompts, self.generate(), strict=True):
            append_json(self.path, {"step": state.global_step, "prompt": prompt, "text": text})
            write_line(f"  sample at step {state.global_step}: {prompt!r} -> {text!r}")


class EpochMeansCallback(TrainerCallback):
    """Logs the mean loss and accuracy of each epoch, if epochs are longer than the logging interval.

    Used on all processes, as a log event sums over them. Rank 0 writes.
    """

    def __init__(self, path: Path):
        self.path = path

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        is_long = state.global_step / max(state.epoch or 0.0, 1e-9) > max(1, state.logging_steps - 0.5)
        control.should_log |= is_long and args.logging_strategy == "steps"

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if "loss" not in kwargs["logs"] or not state.is_world_process_zero:
            return
        if means := epoch_means(state.log_history):
            append_json(self.path, {"step": state.global_step, **means})
            loss, accuracy = means["epoch_loss"], means["epoch_token_accuracy"]
            write_line(f"epoch {means['epoch']:.0f}  mean loss {loss:.4f}  accuracy {accuracy:.1%}")


class PatienceCallback(EarlyStoppingCallback):
    """Early stopping that keeps its count when a run is resumed; the Trainer's starts again at 0."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        states: Any = state.stateful_callbacks
        states.setdefault(type(self).__name__, self.state())  # missing if the run started without it
        self.early_stopping_patience_counter = spent_patience(state.stateful_callbacks)


class SkippedStepsCallback(TrainerCallback):
    """Stops a float16 run in which the optimizer has skipped SKIPPED_STEPS steps in a row.

    The GradScaler skips a step whose gradients overflow, and halves its scale. Once the scale is below 1, an
    overflow does not come from it, and no step will be made.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.skipped = 0

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        accelerator: Any = self.trainer.accelerator
        self.skipped = self.skipped + 1 if accelerator.optimizer_step_was_skipped else 0
        if self.skipped >= SKIPPED_STEPS:
            scaler = accelerator.scaler  # DeepSpeed has its own
            raise DivergedError(
                f"the last {self.skipped} steps were skipped, as their gradients overflow in float16",
                where=f"step {state.global_step}",
                got=f"a loss scale of {scaler.get_scale():g}" if scaler else "",
                fix="set train.fp16: false to train in float32, or train.bf16: true on a GPU that has it",
            )


class LastEvaluationCallback(TrainerCallback):
    """Evaluates at the last step. After training, trackers would start a second run for the evaluation.

    Used on all processes.
    """

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        control.should_evaluate |= state.global_step >= state.max_steps or control.should_training_stop


class TrackerCallback(TrainerCallback):
    """Forwards events to a tracker until it raises an error, then prints a warning and stops forwarding."""

    def __init__(self, tracker: TrainerCallback, *, is_main: bool):
        self.tracker, self.is_main = tracker, is_main
        self.has_failed = False

    def __getattribute__(self, name: str) -> Any:
        """Forwards every event, including those that later versions of transformers add."""
        return partial(self._forward, name) if name.startswith("on_") else super().__getattribute__(name)

    def _forward(self, event: str, *args: Any, **kwargs: Any) -> Any:
        if self.has_failed:
            return None
        try:
            return getattr(self.tracker, event)(*args, **kwargs)
        except Exception as error:  # from the tracker's package or the network
            self.has_failed = True
            if self.is_main:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                name = type(self.tracker).__name__
                write_line(f"warning   {name} failed and is disabled for the rest of the run: {reason}")
            return None


def tolerate_trackers(trainer: Trainer) -> None:
    """Wraps each tracker of a trainer in a TrackerCallback."""
    kinds = tuple(INTEGRATION_TO_CALLBACK.values())
    callbacks = trainer.callback_handler.callbacks
    is_main = trainer.is_world_process_zero()
    callbacks[:] = [
        TrackerCallback(callback, is_main=is_main) if isinstance(callback, kinds) else callback
        for callback in callbacks
    ]


def ends_epoch(state: TrainerState) -> bool:
    """Returns whether the current step is the last of an epoch."""
    return bool(state.epoch) and float(state.epoch or 0).is_integer()


def spent_patience(callbacks: Any) -> int:
    """Returns the number of evaluations without improvement, from the callbacks' states in a checkpoint."""
    state = callbacks.get(PatienceCallback.__name__) or {}
    return state.get("attributes", {}).get("early_stopping_patience_counter", 0)


def epoch_means(history: list[dict[str, Any]]) -> dict[str, float]:
    """Returns the means over the epoch that ends at the last log event; {} if no epoch ends there.

    The loss of an event is the mean over the steps since the previous event, its accuracy that over their
    targets. Also returns {} if no event marks the beginning of the epoch.
    """
    last = history[-1]["epoch"]
    epoch = round(last)
    if epoch < 1 or abs(last - epoch) > 1e-6:  # the usual case: returns before reading a long history
        return {}
    events = [{"step": 0, "epoch": 0.0, "target_tokens_seen": 0}, *(e for e in history if "loss" in e)]
    before = next((i for i, event in enumerate(events) if abs(event["epoch"] - (epoch - 1)) < 1e-6), None)
    if before is None:
        return {}
    steps = targets = 0
    loss = correct = 0.0
    for last, event in pairwise(events[before:]):
        steps += (more := event["step"] - last["step"])
        targets += (learned := event["target_tokens_seen"] - last["target_tokens_seen"])
        loss, correct = loss + more * event["loss"], correct + learned * event["token_accuracy"]
    if steps < 2 or not targets:
        return {}
    return {"epoch": float(epoch), "epoch_loss": loss / steps, "epoch_token_accuracy": correct / targets}


class ReportCallback(TrainerCallback):
    """Writes the report when training begins, at log events, and when it is closed. Rank 0 only.

    Skips log events so that writing takes at most REPORT_SHARE of the time since training began. If the
    report cannot be written, for example on a full disk, prints one warning and continues.
    """

    def __init__(self, write: Callable[[], object], *, is_main: bool):
        self.write, self.is_main = write, is_main
        self.started = self.spent = self.last = 0.0  # seconds
        self.has_failed = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.started = time.monotonic()
        self._write()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        expected = self.spent + max(MIN_SECONDS, GROWTH * self.last)
        if expected <= REPORT_SHARE * (time.monotonic() - self.started):
            self._write()

    def close(self) -> None:
        """Writes the last report, also of a run that failed, once run.json contains how it ended."""
        self._write()

    def _write(self) -> None:
        if not self.is_main:
            return
        start = time.monotonic()
        try:
            self.write()
        except (OSError, UserError, ModuleNotFoundError) as error:  # matplotlib may not be installed
            if not self.has_failed:
                write_line(f"warning   the report cannot be written, and training continues: {error}")
            self.has_failed = True
        self.last = time.monotonic() - start
        self.spent += self.last


def write_line(line: str, figures: Mapping[str, float] | None = None) -> None:
    """Prints one or several lines without breaking a progress bar.

    With HF_CLM_LOG=json, prints each line as a JSON object that also contains the ``figures``. Training
    continues if the output is closed.
    """
    try:
        tqdm.write("\n".join(to_json_lines(line, figures or {})) if writes_json() else line)
        sys.stdout.flush()
    except OSError:  # a closed pipe or terminal, or a full disk
        drop_output()


def drop_output() -> None:
    """Discards all further output."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
