"""``hf-clm bench``: what a recipe and its data make of this machine. Nothing that it trains is kept.

bench --> a process for each micro-batch: prepare, build, prove, train as ``train`` does --> Start, Trial
          (the first prepares the data for all of them, and proves the model)
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
from dataclasses import asdict, dataclass
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
from hf_clm.training.arguments import load_tokenizer_and_settle, training_arguments
from hf_clm.training.prepare import prepare
from hf_clm.training.proof import prove_model
from hf_clm.training.run import build_trainer
from hf_clm.training.summary import RunFacts, versions
from hf_clm.training.trainer import CLMTrainer

WINDOWS = 5  # that are counted, after one to warm up
WINDOW_SECONDS = 5.0  # a window that lasts longer ends with its step
PEAK_SECONDS, INPUT_SECONDS = 1.0, 0.5
NOISE = 1.03  # less than 3 % faster is not faster
WIDTH, INDENT = 100, " " * 10
MIB = 2**20
# Nothing is written outside the temporary folder, evaluated, or logged except by the bench itself.
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
KEPT = "kept      nothing: the weights are thrown away, the data were prepared in a temporary folder"
COLUMNS = (
    "rows at once",
    "rows a step",
    "s a step",
    "tokens/s",
    "targets/s",
    "per second",
    "MFU",
    "peak MiB",
)


@dataclass(frozen=True)
class Start:
    """The machine, the data, and the way to the first step.

    peak                FLOP/s of a large matrix product in the precision of the run
    fill                the share of the packed rows that is filled, None without packing
    rows_per_second     that are read and collated
    seconds             of the start, part by part
    """

    device: str
    peak: float
    examples: int
    rows: int
    tokens: int
    target_tokens: int
    fill: float | None
    rows_per_second: float
    seconds: dict[str, float]
    versions: dict[str, str]

    def to_lines(self) -> list[str]:
        """The machine, the data, their way into the model, and the seconds to the first step."""
        filled = "not packed" if self.fill is None else f"{self.fill:.1%} full"
        parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in self.seconds.items())
        start = f"start     {sum(self.seconds.values()):.1f} s: {parts}"
        return [
            f"device    {self.device}",
            f"peak      {to_flops(self.peak)}/s in a matrix product",
            f"data      {self.examples:,} examples, {self.tokens:,} tokens ({self.target_tokens:,} targets) "
            f"in {self.rows:,} rows, {filled}",
            f"input     prepare {self.tokens / self.seconds['prepare']:,.0f} tokens/s, "
            f"collate {self.rows_per_second:,.0f} rows/s",
            *textwrap.wrap(start, WIDTH, subsequent_indent=INDENT),
        ]


@dataclass(frozen=True)
class Trial:
    """The speed with a micro-batch of ``rows``, in the median of windows; ``failure``: why there is none.

    limit_bytes         memory that was free before, None where only the child ends if it runs out
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

    def is_faster(self, other: "Trial") -> bool:
        """By more than the noise."""
        return self.tokens_per_second > NOISE * other.tokens_per_second


@dataclass(frozen=True)
class Bench:
    """All that was measured. ``trials``: the recipe's own first; ``stopped``: why no more rows were tried."""

    recipe: str
    start: Start
    trials: list[Trial]
    stopped: str

    @property
    def fastest(self) -> Trial:
        """The recipe's own, unless another is faster by more than the noise."""
        best = max(self.trials, key=lambda trial: trial.tokens_per_second)
        return best if best.is_faster(self.trials[0]) else self.trials[0]

    def to_json(self) -> dict[str, Any]:
        """The same, in bytes, seconds and FLOP."""
        trials = [asdict(trial) | {"mfu": trial.flops_per_second / self.start.peak} for trial in self.trials]
        found = {"trials": trials, "fastest": self.fastest.rows, "stopped": self.stopped}
        return {"recipe": self.recipe, "start": asdict(self.start), **found}

    def to_lines(self) -> list[str]:
        """A table of the trials, and which micro-batch to take."""
        trials = sorted(self.trials, key=lambda trial: trial.rows)
        cells = [COLUMNS, *(self._cells(trial) for trial in trials if not trial.failure)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        table = ["  ".join(map(str.rjust, row, widths)) for row in cells]
        failed = [f"{trial.rows:>{widths[0]}}  {trial.failure}" for trial in trials if trial.failure]
        return ["", *table, *failed, "", f"fastest   {self._advice()}", f"          {self.stopped}", KEPT]

    def _advice(self) -> str:
        own, best = self.trials[0], self.fastest
        if best is own:
            return f"{own.rows} rows at once, as the recipe has it"
        rows = best.rows * best.accumulation
        changed = "" if rows == own.rows * own.accumulation else f"; a step of {rows} rows learns differently"
        gain = f" ({best.tokens_per_second / own.tokens_per_second:.2f}x)" if own.tokens_per_second else ""
        sizes = f"{best.rows} --gradient_accumulation_steps {best.accumulation}"
        return f"--per_device_train_batch_size {sizes}{gain}{changed}"

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
    """Measures the recipe's micro-batch, then more and fewer rows at once, each in a process of its own.

    Args:
        say: takes lines as they come.

    Raises UserError as ``train`` does.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError("bench measures one process", where="WORLD_SIZE", fix="start it without a launcher")
    with tempfile.TemporaryDirectory(prefix="hf-clm-bench-") as folder:
        quiet = to_quiet(recipe, folder, steps=steps)
        found = _run_apart(quiet, folder)
        if found is None:
            fix = "lower train.per_device_train_batch_size or data.max_length, or take a smaller model"
            raise EnvironmentFault("a step of the recipe does not fit", where="memory", fix=fix)
        start, first = found
        say("\n".join([*start.to_lines(), _tried(first)]))
        proved = quiet.model_copy(update={"doctor": Doctor(self_test=False, round_trip="off")})

        def attempt(rows: int) -> Trial:
            accumulation = max(1, first.rows * first.accumulation // rows)
            sizes = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulation}
            found = _run_apart(with_values(proved, sizes), folder)
            trial = found[1] if found else Trial(rows, accumulation, "out of memory")
            say(_tried(trial))
            return trial

        if recipe.data.tokens_per_batch:
            return Bench(recipe.file, start, [first], "data.tokens_per_batch decides the micro-batch")
        trials, stopped = find_fastest(attempt, first, most=start.rows)
        return Bench(recipe.file, start, trials, stopped)


def to_quiet(recipe: Recipe, folder: str, *, steps: int) -> Recipe:
    """The recipe for windows of ``steps`` together, with everything that it writes in ``folder``."""
    data = recipe.data.model_copy(update={"cache_dir": f"{folder}/prepared"})
    quiet = recipe.model_copy(update={"data": data, "samples": None, "early_stopping": None})
    steps = (WINDOWS + 1) * -(-steps // WINDOWS)
    return with_values(quiet, {**QUIET, "max_steps": steps, "output_dir": f"{folder}/run"})


def with_values(recipe: Recipe, values: dict[str, Any]) -> Recipe:
    """The recipe with other values in ``train``."""
    return recipe.model_copy(update={"train": {**recipe.train, **values}})


def find_fastest(attempt: Callable[[int], Trial], first: Trial, *, most: int) -> tuple[list[Trial], str]:
    """Doubles the rows at once while that is faster; where it never is, halves them while that is.

    Returns the trials, ``first`` first, and why no more rows were tried.
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
    """Reads a pickled recipe and the time of its start; writes the result, or a UserError, to ``argv[1]``."""
    recipe, started = pickle.load(sys.stdin.buffer)
    result: tuple[Start, Trial] | UserError
    try:
        result = measure(recipe, started=started)
    except UserError as error:
        result = error
    Path(sys.argv[1]).write_bytes(pickle.dumps(result))


def measure(recipe: Recipe, *, started: float) -> tuple[Start, Trial]:
    """Measures the way of ``train`` to its first step, then the speed. Raises UserError as ``train`` does.

    Args:
        started: time.time() when the process was started.
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
    windows = WindowCallback(arguments.max_steps // (WINDOWS + 1))
    trainer.add_callback(windows)
    trainer.train()
    ends["first step"] = windows.begun
    trial = windows.to_trial(arguments, limit_bytes=limit)
    dtype = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else model.dtype
    start = Start(
        device=RunFacts(recipe, arguments, model, splits, 0.0).device,
        peak=measure_peak(arguments.device, dtype, seconds=PEAK_SECONDS),
        examples=len(train.examples),
        rows=len(train.dataset),
        tokens=train.tokens,
        target_tokens=train.target_tokens,
        fill=train.dataset.fill if isinstance(train.dataset, PackedDataset) else None,
        rows_per_second=_input_rows_per_second(trainer),
        seconds=dict(zip(ends, np.diff([started, *ends.values()]).tolist(), strict=True)),
        versions=versions(),
    )
    return start, trial


class WindowCallback(TrainerCallback):
    """Logs at the end of each window of ``steps``; stops after one to warm up and WINDOWS to be counted."""

    def __init__(self, steps: int):
        self.steps = steps
        self.logs: list[dict[str, float]] = []
        self.begun = self.started = math.inf  # time.time() after the first step, and at a window's start
        self.first = 0

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        now = time.time()
        self.begun, self.started = min(self.begun, now), min(self.started, now)
        is_long = now - self.started > WINDOW_SECONDS
        control.should_log |= is_long or state.global_step - self.first >= self.steps

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if "tokens_per_second" in kwargs["logs"]:
            self.logs.append({"step": state.global_step, "flops": state.total_flos, **kwargs["logs"]})
            self.started, self.first = time.time(), state.global_step
            control.should_training_stop |= len(self.logs) > WINDOWS

    def to_trial(self, arguments: TrainingArguments, *, limit_bytes: int | None) -> Trial:
        """The window of median speed."""
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
            limit_bytes=limit_bytes,
        )


def to_flops(count: float) -> str:
    """``4.1e11`` -> ``"410 GFLOP"``, ``1.5e9`` -> ``"1.5 GFLOP"``, ``9.9e14`` -> ``"990 TFLOP"``."""
    size, name = (1e12, "TFLOP") if count >= 1e12 else (1e9, "GFLOP")
    return f"{count / size:.3g} {name}"


def _run_apart(recipe: Recipe, folder: str) -> tuple[Start, Trial] | None:
    """What a process of its own measures; None where it ran out of memory. Raises the UserError it raised."""
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
    if done.returncode == KILLED or any(said in errors for said in OUT_OF_MEMORY):
        return None
    raise RuntimeError(f"a child of the bench failed with {done.returncode}:\n{errors}")


def _tried(trial: Trial) -> str:
    speed = f"{trial.tokens_per_second:,.0f} tokens/s"
    return f"tried     {trial.rows} rows at once: {trial.failure or speed}"


def _why_not(trial: Trial, best: Trial, *, most: int) -> str:
    """Why no more rows at once are tried after a trial, or an empty string."""
    if trial.failure:
        return f"{trial.rows} rows at once: {trial.failure}"
    if trial is not best and not trial.is_faster(best):
        return f"{trial.rows} rows at once are not faster than {best.rows}"
    if 2 * trial.rows > most:
        return f"the data are {most} rows"
    if trial.limit_bytes is not None and 2 * trial.peak_bytes > trial.limit_bytes:
        return f"{2 * trial.rows} rows at once might not fit into the memory"
    return ""


def _input_rows_per_second(trainer: CLMTrainer) -> float:
    """Rows a second that one process reads and collates, in batches of random rows."""
    dataset: Any = trainer.train_dataset
    size, generator, count = trainer.args.train_batch_size, np.random.default_rng(0), 0
    started = time.perf_counter()
    while (elapsed := time.perf_counter() - started) < INPUT_SECONDS:
        trainer.data_collator([dataset[int(row)] for row in generator.integers(len(dataset), size=size)])
        count += size
    return count / elapsed
