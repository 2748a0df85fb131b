"""What a child of ``hf-clm bench`` measures in a process of its own: the way to the first step, or the speed.

Both are made of the parts of a run, and train with its CLMTrainer.
"""

import math
import pickle
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hf_clm.bench.results import Start, Task, Trial
from hf_clm.data.batch.packing import PackedDataset
from hf_clm.data.prepared.sets import load_early, load_examples
from hf_clm.data.read.plain_template import settle_render
from hf_clm.doctor.memory import free_memory
from hf_clm.errors import UserError
from hf_clm.machine import measure_peak, nominal_peak, peak_memory, settle_cpu
from hf_clm.model.build import build_model, build_model_config, build_tokenizer_aside
from hf_clm.training.arguments import training_arguments
from hf_clm.training.prepare import prepare
from hf_clm.training.proof import prove_model
from hf_clm.training.run import build_trainer
from hf_clm.training.summary import RunFacts, versions
from hf_clm.training.trainer import CLMTrainer

WINDOWS = 5  # after one to warm up
WINDOW_SECONDS = 5.0  # a window that lasts longer ends with its step
PEAK_SECONDS, INPUT_SECONDS = 1.0, 0.5


def run_child() -> None:
    """Reads a pickled Task from stdin and writes its result, or the UserError, to the path of ``argv[1]``."""
    task: Task = pickle.load(sys.stdin.buffer)
    result: Start | Trial | UserError
    try:
        result = measure_speed(task) if task.steps else measure_start(task)
    except UserError as error:
        result = error
    Path(sys.argv[1]).write_bytes(pickle.dumps(result))


@dataclass
class Stopwatch:
    """Seconds by the name of a part."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


def measure_start(task: Task) -> Start:
    """From the start of the process to the first step, as ``train`` goes where nothing was prepared before.

    What was prepared is kept in the recipe's cache_dir. Raises UserError as ``train`` does.
    """
    recipe, timing = task.recipe, Stopwatch({"import": time.time() - task.started})
    arguments = training_arguments(recipe)
    _settle(arguments)
    with timing("tokenizer"):
        early = load_early(recipe, arguments.seed)
        tokenizer = build_tokenizer_aside(recipe, early, arguments=arguments)
        recipe = settle_render(recipe, tokenizer)
        config = build_model_config(recipe, tokenizer)
    with timing("prepare"):
        splits = prepare(recipe, tokenizer, arguments=arguments).splits
    with timing("load model"):
        model = build_model(recipe, tokenizer, config=config, arguments=arguments)
        trainer = build_trainer(model, arguments, recipe=recipe, tokenizer=tokenizer, splits=splits)
    train = splits["train"]
    with timing("test model"):
        prove_model(trainer, recipe, split=train, tokenizer=tokenizer)
    assert trainer.peak_flops > 0  # measured before the step
    with timing("first step"):
        trainer.train()
    precision = _precision(arguments, model)
    kinds = dict.fromkeys(("float32", precision))
    collate_seconds, rows_per_second = _measure_input(trainer)
    return Start(
        device=RunFacts(recipe, arguments, model, splits, 0.0).device,
        precision=precision,
        roofline={
            kind: measure_peak(arguments.device, getattr(torch, kind), seconds=PEAK_SECONDS) for kind in kinds
        },
        nominal=nominal_peak(arguments.device),
        micro_batch=arguments.train_batch_size,
        accumulation=arguments.gradient_accumulation_steps,
        examples=len(train.examples),
        rows=len(train.dataset),
        tokens=train.tokens,
        target_tokens=train.target_tokens,
        fill=train.dataset.fill if isinstance(train.dataset, PackedDataset) else None,
        text_bytes=sum(len(text.encode()) for e in load_examples(recipe.data).examples for text in e.texts),
        collate_seconds=collate_seconds,
        rows_per_second=rows_per_second,
        seconds=timing.seconds,
        versions=versions(),
    )


def measure_speed(task: Task) -> Trial:
    """Tokens a second over windows of steps, and the peak of the memory, on what was prepared before."""
    recipe = task.recipe
    arguments = training_arguments(recipe)
    _settle(arguments)
    on_cpu = arguments.device.type == "cpu"
    limit = free_memory(arguments.device) if on_cpu else None
    loaded = load_early(recipe, arguments.seed)
    tokenizer = build_tokenizer_aside(recipe, loaded, arguments=arguments)
    recipe = settle_render(recipe, tokenizer)
    config = build_model_config(recipe, tokenizer)
    splits = prepare(recipe, tokenizer, arguments=arguments).splits
    model = build_model(recipe, tokenizer, config=config, arguments=arguments)
    arguments.max_steps = (WINDOWS + 1) * -(-task.steps // WINDOWS)
    trainer = build_trainer(model, arguments, recipe=recipe, tokenizer=tokenizer, splits=splits)
    windows = WindowCallback(arguments.max_steps // (WINDOWS + 1))
    trainer.add_callback(windows)
    trainer.train()
    found = [_to_figures(before, after) for before, after in pairwise(windows.logs)]
    middle = sorted(found, key=lambda figures: figures["tokens_per_second"])[len(found) // 2]
    return Trial(
        arguments.train_batch_size,
        arguments.gradient_accumulation_steps,
        step_seconds=middle["step_seconds"],
        tokens_per_second=middle["tokens_per_second"],
        target_tokens_per_second=middle["target_tokens_per_second"],
        flops_per_second=middle["flops_per_second"],
        peak_bytes=peak_memory(arguments.device),
        limit_bytes=limit,
    )


class WindowCallback(TrainerCallback):
    """Logs at the end of each window of ``steps``; stops after one to warm up and WINDOWS to be counted."""

    def __init__(self, steps: int):
        self.steps = steps
        self.logs: list[dict[str, float]] = []
        self.started, self.first = math.inf, 0  # the clock starts after the first step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        now = time.perf_counter()
        self.started = min(self.started, now)
        is_long = now - self.started > WINDOW_SECONDS
        control.should_log |= is_long or state.global_step - self.first >= self.steps

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if "tokens_per_second" not in kwargs["logs"]:
            return
        self.logs.append({"step": state.global_step, "flops": state.total_flos, **kwargs["logs"]})
        self.started, self.first = time.perf_counter(), state.global_step
        control.should_training_stop |= len(self.logs) > WINDOWS


def _to_figures(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    tokens, targets, steps = (
        after[key] - before[key] for key in ("tokens_seen", "target_tokens_seen", "step")
    )
    speed = after["tokens_per_second"]
    seconds = tokens / speed
    return {
        "tokens_per_second": speed,
        "target_tokens_per_second": speed * targets / tokens,
        "step_seconds": seconds / steps,
        "flops_per_second": (after["flops"] - before["flops"]) / seconds,
    }


def _measure_input(trainer: CLMTrainer) -> tuple[float, float]:
    """Seconds to collate a batch, and rows a second with the reading of them."""
    dataset: Any = trainer.train_dataset
    collate, size = trainer.data_collator, trainer.args.train_batch_size
    order, seconds, count = np.random.default_rng(0).permutation(len(dataset)), [], 0
    started = time.perf_counter()
    while (elapsed := time.perf_counter() - started) < INPUT_SECONDS:
        rows = [dataset[int(order[(count + place) % len(order)])] for place in range(size)]
        read = time.perf_counter()
        collate(rows)
        seconds.append(time.perf_counter() - read)
        count += size
    return median(seconds), count / elapsed


def _settle(arguments: TrainingArguments) -> None:
    if arguments.device.type == "cpu":
        settle_cpu(1)


def _precision(arguments: TrainingArguments, model: PreTrainedModel) -> str:
    """The type that the matrix products are computed in."""
    if arguments.bf16 or arguments.fp16:
        return "bfloat16" if arguments.bf16 else "float16"
    return str(model.dtype).removeprefix("torch.")
