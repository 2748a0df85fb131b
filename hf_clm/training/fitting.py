"""Out of memory: the same run again, with half the rows in a micro-batch and twice as many micro-batches.

The global batch stays, so that the run is the one that a smaller ``per_device_train_batch_size`` would have
been from the beginning. A process of several cannot start again alone: the others wait for it inside of a
library. There the largest micro-batch is tried before the first step, and all processes decide together.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from transformers import TrainingArguments

from hf_clm.data.split import AnyDataset
from hf_clm.errors import EnvironmentFault
from hf_clm.machine import spreads_with
from hf_clm.recipe.recipe import Recipe, training_values
from hf_clm.training.callbacks import write_line
from hf_clm.training.trainer import CLMTrainer

FIRST_STEPS = 100  # of a session; what runs out of memory later has another reason than its first batches
TRAIN, EVAL = "per_device_train_batch_size", "per_device_eval_batch_size"
# What allocators say in a plain RuntimeError.
WORDS = ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA out of memory")


class DoesNotFit(RuntimeError):
    """All processes raise it, of a run that may start again with less in a batch."""

    def __init__(self, size: str, step: int):
        super().__init__(f"out of memory at step {step}: {size}")
        self.size, self.step = size, step  # the field of the batch that was too large


def to_smaller(recipe: Recipe, arguments: TrainingArguments, error: RuntimeError) -> Recipe:
    """The recipe to start again with after an error, and says so.

    Raises the error itself if it is no lack of memory; EnvironmentFault where a batch cannot be halved, and
    for other lacks of memory.
    """
    if isinstance(error, DoesNotFit):
        recipe, line = halved(recipe, arguments, error)
        if arguments.process_index == 0:
            write_line(line)
        return recipe
    if not is_out_of_memory(error):
        raise error
    what, fix = "out of memory before the first step", "a smaller model, or model.dtype: bfloat16"
    raise EnvironmentFault(what, where=str(arguments.device), fix=fix) from error


def free_memory() -> None:
    """Frees the model of a run that starts again."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def halved(recipe: Recipe, arguments: TrainingArguments, error: DoesNotFit) -> tuple[Recipe, str]:
    """The recipe with half of the batch that did not fit and the same global batch, and a line that says so.

    Raises EnvironmentFault where there is no half.
    """
    size = int(getattr(arguments, error.size))
    where, at = f"train.{error.size}", f"out of memory at step {error.step}"
    if size % 2:
        fix = "a shorter data.max_length, train.activation_checkpointing, lora, or a smaller model"
        if recipe.data.tokens_per_batch:
            where, size, fix = "data.tokens_per_batch", recipe.data.tokens_per_batch, f"lower it, or {fix}"
        elif size > 1:
            fix = "an even number, which can be halved without changing the global batch"
        raise EnvironmentFault(f"{at}, and it cannot be halved", where=where, got=str(size), fix=fix)
    resumes = str(recipe.train.get("resume_from_checkpoint") or "auto")
    if Path(resumes).resolve().parent != Path(str(arguments.output_dir)).resolve() and Path(resumes).is_dir():
        fix = f"give {error.size} {size // 2}, with the same global batch, and another train.output_dir"
        what = f"{at}, and a run from another folder's checkpoint does not start again by itself"
        raise EnvironmentFault(what, where=where, got=str(size), fix=fix)
    changes: dict[str, Any] = {error.size: size // 2}
    if resumes.lower() in ("never", "false"):
        changes["resume_from_checkpoint"] = "auto"  # what the first start has saved is its own
    line = f"restart   {at}: {error.size} {size // 2} instead of {size}"
    if error.size == TRAIN:
        changes["gradient_accumulation_steps"] = 2 * arguments.gradient_accumulation_steps
        line += (
            f", gradient_accumulation_steps {changes['gradient_accumulation_steps']}: the same global batch"
        )
    return recipe.model_copy(update={"train": {**recipe.train, **changes}, "overwrite": False}), line


@contextmanager
def fitting(trainer: CLMTrainer, *, first_step: int) -> Iterator[None]:
    """Turns a lack of memory inside of training into DoesNotFit where the run can start again.

    ``first_step``: the step of the checkpoint that is resumed, or 0. Raises EnvironmentFault where other
    processes would wait, and after the first steps.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        step = trainer.state.global_step + 1
        model: Any = trainer.model
        size = TRAIN if model.training else EVAL
        if trainer.args.world_size == 1 and step - first_step <= FIRST_STEPS:
            raise DoesNotFit(size, step) from error
        fix = (
            f"a smaller train.{size}, with as many more gradient_accumulation_steps; the same command resumes"
        )
        raise EnvironmentFault(f"out of memory at step {step}", where=f"train.{size}", fix=fix) from error


def is_to_be_tried(recipe: Recipe, arguments: TrainingArguments) -> bool:
    """Whether the largest micro-batch is tried before the first step: as asked for, or by several GPUs."""
    if recipe.data.streaming or spreads_with(training_values(recipe)):
        return False  # the largest is not known, or no process has the model to itself
    # a compiled model takes less than this one, which is not compiled yet
    are_gpus = arguments.world_size > 1 and arguments.device.type == "cuda" and not arguments.torch_compile
    return bool(recipe.train.get("auto_find_batch_size")) or are_gpus


def try_largest(trainer: CLMTrainer, rows: AnyDataset) -> None:
    """Computes the gradients of the micro-batch with the longest rows, and leaves everything as it was.

    On a GPU beside as much memory as the optimizer and, of several processes, the reduction of the gradients
    will take. Raises DoesNotFit, on all processes, where one has too little.
    """
    model: Any = trainer.model
    device = trainer.args.device
    lengths = getattr(rows, "lengths", None)  # packed rows are all about as long
    numbers = np.arange(len(rows)) if lengths is None else np.argsort(-np.asarray(lengths), kind="stable")
    longest: Any = [rows[int(number)] for number in numbers[: trainer.args.train_batch_size]]
    batch: Any = trainer.data_collator(longest)
    batch = {key: part.to(device) if torch.is_tensor(part) else part for key, part in batch.items()}
    was_training, fits = model.training, True
    if trainer.args.activation_checkpointing:  # the Trainer does it as late as this
        options: Any = trainer.args.activation_checkpointing_kwargs or {}
        own = {key: options[key] for key in ("every_n_layers", "offload") if key in options}
        of_torch = {key: value for key, value in options.items() if key not in own} or None
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=of_torch, **own)
    with trainer.aside():
        model.train()
        try:
            kept = _what_training_keeps(model, is_one_of_many=trainer.args.world_size > 1)
            with trainer.accelerator.autocast():  # the Trainer wraps the model only when it trains
                loss = trainer.measure_loss(model, batch, items=None)[0]
            loss.backward()
            del kept, loss
        except RuntimeError as error:
            fits = False
            if not is_out_of_memory(error):
                raise
    model.zero_grad(set_to_none=True)
    model.train(was_training)
    if not all(gather_object([fits])):
        raise DoesNotFit(TRAIN, 1)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocator has refused, of whatever device."""
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in WORDS)


def _what_training_keeps(model: torch.nn.Module, *, is_one_of_many: bool) -> list[torch.Tensor]:
    """Memory of a GPU for two averages of Adam, and the buckets of the gradients that DDP reduces."""
    weights = [weight for weight in model.parameters() if weight.requires_grad and weight.is_cuda]
    return [torch.empty_like(weight) for weight in weights for _ in range(3 if is_one_of_many else 2)]
