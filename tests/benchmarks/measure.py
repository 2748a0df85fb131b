"""Measures the speed or the loss of an arm in a child process of the driver. Returns plain data."""

import json
import os
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from arms import Arm, Job, build_trainer
from cases import IGNORE, Case, build_rows, load_model

WARM_UP_STEPS = 2


@dataclass(frozen=True)
class Task:
    """The task of a child. ``seconds``: minimum length of a window. ``seed``: for the order of the rows."""

    case: Case
    arm: Arm
    precision: str
    seed: int = 0
    seconds: float = 1.5


@dataclass
class Counter:
    """Counts the real and target tokens that pass through the model, independent of the collator."""

    tokens: int = 0
    targets: int = 0

    def count(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Counts a batch, as a forward pre-hook of the model."""
        mask, shifted = kwargs.get("attention_mask"), kwargs.get("shift_labels")
        self.tokens += kwargs["input_ids"].numel() if mask is None else int(mask.sum())
        labels = kwargs["labels"][:, 1:] if shifted is None else shifted
        self.targets += int((labels != IGNORE).sum())


@dataclass
class Moment:
    """The times and counts at the end of a step."""

    wall: float
    cpu: float
    tokens: int
    targets: int
    step: int


@dataclass
class Window:
    """The differences between two moments."""

    start: Moment
    end: Moment

    def figures(self, threads: int) -> dict[str, float]:
        """Tokens per second; CPU seconds include all threads of the process."""
        start, end = self.start, self.end
        steps, tokens = end.step - start.step, end.tokens - start.tokens
        return {
            "threads": threads,
            "steps": steps,
            "tokens_per_second": tokens / (end.wall - start.wall),
            "tokens_per_cpu_second": tokens / (end.cpu - start.cpu),
            "target_tokens_per_second": (end.targets - start.targets) / (end.wall - start.wall),
            "step_seconds": (end.wall - start.wall) / steps,
            "tokens_per_step": tokens / steps,
        }


@dataclass
class Clock:
    """Stops a run after one window for each number of threads."""

    task: Task
    counter: Counter
    windows: list[Window] = field(default_factory=list)
    start: Moment | None = None

    def step_ended(self, step: int) -> bool:
        """Returns whether all windows are complete."""
        import torch

        now = Moment(
            time.perf_counter(), time.process_time(), self.counter.tokens, self.counter.targets, step
        )
        if self.start is None:
            self.start = now if step == WARM_UP_STEPS else None
            return False
        is_long = now.wall - self.start.wall >= self.task.seconds
        if is_long and (step - self.start.step) % self.task.case.steps == 0:
            self.windows.append(Window(self.start, now))
            self.start = now
            if len(self.windows) < len(self.task.case.threads):
                torch.set_num_threads(self.task.case.threads[len(self.windows)])
        return len(self.windows) == len(self.task.case.threads)


def measure_speed(task: Task) -> dict[str, Any]:
    """Measures the tokens per second with each number of threads, and the peak memory."""
    import torch

    threads = task.case.threads
    torch.set_num_threads(threads[0])
    at_start = _resident_bytes()
    counter = Counter()
    with tempfile.TemporaryDirectory() as folder:
        values = {"seed": task.seed, "max_steps": 100_000, "logging_steps": 10}
        job = Job(task.case, build_rows(task.case), task.precision, Path(folder), values, sampled=True)
        trainer = build_trainer(task.arm, job)
        trainer.model.register_forward_pre_hook(counter.count, with_kwargs=True)
        clock = Clock(task, counter)
        trainer.add_callback(_at_step_end(clock.step_ended))
        trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    windows = [window.figures(number) for window, number in zip(clock.windows, threads, strict=True)]
    return {
        "windows": windows,
        "peak_bytes": peak,
        "peak_above_imports_bytes": peak - at_start,
        "first_losses": logged[:1],
        "bf16": trainer.args.bf16,
    }


def measure_loss(task: Task) -> dict[str, Any]:
    """Returns the mean loss per target token with constant weights, and in an epoch of training."""
    import torch

    torch.set_num_threads(1)
    rows = build_rows(task.case)
    seen, learned = Counter(), Counter()
    with tempfile.TemporaryDirectory() as folder:
        values = {"seed": task.seed, "num_train_epochs": 1, "logging_steps": 1}
        job = Job(task.case, rows[: -task.case.held_out], task.precision, Path(folder), values)
        still = _epoch_loss(task, job, seen, values={"learning_rate": 0.0})
        moving = _epoch_loss(task, job, learned, values={})
        held_out = _loss_alone(moving[1].model, rows[-task.case.held_out :])
    return {
        "tokens": seen.tokens,
        "target_tokens": seen.targets,
        "still_loss": still[0],
        "epoch_loss": moving[0],
        "steps": moving[1].state.global_step,
        "bf16": moving[1].args.bf16,
        "held_out_loss": held_out,
    }


def measure_alone(task: Task) -> dict[str, Any]:
    """Returns the expected ``still_loss``: of each row alone in the untrained model, without any Trainer."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = build_rows(task.case)[: -task.case.held_out]
    model = load_model(task.case)
    return {
        "tokens": sum(len(row["input_ids"]) for row in rows),
        "target_tokens": sum(label != IGNORE for row in rows for label in row["labels"]),
        "still_loss": _loss_alone(model, rows),
    }


def _epoch_loss(task: Task, job: Job, counter: Counter, *, values: dict[str, Any]) -> tuple[float, Any]:
    """Returns the mean over the target tokens of an epoch, from the losses that the Trainer logs."""
    trainer = build_trainer(task.arm, Job(**vars(job) | {"values": job.values | values}))
    hook = trainer.model.register_forward_pre_hook(counter.count, with_kwargs=True)
    targets = [0]
    trainer.add_callback(_at_step_end(lambda step: targets.append(counter.targets)))
    trainer.train()
    hook.remove()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    total = sum(loss * (end - start) for loss, (start, end) in zip(losses, pairwise(targets), strict=True))
    return total / counter.targets, trainer


def _loss_alone(model: Any, rows: Any) -> float:
    """Returns the mean over the target tokens of rows that are run alone, with the model's loss."""
    import torch

    model.eval()
    model.set_attn_implementation("eager")
    total, targets = 0.0, 0
    with torch.no_grad():
        for row in rows:
            ids, labels = (torch.tensor([row[key]]) for key in ("input_ids", "labels"))
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1).float()
            total += float(torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum"))
            targets += int((labels[:, 1:] != IGNORE).sum())
    return total / targets


def _at_step_end(action: Callable[[int], bool | None]) -> Any:
    """Calls an action after each step; training stops when it returns True."""
    from transformers import TrainerCallback

    class AtStepEnd(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop |= bool(action(state.global_step))

    return AtStepEnd()


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def run_child(measure: Any, task: Task, path: str) -> None:
    """Runs in the child. Its output goes to ``path``, with the result as JSON in the last line."""
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = sys.stderr = os.fdopen(log, "w", buffering=1)
    warnings.simplefilter("ignore")
    result = measure(task)
    print(json.dumps(result), flush=True)
