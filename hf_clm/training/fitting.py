"""Out of memory: restarts the run with half the rows in a micro-batch and twice as many micro-batches.

The global batch size does not change, so the run is the same as with a smaller
``per_device_train_batch_size`` from the beginning. With several processes, none can restart alone while the
others wait in a collective operation. They try the largest micro-batch before the first step instead, and
restart together.
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

from hf_clm.data.batch.mixing import AnyDataset
from hf_clm.errors import EnvironmentFault
from hf_clm.machine import spreads_with
from hf_clm.recipe.recipe import Recipe, training_values
from hf_clm.training.callbacks import write_line
from hf_clm.training.trainer import CLMTrainer

FIRST_STEPS = 100  # after a start; running out of memory later has another cause than the batch size
TRAIN, EVAL = "per_device_train_batch_size", "per_device_eval_batch_size"
# Parts of the messages of plain RuntimeErrors that allocators raise.
ALLOCATOR_MESSAGES = ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA out of memory")


class DoesNotFit(RuntimeError):
    """Raised on all processes if a batch does not fit and the run can restart with a smaller one.

    size: the field of the arguments with the batch that was too large.
    """

    def __init__(self, size: str, step: int, arguments: TrainingArguments):
        super().__init__(f"out of memory at step {step}: {size}")
        self.size, self.step, self.arguments = size, step, arguments


def to_smaller(recipe: Recipe, arguments: TrainingArguments, error: RuntimeError) -> Recipe:
    """Returns the recipe to restart with after an error, and prints what changes.

    Raises the error itself if it is not about memory, and EnvironmentFault if no batch can be halved.
    """
    if isinstance(error, DoesNotFit):
        recipe, line = halved(recipe, error)
        if arguments.process_index == 0:
            write_line(line)
        return recipe
    if not is_out_of_memory(error):
        raise error
    what, fix = "out of memory before the first step", "use a smaller model, or set model.dtype to bfloat16"
    raise EnvironmentFault(what, where=str(arguments.device), fix=fix) from error


def free_memory() -> None:
    """Frees the memory of the model before a restart."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def halved(recipe: Recipe, error: DoesNotFit) -> tuple[Recipe, str]:
    """Returns the recipe with half the batch size and the same global batch, and a line that describes it.

    Raises EnvironmentFault if the batch size cannot be halved.
    """
    arguments = error.arguments
    size = int(getattr(arguments, error.size))
    where, at = f"train.{error.size}", f"out of memory at step {error.step}"
    if size % 2:
        fix = "lower data.max_length, set train.activation_checkpointing, or use lora or a smaller model"
        if recipe.data.tokens_per_batch and recipe.resolved_packing == "none":
            where, size, fix = "data.tokens_per_batch", recipe.data.tokens_per_batch, f"lower it, {fix}"
        elif size > 1:
            fix = "set an even number, which can be halved without changing the global batch"
        raise EnvironmentFault(f"{at}, and it cannot be halved", where=where, got=str(size), fix=fix)
    resumes = str(recipe.train.get("resume_from_checkpoint") or "auto")
    if Path(resumes).resolve().parent != Path(str(arguments.output_dir)).resolve() and Path(resumes).is_dir():
        fix = f"set {error.size} to {size // 2}, with the same global batch, and another train.output_dir"
        what = f"{at}, and a run that resumes a checkpoint of another folder does not restart automatically"
        raise EnvironmentFault(what, where=where, got=str(size), fix=fix)
    changes: dict[str, Any] = {TRAIN: arguments.per_device_train_batch_size, error.size: size // 2}
    changes["gradient_accumulation_steps"] = arguments.gradient_accumulation_steps
    if resumes.lower() in ("never", "false"):
        changes["resume_from_checkpoint"] = "auto"  # resumes what this run has saved before the restart
    line = f"restart   {at}: {error.size} {size} -> {size // 2}"
    if error.size == TRAIN:
        changes["gradient_accumulation_steps"] = 2 * arguments.gradient_accumulation_steps
        micro_steps = changes["gradient_accumulation_steps"]
        line += f", gradient_accumulation_steps {micro_steps} (same global batch)"
    return recipe.model_copy(update={"train": {**recipe.train, **changes}, "overwrite": False}), line


@contextmanager
def fitting(trainer: CLMTrainer, *, first_step: int) -> Iterator[None]:
    """Converts out-of-memory errors during training to DoesNotFit if the run can restart.

    ``first_step``: the step of the resumed checkpoint, or 0. Raises EnvironmentFault with several processes,
    and after the first steps.
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
            raise DoesNotFit(size, step, trainer.args) from error
        fix = f"lower train.{size}, raise gradient_accumulation_steps to match, and resume"
        raise EnvironmentFault(f"out of memory at step {step}", where=f"train.{size}", fix=fix) from error


def is_to_be_tried(recipe: Recipe, arguments: TrainingArguments) -> bool:
    """Returns whether to try the largest micro-batch first: if the recipe sets it, or on several GPUs."""
    if recipe.data.streaming or spreads_with(training_values(recipe)):
        return False  # the largest micro-batch is not known, or the model is sharded
    # The model is compiled only when training starts, and takes less memory then.
    are_gpus = arguments.world_size > 1 and arguments.device.type == "cuda" and not arguments.torch_compile
    return bool(recipe.train.get("auto_find_batch_size")) or are_gpus


def try_largest(trainer: CLMTrainer, rows: AnyDataset) -> None:
    """Computes the gradients of the micro-batch with the longest rows, without any lasting effect.

    On a GPU, first allocates as much memory as the optimizer and DDP will use. Raises DoesNotFit on all
    processes if one of them runs out of memory.
    """
    model: Any = trainer.model
    device = trainer.args.device
    lengths = getattr(rows, "lengths", None)  # None for packed rows, which have about the same length
    numbers = np.arange(len(rows)) if lengths is None else np.argsort(-np.asarray(lengths), kind="stable")
    longest: Any = [rows[int(number)] for number in numbers[: trainer.args.train_batch_size]]
    batch: Any = trainer.data_collator(longest)
    batch = {key: part.to(device) if torch.is_tensor(part) else part for key, part in batch.items()}
    was_training, fits = model.training, True
    if trainer.args.activation_checkpointing:  # which the Trainer enables only in train()
        options: Any = trainer.args.activation_checkpointing_kwargs or {}
        layers = {key: options[key] for key in ("every_n_layers", "offload") if key in options}
        torch_options = {key: value for key, value in options.items() if key not in layers} or None
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=torch_options, **layers)
    with trainer.aside():
        model.train()
        try:
            reserved = _reserve_for_training(model, is_one_of_many=trainer.args.world_size > 1)
            with trainer.accelerator.autocast():  # the Trainer wraps the model only in train()
                loss = trainer.measure_loss(model, batch, items=None)[0]
            loss.backward()
            del reserved, loss
        except RuntimeError as error:
            fits = False
            if not is_out_of_memory(error):
                raise
    model.zero_grad(set_to_none=True)
    model.train(was_training)
    if not all(gather_object([fits])):
        raise DoesNotFit(TRAIN, 1, trainer.args)


def is_out_of_memory(error: Exception) -> bool:
    """Returns whether the error comes from an allocator, of any device."""
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in ALLOCATOR_MESSAGES)


def _reserve_for_training(model: torch.nn.Module, *, is_one_of_many: bool) -> list[torch.Tensor]:
    """Allocates GPU memory of the size of Adam's two averages and DDP's gradient buckets."""
    weights = [weight for weight in model.parameters() if weight.requires_grad and weight.is_cuda]
    return [torch.empty_like(weight) for weight in weights for _ in range(3 if is_one_of_many else 2)]
