"""``hf-clm bench``: measures how fast a recipe and its data train on this machine, and keeps nothing.

bench --> a process for each micro-batch size: prepare, build, prove, train like ``train`` --> Start, Trial
          (the first prepares the data for all of them, and tests the model)
steps --> a window to warm up, WINDOWS for the speed, and one for the parts of a step (step_time.py)
"""

import math
import os
import pickle
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_clm.data.batch.packing import PackedDataset
from hf_clm.doctor.memory import free_memory
from hf_clm.errors import EnvironmentFault, RecipeError, UserError
from hf_clm.machine import measure_peak, peak_memory, settle_cpu
from hf_clm.model.build import build_model, build_model_config
from hf_clm.recipe.recipe import Recipe
from hf_clm.recipe.sections import Doctor
from hf_clm.step_time import StepClock, StepTime, advise, time_parts, to_shares
from hf_clm.training.arguments import load_tokenizer_and_settle, training_arguments
from hf_clm.training.assemble import build_trainer
from hf_clm.training.prepare import prepare
from hf_clm.training.proof import prove_model
from hf_clm.training.summary import RunFacts, versions
from hf_clm.training.trainer import CLMTrainer

WINDOWS = 5  # after one to warm up
WINDOW_SECONDS = 5.0  # a longer window ends with the current step
PEAK_SECONDS = 1.0
NOISE = 1.03  # a speedup of less than 3 % does not count
WIDTH, INDENT = 100, " " * 10
MIB = 2**20
# Turns off evaluation, saving, and logging except by bench itself.
QUIET = {
    "eval_strategy": "no",
    "eval_on_start": False,
    "load_best_model_at_end": False,
    "save_strategy": "no",
    "logging_strategy": "no",
    "report_to": "none",
    "push_to_hub": False,
    "resume_from_checkpoint": None,
}
CHILD = "from hf_clm.bench import run_child; run_child()"
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "MemoryError")
KILLED = -9
NOTHING_KEPT = "kept      nothing: the weights and the prepared data are deleted"
COLUMNS = (
    "micro-batch",
    "rows/step",
    "s/step",
    "tokens/s",
    "targets/s",
    "per second",
    "MFU",
    "peak MiB",
)


@dataclass(frozen=True)
class Start:
    """The machine, the data, and the time to the first step.

    peak                FLOP/s of a large matrix product in the precision of the run
    max_length          tokens of a packed row, None without packing
    fill                share of the packed rows that is filled, None without packing
    seconds             duration of each part of the start
    """

    device: str
    peak: float
    examples: int
    rows: int
    tokens: int
    target_tokens: int
    max_length: int | None
    fill: float | None
    seconds: dict[str, float]
    versions: dict[str, str | None]

    def to_lines(self) -> list[str]:
        """Describes the machine, the data, the speed of their preparation, and the time to the first step."""
        filled = "not packed" if self.fill is None else f"{self.fill:.1%} full"
        parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in self.seconds.items())
        start = f"start     {sum(self.seconds.values()):.1f} s: {parts}"
        return [
            f"device    {self.device}",
            f"peak      {to_flops(self.peak)}/s in a matrix product",
            f"data      {self.examples:,} examples, {self.tokens:,} tokens ({self.target_tokens:,} targets) "
            f"in {self.rows:,} rows, {filled}",
            f"prepare   {self.tokens / self.seconds['prepare']:,.0f} tokens/s",
            *textwrap.wrap(start, WIDTH, subsequent_indent=INDENT),
        ]


@dataclass(frozen=True)
class Trial:
    """The speed with a micro-batch of ``rows``, as the median of windows.

    failure             why there is no speed, or empty
    limit_bytes         memory that was free before; None on a GPU, where running out ends only the child
    """

    rows: int
    accumulation: int
    failure: str = ""
    step_seconds: float = 0.0
    tokens_per_second: float = 0.0
    target_tokens_per_second: float = 0.0
    flops_per_second: float = 0.0
    peak_bytes: int = 0
    limit_bytes: int | None = None
    step_time: StepTime | None = None

    def is_faster(self, other: "Trial") -> bool:
        """Returns whether it is faster by more than the noise."""
        return self.tokens_per_second > NOISE * other.tokens_per_second


@dataclass(frozen=True)
class Bench:
    """The results. ``trials``: the recipe's own first; ``stopped``: why no larger micro-batch was tried."""

    recipe: str
    start: Start
    trials: list[Trial]
    stopped: str

    @property
    def fastest(self) -> Trial:
        """The fastest trial, or the recipe's own if none is faster by more than the noise."""
        best = max(self.trials, key=lambda trial: trial.tokens_per_second)
        return best if best.is_faster(self.trials[0]) else self.trials[0]

    def to_json(self) -> dict[str, Any]:
        """Returns the results, in bytes, seconds and FLOP."""
        trials = [
            asdict(trial)
            | {"mfu": trial.flops_per_second / self.start.peak}
            | ({"shares": trial.step_time.shares} if trial.step_time else {})
            for trial in self.trials
        ]
        speeds = {"trials": trials, "fastest": self.fastest.rows, "stopped": self.stopped}
        return {"recipe": self.recipe, "start": asdict(self.start), **speeds}

    def to_lines(self) -> list[str]:
        """Returns a table of the trials, the recommended micro-batch size, and the parts of its step."""
        trials = sorted(self.trials, key=lambda trial: trial.rows)
        cells = [COLUMNS, *(self._cells(trial) for trial in trials if not trial.failure)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        table = ["  ".join(map(str.rjust, row, widths)) for row in cells]
        failed = [f"{trial.rows:>{widths[0]}}  {trial.failure}" for trial in trials if trial.failure]
        best = self.fastest
        parts = [*best.step_time.to_lines(best.rows), ""] if best.step_time else []
        advice = [f"fastest   {self._advice()}", f"          {self.stopped}", ""]
        return ["", *table, *failed, "", *advice, *parts, NOTHING_KEPT]

    def _advice(self) -> str:
        first, best = self.trials[0], self.fastest
        if best is first:
            return f"a micro-batch of {first.rows}, as in the recipe"
        rows = best.rows * best.accumulation
        note = "" if rows == first.rows * first.accumulation else f"; changes the global batch to {rows} rows"
        speed = first.tokens_per_second
        gain = f" ({best.tokens_per_second / speed:.2f}x)" if speed else ""
        sizes = f"{best.rows} --gradient_accumulation_steps {best.accumulation}"
        if best.limit_bytes is None and self.start.max_length:  # a GPU would choose it by its memory
            sizes += f" --data.tokens_per_batch {best.rows * self.start.max_length}"
        return f"--per_device_train_batch_size {sizes}{gain}{note}"

    def _cells(self, trial: Trial) -> tuple[str, ...]:
        return (
            str(trial.rows),
            str(trial.rows * trial.accumulation),
            f"{trial.step_seconds:.3f}",
            f"{trial.tokens_per_second:,.0f}",
            f"{trial.target_tokens_per_second:,.0f}",
            to_flops(trial.flops_per_second),
            f"{trial.flops_per_second / self.start.peak:.1%}",
            f"{trial.peak_bytes / MIB:,.0f}",
        )


def bench(recipe: Recipe, *, steps: int, say: Callable[[str], object]) -> Bench:
    """Measures the recipe's micro-batch size, then larger and smaller ones, each in a separate process.

    Args:
        say: prints lines of progress.

    Raises UserError like ``train``.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError("bench runs in one process", where="WORLD_SIZE", fix="start it without a launcher")
    with tempfile.TemporaryDirectory(prefix="hf-clm-bench-") as folder:
        quiet = to_quiet(recipe, folder, steps=steps)
        result = _run_child(quiet, folder)
        if result is None:
            fix = "lower train.per_device_train_batch_size or data.max_length, or use a smaller model"
            raise EnvironmentFault("a step of the recipe does not fit", where="memory", fix=fix)
        start, first = result
        say("\n".join([*start.to_lines(), _tried(first)]))
        proved = quiet.model_copy(update={"doctor": Doctor(self_test=False, round_trip="off")})

        def attempt(rows: int) -> Trial:
            accumulation = max(1, first.rows * first.accumulation // rows)
            sizes = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulation}
            result = _run_child(with_values(proved, sizes), folder)
            trial = result[1] if result else Trial(rows, accumulation, "out of memory")
            say(_tried(trial))
            return trial

        if recipe.data.tokens_per_batch and recipe.resolved_packing == "none":
            return Bench(recipe.file, start, [first], "data.tokens_per_batch determines the micro-batch")
        trials, stopped = find_fastest(attempt, first, most=start.rows)
        return Bench(recipe.file, start, trials, stopped)


def to_quiet(recipe: Recipe, folder: str, *, steps: int) -> Recipe:
    """Returns the recipe with windows of ``steps`` in total, and all of its output in ``folder``."""
    data = recipe.data.model_copy(update={"cache_dir": f"{folder}/prepared"})
    quiet = recipe.model_copy(update={"data": data, "samples": None, "early_stopping": None})
    steps = (WINDOWS + 2) * -(-steps // WINDOWS) + 1  # the parts of a step have a step to warm up
    return with_values(quiet, {**QUIET, "max_steps": steps, "output_dir": f"{folder}/run"})


def with_values(recipe: Recipe, values: dict[str, Any]) -> Recipe:
    """Returns the recipe with these values in ``train``."""
    return recipe.model_copy(update={"train": {**recipe.train, **values}})


def find_fastest(attempt: Callable[[int], Trial], first: Trial, *, most: int) -> tuple[list[Trial], str]:
    """Doubles the micro-batch size while that is faster. If it never is, halves it while that is faster.

    Returns the trials, beginning with ``first``, and why no larger micro-batch was tried.
    """
    trials, stopped = [first], _why_not(first, first, most=most)
    while not stopped:
        best = trials[-1]
        trials.append(attempt(2 * best.rows))
        stopped = _why_not(trials[-1], best, most=most)
    if not any(trial.is_faster(first) for trial in trials):
        best = first
        while best.rows > 1:
            trials.append(attempt(best.rows // 2))
            if not trials[-1].is_faster(best):
                break
            best = trials[-1]
    return trials, stopped


def run_child() -> None:
    """Reads a pickled recipe and start time, and writes the result, or a UserError, to ``argv[1]``."""
    recipe, started = pickle.load(sys.stdin.buffer)
    result: tuple[Start, Trial] | UserError
    try:
        result = measure(recipe, started=started)
    except UserError as error:
        result = error
    Path(sys.argv[1]).write_bytes(pickle.dumps(result))


def measure(recipe: Recipe, *, started: float) -> tuple[Start, Trial]:
    """Measures the time to the first step, then the speed. Raises UserError like ``train``.

    Args:
        started: time.time() at which the process was started.
    """
    ends = {"import": time.time()}
    arguments = training_arguments(recipe)
    limit = free_memory(arguments.device) if arguments.device.type == "cpu" else None
    if arguments.device.type == "cpu":
        settle_cpu(1)
    tokenizer, recipe = load_tokenizer_and_settle(recipe, arguments)
    config = build_model_config(recipe, tokenizer)
    ends["tokenizer"] = time.time()
    splits = prepare(recipe, tokenizer, arguments=arguments).splits
    train = splits["train"]
    ends["prepare"] = time.time()
    model = build_model(recipe, tokenizer, config=config, arguments=arguments)
    trainer = build_trainer(model, arguments, recipe=recipe, tokenizer=tokenizer, splits=splits)
    ends["load model"] = time.time()
    prove_model(trainer, recipe, split=train, tokenizer=tokenizer)
    assert trainer.peak_flops > 0  # measured before the first step
    ends["test model"] = time.time()
    windows = WindowCallback(trainer)
    trainer.add_callback(windows)
    trainer.train()
    ends["first step"] = windows.begun
    dtype = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else model.dtype
    fill = train.dataset.fill if isinstance(train.dataset, PackedDataset) else None
    advice = advise(
        to_shares(windows.seconds),
        arguments,
        dtype=dtype,
        vocabulary=len(tokenizer),
        own_loss=trainer.own_loss,
        padding=windows.logs[-1]["padding_share"] if fill is None else 0.0,
    )
    step_time = StepTime(windows.seconds, windows.loss, advice)
    trial = replace(windows.to_trial(arguments), limit_bytes=limit, step_time=step_time)
    start = Start(
        device=RunFacts(recipe, arguments, model, splits, 0.0).device,
        peak=measure_peak(arguments.device, dtype, seconds=PEAK_SECONDS),
        examples=len(train.examples),
        rows=len(train.dataset),
        tokens=train.tokens,
        target_tokens=train.target_tokens,
        max_length=None if fill is None else recipe.data.max_length,
        fill=fill,
        seconds=dict(zip(ends, np.diff([started, *ends.values()]).tolist(), strict=True)),
        versions=versions(),
    )
    return start, trial


class WindowCallback(TrainerCallback):
    """Logs after a window to warm up and after each of WINDOWS more, times the parts of a step, and stops.

    The parts have a separate window at the end, so measuring them does not affect the speed.
    """

    def __init__(self, trainer: CLMTrainer):
        self.trainer = trainer
        self.steps = trainer.args.max_steps // (WINDOWS + 2)  # in a window
        self.logs: list[dict[str, float]] = []
        self.begun = self.started = math.inf  # time.time() after the first step, and at the start of a window
        self.first = 0
        self.clock = StepClock(trainer.args.device)
        self.loss = ""  # what the loss consists of
        self.seconds: dict[str, float] = {}  # of each part of a step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        now, steps = time.time(), state.global_step - self.first
        self.begun, self.started = min(self.begun, now), min(self.started, now)
        is_long = now - self.started > WINDOW_SECONDS
        if len(self.logs) <= WINDOWS:
            control.should_log |= is_long or steps >= self.steps
        elif steps == 1:  # a compiled model is compiled again in this step
            self.clock.start()
        elif is_long or steps > self.steps:
            parts = self.clock.stop()
            self.seconds = {part: seconds / (steps - 1) for part, seconds in parts.items()}
            control.should_training_stop = True

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if "tokens_per_second" in kwargs["logs"] and len(self.logs) <= WINDOWS:
            self.logs.append({"step": state.global_step, "flops": state.total_flos, **kwargs["logs"]})
            self.started, self.first = time.time(), state.global_step
            if len(self.logs) > WINDOWS:
                self.loss = time_parts(self.trainer, self.clock)

    def to_trial(self, arguments: TrainingArguments) -> Trial:
        """Returns the window with the median speed."""
        windows = sorted(pairwise(self.logs), key=lambda pair: pair[1]["tokens_per_second"])
        before, after = windows[len(windows) // 2]
        tokens, targets, steps, flops = (
            after[key] - before[key] for key in ("tokens_seen", "target_tokens_seen", "step", "flops")
        )
        speed = after["tokens_per_second"]
        return Trial(
            arguments.train_batch_size,
            arguments.gradient_accumulation_steps,
            step_seconds=tokens / speed / steps,
            tokens_per_second=speed,
            target_tokens_per_second=speed * targets / tokens,
            flops_per_second=speed * flops / tokens,
            peak_bytes=peak_memory(arguments.device),
        )


def to_flops(count: float) -> str:
    """``4.1e11`` -> ``"410 GFLOP"``, ``1.5e9`` -> ``"1.5 GFLOP"``, ``9.9e14`` -> ``"990 TFLOP"``."""
    size, name = (1e12, "TFLOP") if count >= 1e12 else (1e9, "GFLOP")
    return f"{count / size:.3g} {name}"


def _run_child(recipe: Recipe, folder: str) -> tuple[Start, Trial] | None:
    """Measures a recipe in a child process. Returns None if it runs out of memory; raises its UserError."""
    path = Path(folder, "result.pickle")
    path.unlink(missing_ok=True)
    words = [sys.executable, "-c", CHILD, str(path)]
    task = pickle.dumps((recipe, time.time()))
    done = subprocess.run(words, input=task, capture_output=True, check=False)
    if path.is_file():
        result = pickle.loads(path.read_bytes())
        if isinstance(result, UserError):
            raise result
        return result
    errors = done.stderr.decode(errors="replace")
    if done.returncode == KILLED or any(message in errors for message in OUT_OF_MEMORY):
        return None
    raise RuntimeError(f"a child of the bench failed with {done.returncode}:\n{errors}")


def _tried(trial: Trial) -> str:
    speed = f"{trial.tokens_per_second:,.0f} tokens/s"
    return f"tried     micro-batch {trial.rows}: {trial.failure or speed}"


def _why_not(trial: Trial, best: Trial, *, most: int) -> str:
    """Returns why no larger micro-batch is tried after a trial, or an empty string."""
    if trial.failure:
        return f"micro-batch {trial.rows}: {trial.failure}"
    if trial is not best and not trial.is_faster(best):
        return f"micro-batch {trial.rows} is not faster than {best.rows}"
    if 2 * trial.rows > most:
        return f"the data have only {most} rows"
    if trial.limit_bytes is not None and 2 * trial.peak_bytes > trial.limit_bytes:
        return f"micro-batch {2 * trial.rows} might not fit in memory"
    return ""
