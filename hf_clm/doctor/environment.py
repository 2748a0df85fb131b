"""Checks of the machine: memory, disk, network, threads, precision, GPUs."""

import math

from hf_clm.doctor.facts import Check, Facts, Ok, Problem
from hf_clm.errors import EnvironmentFault, RecipeError

ESTIMATE_ERROR = 1.15  # the estimate is good to 15 %: over this much of what is free it cannot fit
GIB = 2**30


def check_memory(facts: Facts) -> Check | None:
    """Weights, gradients, optimizer, activations and logits against what is free on the device."""
    estimate, model = facts.estimate, facts.model
    if estimate is None:
        return None
    is_measured = facts.measured is not None
    peak = max(facts.measured if facts.measured is not None else estimate.micro_step, estimate.evaluation)
    needed = estimate.weights + estimate.optimizer + peak
    is_loaded = model is not None and model.device.type == facts.arguments.device.type
    free = facts.machine.free_memory + (estimate.weights if is_loaded else 0)
    what = f"{_gib(needed)} needed, {_gib(free)} free"
    if needed > (free if is_measured else free / ESTIMATE_ERROR):
        is_sure = is_measured or (needed > free * ESTIMATE_ERROR and not estimate.is_rough)
        fix = (
            "lower train.per_device_train_batch_size (and _eval_), data.max_length, "
            "or set train.activation_checkpointing: true"
        )
        return Problem(what, "memory", fix, EnvironmentFault, is_warning=not is_sure)
    return Ok(what)


def check_disk(facts: Facts) -> Check | None:
    """The checkpoints that lie there at one time, the newest beside those kept, and the final model."""
    estimate, arguments = facts.estimate, facts.arguments
    if estimate is None:
        return None
    saves = _saves(facts)
    kept = min(saves, arguments.save_total_limit + 1 if arguments.save_total_limit else saves)
    checkpoint = estimate.weights + (0 if arguments.save_only_model else estimate.optimizer)
    needed, free = checkpoint * kept + estimate.weights, facts.machine.free_disk
    what = f"{kept} checkpoints and the model take {_gib(needed)}, {_gib(free)} are free"
    if needed > free:
        fix = "lower train.save_total_limit, set train.save_only_model, or free some space"
        return Problem(what, str(arguments.output_dir), fix, EnvironmentFault)
    return Ok(what)


def check_network(facts: Facts) -> Check:
    """What the run needs of the Hub."""
    origin, is_offline = facts.machine.origin, facts.machine.is_offline
    if facts.arguments.push_to_hub and is_offline:
        what = "the model is to be pushed to the Hub, and HF_HUB_OFFLINE is set"
        return Problem(what, "train.push_to_hub", "unset HF_HUB_OFFLINE", EnvironmentFault)
    if origin == "Hub" and is_offline:
        what = f"{facts.recipe.model.name_or_path!r} is not in the cache, and HF_HUB_OFFLINE is set"
        return Problem(what, "model.name_or_path", "unset HF_HUB_OFFLINE", EnvironmentFault)
    from_where = {"scratch": "no model is loaded", "folder": "the model is a folder here"}
    words = from_where.get(origin, f"the model comes from the {origin}")
    return Ok(words + (", HF_HUB_OFFLINE is set" if is_offline else ""))


def check_threads(facts: Facts) -> Check:
    """More threads than cores slow each other down; fewer leave cores idle where the CPU computes."""
    machine = facts.machine
    if machine.threads is None:
        return Ok(f"{machine.cores} cores, OMP_NUM_THREADS is not set")
    used = machine.threads * machine.processes
    is_idle = facts.arguments.device.type == "cpu" and used <= machine.cores // 2
    what = f"{machine.processes} x {machine.threads} threads on {machine.cores} physical cores"
    if used > machine.cores or is_idle:
        fix = f"OMP_NUM_THREADS={max(1, machine.cores // machine.processes)}"
        return Problem(what, "OMP_NUM_THREADS", fix, EnvironmentFault, is_warning=True)
    return Ok(what)


def check_dtype(facts: Facts) -> Check:
    """A number format that the device has, and that the optimizer can train in."""
    arguments, dtype = facts.arguments, facts.recipe.model.dtype
    device, where = arguments.device.type, "train.bf16"
    if dtype == "float16":
        what = "weights in float16 cannot be trained: their gradients overflow"
        return Problem(what, "model.dtype", "float32, with train.fp16: true", RecipeError)
    if arguments.fp16 and device == "cpu":
        return Problem(
            "float16 autocast needs a GPU", "train.fp16", "train.bf16: true, or neither", RecipeError
        )
    if (arguments.bf16 or dtype == "bfloat16") and not facts.machine.has_bf16:
        what = f"this {device} has no bfloat16 of its own: slower than float32"
        return Problem(what, where, "leave it out, or set train.fp16 on a GPU", is_warning=True)
    if dtype == "bfloat16":
        what = "weights in bfloat16 lose small updates"
        return Problem(what, "model.dtype", "float32, with train.bf16: true", is_warning=True)
    autocast = ", bfloat16 autocast" if arguments.bf16 else ", float16 autocast" if arguments.fp16 else ""
    return Ok(f"{dtype} weights{autocast} on {device}")


def check_gpus(facts: Facts) -> Check:
    """GPUs that stand idle."""
    machine, arguments = facts.machine, facts.arguments
    used = machine.processes if arguments.device.type == "cuda" else 0
    if used < machine.gpus:
        fix = "accelerate launch --multi_gpu -m hf_clm train RECIPE" if used else "leave out train.use_cpu"
        what = f"{used} of {machine.gpus} GPUs used"
        return Problem(what, "GPUs", fix, EnvironmentFault, is_warning=True)
    return Ok(f"{used} of {machine.gpus} GPUs used" if machine.gpus else "none here")


def _saves(facts: Facts) -> int:
    strategy = str(getattr(facts.arguments.save_strategy, "value", facts.arguments.save_strategy))
    if strategy == "epoch":
        return max(1, math.ceil(facts.arguments.num_train_epochs))
    if strategy != "steps":
        return 1 if strategy == "best" else 0
    every = facts.arguments.save_steps
    every = math.ceil(every * facts.steps) if every < 1 else every
    return math.ceil(facts.steps / max(1, every))


def _gib(count: int) -> str:
    return f"{count / GIB:,.2f} GiB"
