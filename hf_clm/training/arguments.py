"""Builds the TrainingArguments of a recipe, and derives rows per step, steps and the stream from them."""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedTokenizerFast,
    TrainingArguments,
)

from hf_clm.data.prepared.sets import load_early
from hf_clm.data.prepared.stream import StreamedRows, StreamPlan
from hf_clm.data.prepared.stream_blocks import counted_by, read_stream, shares_of, stream_identity
from hf_clm.data.read.plain_template import settle_render
from hf_clm.errors import RecipeError
from hf_clm.machine import check_spreading, has_bf16, is_one_of_many, spreads_with
from hf_clm.model.build import build_tokenizer_aside, weights_dtype
from hf_clm.recipe.recipe import Recipe, training_values
from hf_clm.training.optimizer import check_optimization

WORKERS = 2  # processes that make the batches of a GPU


def check_launch(recipe: Recipe) -> None:
    """Calls check_spreading before the process group is created and anything is loaded.

    Raises RecipeError for Muon with DeepSpeed.
    """
    values = training_values(recipe)
    check_spreading(
        values,
        on_cpu=_is_on_cpu(values),
        generates=recipe.samples is not None or recipe.evaluation.generate > 0,
    )
    if recipe.optimizer and recipe.optimizer.name == "muon" and spreads_with(values) == "DeepSpeed":
        what = "needs complete matrices, and DeepSpeed gives an optimizer flat pieces of them"
        raise RecipeError(what, where="optimizer.name", got="muon", fix="set it to adamw, or use DDP")


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """Returns the TrainingArguments of the recipe, with bf16 autocast by default if the device supports it.

    Raises RecipeError for values that TrainingArguments or check_optimization reject.
    """
    values = training_values(recipe)
    on_gpu = torch.cuda.is_available() and not values.get("use_cpu")
    on_cpu = _is_on_cpu(values)
    device = torch.device("cuda" if on_gpu else "cpu")
    if (on_gpu or on_cpu) and has_bf16(device) and not values.get("fp16"):
        values.setdefault("bf16", True)
    if on_cpu and (values.get("bf16") or is_one_of_many()):
        values["use_cpu"] = True  # without it, bf16 requires a GPU, and no process group is created
    if values.pop("auto_find_batch_size", False) and (spread := spreads_with(values)):
        what = f"is not supported with {spread}, which shards the model"
        raise RecipeError(what, where="train.auto_find_batch_size", fix="remove it")
    values.setdefault("eval_on_start", True)  # to compare the loss before and after training
    values.setdefault("dataloader_pin_memory", on_gpu)  # avoids a warning on CPUs
    if on_gpu:  # batches are made, and sent to the GPU, while it computes
        values["accelerator_config"] = {"non_blocking": True, **(values.get("accelerator_config") or {})}
        if not recipe.data.streaming:  # in which each worker reads a part of the data
            values.setdefault("dataloader_num_workers", WORKERS)
    try:
        arguments = TrainingArguments(**values)
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError(" ".join(str(error).split()), where="train") from error
    arguments._n_gpu = min(arguments.n_gpu, 1)  # DataParallel cannot split a packed row
    check_optimization(arguments, recipe.train)
    return arguments


def rows_per_step(arguments: TrainingArguments) -> int:
    """Returns the global batch size: the rows of all processes in one optimizer step."""
    return arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size


def count_steps(arguments: TrainingArguments, rows: int) -> int:
    """Returns the number of optimizer steps that the Trainer makes with this many rows, possibly 0."""
    rounded = math.floor if arguments.dataloader_drop_last else math.ceil
    batches = rounded(rows / arguments.world_size / arguments.train_batch_size)
    if batches == 0 or arguments.max_steps > 0:
        return arguments.max_steps if batches else 0
    per_epoch = math.ceil(batches / arguments.gradient_accumulation_steps)
    return math.ceil(arguments.num_train_epochs * per_epoch)


def resolve(recipe: Recipe, arguments: TrainingArguments) -> Recipe:
    """Returns the recipe with the values that the run uses for Trainer defaults, precision and packing."""
    values = {**training_values(recipe), "bf16": arguments.bf16}
    data = recipe.data.model_copy(update={"packing": recipe.resolved_packing})
    model = recipe.model.model_copy(update={"dtype": weights_dtype(recipe, arguments)})
    decided = {"model": model, "train": values, "data": data}
    return recipe.model_copy(update={**decided, "overwrite": False, "resume_override": []})


def build_stream(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    *,
    arguments: TrainingArguments,
    checkpoint: Path | None = None,
) -> StreamedRows | None:
    """Returns the rows of a streaming run, with one shard for each worker, or None without streaming.

    Raises RecipeError for a checkpoint of a run that read other data, or read it in another order.
    """
    if not recipe.data.streaming:
        return None
    shards = arguments.world_size * max(1, arguments.dataloader_num_workers)
    rows = rows_per_step(arguments) * arguments.max_steps
    seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
    stream = StreamedRows(
        partial(read_stream, recipe=recipe, tokenizer=tokenizer),
        StreamPlan(rows, arguments.train_batch_size, shards, shares_of(recipe.data), counted_by(recipe.data)),
        seed=seed if arguments.train_sampling_strategy == "random" else None,
        max_dropped=recipe.data.max_dropped,
        identity=stream_identity(recipe),
    )
    if checkpoint:
        stream.read_state(checkpoint)
    return stream


def load_tokenizer_and_settle(
    recipe: Recipe, arguments: TrainingArguments
) -> tuple[PreTrainedTokenizerFast, Recipe]:
    """Returns the tokenizer of a recipe, and the recipe with ``data.render`` settled, outside of a run.

    If the recipe trains a tokenizer, trains it again without writing it to the output folder.
    """
    tokenizer = build_tokenizer_aside(recipe, load_early(recipe, arguments.seed), arguments=arguments)
    return tokenizer, settle_render(recipe, tokenizer)


def _is_on_cpu(values: Mapping[str, Any]) -> bool:
    return bool(values.get("use_cpu")) or not torch.accelerator.is_available()
