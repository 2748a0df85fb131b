"""``hf-clm bench``: what a recipe and its data make of this machine. Nothing that it trains is kept."""

import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_clm.bench.results import Bench, Start, Task, Trial, start_lines
from hf_clm.errors import EnvironmentFault, RecipeError, UserError
from hf_clm.recipe.recipe import Recipe

# Nothing is written beside the temporary folder, evaluated, or logged but by the bench itself.
QUIET = {
    "eval_strategy": "no",
    "eval_on_start": False,
    "load_best_model_at_end": False,
    "save_strategy": "no",
    "logging_strategy": "no",
    "report_to": "none",
    "push_to_hub": False,
    "resume_from_checkpoint": None,
    "max_steps": 1,
}
CHILD = "from hf_clm.bench.measure import run_child; run_child()"
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "MemoryError")
KILLED = -9
FEWER = "lower train.per_device_train_batch_size or data.max_length, or take a smaller model"


def bench(recipe: Recipe, *, steps: int, say: Callable[[str], Any]) -> Bench:
    """Measures the start and the speed, the latter with more and with fewer rows at once.

    Every measurement is a process of its own, with a temporary output folder. ``say``: takes lines as they
    come. Raises UserError as ``train`` does.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError("bench measures one process", where="WORLD_SIZE", fix="start it without a launcher")
    with tempfile.TemporaryDirectory(prefix="hf-clm-bench-") as folder:
        quiet = _to_quiet(recipe, folder)
        start = _run(Task(quiet, 0, time.time()), folder)
        if start is None:
            raise EnvironmentFault("a step of the recipe does not fit", where="memory", fix=FEWER)
        assert isinstance(start, Start)
        say("\n".join(start_lines(start)))

        def attempt(rows: int) -> Trial:
            accumulation = max(1, start.micro_batch * start.accumulation // rows)
            sizes = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulation}
            task = Task(with_values(quiet, sizes), steps, time.time())
            trial = _run(task, folder) or Trial(rows, accumulation, "out of memory")
            assert isinstance(trial, Trial)
            speed = f"{trial.tokens_per_second:,.0f} tokens/s"
            say(f"tried     {rows} rows at once: {trial.failure or speed}")
            return trial

        if recipe.data.tokens_per_batch:
            stopped = "data.tokens_per_batch decides the micro-batch"
            return Bench(recipe.file, start, [attempt(start.micro_batch)], stopped)
        trials, stopped = find_fastest(attempt, start.micro_batch, most=start.rows)
        if all(trial.failure for trial in trials):
            raise EnvironmentFault("not even one row at once fits", where="memory", fix=FEWER)
        return Bench(recipe.file, start, trials, stopped)


def find_fastest(attempt: Callable[[int], Trial], rows: int, *, most: int) -> tuple[list[Trial], str]:
    """Doubles the rows at once while that is faster; where it never is, halves them while that is.

    Returns the trials, the first with ``rows``, and why no more rows were tried.
    """
    first = attempt(rows)
    trials, stopped = [first], _why_not(first, first, most=most)
    while not stopped:
        best = trials[-1]
        trials.append(attempt(2 * best.rows))
        stopped = _why_not(trials[-1], best, most=most)
    if not any(trial.is_faster(first) for trial in trials):
        best = first
        while best.rows > 1:
            trials.append(attempt(best.rows // 2))
            if not (best.failure or trials[-1].is_faster(best)):
                break
            best = trials[-1]
    return trials, stopped


def with_values(recipe: Recipe, values: dict[str, Any]) -> Recipe:
    """The recipe with other values in ``train``."""
    return recipe.model_copy(update={"train": {**recipe.train, **values}})


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


def _to_quiet(recipe: Recipe, folder: str) -> Recipe:
    data = recipe.data.model_copy(update={"cache_dir": f"{folder}/prepared"})
    quiet = recipe.model_copy(update={"data": data, "samples": None, "early_stopping": None})
    return with_values(quiet, {**QUIET, "output_dir": f"{folder}/run"})


def _run(task: Task, folder: str) -> Start | Trial | None:
    """The result of a child; None where it ran out of memory. Raises the UserError that it raised."""
    path = Path(folder, "result.pickle")
    path.unlink(missing_ok=True)
    words = [sys.executable, "-c", CHILD, str(path)]
    done = subprocess.run(words, input=pickle.dumps(task), capture_output=True, check=False)
    if path.is_file():
        result = pickle.loads(path.read_bytes())
        if isinstance(result, UserError):
            raise result
        return result
    errors = done.stderr.decode(errors="replace")
    if done.returncode == KILLED or any(said in errors for said in OUT_OF_MEMORY):
        return None
    raise RuntimeError(f"a child of the bench failed with {done.returncode}:\n{errors}")
