"""Where the time of an optimizer step goes, and what to change: a part of ``hf-clm bench``.

marks     (Python, 0.0) (input, 0.1) (Python, 0.3) (forward, 0.4) (loss, 1.1) (forward, 1.5) ...
seconds   each part from its mark to the next mark, so the sum of the parts is the step
"""

import os
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from transformers import TrainingArguments

from hf_clm.machine import has_bf16, usable_cores
from hf_clm.model.load import without_adapters
from hf_clm.training.trainer import CLMTrainer

# What each part consists of. Python is the rest of the Trainer's loop.
PARTS = {
    "input": "read, collate, copy",
    "forward": "",
    "loss": "",
    "backward": "",
    "optimizer": "clip and update",
    "Python": "the rest",
}
REST = "Python"
BAR, WIDTH, INDENT = 30, 80, " " * 10
# There is advice for a part that takes more than this share of a step.
LARGE = {"input": 0.1, "loss": 0.3, "optimizer": 0.15, "Python": 0.2}
PADDED = 0.2  # a larger share of padding calls for packing


@dataclass(frozen=True)
class StepTime:
    """The mean seconds of each part of a step, what the loss consists of, and what to change."""

    seconds: dict[str, float]
    loss: str
    advice: list[str]

    @property
    def shares(self) -> dict[str, float]:
        """The share of the step that each part takes."""
        return to_shares(self.seconds)

    def to_lines(self, rows: int) -> list[str]:
        """Draws a bar for each part, and lists the advice. ``rows``: the micro-batch."""
        largest, bars = max(self.shares.values()), []
        for name, share in self.shares.items():
            bar, note = "#" * round(BAR * share / largest), self.loss if name == "loss" else PARTS[name]
            bars.append(f"{INDENT}{name:<9} {share:>6.1%}  {bar:<{BAR}}  {note}".rstrip())
        model = sum(self.shares[name] for name in ("forward", "loss", "backward"))
        advice = self.advice or [f"nothing: the model itself takes {model:.0%} of the step"]
        lines = [
            line
            for text in advice
            for line in textwrap.wrap(text, WIDTH, initial_indent=INDENT, subsequent_indent=f"{INDENT}  ")
        ]
        title = f"step      {sum(self.seconds.values()):.3f} s with a micro-batch of {rows}:"
        return [title, *bars, "change" + lines[0][len("change") :], *lines[1:]]


class StepClock:
    """Measures the parts of the steps between ``start`` and ``stop``. A part inside another interrupts it.

    A GPU records events in its stream, so nothing waits for it. Work of the CPU counts only while the GPU
    is idle.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.marks: list[tuple[str, float | torch.Event]] = []

    def start(self) -> None:
        """Forgets what was measured before."""
        self.marks = []
        self.mark(REST)

    def stop(self) -> dict[str, float]:
        """Returns the seconds of each part since ``start``."""
        self.mark(REST)
        last = self.marks[-1][1]
        if isinstance(last, torch.Event):
            last.synchronize()
        seconds = dict.fromkeys(PARTS, 0.0)
        for (part, begin), (_, end) in pairwise(self.marks):
            seconds[part] += _seconds_between(begin, end)
        return seconds

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a function that calls ``call`` and counts its time to ``part``."""

        def run(*args: Any, **kwargs: Any) -> Any:
            outer = self.marks[-1][0] if self.marks else REST
            self.mark(part)
            try:
                return call(*args, **kwargs)
            finally:
                self.mark(outer)

        return run

    def mark(self, part: str) -> None:
        """Notes that ``part`` begins now."""
        now = time.perf_counter()
        if self.device.type != "cpu":
            now = torch.Event(self.device, enable_timing=True)
            now.record()
        self.marks.append((part, now))


def time_parts(trainer: CLMTrainer, clock: StepClock) -> str:
    """Makes the clock measure the trainer's steps from the next one on. Returns what the loss consists of."""
    calls = [
        (trainer, "get_batch_samples", "input"),
        (trainer, "_prepare_inputs", "input"),
        (trainer, "compute_loss", "forward"),
        (trainer.accelerator, "backward", "backward"),
        (trainer, "_clip_grad_norm", "optimizer"),
        (trainer, "_get_grad_norm", "optimizer"),
        (trainer.optimizer, "step", "optimizer"),
    ]
    for owner, name, part in calls:
        setattr(owner, name, clock.timed(part, getattr(owner, name)))
    loss: Any = trainer.target_loss
    if loss is not None:
        loss._measure = torch.compiler.disable(clock.timed("loss", loss._measure))
        return "with its gradients"
    if trainer.args.torch_compile:
        return "compiled into forward"
    model = without_adapters(trainer.accelerator.unwrap_model(trainer.model))
    model.loss_function = clock.timed("loss", model.loss_function)
    return ""


def to_shares(seconds: dict[str, float]) -> dict[str, float]:
    """Returns the share of each part."""
    total = sum(seconds.values())
    return {name: part / total for name, part in seconds.items()}


def advise(
    shares: dict[str, float],
    arguments: TrainingArguments,
    *,
    dtype: torch.dtype,
    vocabulary: int,
    own_loss: str,
    padding: float,
) -> list[str]:
    """Returns what to change in the recipe, or on the machine, for faster steps.

    Args:
        dtype: of the matrix products.
        own_loss: why the model computes its own loss, or empty.
        padding: the share of positions that packing would save.
    """
    is_large = {name: shares[name] > limit for name, limit in LARGE.items()}
    device, workers = arguments.device.type, arguments.dataloader_num_workers
    where = f"at every position ({own_loss})" if own_loss else "at the targets only"
    cores, threads = usable_cores(), torch.get_num_threads()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    rules = [
        (
            is_large["input"] and workers < cores,
            f"input: set train.dataloader_num_workers to {min(workers + 2, cores)}, so that more"
            " batches are collated while the model computes",
        ),
        (padding > PADDED, f"padding: {padding:.0%} of all positions; set data.packing to best_fit"),
        (
            is_large["loss"],
            f"loss: computed {where} over {vocabulary:,} tokens; a smaller vocabulary or"
            f" {'shorter rows' if own_loss else 'fewer targets'} would be faster",
        ),
        (
            arguments.gradient_checkpointing,
            "backward: includes a second forward pass; set train.gradient_checkpointing to false if memory"
            " allows",
        ),
        (
            is_large["optimizer"] and arguments.optim == "adamw_torch",
            "optimizer: set train.optim to adamw_torch_fused",
        ),
        (
            is_large["optimizer"],
            "optimizer: take fewer, larger steps; set train.gradient_accumulation_steps to"
            f" {2 * arguments.gradient_accumulation_steps} (changes the global batch)",
        ),
        (
            is_large["Python"],
            "Python: costs the same for every micro-batch; use fewer and larger ones"
            " (train.per_device_train_batch_size or data.tokens_per_batch)",
        ),
        (
            dtype == torch.float32 and has_bf16(arguments.device),
            "precision: float32, but this machine has bfloat16, which is faster; set train.bf16 to true",
        ),
        (
            device == "cuda" and not arguments.torch_compile,
            "compile: set train.torch_compile to true, which fuses small operations",
        ),
        (
            device == "cpu" and threads < cores,
            f"cores: {threads} of {cores} in use; unset OMP_NUM_THREADS or raise it",
        ),
        (
            device == "cpu" and load > threads + cores / 2,
            f"cores: other programs use them (load average {load:.0f} on {cores}); measure again when idle",
        ),
    ]
    return [line for applies, line in rules if applies]


def _seconds_between(begin: float | torch.Event, end: float | torch.Event) -> float:
    if isinstance(begin, torch.Event) and isinstance(end, torch.Event):
        return begin.elapsed_time(end) / 1000
    assert isinstance(begin, float) and isinstance(end, float)
    return end - begin
