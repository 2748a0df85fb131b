"""Chooses the micro-batch of packed rows, and whether to compile the model, for the device.

the recipe             8 rows x 4 micro-batches in a step
the device has room   16 rows x 2 micro-batches in a step: the same rows, in fewer and larger kernels

Neither choice changes what is trained, apart from rounding. A resumed run keeps those of its first start.
"""

import importlib.util
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import gather_object

from hf_clm.doctor.facts import Facts, estimate, model_sizes, to_micro_step
from hf_clm.machine import measure_peak, nominal_peak, spreads_with
from hf_clm.model.attention import NAME as PACKED
from hf_clm.recipe.recipe import Recipe, training_values
from hf_clm.training.arguments import training_arguments

ROWS, EVAL_ROWS = "per_device_train_batch_size", "per_device_eval_batch_size"
MICRO_BATCHES, COMPILE = "gradient_accumulation_steps", "torch_compile"
MOST_TOKENS = 2**16  # of a micro-batch: with more, a GPU is not faster
MEMORY_SHARE = 0.75  # of the free memory: the estimate is rough
COMPILED_SECONDS = 900  # a run that is estimated to take longer gains more time than compiling costs
USUAL_MFU = 0.4


def settle_batch(
    facts: Facts, *, kept: Mapping[str, Any], most_rows: int | None = None
) -> tuple[Facts, list[str]]:
    """Returns the facts of the run with both choices, and a line that explains each.

    Args:
        kept: the section ``train`` of the checkpoint that is resumed, or {}.
        most_rows: the largest micro-batch that may still fit, after a larger one did not.
    """
    batch, batch_line = choose_batch(facts, kept=kept, most_rows=most_rows)
    compiled, compile_line = choose_compile(facts, kept=kept)
    if batch or compiled:
        train = {**facts.recipe.train, **batch, **compiled}
        recipe = facts.recipe.model_copy(update={"train": train})
        facts = replace(facts, recipe=recipe, arguments=training_arguments(recipe))
        facts = replace(facts, estimate=estimate(facts, to_micro_step(facts)))
    return facts, [line for line in (batch_line, compile_line) if line]


def choose_batch(
    facts: Facts, *, kept: Mapping[str, Any], most_rows: int | None
) -> tuple[dict[str, int], str]:
    """Returns the fields of ``train`` that set the micro-batch of packed rows, and a line that explains them.

    The micro-batch is limited by ``data.tokens_per_batch`` or, on a GPU, by the free memory. It divides the
    rows that each process has in a step, so that the global batch is that of the recipe. Returns no fields
    if the recipe's own micro-batch is used.
    """
    recipe, arguments = facts.recipe, facts.arguments
    budget, on_gpu = recipe.data.tokens_per_batch, arguments.device.type == "cuda"
    is_packed = recipe.resolved_packing != "none" and recipe.model.attention == PACKED
    if not is_packed or not (budget or (on_gpu and facts.estimate)):
        return {}, ""
    given = arguments.train_batch_size
    in_step = given * int(arguments.gradient_accumulation_steps)
    if not budget and kept.get(ROWS, 0) * kept.get(MICRO_BATCHES, 0) == in_step:
        rows = int(kept[ROWS])
    else:
        limit = min(most_rows or in_step, (budget or MOST_TOKENS) // recipe.data.max_length)
        rows = largest_micro_batch(facts, in_step, limit=limit)
    if rows == given:
        return {}, ""
    fields = {ROWS: rows, MICRO_BATCHES: in_step // rows}
    if EVAL_ROWS not in recipe.train:
        fields[EVAL_ROWS] = rows
    room = f"{facts.machine.free_memory / 2**30:,.0f} GiB are free; data.tokens_per_batch sets another size"
    why = f"data.tokens_per_batch is {budget:,}" if budget else room
    sizes = f"{rows} rows x {in_step // rows} instead of {given} x {in_step // given}"
    return fields, f"batch     micro-batches of {sizes}: {why}"


def largest_micro_batch(facts: Facts, in_step: int, *, limit: int) -> int:
    """Returns the largest divisor of ``in_step``, up to ``limit``, for which all processes have memory."""
    sizes = [rows for rows in range(1, max(1, limit) + 1) if in_step % rows == 0]
    if facts.arguments.device.type == "cuda" and facts.estimate is not None:
        free = MEMORY_SHARE * facts.machine.free_memory
        sizes = [rows for rows in sizes if rows == 1 or _bytes(facts, rows, in_step=in_step) <= free]
    return min(gather_object([max(sizes)]))


def choose_compile(facts: Facts, *, kept: Mapping[str, Any]) -> tuple[dict[str, bool], str]:
    """Returns the field of ``train`` that compiles the model, and a line that explains it.

    A GPU compiles by default if the run is long enough. Returns no field if the recipe's own value is used.
    """
    recipe, arguments = facts.recipe, facts.arguments
    if arguments.device.type != "cuda" or COMPILE in recipe.train or not can_compile(recipe):
        return {}, ""
    seconds = estimate_seconds(facts)
    if not kept.get(COMPILE, seconds > COMPILED_SECONDS):
        return {}, ""
    return {COMPILE: True}, (
        f"compile   takes minutes, and makes about {seconds / 60:,.0f} minutes of training shorter; "
        "--torch_compile false turns it off"
    )


def can_compile(recipe: Recipe) -> bool:
    """Returns whether all batches of a run can have one shape, and its model one graph."""
    is_quantized = recipe.lora is not None and recipe.lora.quantize is not None
    has_shapes = recipe.model.attention == PACKED and not recipe.data.streaming
    is_sharded = bool(spreads_with(training_values(recipe)))
    return has_shapes and not is_quantized and not is_sharded and bool(importlib.util.find_spec("triton"))


def estimate_seconds(facts: Facts) -> float:
    """Estimates the duration of a run at the usual share of the device's peak; 0 for an unknown model."""
    sizes = model_sizes(facts)
    if sizes is None:
        return 0.0
    device, dataset = facts.arguments.device, facts.train.dataset
    tokens = facts.train.tokens * facts.steps * facts.rows_per_step / max(1, len(dataset))
    peak = nominal_peak(device) or measure_peak(device, torch.bfloat16)
    return 6 * sizes.parameters * tokens / (USUAL_MFU * peak * facts.arguments.world_size)


def _bytes(facts: Facts, rows: int, *, in_step: int) -> int:
    """Estimates the memory of training with micro-batches of ``rows`` full rows."""
    tokens = rows * facts.recipe.data.max_length
    step = replace(to_micro_step(facts), tokens=tokens, eval_tokens=tokens, accumulates=rows < in_step)
    expected = estimate(facts, step)
    assert expected is not None
    return expected.total
